"""How fast the embedded engine answers: many short requests at once, over HTTP.

    python -m tools.benchmarks.engine [--concurrency 64] [--requests 2048] [--json FILE]

Same weights, same run: first the engine's own loop without HTTP (batcher and device in this
process, the baseline), then a server process asked by `--concurrency` callers. Prints a table and
writes JSON. The defaults are the demo's shape: the `tiny` preset, 7 prompt and 5 new tokens.
"""

import argparse
import asyncio
import json
import os
import pathlib
import platform
import socket
import tempfile
import time
from typing import Any

import aiohttp
import jax

from intellect3.inference import launch
from intellect3.inference.engine import flags, server
from intellect3.inference.engine.batcher import Running
from intellect3.inference.engine.request import Request
from intellect3.inference.transport import HttpTransport
from intellect3.models import hf, presets, transformer

HEALTHY_SECONDS = 300.0


def main() -> None:
  parser = argparse.ArgumentParser(
    description="Tokens per second of the embedded engine.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--model", help="model directory; None: the tiny preset, random")
  add("--concurrency", type=int, default=64)
  add("--requests", type=int, default=2048)
  add("--prompt-tokens", type=int, default=7)
  add("--new-tokens", type=int, default=5)
  add("--slots", type=int, default=64)
  add("--prefill-rows", type=int, default=16)
  add("--prefill-chunk", type=int, default=16)
  add("--context-length", type=int, default=64)
  add("--json", help="JSON file; None: only print")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    model = args.model or _tiny(pathlib.Path(directory) / "tiny")
    result = {
      "settings": {**vars(args), "model": args.model or "tiny"},
      "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
      "loop": _loop(model, args),
      "http": asyncio.run(_over_http(model, args)),
    }
  ratio = result["http"]["tokens_per_second"] / result["loop"]["tokens_per_second"]
  result["http_share_of_loop"] = ratio
  for name in ("loop", "http"):
    print(f"{name:5} {result[name]['tokens_per_second']:9.0f} generated tokens/s")
  print(f"over HTTP {ratio:.0%} of the loop; p99 {result['http']['latency_p99_ms']:.1f} ms")
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def _tiny(directory: pathlib.Path) -> str:
  config = presets.tiny()
  hf.save(directory, config, jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0)))
  return str(directory)


def _engine_flags(args: argparse.Namespace) -> dict[str, int]:
  names = ("slots", "prefill_rows", "prefill_chunk", "context_length")
  return {name: getattr(args, name) for name in names}


def _prompt(index: int, args: argparse.Namespace) -> list[int]:
  return [1 + (index + position) % 200 for position in range(args.prompt_tokens)]


def _loop(model: str, args: argparse.Namespace) -> dict[str, float]:
  """The batcher and the device alone, with as many requests in the house as over HTTP."""
  options = [f"--{key.replace('_', '-')}={value}" for key, value in _engine_flags(args).items()]
  parts = server.build(flags.parse(["--model", model, "--port", "0", *options]))
  sent = tokens = steps = 0
  began = time.perf_counter()
  in_house = 0
  while sent < args.requests or in_house:
    while sent < args.requests and in_house < args.concurrency:
      request = Request(
        rid=str(sent),
        input_ids=_prompt(sent, args),
        max_new_tokens=args.new_tokens,
        temperature=1.0,
        ignore_eos=True,
        return_logprob=True,
      )
      parts.batcher.add(Running(request, seed=sent, received=0.0))
      sent, in_house = sent + 1, in_house + 1
    plan = parts.batcher.plan()
    assert plan is not None
    prefilled, decoded = parts.device.run(plan)
    done = parts.batcher.apply(plan, prefilled, decoded, version="0", now=0.0)
    tokens += sum(len(sequence.output_ids) for sequence in done)
    in_house -= len(done)
    steps += 1
  seconds = time.perf_counter() - began
  return {
    "tokens_per_second": tokens / seconds,
    "seconds": seconds,
    "steps": steps,
    "step_ms": 1e3 * seconds / steps,
  }


async def _over_http(model: str, args: argparse.Namespace) -> dict[str, Any]:
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  command = launch.embedded_command(
    model, port, die_with_parent=True, log_level="warning", **_engine_flags(args)
  )
  url = f"http://127.0.0.1:{port}"
  process = await asyncio.create_subprocess_exec(*command)
  try:
    transport = HttpTransport()
    began = time.perf_counter()
    await launch.wait_until_healthy(
      transport, url, HEALTHY_SECONDS, alive=lambda: process.returncode is None
    )
    start_seconds = time.perf_counter() - began
    await transport.close()
    return {"start_seconds": start_seconds} | await _ask(url, args)
  finally:
    if process.returncode is None:
      process.terminate()
    await process.wait()


async def _ask(url: str, args: argparse.Namespace) -> dict[str, float]:
  numbers = iter(range(args.requests))
  latencies: list[float] = []
  tokens = 0

  async def caller(http: aiohttp.ClientSession) -> None:
    nonlocal tokens
    for number in numbers:
      body = {
        "input_ids": _prompt(number, args),
        "sampling_params": {
          "max_new_tokens": args.new_tokens,
          "sampling_seed": number,
          "ignore_eos": True,
        },
        "return_logprob": True,
      }
      sent = time.perf_counter()
      async with http.post(url + "/generate", json=body) as response:
        reply = await response.json()
      latencies.append(time.perf_counter() - sent)
      tokens += reply["meta_info"]["completion_tokens"]

  async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
      for _ in range(args.concurrency):
        group.create_task(caller(http))
    seconds = time.perf_counter() - began
  latencies.sort()
  return {
    "tokens_per_second": tokens / seconds,
    "requests_per_second": len(latencies) / seconds,
    "seconds": seconds,
    "latency_p50_ms": 1e3 * latencies[len(latencies) // 2],
    "latency_p99_ms": 1e3 * latencies[len(latencies) * 99 // 100],
  }


if __name__ == "__main__":
  main()

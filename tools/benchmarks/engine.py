"""How fast the embedded engine is, against transformers' `generate` on the same weights.

    python -m tools.benchmarks.engine [--rounds 5] [--json FILE] [--sglang DIRECTORY]

One run, one machine, rounds interleaved, medians; ratios are to `generate` (batch of all requests,
in process, no logprobs). Figures:

- 64 requests at once, 32 prompt and 64 new tokens, with logprobs: `generate`, the engine's own loop
  without HTTP, the engine over HTTP, and, with `--sglang`, a real SGLang server on CPU.
- 8 groups of 16 that share a prompt of 512 tokens: how much of it is computed once.
- Time to first token and between tokens of 16 streams while 16 long prompts arrive.
- Start to first token, memory.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from intellect3 import compilation_cache
from intellect3.inference import launch
from intellect3.inference.transport import HttpTransport
from tools.benchmarks.engine_load import Load, body, gaps, percentiles
from tools.benchmarks.engine_sides import SIDES, random_prompts, save_preset, start_side
from tools.benchmarks.side import Side, peak_mib

HEALTHY_SECONDS = 600.0
GROUPS, GROUP_SIZE, SHARED_TOKENS = 8, 16, 512
LONG_PROMPTS, LONG_TOKENS, STREAMS = 16, 900, 16


def main() -> None:
  parser = argparse.ArgumentParser(
    description="Tokens per second of the embedded engine.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--model", help="model directory; None: the preset, random")
  add("--preset", default="tiny", help="of intellect3.models.presets, where no model is given")
  add("--requests", type=int, default=64, help="at once")
  add("--prompt-tokens", type=int, default=32)
  add("--new-tokens", type=int, default=64)
  add("--rounds", type=int, default=5)
  add("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
  add("--device", default="cpu", help="of torch; jax takes its default")
  add("--experts", help="transformers' experts implementation; None: its default")
  add("--engine-flag", action="append", default=[], help="e.g. --engine-flag=--slots=256")
  add("--sglang", help="directory of a real SGLang (make sglang): measured too")
  add("--seed", type=int, default=0)
  add("--json", help="JSON file; None: only print")
  arguments = parser.parse_args()
  compilation_cache.set_default()
  with tempfile.TemporaryDirectory() as directory:
    model = arguments.model or save_preset(arguments.preset, pathlib.Path(directory) / "model")
    result = asyncio.run(_measure(model, arguments))
  _print(result)
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


async def _measure(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
  config = json.loads((pathlib.Path(model) / "config.json").read_text())
  vocab_size, rng = config["vocab_size"], np.random.default_rng(arguments.seed)
  context = min(config["max_position_embeddings"], 1024)
  flags = [f"--slots={arguments.requests}", f"--context-length={context}", *arguments.engine_flag]
  options = {
    "threads": arguments.threads,
    "device": arguments.device,
    "experts": arguments.experts,
    "engine_flags": flags,
  }
  result: dict[str, Any] = {
    "settings": {**vars(arguments), "model": arguments.model or arguments.preset},
    "machine": {"cores": os.cpu_count(), "platform": platform.platform(), **_versions()},
  }
  sides = {}
  try:
    for name in SIDES:
      sides[name] = start_side(name, model, options)
    async with _engine(model, flags) as (url, pid, seconds), Load(url) as load:
      result["start_to_first_token_seconds"] = seconds
      result |= await _throughput(sides, {"http": load}, rng, vocab_size, arguments)
      result["shared_prompts"] = await _shared_prompts(load, rng, vocab_size)
      result["latency"] = await _latency(load, rng, vocab_size, context)
      result["server_peak_mib"] = peak_mib(pid)
    if arguments.sglang:
      async with _sglang(model, context, arguments) as url, Load(url) as load:
        result["sglang"] = await _throughput({}, {"sglang": load}, rng, vocab_size, arguments)
        ours = result["tokens_per_second"]["http"]
        result["ratio_to_sglang"] = ours / result["sglang"]["tokens_per_second"]["sglang"]
  finally:
    for side in sides.values():
      side.close()
  return result


async def _throughput(
  sides: dict[str, Side],
  loads: dict[str, Load],
  rng: np.random.Generator,
  vocab_size: int,
  arguments: argparse.Namespace,
) -> dict[str, Any]:
  """Rounds of all requests at once, the sides in turn; the first of each warms up."""
  rates: dict[str, list[float]] = {name: [] for name in (*sides, *loads)}
  peaks: dict[str, float] = {}
  for number in range(arguments.rounds + 1):
    prompts = random_prompts(rng, arguments.requests, arguments.prompt_tokens, vocab_size)
    bodies = [body(prompt, arguments.new_tokens, seed) for seed, prompt in enumerate(prompts)]
    for name in rates:
      if name in sides:
        answer = sides[name].ask([prompts, arguments.new_tokens])
        peaks[name] = answer["peak_mib"]
      else:
        answer = await loads[name].wave(bodies)
      if number:
        rates[name].append(answer["tokens"] / answer["seconds"])
    _progress(f"round {number} of {arguments.rounds}")
  result: dict[str, Any] = {"tokens_per_second": _medians(rates), "all_rates": rates}
  result["peak_mib"] = peaks
  if "generate" in rates:
    result["ratio_to_generate"] = _medians(
      {
        name: [a / b for a, b in zip(values, rates["generate"], strict=True)]
        for name, values in rates.items()
      }
    )
    result["http_share_of_time"] = statistics.median(
      1 - http / loop for http, loop in zip(rates["http"], rates["loop"], strict=True)
    )
  for name, load in loads.items():
    prompts = random_prompts(rng, 8 * arguments.requests, arguments.prompt_tokens, vocab_size)
    bodies = [body(prompt, arguments.new_tokens, seed) for seed, prompt in enumerate(prompts)]
    answer = await load.sustained(bodies, arguments.requests)
    result[f"{name}_sustained_tokens_per_second"] = answer["tokens"] / answer["seconds"]
  return result


async def _shared_prompts(
  load: Load, rng: np.random.Generator, vocab_size: int
) -> dict[str, float]:
  """Groups that share their prompts: tokens that prefill computed, against those that were sent."""
  before = (await load.json("/server_info"))["internal_states"][0]
  prompts = random_prompts(rng, GROUPS, SHARED_TOKENS, vocab_size)
  bodies = [
    body(prompt, 16, GROUP_SIZE * group + member)
    for group, prompt in enumerate(prompts)
    for member in range(GROUP_SIZE)
  ]
  answer = await load.wave(bodies)
  after = (await load.json("/server_info"))["internal_states"][0]
  names = ("prompt_tokens", "cached_tokens", "prefilled_tokens")
  return {"seconds": answer["seconds"], **{name: after[name] - before[name] for name in names}}


async def _latency(
  load: Load, rng: np.random.Generator, vocab_size: int, context: int
) -> dict[str, Any]:
  """Streams that decode while long prompts arrive, and the same streams alone."""
  long_tokens = min(LONG_TOKENS, context - 40)

  def streams() -> list[bytes]:
    prompts = random_prompts(rng, STREAMS, 32, vocab_size)
    return [body(prompt, 256, seed, stream=True) for seed, prompt in enumerate(prompts)]

  def summary(times: list[list[tuple[float, int]]]) -> dict[str, Any]:
    return {
      "first_token": percentiles([stream[0][0] for stream in times]),
      "between_tokens": percentiles([gap for stream in times for gap in gaps(stream)]),
    }

  alone = await asyncio.gather(*map(load.stream_times, streams()))
  running = [asyncio.ensure_future(load.stream_times(request)) for request in streams()]
  await asyncio.sleep(0.02)
  prompts = random_prompts(rng, LONG_PROMPTS, long_tokens, vocab_size)
  long = [load.stream_times(body(prompt, 16, 0, stream=True)) for prompt in prompts]
  long_times = await asyncio.gather(*long)
  return {
    "long_prompt_tokens": long_tokens,
    "streams_alone": summary(alone),
    "streams_beside_long_prompts": summary(await asyncio.gather(*running)),
    "long_prompts": summary(long_times),
  }


@contextlib.asynccontextmanager
async def _engine(model: str, flags: list[str]) -> AsyncIterator[tuple[str, int, float]]:
  """A server process: its address, its process id, and the seconds to its first token."""
  url = f"http://127.0.0.1:{_free_port()}"
  command = [sys.executable, "-m", "intellect3.inference.engine", "--model", model, *flags]
  command += ["--port", url.rpartition(":")[2], "--log-level", "warning", "--die-with-parent"]
  began = time.perf_counter()
  async with _process(command, url) as process:
    async with Load(url) as load:
      await load.wave([body([1, 2, 3], 1, 0)])
    yield url, process.pid, time.perf_counter() - began


@contextlib.asynccontextmanager
async def _sglang(model: str, context: int, arguments: argparse.Namespace) -> AsyncIterator[str]:
  """A real SGLang server on CPU, allowed as many running requests."""
  url = f"http://127.0.0.1:{_free_port()}"
  command = [sys.executable, "-m", "tools.sglang.serve", "--directory", arguments.sglang]
  command += ["--model", model, "--port", url.rpartition(":")[2], "--"]
  command += ["--max-running-requests", str(arguments.requests), "--context-length", str(context)]
  command += ["--skip-tokenizer-init"]
  async with _process(command, url):
    yield url


@contextlib.asynccontextmanager
async def _process(command: list[str], url: str) -> AsyncIterator[asyncio.subprocess.Process]:
  process = await asyncio.create_subprocess_exec(*command)
  try:
    transport = HttpTransport()
    await launch.wait_until_healthy(
      transport, url, HEALTHY_SECONDS, alive=lambda: process.returncode is None
    )
    await transport.close()
    yield process
  finally:
    if process.returncode is None:
      process.terminate()
    await process.wait()


def _free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as free:
    return free.getsockname()[1]


def _versions() -> dict[str, str]:
  from importlib import metadata

  return {name: metadata.version(name) for name in ("jax", "torch", "transformers")}


def _medians(values: dict[str, list[float]]) -> dict[str, float]:
  return {name: statistics.median(one) for name, one in values.items()}


def _progress(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _print(result: dict[str, Any]) -> None:
  ratios = result["ratio_to_generate"]
  for name, rate in result["tokens_per_second"].items():
    print(f"{name:9} {rate:9.0f} tokens/s  {ratios[name]:6.2f} x generate")
  print(f"http, sustained: {result['http_sustained_tokens_per_second']:.0f} tokens/s")
  print(f"HTTP takes {result['http_share_of_time']:.0%} of the time")
  if "sglang" in result:
    rate = result["sglang"]["tokens_per_second"]["sglang"]
    print(f"real SGLang on CPU: {rate:.0f} tokens/s; ours {result['ratio_to_sglang']:.1f} x")
  shared = result["shared_prompts"]
  print(
    f"shared prompts: sent {shared['prompt_tokens']} tokens, computed {shared['prefilled_tokens']}"
  )
  for name, figures in result["latency"].items():
    if isinstance(figures, dict):
      text = ", ".join(
        f"{what.replace('_', ' ')} p50 {values['p50_ms']:.1f} p99 {values['p99_ms']:.1f} ms"
        for what, values in figures.items()
      )
      print(f"{name.replace('_', ' ')}: {text}")
  print(f"start to first token {result['start_to_first_token_seconds']:.1f} s")
  peaks = {**result["peak_mib"], "server": result["server_peak_mib"]}
  print("peak MiB: " + ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items()))


if __name__ == "__main__":
  main()

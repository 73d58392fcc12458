"""A server under test: its address, our own clients of it, and streams that a test can act amid.

Nothing here knows which of the two servers it is, but for how each is started.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import uuid

import aiohttp

from intellect3.inference import launch
from intellect3.inference.client import ServerPool
from intellect3.inference.control import ServerControl
from intellect3.inference.transport import HttpTransport
from tests.real_sglang import checkpoints
from tools.sglang import serve

CONTEXT = 1024
LONG = 700
"""Tokens of a generation that something happens to: seconds on SGLang, fewer on ours."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint's directory and parameters."""

  directory: pathlib.Path
  params: dict = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Remote:
  """A running server and the checkpoints it can read."""

  url: str
  kind: str
  first: Checkpoint
  second: Checkpoint
  scripted: Checkpoint

  def run(self, coroutine):
    """Runs `coroutine(session)`, a Session of a loop of its own, to its end."""

    async def main():
      async with session(self.url) as opened:
        return await asyncio.wait_for(coroutine(opened), 120)

    return asyncio.run(main())

  def post(self, path, **body):
    """One request; returns (status, parsed JSON or text)."""
    return self.run(lambda opened: opened.post(path, **body))

  def generate(self, ids, *, sampling=None, **more):
    """One `/generate` that must succeed."""
    return self.run(lambda opened: opened.generate(ids, sampling=sampling, **more))

  def get(self, path):
    return self.run(lambda opened: opened.request("GET", path))


@dataclasses.dataclass
class Session:
  """One loop's connections to a server: raw requests, the pool and the control of the library."""

  url: str
  transport: HttpTransport
  raw: aiohttp.ClientSession
  pool: ServerPool
  control: ServerControl

  async def request(self, method, path, body=None):
    status, answer = await self.transport.request(method, self.url + path, body, 60.0)
    text = answer.decode()
    try:
      return status, json.loads(text)
    except json.JSONDecodeError:
      return status, text

  async def post(self, path, **body):
    return await self.request("POST", path, body)

  async def generate(self, ids, *, sampling=None, **more):
    body = {"input_ids": list(ids), "sampling_params": sampling or {}, **more}
    status, reply = await self.request("POST", "/generate", body)
    assert status == 200, reply
    return reply

  def later(self, ids, **more):
    return asyncio.create_task(self.generate(ids, **more))

  async def stream(self, path, body):
    """Yields the events of a stream, parsed; checks its framing and its end."""
    async with self.raw.post(self.url + path, json={**body, "stream": True}) as response:
      assert response.status == 200, await response.text()
      assert response.headers["content-type"].startswith("text/event-stream")
      buffer = b""
      ended = False
      async for chunk in response.content.iter_any():
        buffer += chunk
        while b"\n\n" in buffer:
          event, buffer = buffer.split(b"\n\n", 1)
          assert event.startswith(b"data: ") and not ended, event
          if event == b"data: [DONE]":
            ended = True
          else:
            yield json.loads(event[len(b"data: ") :])
      assert ended and not buffer.strip()

  async def amid(self, act, *, rid=None, tokens=3, **more):
    """Streams a long generation and calls `act()` once some tokens came; last event, answer."""
    body = {
      "input_ids": list(PROMPT),
      # Never twice: SGLang aborts a stream's id once more seconds after the stream has ended.
      "rid": rid or f"amid-{uuid.uuid4().hex}",
      "sampling_params": {"max_new_tokens": LONG, "ignore_eos": True},
      "return_logprob": True,
      **more,
    }
    acting = None
    last = None
    async for event in self.stream("/generate", body):
      last = event
      if acting is None and event["meta_info"]["completion_tokens"] >= tokens:
        acting = asyncio.create_task(act())
    assert acting is not None, "the generation ended too soon"
    return last, await acting

  async def restore(self, checkpoint, version):
    """Serves a checkpoint from a clean cache."""
    outcome = await self.control.update_weights(checkpoint.directory, version, flush_cache=True)
    assert outcome[self.url].ok, outcome


PROMPT = (72, 101, 108, 108, 111, 32, 119, 111)


@contextlib.asynccontextmanager
async def session(url):
  transport = HttpTransport()
  common = {"vocab_size": checkpoints.VOCAB_SIZE, "timeout_seconds": 60.0}
  try:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as raw:
      pool = ServerPool(transport, [url], **common)
      yield Session(url, transport, raw, pool, ServerControl(transport, [url], **common))
  finally:
    await transport.close()


SHARED_FLAGS = ("--tool-call-parser", "glm45", "--reasoning-parser", "glm45")
ROUTED_EXPERTS = ("--enable-return-routed-experts",)


@contextlib.contextmanager
def sglang(checkpoint, port, log, flags=ROUTED_EXPERTS):
  """A real SGLang server."""
  flags = (*SHARED_FLAGS, "--random-seed", "0", *flags)
  with serve.Server(checkpoint, port=port, log=log, flags=flags) as server:
    server.wait(240.0)
    yield server


@contextlib.contextmanager
def engine(checkpoint, port, log, flags=ROUTED_EXPERTS):
  """The embedded engine, as a process of its own."""
  command = [
    *launch.embedded_command(checkpoint, port, context_length=CONTEXT, die_with_parent=True),
    *SHARED_FLAGS,
    *flags,
  ]
  # As users run it: it decodes thousands of tokens, of which compiling is the smaller part.
  environment = {**os.environ, "XLA_FLAGS": ""}
  with log.open("wb") as out:
    process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
  try:

    async def wait():
      async with session(f"http://127.0.0.1:{port}") as opened:
        await launch.wait_until_healthy(
          opened.transport, opened.url, 120.0, lambda: process.poll() is None
        )

    try:
      asyncio.run(wait())
    except launch.ServerDied as error:
      raise AssertionError(log.read_text()[-3000:]) from error
    yield process
  finally:
    process.terminate()
    try:
      process.wait(10)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


START = {"engine": engine, "sglang": sglang}

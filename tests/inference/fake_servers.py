"""Simulated servers behind a Transport, and an event loop whose clock jumps instead of waiting.

The model of a fake server is arithmetic: the token at absolute position p is p % 200 with logprob
-(p + 1) / 1000, whatever the prompt, so that a stitched generation can be told from a wrong one.
"""

import asyncio
import collections
import json
import selectors

import numpy as np

from intellect3.inference import client
from intellect3.inference.transport import TransportError

VOCAB = 264


class _JumpingSelector(selectors.DefaultSelector):
  """Never waits: what would be a wait moves the loop's clock."""

  elapsed = 0.0

  def select(self, timeout=None):
    ready = super().select(0)
    if not ready and timeout is None:
      raise RuntimeError("deadlock: nothing is scheduled and nothing can arrive")
    if not ready and timeout > 0:
      self.elapsed += timeout
    return ready


def run_virtual(coroutine):
  """Runs a coroutine in virtual time; a deadlock raises. Returns (result, virtual seconds)."""
  selector = _JumpingSelector()
  loop = asyncio.SelectorEventLoop(selector)
  loop.time = lambda: selector.elapsed
  try:
    return loop.run_until_complete(coroutine), selector.elapsed
  finally:
    loop.close()


def token_at(position):
  return position % 200


def logprob_at(position):
  return -(position + 1) / 1000


class FakeServer:
  """One server: `script` holds what the next generations meet, e.g. `503`, `("abort", 3)`."""

  def __init__(self, version=0, seconds=1.0):
    self.version = str(version)
    self.seconds = seconds
    self.script = collections.deque()
    self.seen = []
    self.running = asyncio.Event()
    self.running.set()
    self.in_flight = self.most_in_flight = 0
    self.log = []
    self.update = None
    self.score_offset = 0.0
    self.mutate = None
    self.aborted = {}
    self.calls = []
    self.states = [{}]
    self.loads = None
    self.alive = True
    self.connections = set()
    self.cached = None
    self.ranks = 1
    self.session = False
    self.ended = 0
    self.settings = {}

  def kill(self):
    """From now on every connection is refused, and those that are open break."""
    self.alive = False
    for connection in self.connections:
      connection.set_result(None)

  def restart(self, version=0):
    """Comes back with the weights it was started with, knowing nothing."""
    self.alive, self.version = True, str(version)
    self.running.set()

  async def answer(self, method, path, body, timeout):
    if not self.alive:
      raise TransportError(f"fake{path}", "refused")
    self.log.append(path)
    self.calls.append((path, body))
    work = asyncio.ensure_future(self._answer(path, body))
    dead = asyncio.get_running_loop().create_future()
    self.connections.add(dead)
    try:
      await asyncio.wait({work, dead}, return_when=asyncio.FIRST_COMPLETED)
      if not work.done():
        raise TransportError(f"fake{path}", "connection reset")
      return work.result()
    finally:
      self.connections.discard(dead)
      work.cancel()

  async def _answer(self, path, body):
    match path:
      case "/generate":
        return await self._generate(body)
      case "/pause_generation":
        self.running.clear()
        self.mode = body["mode"]
        return 200, {"status": "ok"}
      case "/continue_generation":
        self.running.set()
        return 200, {"status": "ok"}
      case "/update_weights_from_disk":
        if self.update is not None:
          return self.update
        self.version = body["weight_version"]
        self.flushed = body["flush_cache"]
        return 200, {"success": True, "message": "ok"}
      case "/abort_request" if body.get("abort_all"):
        self.ended += 1
        return 200, ""
      case "/abort_request":
        if body["rid"] in self.aborted:
          self.aborted[body["rid"]].set()
        return 200, ""
      case "/begin_weight_update":
        if self.session:
          return 400, {"success": False, "message": "a session is already open"}
        self.session = True
        return 200, {"success": True, "message": "Success"}
      case "/end_weight_update":
        if not self.session:
          return 400, {"success": False, "message": "no session is open"}
        self.session = False
        return 200, {"success": True, "message": "Success"}
      case "/update_weights_from_tensor":
        if not self.session:
          return 400, {"success": False, "message": "outside of a session"}
        if self.update is not None:
          return self.update
        self.version = body.get("weight_version", self.version)
        return 200, {"success": True, "message": "Success"}
      case "/server_info":
        return 200, {"internal_states": self.states, "tp_size": self.ranks, **self.settings}
      case "/v1/loads?include=core" if self.loads is not None:
        return 200, {"loads": self.loads}
      case "/model_info":
        return 200, {"model_path": "m", "weight_version": self.version}
      case "/health":
        await asyncio.sleep(0.5)
        return (200 if self.running.is_set() else 503), ""
    return 404, ""

  async def _generate(self, body):
    self.seen.append(body)
    self.in_flight += 1
    self.most_in_flight = max(self.most_in_flight, self.in_flight)
    try:
      fault = self.script.popleft() if self.script else None
      ended, begun_with = self.ended, self.version
      await asyncio.sleep(self.seconds)
      await self.running.wait()
      start, count = len(body["input_ids"]), body["sampling_params"]["max_new_tokens"]
      finish = {"type": "length", "length": count}
      match fault:
        case int():
          return fault, {"error": {"message": "scripted"}}
        case "drop":
          raise TransportError("fake", "dropped")
        case ("stop", made):
          count, finish = made, {"type": "stop", "matched": token_at(start + made - 1)}
        case ("short", made):
          count = made
        case "hang":
          await asyncio.Event().wait()
        case ("slow", made):
          self.aborted[body["rid"]] = asyncio.Event()
          await self.aborted[body["rid"]].wait()
          count, finish = made, {"type": "abort", "message": "Aborted"}
        case ("abort", made):
          count, finish = made, {"type": "abort", "message": "Aborted", "status_code": None}
        case ("reject", code):
          count, finish = 0, {"type": "abort", "message": "too long", "status_code": code}
      if self.ended != ended:  # as SGLang: a last token is made once it goes on
        count, finish = 3, {"type": "abort", "message": "Aborted"}
      reply = self._reply(body, start, count, finish)
      if self.ended != ended and self.version != begun_with:
        reply["meta_info"]["weight_versions"] = [
          {"version": begun_with, "start": 0, "end": 2},
          {"version": self.version, "start": 2, "end": 3},
        ]
      if self.mutate is not None:
        self.mutate(reply)
      return 200, reply
    finally:
      self.in_flight -= 1

  def _reply(self, body, start, count, finish):
    made = range(start, start + count)
    cached = {} if self.cached is None else {"cached_tokens": self.cached(body)}
    inputs = [] if body["logprob_start_len"] < 0 else body["input_ids"]
    return {
      "text": "",
      "output_ids": [token_at(p) for p in made],
      "meta_info": {
        **cached,
        "id": body["rid"],
        "finish_reason": finish,
        "prompt_tokens": start,
        "completion_tokens": count,
        "weight_version": self.version,
        "weight_versions": [{"version": self.version, "start": 0, "end": count}],
        "output_token_logprobs": [[logprob_at(p), token_at(p), None] for p in made],
        "input_token_logprobs": [
          [logprob_at(p) + self.score_offset if p else None, token, None]
          for p, token in enumerate(inputs)
        ],
      },
    }


class FakeTransport:
  """Routes requests to fake servers by url; keeps every request. Times out like the real one."""

  def __init__(self, **servers):
    self.servers = {f"http://{name}": server for name, server in servers.items()}

  async def request(self, method, url, json_body, timeout):
    base, _, path = url.removeprefix("http://").partition("/")
    server = self.servers[f"http://{base}"]
    json_body = json.loads(json_body) if isinstance(json_body, bytes) else json_body
    try:
      async with asyncio.timeout(timeout):
        status, answer = await server.answer(method, f"/{path}", json_body, timeout)
    except TimeoutError:
      raise TransportError(url, "timeout") from None
    return status, (answer if isinstance(answer, str) else json.dumps(answer)).encode()

  async def close(self):
    pass


PROMPT = [5, 6, 7]


def make_pool(transport, **options):
  settings = {"vocab_size": VOCAB, "backoff_seconds": 1.0, "timeout_seconds": 100.0}
  return client.ServerPool(transport, list(transport.servers), **{**settings, **options})


def generate(pool, *, rid="r", max_new_tokens=6, seed=11, prompt=PROMPT, extra_key="0", **options):
  return pool.generate(
    prompt,
    max_new_tokens=max_new_tokens,
    temperature=1.0,
    stop_token_ids=(256,),
    seed=seed,
    rid=rid,
    extra_key=extra_key,
    **options,
  )


def check_continues(generation, prompt_length, length):
  """The tokens and logprobs are those of positions prompt_length, prompt_length + 1, ..."""
  positions = range(prompt_length, prompt_length + length)
  assert generation.tokens.tolist() == [token_at(p) for p in positions]
  expected = np.asarray([logprob_at(p) for p in positions], np.float32)
  np.testing.assert_array_equal(generation.inference_logprobs, expected)

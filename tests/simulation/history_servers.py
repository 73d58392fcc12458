"""Servers that do what they are told, and nothing before: the far end of the production sync.

Whoever brings weights to them (`rl.serving`, `inference.fleet`, `weight_sync`, `control`) is the
production code. Each of its four calls to a server, pause, load, resume and canary, waits until an
event says how it ends; questions are answered at once.
"""

import asyncio
import dataclasses
import pathlib

import msgspec

from intellect3.inference import transport
from intellect3.weights import manifest as manifests

WAITING = {
  "pause_generation": "pause",
  "update_weights_from_disk": "load",
  "continue_generation": "resume",
  "generate": "canary",
}
ENDS = ("ok", "refused", "lost", "unheard", "wrong")
"""Of a call: done; not done and said so; not done and no answer; done, but the answer is lost;
answered (a canary: scored by other weights)."""

CANARY = [3, 1, 2], [0.0, -1.0, -2.0]


@dataclasses.dataclass(eq=False)
class Call:
  """One that waits for its server."""

  what: str
  body: dict
  answer: asyncio.Future


@dataclasses.dataclass(eq=False)
class ServerDouble:
  """A server, over all lives of the orchestrator.

  Attributes:
    version: what it believes to have; `mixed`: a load broke, and it has nothing of the kind.
    loads: how many times its weights were changed: what it makes is made by that load of it.
    load_of: version -> the last load of it that workers may have tokens of.
    sound: loads that passed the canary, and those that a start of its process made.
    good: the version that it passed the canary of, until something happens to it.
    used: whether workers may have requests there.
    barred: `lost` or `fenced`, where it was said to be and not yet that it may be used again.
    ended: the last call that ended in this life of the orchestrator, and how.
  """

  url: str
  up: bool = True
  listed: bool = True
  paused: bool = False
  mixed: bool = False
  version: int = 0
  loads: int = 0
  load_of: dict = dataclasses.field(default_factory=dict)
  sound: set = dataclasses.field(default_factory=set)
  good: int | None = None
  used: bool = False
  barred: str = ""
  calls: list = dataclasses.field(default_factory=list)
  ended: tuple = ()

  @property
  def makes_tokens(self):
    return self.up and self.used and not self.paused and not self.mixed

  def die(self):
    """Its process is gone, and every call with it."""
    self.up = False
    self.good, self.used, self.ended = None, False, ()
    for call in self.calls:
      if not call.answer.done():
        call.answer.set_exception(transport.TransportError(self.url, "reset"))

  def start(self, version):
    """A new process takes its place, with the weights of a version of its own choice."""
    self.up, self.paused, self.mixed = True, False, False
    self.version, self.loads = version, self.loads + 1
    self.sound.add(self.loads)

  def end(self, call, how):
    """Ends a call as one of `ENDS`."""
    self.calls.remove(call)
    self.ended = call.what, how
    self.mixed = self.mixed or (call.what, how) == ("canary", "wrong")
    answers = {"ok": 200, "refused": 400, "wrong": 200 if call.what == "canary" else 400}
    told = {"success": False, "message": "no"}
    if how in ("ok", "unheard") or answers.get(how) == 200:
      told = getattr(self, f"_{call.what}")(call.body)
    elif call.what == "load":  # what is there now is neither the old nor the new
      self.loads, self.mixed = self.loads + 1, True
    if how != "ok":
      self.good = None
    if how in answers:
      call.answer.set_result((answers[how], msgspec.json.encode(told)))
    else:
      call.answer.set_exception(transport.TransportError(self.url, "reset"))

  def _pause(self, body):
    del body
    self.paused = True
    return {}

  def _load(self, body):
    self.loads, self.mixed = self.loads + 1, False
    self.version = int(body["weight_version"])
    if self.used:  # what runs there goes on with it
      self.load_of[self.version] = self.loads
    return {"success": True}

  def _resume(self, body):
    del body
    self.paused = False
    return {}

  def _canary(self, body):
    ids, logprobs = CANARY
    off = 1.0 if self.mixed else 0.0
    if not self.mixed:
      self.sound.add(self.loads)
      self.good = self.version
    rows = [(value - off, token, None) for token, value in zip(ids, logprobs, strict=True)]
    meta = {
      "id": body["rid"],
      "finish_reason": {"type": "length"},
      "prompt_tokens": len(ids),
      "completion_tokens": 1,
      "weight_version": str(self.version),
      "weight_versions": [{"version": str(self.version), "start": 0, "end": 1}],
      "output_token_logprobs": [(-1.0, 1, None)],
      "input_token_logprobs": [(None, *rows[0][1:]), *rows[1:]],
    }
    return {"output_ids": [1], "meta_info": meta}

  def asked(self, path):
    """The answer to a question."""
    if path == "model_info":
      return 200, {"model_path": "m", "weight_version": str(self.version)}
    if path == "server_info":
      return 200, {"internal_states": [{"running_requests": 1, "waiting_requests": 0}]}
    if path == "abort_request":
      return 200, {}
    return 400, {"error": {"message": "no update is open"}}


class Wires:
  """Implements `inference.transport.Transport` for one life of the orchestrator."""

  def __init__(self, servers):
    self._servers = servers
    self.cut = False

  async def request(self, method, url, json, timeout):
    """See Transport.request."""
    del method
    base, _, path = url.partition("//")[2].partition("/")
    server = self._servers[f"http://{base}"]
    if not server.up or self.cut:
      raise transport.TransportError(url, "refused")
    if path not in WAITING:
      status, told = server.asked(path)
      return status, msgspec.json.encode(told)
    call = Call(WAITING[path], json, asyncio.get_running_loop().create_future())
    server.calls.append(call)
    try:
      async with asyncio.timeout(timeout):
        return await call.answer
    except TimeoutError as error:
      server.good, server.ended = None, (call.what, "lost")
      raise transport.TransportError(url, f"no answer within {timeout:g} s") from error
    finally:
      if call in server.calls:
        server.calls.remove(call)

  async def close(self):
    """See Transport.close."""


class Published:
  """Implements `rl.outside.Weights`: versions without bytes."""

  def __init__(self):
    self.damaged = set()

  def directory(self, version):
    """See Weights."""
    return pathlib.Path(f"v_{version}")

  def read(self, version):
    """See Weights."""
    ids, logprobs = CANARY
    return manifests.WeightsManifest(
      version=version,
      files=[],
      fingerprints={},
      dtype="F32",
      canary_ids=ids,
      canary_logprobs=logprobs,
    )

  async def verify(self, version):
    """See Weights."""
    return ["model.embed_tokens.weight"] if version in self.damaged else []

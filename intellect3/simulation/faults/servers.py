"""A simulated inference server: SGLang's calls over virtual time, and what can be wrong with it.

Its clients reach it by `network.Network` alone. It decodes all its requests at one rate, holds them
while it is paused, loads weights from the real directory in the order in which calls reach its
scheduler, and stamps each token with the version it believes to have. `truth` is what it has.
"""

import asyncio
import base64
import dataclasses
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from intellect3.simulation.faults import truth
from intellect3.simulation.faults.held import Held

GARBAGE = (
  "not_json",
  "half",
  "short_logprobs",
  "other_id",
  "no_versions",
  "nan",
  "future_version",
  "500",
  "503",
  "400",
)
"""What a server may answer to `/generate` instead of an answer."""
EXPERTS_GARBAGE = ("no_experts", "short_experts")
"""The same, where experts are asked for."""
PLAIN = "plain"
"""A server that was started without what makes it tell experts."""


@dataclasses.dataclass(eq=False)
class _Running:
  """A request that is decoded."""

  rid: str
  prompt: Sequence[int]
  coming: Sequence[int]
  ends: bool
  answer: asyncio.Future[str]
  since: float
  spans: list[list[Any]] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  timer: asyncio.TimerHandle | None = None

  @property
  def made(self) -> int:
    return len(self.logprobs)


class Server:
  """See the module's docstring."""

  def __init__(
    self,
    url: str,
    *,
    rng: random.Random,
    rate: float,
    room: int,
    load_seconds: float,
    stages: bool,
    tells_experts: bool,
    note: Callable[[str, str], None],
    felt: Callable[[str], None],
  ) -> None:
    """Args: rng: of its faults. rate: tokens a second of each request. room: requests at most.
    load_seconds: of a version. stages: see `Held`. tells_experts: where they are asked for. note:
    tells the trace. felt: is told of each fault that somebody felt."""
    self.url = url
    self._rng, self._rate, self._room = rng, rate, room
    self._load_seconds, self._stages, self._note = load_seconds, stages, note
    self._tells_experts, self._felt = tells_experts, felt
    self.alive = True
    self.ended_by = ""
    self.held = Held(stages, "0", 0)
    self.plain = False
    self._stale = False
    self.slow = 1.0
    self.garbage: list[str] = []
    self._paused = False
    self._busy = False
    self._hung: asyncio.Future[None] | None = None
    self._running: list[_Running] = []
    self._scheduler = asyncio.Lock()
    self._scores: dict[str, list[float]] = {}
    self.calls: dict[asyncio.Task[tuple[int, bytes]], None] = {}

  # What happens to it.

  def die(self, why: str = "") -> None:
    """Its process ends, by a fault perhaps; who waits for an answer gets none."""
    self.alive, self.ended_by = False, why
    if why and self.calls:
      self._felt(why)
    for request in self._running:
      if request.timer is not None:
        request.timer.cancel()
    self._running = []
    for call in list(self.calls):
      call.cancel()
    if self._hung is not None and not self._hung.done():
      self._hung.set_result(None)
    self._hung = None

  def start(self, label: str, weights: int, how: str = "") -> None:
    """A new process takes its address; `how` may be `PLAIN`."""
    self.alive, self.slow = True, 1.0
    self.held, self.plain = Held(self._stages, label, weights), how == PLAIN
    self._paused = self._busy = False
    self._scheduler = asyncio.Lock()
    self._scores = {}
    self.garbage = []
    self._stale = self.ended_by == "server_restarted_stale"

  def hang(self, seconds: float) -> None:
    """It does nothing for a while; calls that come meanwhile are done afterwards, in any order."""
    if self._hung is None:
      self._settle()
      self._hung = asyncio.get_running_loop().create_future()
      self._go_on()
      asyncio.get_running_loop().call_later(seconds, self._wake, self._hung)

  def _wake(self, hung: asyncio.Future[None]) -> None:
    if self._hung is hung:
      self._hung = None
      hung.set_result(None)
      self._go_on()

  def set_slow(self, factor: float) -> None:
    """All it does takes so many times as long."""
    self._settle()
    self.slow = factor
    self._go_on()

  # Calls.

  async def handle(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
    """One call, whoever still waits for its answer."""
    while self._hung is not None:
      self._felt("server_hung")
      await asyncio.shield(self._hung)
      await asyncio.sleep(self._rng.random() * 0.01)  # which of those that waited comes first
    if path == "/generate":
      return await self._generate(body)
    if self._stale:
      self._felt("server_restarted_stale")
    if path == "/model_info":
      return 200, _json({"model_path": "m", "weight_version": self.held.label})
    if path == "/server_info":
      state = {"running_requests": len(self._running), "waiting_requests": 0}
      tells = self._tells_experts and not self.plain
      return 200, _json({"internal_states": [state], "enable_return_routed_experts": tells})
    if path == "/abort_request":
      self._abort(None if body.get("abort_all") else body["rid"])
      return 200, b""
    async with self._scheduler:
      while self._hung is not None:
        await asyncio.shield(self._hung)
      if path == "/pause_generation":
        self._settle()
        self._paused = True
        self._go_on()
      elif path == "/continue_generation":
        self._paused = False
        self._go_on()
      else:
        return await self._change_weights(path, body)
    return 200, b"{}"

  async def _change_weights(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
    """Changes the weights while it decodes nothing; what a fault made of it is told as felt."""
    held = self.held
    held.last_load = ""
    whole = path == "/update_weights_from_disk"
    bucket = path == "/update_weights_from_tensor"
    self._settle()
    self._busy = True
    self._go_on()
    try:
      await asyncio.sleep(self._load_seconds * self.slow * (1.0 if whole else 0.4 * bucket))
      if whole:
        held.load(pathlib.Path(body["model_path"]), body["weight_version"])
      elif path == "/begin_weight_update":
        held.begin()
      elif bucket:
        held.bucket(body["serialized_named_tensors"], body["weight_version"])
      elif path == "/end_weight_update":
        held.end(abort=body.get("abort", False))
      else:
        return 404, b"{}"
    except (OSError, ValueError) as error:
      if whole or bucket:
        self._note(self.url, f"load of {body['weight_version']} fails")
      return 400, _json({"success": False, "message": str(error)})
    finally:
      if held.last_load:
        self._felt(f"load_{held.last_load}")
      self._busy = False
      self._settle()
      self._go_on()
    if whole or (path == "/end_weight_update" and not body.get("abort")):
      self._stale = False
      self._note(self.url, f"has {held.label}" + (", wrongly" if held.last_load == "wrong" else ""))
    return 200, _json({"success": True, "message": ""})

  # Generation.

  async def _generate(self, body: Mapping[str, Any]) -> tuple[int, bytes]:
    scored = body.get("logprob_start_len", -1) >= 0
    garbage = self.garbage.pop(0) if self.garbage and not scored else ""
    if garbage:
      self._felt("server_garbage")
    if garbage in ("500", "503", "400"):
      return int(garbage), _json({"error": {"message": "no"}})
    if len(self._running) >= self._room:
      return 503, _json({"error": {"message": "the queue is full"}})
    params = body["sampling_params"]
    prompt = body["input_ids"]
    tokens, ends = truth.continuation(
      params.get("sampling_seed", 0), prompt, params["max_new_tokens"]
    )
    loop = asyncio.get_running_loop()
    request = _Running(body["rid"], prompt, tokens, ends, loop.create_future(), loop.time())
    self._running.append(request)
    self._schedule(request)
    try:
      finish = await request.answer
    finally:  # whoever asked is gone, too
      if request.timer is not None:
        request.timer.cancel()
      if request in self._running:
        self._running.remove(request)
    scores: list[Any] = []
    if scored:
      key = f"{body.get('extra_key')}"
      fresh = [float(x) for x in truth.logprobs(self.held.truth, prompt)]
      scores = self._scores.setdefault(key, fresh)
    return 200, self._reply(request, finish, scores, garbage, body)

  def _reply(
    self,
    request: _Running,
    finish: str,
    scores: Sequence[float],
    garbage: str,
    body: Mapping[str, Any],
  ) -> bytes:
    made = request.made
    tokens = list(request.coming[:made])
    rows: list[tuple[float | None, int, None]] = [
      (value, token, None) for value, token in zip(request.logprobs, tokens, strict=True)
    ]
    spans = [
      {"version": version, "start": start, "end": end} for version, start, end in request.spans
    ]
    meta: dict[str, Any] = {
      "id": request.rid,
      "finish_reason": {"type": finish},
      "prompt_tokens": len(request.prompt),
      "completion_tokens": made,
      "cached_tokens": 0,
      "weight_version": self.held.label,
      "weight_versions": spans,
      "output_token_logprobs": rows,
      "input_token_logprobs": [
        (value if place else None, token, None)
        for place, (value, token) in enumerate(zip(scores, request.prompt, strict=bool(scores)))
      ],
    }
    if body.get("return_routed_experts") and not self.plain and garbage != "no_experts":
      known = body["routed_experts_start_len"] + (garbage == "short_experts")
      meta["routed_experts"] = _experts([*request.prompt, *tokens][:-1], known)
    if garbage == "short_logprobs":
      meta["output_token_logprobs"] = rows[:-1]
    elif garbage == "other_id":
      meta["id"] = "train-0-0"
    elif garbage == "no_versions":
      meta["weight_versions"] = spans[1:]
    elif garbage == "nan" and rows:
      meta["output_token_logprobs"] = [(None, rows[0][1], None), *rows[1:]]
    elif garbage == "future_version":
      meta["weight_versions"] = [{**span, "version": "77"} for span in spans]
    answer = _json({"output_ids": tokens, "meta_info": meta})
    if garbage == "not_json":
      return b"<html>bad gateway</html>"
    return answer[: len(answer) // 2] if garbage == "half" else answer

  def _abort(self, rid: str | None) -> None:
    self._settle()
    for request in list(self._running):
      if rid in (None, request.rid):
        self._finish(request, "abort")

  def _finish(self, request: _Running, how: str) -> None:
    if not request.answer.done():
      request.answer.set_result(how)
    if request in self._running:
      self._running.remove(request)

  @property
  def answers(self) -> bool:
    """Whether it lives and does not hang."""
    return self.alive and self._hung is None

  @property
  def _decodes(self) -> bool:
    return self.alive and not (self._paused or self._busy or self._hung is not None)

  def _settle(self) -> None:
    """Makes the tokens that are due by now."""
    now = asyncio.get_running_loop().time()
    pace = self._rate / self.slow
    for request in self._running:
      if self._decodes:
        due = int((now - request.since) * pace + 1e-6)
        self._make(request, due)
        request.since += due / pace
      else:
        request.since = now

  def _make(self, request: _Running, count: int) -> None:
    start, place = request.made, len(request.prompt) + request.made
    before = request.coming[start - 1] if start else request.prompt[-1]
    for token in request.coming[start : start + count]:
      request.logprobs.append(truth.logprob(self.held.truth, before, token, place))
      before, place = token, place + 1
    if request.made > start:
      if request.spans and request.spans[-1][0] == self.held.label:
        request.spans[-1][2] = request.made
      else:
        request.spans.append([self.held.label, start, request.made])

  def _schedule(self, request: _Running) -> None:
    if request.timer is not None:
      request.timer.cancel()
    if not self._decodes:
      request.timer = None
      return
    if self.slow > 1.0:
      self._felt("server_slow")
    loop = asyncio.get_running_loop()
    left = (len(request.coming) - request.made) * self.slow / self._rate
    request.timer = loop.call_at(request.since + left, self._due, request)

  def _due(self, request: _Running) -> None:
    self._make(request, len(request.coming) - request.made)
    self._finish(request, "stop" if request.ends else "length")

  def _go_on(self) -> None:
    """Lets requests be decoded from now on, or not, as its state says."""
    now = asyncio.get_running_loop().time()
    for request in self._running:
      request.since = now
      self._schedule(request)


def _experts(tokens: Sequence[int], known: int) -> str:
  """The experts of the tokens from `known` on, as a reply tells them."""
  shape = (len(tokens), truth.ROUTER.num_layers, truth.ROUTER.num_experts_per_token)
  whole_TLA = np.zeros(shape, "<i4")
  whole_TLA[:, truth.ROUTER.num_dense_layers :] = truth.experts(tokens)
  return base64.b64encode(whole_TLA[known:].tobytes()).decode("ascii")


def _json(value: Any) -> bytes:
  return msgspec.json.encode(value)

"""An engine that says what a recording said, and a client that needs no socket.

What is tested with it is the HTTP surface alone: given the tokens that a real SGLang sampled, ours
must tell of them in the same words.
"""

import asyncio
import base64
import copy
import json
import time

import numpy as np

from intellect3.inference.engine import flags
from intellect3.inference.engine.app import make_app
from intellect3.inference.engine.desk import Desk
from intellect3.inference.engine.loop import Event, Weights
from intellect3.inference.engine.sequence import Sequence
from intellect3.inference.engine.serving import make_serving
from intellect3.models.config import ModelConfig

STATS = (
  *("running_requests", "waiting_requests", "generated_tokens", "prompt_tokens", "cached_tokens"),
  *("prefilled_tokens", "reprefilled_tokens", "retractions", "steps", "decode_calls"),
  *("prefill_calls", "used_tokens", "max_total_tokens", "prefix_tokens", "paused", "updating"),
)


def output_of(reply, *, layers=2, dense=1, active=2):
  """What was sampled, taken out of a recorded `/generate` reply."""
  meta = reply["meta_info"]
  pairs = [
    [None if row is None else [(logprob, index) for logprob, index, _ in row] for row in rows]
    for rows in (meta.get("input_top_logprobs", []), meta.get("output_top_logprobs", []))
  ]
  experts = []
  if "routed_experts" in meta:
    flat = np.frombuffer(base64.b64decode(meta["routed_experts"]), np.int32)
    experts = [flat.reshape(-1, layers, active)[:, dense:]]
  return {
    "output_ids": reply["output_ids"],
    "output_logprobs": [row[0] for row in meta.get("output_token_logprobs", [])],
    "input_logprobs": [row[0] for row in meta.get("input_token_logprobs", [])][1:],
    "input_top": pairs[0][1:],
    "output_top": pairs[1],
    "experts": experts,
    "spans": [[s["version"], s["start"], s["end"]] for s in meta.get("weight_versions", [])],
    "cached_tokens": meta["cached_tokens"],
    "retractions": meta["num_retractions"],
    "finish": meta["finish_reason"],
  }


class ScriptedEngine:
  """Has the interface of `loop.Engine`; its n-th request is answered with the n-th output, of
  which streams hear token by token, or of all at once."""

  def __init__(self, outputs, version="default", *, at_once=False):
    self.weights = Weights("MODEL_DIR_A", version)
    self.paused, self.alive = False, True
    self.requests, self.aborted, self.updates = [], [], []
    self.on_events = None
    self._outputs, self._at_once = list(outputs), at_once
    self._tasks = []

  @property
  def halted(self):
    return self.paused

  def stalled(self, seconds):
    return False

  def submit(self, request):
    output = copy.deepcopy(self._outputs.pop(0)) if self._outputs else None
    self.requests.append(request)
    now = time.time()
    sequence = Sequence(request, seed=0, received=now, started=now, first_token=now)
    if output is not None:
      self._tasks.append(asyncio.ensure_future(self._say(sequence, output)))
    return sequence

  async def _say(self, sequence, output):
    finish = output.pop("finish")
    for name, value in output.items():
      setattr(sequence, name, value)
    by_token = sequence.request.stream and not self._at_once
    for length in range(1, len(sequence.output_ids)) if by_token else ():
      self.on_events([Event(sequence, length, False)])
      await asyncio.sleep(0.001)
    sequence.finish, sequence.finished = finish, time.time() + 1e-3
    self.on_events([Event(sequence, len(sequence.output_ids), True)])

  async def abort(self, rid):
    self.aborted.append(rid)

  async def pause(self, mode):
    if mode not in ("abort", "in_place", "retract"):
      raise ValueError(f"mode: got {mode!r}")

  async def resume(self):
    pass

  async def flush_cache(self):
    return True

  async def update(self, params, weights, *, flush_cache, abort_running):
    self.updates.append((params, weights, flush_cache, abort_running))
    self.weights = weights

  async def release_memory(self, tags):
    pass

  resume_memory = release_memory

  def stats(self):
    return dict.fromkeys(STATS, 0)


def recorded_serving(model, *arguments, prepare=str, prepare_tensors=dict):
  """The Serving of the server that was recorded, with other callbacks."""
  settings = flags.parse(
    ["--model", str(model), "--port", "0", "--context-length", "1024", *RECORDED_FLAGS, *arguments]
  )
  config = ModelConfig.from_hf(json.loads((model / "config.json").read_text()))
  return make_serving(
    settings,
    config,
    context_length=1024,
    max_total_tokens=8192,
    max_stop_ids=32,
    platform="cpu",
    prepare=prepare,
    prepare_tensors=prepare_tensors,
  )


RECORDED_FLAGS = (
  "--enable-return-routed-experts",
  "--tool-call-parser=glm45",
  "--reasoning-parser=glm45",
)


async def ask(app, method, path, body=None):
  """Calls an ASGI app; returns the status and the parsed answer (of a stream, its events)."""
  sent = []
  inbox = asyncio.Queue()
  content = b"" if body is None else json.dumps(body).encode()
  inbox.put_nowait({"type": "http.request", "body": content})

  async def send(message):
    sent.append(message)

  scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
  await asyncio.wait_for(app(scope, inbox.get, send), 30)
  headers = dict(sent[0]["headers"])
  text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
  if headers[b"content-type"].startswith(b"text/event-stream"):
    events = [part.removeprefix("data: ") for part in text.split("\n\n")[:-1]]
    return sent[0]["status"], [e if e == "[DONE]" else json.loads(e) for e in events]
  try:
    return sent[0]["status"], json.loads(text)
  except json.JSONDecodeError:
    return sent[0]["status"], text


def replay(serving, engine, *exchanges):
  """Asks (method, path, body) after another of an app over the engine; returns the answers."""

  async def main():
    desk = Desk(asyncio.get_running_loop(), slots=64, queue_limit=4096)
    engine.on_events = desk.report
    app = make_app(engine, desk, serving)
    return [await ask(app, *exchange) for exchange in exchanges]

  return asyncio.run(main())

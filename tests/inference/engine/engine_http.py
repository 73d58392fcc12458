"""Helpers of the engine's tests: a server in a thread, a small client, the recorded exchanges."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import pathlib
import socket
import threading
import time

import jax
import numpy as np

from intellect3.inference.engine import flags, server
from intellect3.models import transformer

DATA = pathlib.Path(__file__).resolve().parents[2] / "data" / "sglang"
GOLDENS, MODEL_A, MODEL_B = DATA / "goldens", DATA / "model_a", DATA / "model_b"


def exchanges() -> dict[str, dict]:
  """The recorded exchanges by name."""
  recorded = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDENS.glob("*.json"))}
  del recorded["fields"]  # the names and defaults of SGLang's fields
  return recorded


def random_params(config, seed):
  """Parameters without a compilation: normal around 0, norm scales around 1."""
  generator = np.random.default_rng(seed)

  def leaf(path, shape):
    values = generator.normal(scale=0.2, size=shape.shape)
    return (values + (path[-1].key == "scale")).astype(shape.dtype)

  return jax.tree_util.tree_map_with_path(leaf, transformer.abstract(config)[0])


@dataclasses.dataclass
class Client:
  """Talks to one server; calls block."""

  port: int
  parts: server.Parts | None = None
  pool: concurrent.futures.ThreadPoolExecutor = dataclasses.field(
    default_factory=lambda: concurrent.futures.ThreadPoolExecutor(32)
  )

  def call(self, method, path, body=None, timeout=60):
    """Returns (status, parsed JSON, a stream's events, or text)."""
    with contextlib.closing(
      http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
    ) as connection:
      connection.request(method, path, None if body is None else json.dumps(body))
      response = connection.getresponse()
      text = response.read().decode()
    if response.getheader("content-type", "").startswith("text/event-stream"):
      events = [part.removeprefix("data: ") for part in text.split("\n\n")[:-1]]
      return response.status, [e if e == "[DONE]" else json.loads(e) for e in events]
    try:
      return response.status, json.loads(text)
    except json.JSONDecodeError:
      return response.status, text

  def post(self, path, **body):
    return self.call("POST", path, body)

  def generate(self, ids, *, expect=200, sampling=None, **more):
    status, reply = self.post(
      "/generate", input_ids=list(ids), sampling_params=sampling or {}, **more
    )
    assert status == expect, reply
    return reply

  def later(self, *arguments, **named):
    """`generate` in a thread; returns a future."""
    return self.pool.submit(self.generate, *arguments, **named)

  def state(self):
    return self.call("GET", "/server_info")[1]["internal_states"][0]

  def wait_until(self, condition, seconds=30.0):
    """Polls `/server_info` until its state satisfies the condition."""
    deadline = time.monotonic() + seconds
    while not condition(self.state()):
      assert time.monotonic() < deadline, self.state()
      time.sleep(0.005)


@contextlib.contextmanager
def serving(model, *switches, **more):
  """Serves a model directory from a thread of this process; yields its Client."""
  arguments = ["--model", str(model), "--port", "0", *switches]
  for name, value in more.items():
    arguments += ["--" + name.replace("_", "-"), str(value)]
  settings = flags.parse(arguments)
  parts = server.build(settings)
  listener = socket.create_server(("127.0.0.1", 0))
  runner = asyncio.Runner()
  loop = runner.get_loop()
  task = loop.create_task(server.serve(parts, listener, settings))

  def run():
    with contextlib.suppress(asyncio.CancelledError):
      loop.run_until_complete(task)

  thread = threading.Thread(target=run)
  thread.start()
  client = Client(listener.getsockname()[1], parts)
  try:
    yield client
  finally:
    loop.call_soon_threadsafe(task.cancel)
    thread.join(20)
    client.pool.shutdown(wait=False, cancel_futures=True)
    runner.close()
    assert not thread.is_alive()

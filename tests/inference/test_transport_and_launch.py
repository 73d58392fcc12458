"""The HTTP transport against a real local server; command lines, ports, waiting for health."""

import asyncio
import socket
import sys

import pytest
from aiohttp import web
from fake_servers import FakeServer, FakeTransport, run_virtual

from intellect3.inference import launch
from intellect3.inference.transport import HttpTransport, TransportError


def with_server(handler, use):
  """Runs `use(transport, url)` against an aiohttp server with one handler."""

  async def run():
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    transport = HttpTransport(headers={"Authorization": "Bearer key"})
    try:
      return await use(transport, f"http://127.0.0.1:{port}")
    finally:
      await transport.close()
      await runner.cleanup()

  return asyncio.run(run())


def test_requests_and_statuses_travel():
  async def handler(request):
    body = await request.json() if request.can_read_body else None
    echo = {"method": request.method, "path": request.path, "body": body}
    echo["type"], echo["key"] = request.content_type, request.headers["Authorization"]
    return web.json_response(echo, status=418)

  async def use(transport, url):
    post = await transport.request("POST", f"{url}/generate", {"a": [1]}, 5.0)
    get = await transport.request("GET", f"{url}/health", None, 5.0)
    return post, get

  (post_status, post), (_, get) = with_server(handler, use)
  assert post_status == 418
  assert b'"body": {"a": [1]}' in post and b'"type": "application/json"' in post
  assert b'"path": "/health", "body": null' in get and b"Bearer key" in get


@pytest.mark.parametrize(("size", "taken"), [(1000, True), (1001, False)])
def test_an_answer_is_read_no_further_than_it_may_be_long(size, taken):
  async def handler(request):
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"x" * size)
    return response

  async def use(transport, url):
    short = HttpTransport(max_answer_bytes=1000)
    try:
      return await short.request("GET", url, None, 5.0)
    finally:
      await short.close()

  if taken:
    assert with_server(handler, use) == (200, b"x" * size)
  else:
    with pytest.raises(TransportError, match="more than 1000 bytes"):
      with_server(handler, use)
  with pytest.raises(ValueError, match="max_answer_bytes"):
    HttpTransport(max_answer_bytes=0)


def test_a_redirection_is_an_answer_and_not_followed():
  async def handler(request):
    if request.path == "/elsewhere":
      return web.Response(text="followed")
    raise web.HTTPTemporaryRedirect("/elsewhere")

  async def use(transport, url):
    return await transport.request("POST", f"{url}/generate", {}, 5.0)

  assert with_server(handler, use)[0] == 307


def test_more_connections_than_aiohttps_default_limit():
  at_once = most = 0

  async def handler(request):
    nonlocal at_once, most
    at_once += 1
    most = max(most, at_once)
    await asyncio.sleep(0.5)
    at_once -= 1
    return web.Response()

  async def use(transport, url):
    await asyncio.gather(*(transport.request("GET", url, None, 10.0) for _ in range(130)))

  with_server(handler, use)
  assert most > 100


def test_no_answer_is_a_transport_error():
  async def handler(request):
    if request.path == "/slow":
      await asyncio.sleep(1.0)
    request.transport.close()
    return web.Response()

  async def use(transport, url):
    for path, timeout, says in (("/slow", 0.1, "0.1 s"), ("/dropped", 5.0, "Disconnected")):
      with pytest.raises(TransportError, match=says):
        await transport.request("GET", url + path, None, timeout)
    with pytest.raises(TransportError, match="Connect"):
      await transport.request("GET", f"http://127.0.0.1:{free_port()}/", None, 5.0)

  with_server(handler, use)


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def test_embedded_command():
  command = launch.embedded_command(
    "model", 30001, weight_version=7, slots=8, die_with_parent=True, dtype=None, quiet=False
  )
  assert command == [
    *[sys.executable, "-m", "intellect3.inference.engine", "--model", "model", "--port", "30001"],
    *["--weight-version", "7", "--slots", "8", "--die-with-parent"],
  ]


def test_sglang_command():
  command = launch.sglang_command(
    "model", 30001, python="venv/python", tp=8, rl_on_policy_target="fsdp", enable_memory_saver=True
  )
  assert command == [
    *["venv/python", "-m", "sglang.launch_server", "--model-path", "model", "--port", "30001"],
    *["--weight-version", "0", "--tp", "8", "--rl-on-policy-target", "fsdp"],
    "--enable-memory-saver",
  ]


def test_a_busy_port_is_named():
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f"port.*{port}"):
      launch.check_port_free("127.0.0.1", port)
  launch.check_port_free("127.0.0.1", port)
  with pytest.raises(ValueError, match="70000"):
    launch.check_port_free("127.0.0.1", 70000)


class Starting(FakeServer):
  """Answers 503 until it is up."""

  def __init__(self, up_after):
    super().__init__()
    self.up_after = up_after

  async def answer(self, method, path, body, timeout):
    now = asyncio.get_running_loop().time()
    if now < self.up_after / 2:
      raise TransportError("http://a", "refused")
    return (200 if now >= self.up_after else 503), ""


def wait(server, timeout_seconds=30.0, alive=lambda: True):
  transport = FakeTransport(a=server)
  return run_virtual(launch.wait_until_healthy(transport, "http://a", timeout_seconds, alive))


def test_waiting_until_healthy():
  _, seconds = wait(Starting(10.0))
  assert 10.0 <= seconds < 10.5


def test_waiting_ends_with_the_process_or_the_time():
  looks = iter([True] * 5 + [False])
  with pytest.raises(launch.ServerDied, match="http://a"):
    wait(Starting(10.0), alive=lambda: next(looks))
  with pytest.raises(TimeoutError, match=r"http://a.*4 s.*refused"):
    wait(Starting(10.0), timeout_seconds=4.0)
  with pytest.raises(TimeoutError, match="503"):
    wait(Starting(10.0), timeout_seconds=6.0)

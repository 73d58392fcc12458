"""sglang-router before a real server: what it passes on, and what it drops without a word."""

import asyncio
import subprocess

import pytest

from intellect3.inference import launch
from intellect3.rl import checks
from tests.real_sglang import remote
from tests.real_sglang.remote import PROMPT
from tools.sglang import environment

pytestmark = [
  pytest.mark.real_sglang,
  pytest.mark.parametrize("served", ["sglang"], indirect=True, scope="session"),
]
SAMPLING = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def router(served, tmp_path_factory):
  """Url of a router before the server under test."""
  directory = environment.DEFAULT_DIRECTORY
  port, metrics = checks.free_ports("127.0.0.1", 2)
  command = [
    *(environment.python_of(directory), "-m", "sglang_router.launch_router"),
    *("--worker-urls", served.url, "--host", "127.0.0.1", "--port", str(port)),
    *("--prometheus-port", str(metrics)),
  ]
  log = tmp_path_factory.mktemp("router") / "log"
  with log.open("wb") as out:
    process = subprocess.Popen(
      command, stdout=out, stderr=subprocess.STDOUT, env=environment.variables(directory)
    )
  url = f"http://127.0.0.1:{port}"

  async def wait():
    async with remote.session(url) as opened:
      alive = lambda: process.poll() is None  # noqa: E731
      await launch.wait_until_healthy(opened.transport, url, 60.0, alive)
      # Healthy it is at once; the servers behind it are looked at first.
      body = {"input_ids": list(PROMPT), "sampling_params": SAMPLING}
      for _ in range(300):
        if (await opened.request("POST", "/generate", body))[0] != 503:
          return
        await asyncio.sleep(0.2)
      raise AssertionError(log.read_text()[-3000:])

  try:
    asyncio.run(wait())
    yield url
  finally:
    process.terminate()
    process.wait(20)


def ask(url, path, body):
  async def main():
    async with remote.session(url) as opened:
      return await opened.request("POST", path, body)

  return asyncio.run(main())


def test_plain_sampling_passes_through(server, router):
  body = {"input_ids": list(PROMPT), "sampling_params": SAMPLING, "return_logprob": True}
  status, reply = ask(router, "/generate", body)
  assert status == 200
  direct = server.generate(PROMPT, sampling=SAMPLING, return_logprob=True)
  assert reply["output_ids"] == direct["output_ids"]
  assert len(reply["meta_info"]["output_token_logprobs"]) == 4


def test_routed_experts_are_dropped(server, router):
  body = {"input_ids": list(PROMPT), "sampling_params": SAMPLING, "return_routed_experts": True}
  status, reply = ask(router, "/generate", body)
  assert status == 200 and not reply["meta_info"].get("routed_experts")
  assert server.generate(PROMPT, sampling=SAMPLING, return_routed_experts=True)["meta_info"][
    "routed_experts"
  ]


@pytest.mark.parametrize(
  ("path", "body"),
  [
    ("/pause_generation", {"mode": "in_place"}),
    ("/continue_generation", {}),
    ("/abort_request", {"abort_all": True}),
    ("/update_weights_from_disk", {"model_path": "nowhere"}),
  ],
)
def test_no_control_call_is_passed_on(router, path, body):
  status, _ = ask(router, path, body)
  assert status in (404, 405)

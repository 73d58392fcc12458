"""A server reads our export of every family and samples what the trainer computes.

Each case is a server of its own, one at a time: on ours with the marker `slow` (its forward is the
trainer's, which other tests hold fast), on a real SGLang with `real_sglang`.
"""

import base64

import numpy as np
import pytest

from intellect3.models import presets
from intellect3.rl import checks
from tests.real_sglang import checkpoints, remote
from tools import score
from tools.sglang import environment

COUNT = 200
KINDS = (
  pytest.param("engine", marks=pytest.mark.slow),
  pytest.param("sglang", marks=pytest.mark.real_sglang),
)
SIZES = {"vocab_size": checkpoints.VOCAB_SIZE, "num_layers": 3, "max_positions": 2048}
MODELS = {
  "glm4_moe": presets.tiny(**SIZES),
  "glm4_moe_groups_qk_norm": presets.tiny(
    **SIZES,
    num_experts=16,
    num_expert_groups=4,
    num_groups_per_token=2,
    num_experts_per_token=4,
    attention_bias=False,
    qk_norm=True,
    routed_scaling_factor=2.5,
  ),
  "qwen3_tied": presets.tiny_qwen3(**SIZES, num_dense_layers=3),
  "qwen3_untied": presets.tiny_qwen3(
    **SIZES, num_dense_layers=3, tie_embeddings=False, head_dim=32, num_heads=6
  ),
  "qwen3_moe": presets.tiny_qwen3_moe(**SIZES, num_experts_per_token=3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_two_hundred_sampled_tokens_are_the_trainers(name, kind, tmp_path, capsys):
  if kind == "sglang" and (reason := environment.why_not_ready(environment.DEFAULT_DIRECTORY)):
    pytest.skip(reason)
  config = MODELS[name]
  params = checkpoints.random_params(5, config)
  directory = checkpoints.write(tmp_path / "model", params, config)
  wishes = {"sampling": {"max_new_tokens": COUNT, "ignore_eos": True}, "return_logprob": True}
  if config.num_moe_layers:
    wishes["return_routed_experts"] = True
  (port,) = checks.free_ports("127.0.0.1", 1)
  flags = remote.ROUTED_EXPERTS if config.num_moe_layers else ()
  with remote.START[kind](directory, port, tmp_path / "log", flags):
    server = remote.Remote(f"http://127.0.0.1:{port}", kind, None, None, None)
    reply = server.generate(remote.PROMPT, **wishes)
  tokens = [*remote.PROMPT, *reply["output_ids"]]
  assert len(tokens) == len(remote.PROMPT) + COUNT
  scored = score.score(directory, config, [tokens], tokens_per_call=512)
  sampled = np.array([row[0] for row in reply["meta_info"]["output_token_logprobs"]])
  difference = scored.logprobs[0][len(remote.PROMPT) - 1 :] - sampled
  mismatch_kl = np.mean(np.expm1(difference) - difference)
  with capsys.disabled():
    print(
      f"\n{name} from {kind}: mismatch KL {mismatch_kl:.2e}, logprobs differ by at most "
      f"{np.abs(difference).max():.2e}, mean logprob {sampled.mean():.2f}"
    )
  assert np.abs(difference).max() <= 1e-4
  assert mismatch_kl < 1e-8
  assert len(set(reply["output_ids"])) > COUNT / 4  # not one token over and over
  if config.num_moe_layers:
    _check_experts(config, reply, scored.experts[0][: len(tokens) - 1])


def _check_experts(config, reply, expected_TMA):
  told = np.frombuffer(base64.b64decode(reply["meta_info"]["routed_experts"]), np.int32)
  told = told.reshape(-1, config.num_layers, config.num_experts_per_token)
  assert not told[:, : config.num_dense_layers].any()
  told = told[:, config.num_dense_layers :]
  np.testing.assert_array_equal(np.sort(told, axis=-1), np.sort(expected_TMA, axis=-1))
  used = [len(np.unique(told[:, layer])) for layer in range(config.num_moe_layers)]
  assert min(used) > config.num_experts_per_token  # more than one way to go

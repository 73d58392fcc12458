"""Scores of packed sequences against transformers, family by family; bad input."""

import json
import re

import numpy as np
import pytest

from intellect3.models import hf, presets
from tests.models import helpers
from tools import score

SIZES = dict(vocab_size=97, embed_dim=32, mlp_dim=48)
CONFIGS = {
  "glm4_moe": helpers.small(),
  "qwen3": presets.tiny_qwen3(**SIZES),
  "qwen3_moe": presets.tiny_qwen3_moe(**SIZES),
}


def run(directory, ids, out, *options):
  path = directory / "ids.json"
  path.write_text(ids if isinstance(ids, str) else json.dumps(ids))
  return score.main(
    ["--model", str(directory), "--ids", str(path), "--out", str(out), *map(str, options)]
  )


def theirs(directory, ids):
  """Logprobs of each sequence by transformers, alone, and its routers' choices as sets."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
  logprobs, chosen = [], []
  for layer in model.model.layers:
    if hasattr(layer.mlp, "experts"):
      layer.mlp.experts.register_forward_pre_hook(lambda _, given: chosen[-1].append(given[1]))
  with torch.no_grad():
    for sequence in ids:
      chosen.append([])
      tokens = torch.tensor([sequence])
      table = torch.log_softmax(model(tokens).logits[0], dim=-1)[:-1]
      logprobs.append(table.gather(1, tokens[0, 1:, None])[:, 0].numpy())
  return logprobs, [[layer.reshape(len(ids[n]), -1) for layer in c] for n, c in enumerate(chosen)]


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_transformers(tmp_path, family):
  config = CONFIGS[family]
  hf.save(tmp_path, config, helpers.random_params(config), dtype="bfloat16")
  rng = np.random.default_rng(0)
  ids = [rng.integers(0, 97, length).tolist() for length in (40, 1, 100, 17, 60, 2, 128)]
  out = tmp_path / "out.json"
  assert run(tmp_path, ids, out, "--tokens-per-call", 256) == 0
  result = json.loads(out.read_text())
  expected, chosen = theirs(tmp_path, ids)
  assert len(result["logprobs"]) == len(ids)
  for sequence, given, wanted in zip(ids, result["logprobs"], expected, strict=True):
    assert given[0] is None and len(given) == len(sequence)
    np.testing.assert_allclose(np.asarray(given[1:], float), wanted, atol=2e-5)
    assert all(np.float32(value) == value for value in given[1:])
  if family == "qwen3":
    assert result["routed_experts"] is None
    return
  for sequence, given, wanted in zip(ids, result["routed_experts"], chosen, strict=True):
    shape = (len(sequence), config.num_moe_layers, config.num_experts_per_token)
    assert np.shape(given) == shape
    theirs_TMA = np.stack([layer.numpy() for layer in wanted], axis=1)
    np.testing.assert_array_equal(np.sort(given, axis=-1), np.sort(theirs_TMA, axis=-1))


@pytest.mark.parametrize(
  ("ids", "says"),
  [
    ("{", "no valid JSON"),
    ("[" * 100_000, "no valid JSON"),
    ("[]", "expected a list of at least one sequence"),
    ('{"a": 1}', "expected a list of at least one sequence"),
    ("[[1], []]", "sequence 1: expected a list of 1 to 4096 ids"),
    ("[[1], 5]", "sequence 1: expected a list"),
    ("[[1, 97]]", "sequence 0, token 1: expected an integer of 0 to 96 .*got 97"),
    ("[[1, -1]]", "token 1: .*got -1"),
    ("[[1, 2.0]]", "token 1: .*got 2.0"),
    ("[[true]]", "token 0: .*got True"),
    (json.dumps([[1] * 4097]), "sequence 0: expected a list of 1 to 4096"),
  ],
)
def test_bad_ids_are_told_before_anything_is_loaded(tmp_path, ids, says, capsys, monkeypatch):
  config = CONFIGS["qwen3"]
  hf.save(tmp_path, config, helpers.random_params(config))
  monkeypatch.setattr(hf, "load_sharded", None)
  assert run(tmp_path, ids, tmp_path / "out.json") == 2
  said = capsys.readouterr().err
  assert said.startswith("score: --ids") and re.search(says, said), said
  assert not (tmp_path / "out.json").exists()


def test_the_head_holds_little_beside_the_largest_vocabulary():
  vocabulary = presets.glm_4_5_air().vocab_size
  assert 3 * 4 * score.HEAD_CHUNK * vocabulary < 700 << 20


def test_bad_paths_and_broken_weights_are_told(tmp_path, capsys):
  config = CONFIGS["qwen3"]
  params = helpers.random_params(config)
  hf.save(tmp_path, config, params)
  assert run(tmp_path, [[1]], tmp_path / "no" / "out.json") == 2
  assert "--out: expected a file in a directory that is there" in capsys.readouterr().err
  assert run(tmp_path, [[1]], tmp_path / "out.json", "--tokens-per-call", 0) == 2
  assert "--tokens-per-call: expected at least 1" in capsys.readouterr().err
  (tmp_path / "config.json").unlink()
  assert run(tmp_path, [[1]], tmp_path / "out.json") == 2
  assert "config.json: cannot be read" in capsys.readouterr().err
  params["final_norm"]["scale"][3] = np.nan
  hf.save(tmp_path, config, params)
  assert run(tmp_path, [[1, 2, 3]], tmp_path / "out.json") == 2
  assert "sequence 0, token 1: expected a finite logprob" in capsys.readouterr().err
  assert not (tmp_path / "out.json").exists()

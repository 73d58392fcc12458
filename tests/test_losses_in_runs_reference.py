"""A reference model is checked against the policy, and scores batches as it is on disk."""

import json

import jax
import numpy as np
import pytest

from intellect3.models import hf, presets, transformer
from intellect3.pipeline import packing, placement
from intellect3.rendering import tokenizer_files
from intellect3.rl import NotStarted, reference
from intellect3.sharding.mesh import make_mesh
from intellect3.sharding.rules import TRAIN_FSDP
from intellect3.training import scoring

POLICY = presets.tiny()
TEACHER = presets.tiny_qwen3(num_layers=1, num_dense_layers=1, embed_dim=32)


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models") / "policy"
  directory.mkdir()
  tokenizer_files.write_tokenizer(directory)
  return directory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models") / "teacher"
  hf.save(directory, TEACHER, transformer.init(TEACHER, jax.random.key(1)))
  tokenizer_files.write_tokenizer(directory)
  return directory


def check(path, policy_path, *, policy=POLICY, dtype=None, **options):
  return reference.check(path, policy, policy_path, dtype=dtype, options=options)


def test_a_reference_of_another_family_and_size_is_fit(teacher, policy_path):
  config = check(teacher, policy_path, remat_policy="full", attention="blockwise")
  assert (config.family, config.num_layers, config.embed_dim) == ("qwen3", 1, 32)
  assert config.dtype == config.param_dtype == "float32"
  assert config.remat_policy == "none" and config.attention == "blockwise"
  small = check(teacher, policy_path, dtype="bfloat16", param_dtype="float32")
  assert small.dtype == small.param_dtype == "bfloat16"


def test_another_vocabulary_is_refused(teacher, policy_path):
  with pytest.raises(NotStarted, match=r"expected the policy's 300 ids, got 264"):
    check(teacher, policy_path, policy=presets.tiny(vocab_size=300))


def test_other_tokens_under_the_same_ids_are_refused(teacher, policy_path, tmp_path):
  content = json.loads((policy_path / "tokenizer.json").read_text())
  content["added_tokens"][0]["content"] = "<|other|>"
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  number = content["added_tokens"][0]["id"]
  with pytest.raises(NotStarted, match=rf"others for 1 ids .*: {number} is '<\|other\|>' to the"):
    check(teacher, tmp_path)
  # More tokens than the policy's are none of its business; nor is a policy without a tokenizer.
  content["added_tokens"] = content["added_tokens"][1:]
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  check(teacher, tmp_path)
  (tmp_path / "tokenizer.json").unlink()
  check(teacher, tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(NotStarted, match="expected a tokenizer"):
    check(teacher, tmp_path)


@pytest.mark.parametrize(
  ("path", "dtype", "message"),
  [
    (3, None, "trainer.reference_path: expected a path, got 3"),
    ("nowhere", None, "trainer.reference_path: nowhere"),
    (None, "float64", "trainer.reference_dtype: expected float32 or bfloat16, got 'float64'"),
  ],
)
def test_a_bad_reference_is_named(teacher, policy_path, path, dtype, message):
  with pytest.raises(NotStarted, match=message):
    check(teacher if path is None else path, policy_path, dtype=dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-5), ("bfloat16", 0.1)])
def test_the_scorer_fills_in_what_the_directory_says(teacher, policy_path, dtype, bound):
  mesh = make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    score = reference.make_scorer(
      teacher,
      check(teacher, policy_path, dtype=dtype),
      mesh,
      TRAIN_FSDP,
      micro_rows=1,
      head_chunk_size=16,
    )
  batch = packing.empty_batch(2, 8, step=1, loss_tokens=1)
  rng = np.random.default_rng(0)
  batch.tokens[:] = rng.integers(0, 264, batch.tokens.shape)
  batch.positions[:] = np.arange(8)
  batch.segment_ids[:] = 1
  placed = placement.place(batch, mesh)
  filled, seconds = score(placed)
  assert seconds > 0.0 and placed.ref_logprobs is None
  config, params = hf.load(teacher)
  alone = jax.jit(scoring.make_logprob_fn(config, head_chunk_size=64))
  expected = np.stack([alone(params, tokens) for tokens in batch.tokens])
  error = np.abs(filled.ref_logprobs - expected).max()
  assert error < bound and (dtype is None or error > 1e-4)
  assert filled.ref_logprobs.dtype == np.float32
  assert filled.ref_logprobs.sharding.is_equivalent_to(placed.tokens.sharding, 2)

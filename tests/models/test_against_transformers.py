"""The model against transformers' Glm4MoeForCausalLM in float32: an independent witness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.models import hf, transformer
from tests.models import helpers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIGS = {
  "air": helpers.small(),
  "other_options": helpers.small(
    attention_bias=False,
    qk_norm=True,
    tie_embeddings=True,
    norm_topk_prob=False,
    routed_scaling_factor=2.5,
    num_shared_experts=2,
    num_dense_layers=2,
    num_experts_per_token=3,
    partial_rotary_factor=1.0,
    remat_policy="full",
  ),
}


@functools.cache
def witness(name):
  """A random torch model, its weights saved by transformers and loaded by us, and tokens."""
  torch.manual_seed(0)
  config = CONFIGS[name]
  values = {**config.to_hf(), "attn_implementation": "eager"}
  model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**values)).float().eval()
  with torch.no_grad():
    for tensor in model.parameters():
      tensor.add_(torch.randn_like(tensor) * 0.1)
    for key, buffer in model.named_buffers():
      if key.endswith("e_score_correction_bias"):
        buffer.copy_(torch.randn_like(buffer) * 0.3)
  return config, model


@pytest.fixture(params=CONFIGS)
def case(request, tmp_path):
  config, model = witness(request.param)
  model.save_pretrained(tmp_path)
  loaded, params = hf.load(tmp_path, remat_policy=config.remat_policy)
  assert loaded == config
  return config, model, params


def routed_experts(model, tokens):
  """Runs the torch model; returns its logits and each router's choice [L][B * T, A]."""
  chosen = []
  routers = [m for m in model.modules() if type(m).__name__ == "Glm4MoeTopkRouter"]
  hooks = [r.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for r in routers]
  logits = model(torch.tensor(tokens, dtype=torch.long)).logits
  for hook in hooks:
    hook.remove()
  return logits, [experts.numpy() for experts in chosen]


def test_logprobs_and_routed_experts(case):
  config, model, params = case
  tokens, positions, segment_ids = helpers.rows(config, 3, 24)
  with torch.no_grad():
    logits, chosen = routed_experts(model, tokens)
  expected = torch.log_softmax(logits, -1).numpy()
  out = helpers.forward(config, params, tokens, positions, segment_ids)
  given = jax.nn.log_softmax(out.hidden_BTD @ transformer.head(params, config))
  np.testing.assert_allclose(given, expected, atol=2e-5)
  experts = np.asarray(out.router.experts_LBTA).reshape(config.num_moe_layers, 72, -1)
  np.testing.assert_array_equal(np.sort(experts, axis=-1), np.sort(np.stack(chosen), axis=-1))
  counts = np.stack([np.bincount(c.reshape(-1), minlength=config.num_experts) for c in chosen])
  np.testing.assert_array_equal(out.router.load_LE, counts)
  # The correction bias must have mattered, or the choice was not put to the test.
  unbiased = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf * 0 if "correction_bias" in str(path) else leaf, params
  )
  other = helpers.forward(config, unbiased, tokens, positions, segment_ids)
  assert np.any(np.asarray(other.router.load_LE) != counts)


def torch_gradients(config, model, tokens):
  """Gradients by checkpoint name; the experts' are stacked in torch and are taken apart."""
  model.zero_grad()
  model(torch.tensor(tokens, dtype=torch.long), labels=torch.tensor(tokens).long()).loss.backward()
  gradients = {}
  for name, tensor in model.named_parameters():
    gradient = tensor.grad.numpy()
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
      gradients[name] = gradient
      continue
    prefix, _, kind = name.rpartition(".")
    for expert in range(config.num_experts):
      if kind == "down_proj":
        gradients[f"{prefix}.{expert}.down_proj.weight"] = gradient[expert]
      else:
        gate, up = np.split(gradient[expert], 2)
        gradients[f"{prefix}.{expert}.gate_proj.weight"] = gate
        gradients[f"{prefix}.{expert}.up_proj.weight"] = up
  return gradients


def test_gradients_per_tensor(case):
  config, model, params = case
  tokens, positions, segment_ids = helpers.rows(config, 3, 24)

  @jax.jit
  @jax.grad
  def gradient(params):
    out = transformer.Transformer(config).apply({"params": params}, tokens, positions, segment_ids)
    logprobs = helpers.token_logprobs(config, params, out.hidden_BTD[:, :-1], tokens[:, 1:])
    return -jnp.mean(logprobs)

  ours = dict(hf.to_hf(config, gradient(params)))
  theirs = torch_gradients(config, model, tokens)
  biases = {name for name in ours if name.endswith("e_score_correction_bias")}
  assert len(biases) == config.num_moe_layers
  assert all(not np.any(ours[name]) for name in biases)
  assert set(ours) - biases == set(theirs)
  for name, expected in theirs.items():
    scale = np.abs(expected).max()
    assert scale > 0 or "experts" in name, name
    np.testing.assert_allclose(ours[name], expected, atol=1e-4 * scale + 1e-9, err_msg=name)


def test_transformers_loads_what_we_save(tmp_path):
  config = CONFIGS["air"]
  params = helpers.random_params(config)
  hf.save(tmp_path, config, params)
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert type(model).__name__ == "Glm4MoeForCausalLM"
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  tokens, positions, segment_ids = helpers.rows(config, 2, 12)
  with torch.no_grad():
    expected = torch.log_softmax(model(torch.tensor(tokens).long()).logits, -1).numpy()
  out = helpers.forward(config, params, tokens, positions, segment_ids)
  given = jax.nn.log_softmax(out.hidden_BTD @ transformer.head(params, config))
  np.testing.assert_allclose(given, expected, atol=2e-5)

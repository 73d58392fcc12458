"""Models of unusual shapes in three families, and what both implementations make of them.

The weights are ours, written by `hf.save` and read by transformers; the text is three sequences.
Ours is compiled once per model: rows of one sequence each and packed rows have the same shape.
"""

import functools
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from intellect3.models import hf, presets, transformer
from tests.models import helpers

LENGTHS = (24, 15, 9)
"""Of the sequences; the second and third fit into one row as long as the first."""


def _odd(preset, **changes):
  """Three layers whose heads are not `embed_dim / num_heads` wide."""
  values = dict(embed_dim=40, num_layers=3, mlp_dim=48, vocab_size=97)
  if preset is presets.tiny_qwen3:
    values |= {"num_dense_layers": 3}
  else:
    values |= {"expert_mlp_dim": 24}
  return preset(**{**values, **changes})


CASES = {
  "glm_air": helpers.small(attention="plain", grouped_matmul="blocked"),
  "glm_other_options": helpers.small(
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
    grouped_matmul="dense",
  ),
  "glm_groups_odd_heads": _odd(
    presets.tiny,
    num_experts=12,
    num_expert_groups=4,
    num_groups_per_token=2,
    num_experts_per_token=5,
    num_heads=9,
    num_kv_heads=3,
    head_dim=12,
    attention="blockwise",
  ),
  "glm_one_group_of_many_top_1": _odd(
    presets.tiny,
    num_dense_layers=0,
    num_experts=16,
    num_expert_groups=8,
    num_groups_per_token=1,
    num_experts_per_token=1,
    norm_topk_prob=False,
    routed_scaling_factor=1.5,
    num_heads=5,
    num_kv_heads=5,
    head_dim=20,
    qk_norm=True,
    attention="blockwise",
    grouped_matmul="blocked",
  ),
  "glm_no_shared_expert": _odd(
    presets.tiny, num_shared_experts=0, num_heads=7, num_kv_heads=1, attention_bias=False
  ),
  "qwen3_tied": _odd(presets.tiny_qwen3, num_heads=5, num_kv_heads=1, head_dim=24),
  "qwen3_untied": _odd(
    presets.tiny_qwen3,
    tie_embeddings=False,
    num_heads=3,
    num_kv_heads=3,
    head_dim=10,
    attention="blockwise",
  ),
  "qwen3_wide_heads": _odd(
    presets.tiny_qwen3, embed_dim=24, num_heads=6, num_kv_heads=2, head_dim=32, rope_theta=1e6
  ),
  "qwen3_moe_normalised": _odd(
    presets.tiny_qwen3_moe, num_heads=5, num_kv_heads=1, head_dim=12, grouped_matmul="blocked"
  ),
  "qwen3_moe_as_scored": _odd(
    presets.tiny_qwen3_moe,
    norm_topk_prob=False,
    num_experts=7,
    num_experts_per_token=3,
    num_heads=3,
    num_kv_heads=3,
    grouped_matmul="dense",
    attention="blockwise",
  ),
  "qwen3_moe_top_1_dense_first": _odd(
    presets.tiny_qwen3_moe,
    num_dense_layers=1,
    num_experts_per_token=1,
    norm_topk_prob=False,
    tie_embeddings=True,
    num_heads=6,
    num_kv_heads=3,
    head_dim=14,
  ),
}


class Rows(NamedTuple):
  """Tokens, positions and segment ids, int32 [3, 24], and where each sequence lies in them."""

  tokens: np.ndarray
  positions: np.ndarray
  segment_ids: np.ndarray
  places: tuple[tuple[int, slice], ...]

  def take(self, array, axis=0):
    """The sequences' own parts of an array whose axes `axis` and `axis + 1` are those of rows."""
    before = (slice(None),) * axis
    return [np.asarray(array)[(*before, row, columns)] for row, columns in self.places]


def sequences(config, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, config.vocab_size, length).astype(np.int32) for length in LENGTHS]


def rows(texts, places):
  """Rows with padding between and after the sequences; segment ids in no order."""
  shape = (3, max(LENGTHS))
  made = Rows(*(np.zeros(shape, np.int32) for _ in range(3)), places)
  for number, (text, (row, columns)) in enumerate(zip(texts, places, strict=True)):
    made.tokens[row, columns] = text
    made.positions[row, columns] = np.arange(len(text))
    made.segment_ids[row, columns] = (4, 9, 2)[number]
  return made


ALONE = ((0, slice(0, 24)), (1, slice(0, 15)), (2, slice(0, 9)))
PACKED = ((2, slice(0, 24)), (0, slice(9, 24)), (0, slice(0, 9)))


class Result(NamedTuple):
  """Attributes: logprobs [B, T, V]; experts [M, B, T, A]; load [M, E]; gradients, as params."""

  logprobs: jax.Array
  experts: jax.Array
  load: jax.Array
  gradients: transformer.Params


@functools.partial(jax.jit, static_argnums=0)
def evaluate(config, params, tokens, positions, segment_ids):
  """Everything of one forward and backward pass; the loss is the mean over predicted tokens."""

  def loss(params):
    out = transformer.Transformer(config).apply({"params": params}, tokens, positions, segment_ids)
    logits = out.hidden_BTD.astype(jnp.float32) @ transformer.head(params, config)
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    follows = (positions[:, 1:] > 0) & (segment_ids[:, 1:] > 0)
    mean = jnp.sum(jnp.where(follows, chosen, 0)) / jnp.sum(follows)
    return -mean, (logprobs, out.router.experts_LBTA, out.router.load_LE)

  (_, told), gradients = jax.value_and_grad(loss, has_aux=True)(params)
  return Result(*told, gradients)


@functools.cache
def ours(name):
  """The model's parameters, its rows of one sequence each, and our result on them."""
  config = CASES[name]
  params = helpers.random_params(config)
  alone = rows(sequences(config), ALONE)
  return params, alone, evaluate(config, params, *alone[:3])


@functools.cache
def theirs(name):
  """The same model in transformers, float32, read from our export."""
  with tempfile.TemporaryDirectory() as directory:
    hf.save(directory, CASES[name], ours(name)[0])
    return load_theirs(directory)


def load_theirs(directory):
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    directory,
    dtype=torch.float32,
    attn_implementation="eager",
    experts_implementation="eager",
    output_loading_info=True,
  )
  shapes = dict(model.named_parameters())
  missing = [key for key in info["missing_keys"] if key not in shapes or shapes[key].numel()]
  assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
  return model.eval()


def run_theirs(model, tokens, first=0):
  """Logprobs [.., T, V], differentiable, and what each router chose, [.., T, A], of [.., T].

  The first token of each row is at position `first`.
  """
  chosen = []
  routers = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
  hooks = [r.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for r in routers]
  rows = torch.tensor(tokens, dtype=torch.long).reshape(-1, tokens.shape[-1])
  positions = (first + torch.arange(rows.shape[1])).expand(rows.shape)
  logprobs = torch.log_softmax(model(rows, position_ids=positions).logits.float(), -1)
  for hook in hooks:
    hook.remove()
  experts = [choice.numpy().reshape(*tokens.shape, -1) for choice in chosen]
  return logprobs.reshape(*tokens.shape, -1), experts


def gradients_by_name(config, model):
  """A torch model's gradients by the checkpoint's names: the stacked experts are taken apart."""
  gradients = {}
  for name, tensor in model.named_parameters():
    if not tensor.numel():
      continue
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

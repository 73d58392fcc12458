"""The decoder: embedding, dense layers, MoE layers, final norm.

Place in the ring: the train step and the engine apply the same modules. The vocabulary head stays
outside (`head`), since it is never applied to all tokens at once (`losses.logprobs`).

Layers of one kind are stacked and scanned, so compile time does not grow with depth. The carry is
(residual stream, KV cache); the layer's index is a scanned input.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from intellect3.kernels.attention import context as context_lib
from intellect3.kernels.platform import traced_platform
from intellect3.models import layers, remat
from intellect3.models.attention import Attention, Context
from intellect3.models.cache import KVCache
from intellect3.models.config import ModelConfig
from intellect3.models.moe import Choice, MoE
from intellect3.models.parallel import ONE_DEVICE, Parallel
from intellect3.sharding import collectives

Params = dict[str, Any]

EMBEDDING_STD = 0.1
HEAD_SCALE = 0.3


class RouterStats(NamedTuple):
  """What the routers did, M MoE layers from the first.

  Attributes:
    load_LE: float32 [M, E], tokens that chose each expert; padding (segment 0) not counted.
    experts_LBTA: int32 [M, B, T, A], the experts of every token, padding included.
    agreed_LBT: bool [M, B, T], whether a router's own choice was the replayed one, as sets; None
      where nothing was replayed.
    extra_rounds_L: int32 [M], rounds of the exchange between devices beyond those that an even
      load takes (`kernels.expert_parallel`).
  """

  load_LE: jax.Array
  experts_LBTA: jax.Array
  agreed_LBT: jax.Array | None
  extra_rounds_L: jax.Array


class Output(NamedTuple):
  """Attributes: hidden_BTD, after the final norm; cache, updated, or None; router."""

  hidden_BTD: jax.Array
  cache: KVCache | None
  router: RouterStats


class Layer(nn.Module):
  """Attention and MLP (or MoE), each behind a norm and added to the residual stream."""

  config: ModelConfig
  moe: bool
  parallel: Parallel = ONE_DEVICE

  @nn.compact
  def __call__(
    self,
    carry: tuple[jax.Array, KVCache | None],
    layer: jax.Array,
    replayed_BTA: jax.Array | None,
    context: Context,
  ) -> tuple[tuple[jax.Array, KVCache | None], tuple[Choice, jax.Array] | None]:
    config, parallel = self.config, self.parallel
    x_BTD, cache = carry
    x_BTD = checkpoint_name(x_BTD, remat.LAYER_INPUT)
    normed_BTD = layers.RMSNorm(config, name="attention_norm")(x_BTD)
    attend = Attention(config, parallel, name="attention")
    out_BTD, cache = attend(normed_BTD, cache, layer, context)
    x_BTD = x_BTD + collectives.total(out_BTD, parallel.heads)
    normed_BTD = layers.RMSNorm(config, name="mlp_norm")(x_BTD)
    routed = None
    if self.moe:
      moe = MoE(config, parallel, name="moe")
      out_BTD, choice, extra_rounds = moe(normed_BTD, context.valid_BT, replayed_BTA)
      routed = (choice, extra_rounds)
    else:
      width = config.mlp_dim // parallel.parts(parallel.mlp)
      out_BTD = layers.MLP(config, width, name="mlp")(normed_BTD)
    x_BTD = x_BTD + collectives.total(out_BTD, parallel.mlp)
    return (x_BTD, cache), routed


class Transformer(nn.Module):
  """A decoder of `config.family`.

  Attributes:
    config: of the model.
    parallel: how its work is divided. More than one device means inside a `shard_map` over the
      whole mesh: the parameters of the layers are this device's shards, the others are gathered.
  """

  config: ModelConfig
  parallel: Parallel = ONE_DEVICE

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    cache: KVCache | None = None,
    tables_BW: jax.Array | None = None,
    routed_experts_LBTA: jax.Array | None = None,
  ) -> Output:
    """Runs the decoder on packed rows, or on rows that continue the sequences of a cache.

    Args:
      tokens_BT: int32 [B, T], each in [0, V).
      positions_BT: int32 [B, T], from 0 in each segment. With a cache: the position in the row's
        sequence. All earlier ones must be in the cache or in this call: rows of one sequence may
        follow each other in one call, since each layer writes all rows before it reads.
      segment_ids_BT: int32 [B, T], 0 for padding. Tokens of one id (per row) see each other; with
        a cache every other id means "valid".
      cache: None, or the carry; donate it to `jit` to have it updated in place.
      tables_BW: int32 [B, W], the cache pages of each row's sequence, in order; the caller keeps
        positions below W pages. None without a cache.
      routed_experts_LBTA: int32 [M, B, T, A], the experts to take instead of the routers' own
        choice (router replay), laid out as `RouterStats.experts_LBTA`; a token with a negative
        entry chooses for itself. Their weights are of the model's own scores.

    Where `parallel` divides the length, the [B, T] arguments are whole rows; `routed_experts_LBTA`
    and what is returned are of this device's tokens, `kernels.attention.context.local_part`.

    Returns:
      `Output`; hidden states in config.dtype. Padding's hidden states mean nothing.

    Raises:
      ValueError: for an unknown remat policy or one that cannot run here, page tables that do not
        go with rows or cache, or routed experts of another shape than the model's.
    """
    config, parallel = self.config, self.parallel
    remat.check(config.remat_policy, traced_platform())
    _check_tables(tokens_BT, cache, tables_BW)
    shape, axes, dtype = (
      (config.vocab_size, config.embed_dim),
      ("vocab", "embed"),
      config.param_dtype,
    )
    init = nn.initializers.normal(EMBEDDING_STD)
    embedding_VD = layers.parameter(self, "embedding", init, shape, axes, dtype)
    if not config.tie_embeddings:
      init = layers.kernel_init(HEAD_SCALE)
      layers.parameter(self, "head", init, shape[::-1], axes[::-1], dtype)
    whole_ids = (positions_BT, segment_ids_BT)
    if parallel.length:
      part = functools.partial(context_lib.local_part, axis_name=parallel.length)
      tokens_BT, positions_BT, segment_ids_BT = map(part, (tokens_BT, *whole_ids))
    chosen = (config.num_moe_layers, *tokens_BT.shape, config.num_experts_per_token)
    if routed_experts_LBTA is not None and routed_experts_LBTA.shape != chosen:
      given = list(routed_experts_LBTA.shape)
      raise ValueError(f"routed_experts_LBTA: expected {list(chosen)}, got {given}")
    x_BTD = embedding_VD[tokens_BT].astype(config.dtype)
    angles_BTR = layers.rotary_angles(config, positions_BT)
    context = Context(positions_BT, segment_ids_BT, angles_BTR, tables_BW, *whole_ids)

    carry = (x_BTD, cache)
    nothing = jnp.zeros((0, *tokens_BT.shape, chosen[-1]), jnp.int32)
    routed = (Choice(nothing, None), jnp.zeros(0, jnp.int32))
    first_moe = config.num_dense_layers
    for name, moe, start, stop in (
      ("dense_layers", False, 0, first_moe),
      ("moe_layers", True, first_moe, config.num_layers),
    ):
      if stop > start:
        layer = _scanned(config, name, stop - start, parallel, training=cache is None)
        stack = layer(config, moe=moe, parallel=parallel, name=name)
        replayed = routed_experts_LBTA if moe else None
        carry, routed_by_layer = stack(carry, jnp.arange(start, stop), replayed, context)
        routed = routed_by_layer if moe else routed
    x_BTD, cache = carry
    hidden_BTD = layers.RMSNorm(config, name="final_norm")(x_BTD)
    choice, extra_rounds_L = routed
    load_LE = _load(choice.experts, segment_ids_BT != 0, config.num_experts)
    stats = RouterStats(load_LE, choice.experts, choice.agreed, extra_rounds_L)
    return Output(hidden_BTD, cache, stats)


def _scanned(
  config: ModelConfig, name: str, length: int, parallel: Parallel, *, training: bool
) -> Any:
  policy = remat.POLICIES[config.remat_policy]
  layer: Any = Layer
  if parallel.dims:
    # Inside the checkpoint: the backward pass gathers again instead of keeping every layer whole.
    gather = functools.partial(parallel.gather, prefix=f"{name}/", dtype=config.dtype)
    layer = nn.map_variables(
      layer, "params", trans_in_fn=lambda tree: {"params": gather(tree["params"])}
    )
  if training and policy is not None:
    # Inside a scan nothing can be merged across the checkpoint, so no barrier is needed.
    layer = nn.remat(layer, policy=policy, prevent_cse=False)
  return nn.scan(
    layer,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(0, 0, nn.broadcast),
    length=length,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )


def _check_tables(tokens_BT: Any, cache: KVCache | None, tables_BW: Any) -> None:
  if (cache is None) != (tables_BW is None):
    have, miss = ("cache", "tables_BW") if tables_BW is None else ("tables_BW", "cache")
    raise ValueError(f"{miss}: expected one to go with {have}, got None")
  if tables_BW is not None and (tables_BW.ndim != 2 or tables_BW.shape[0] != tokens_BT.shape[0]):
    raise ValueError(
      f"tables_BW: expected [{tokens_BT.shape[0]}, pages], got {list(tables_BW.shape)}"
    )


def _load(experts_LBTA: jax.Array, valid_BT: jax.Array, num_experts: int) -> jax.Array:
  chosen_LBTAE = experts_LBTA[..., None] == jnp.arange(num_experts)
  return jnp.sum(chosen_LBTAE & valid_BT[None, :, :, None, None], axis=(1, 2, 3), dtype=jnp.float32)


def _boxed_init(config: ModelConfig, key: jax.Array) -> Any:
  token = jnp.zeros((1, 1), jnp.int32)
  return Transformer(config).init(key, token, token, token + 1)["params"]


@functools.partial(jax.jit, static_argnums=0)
def init(config: ModelConfig, key: jax.Array) -> Params:
  """Random parameters, a nested dict of arrays in config.param_dtype; a jitted function.

  Kernels are normal with deviation 1 / sqrt(fan in), times 1 / sqrt(2 L) where they write to the
  residual stream and times `HEAD_SCALE` in the head; embeddings are normal with `EMBEDDING_STD`;
  norm scales are 1, biases 0. The router's correction bias is float32 always.
  """
  return nn.meta.unbox(_boxed_init(config, key))


def abstract(config: ModelConfig) -> tuple[Params, Params]:
  """Shapes and logical axes of the parameters; nothing is allocated.

  Traced once per config: every publication and every load of weights asks for it.

  Returns:
    Two nested dicts, not to be changed, of the parameters' structure: of `jax.ShapeDtypeStruct`,
    and of tuples with one axis name (or None) per dimension. Map over both, the shapes first.
  """
  # Shapes do not depend on the kernels, and those of a GPU refuse to be traced without it.
  return _abstract(
    dataclasses.replace(config, attention="plain", grouped_matmul="dense", remat_policy="none")
  )


@functools.lru_cache(maxsize=64)
def _abstract(config: ModelConfig) -> tuple[Params, Params]:
  boxed = jax.eval_shape(lambda key: _boxed_init(config, key), jax.random.key(0))
  is_boxed = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
  axes = jax.tree.map(lambda leaf: tuple(leaf.names), boxed, is_leaf=is_boxed)
  return nn.meta.unbox(boxed), axes


def head(params: Params, config: ModelConfig) -> jax.Array:
  """The vocabulary head, head_DV: logits are `hidden_BTD @ head_DV`."""
  return params["embedding"].T if config.tie_embeddings else params["head"]

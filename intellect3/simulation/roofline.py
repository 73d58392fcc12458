"""How fast a server of a given model decodes at best: a roofline of weights, cache and links.

Place in the ring: beside it; it makes the decode table of a scenario where nothing was measured. A
decode step of R running requests at a mean context of C tokens, on a node of D devices (tensor
parallel), takes

    memory   (weights read + R C cache bytes a token) / (D memory_rate memory_share)
    matrices 2 R (parameters a token uses) / (D matrix_rate matrix_share)
    links    2 all-reduces a layer: latency + 2 R embed bytes / (inner link_share)
    kernels  a layer's launches

and the longer of memory and matrices counts, links and kernels being added. Of E experts with A a
token, R tokens that choose evenly read E (1 - (1 - A / E)^R): all of them from some sixty on. The
shares of `planning/hardware.toml` are uncalibrated; a server's own work (scheduling, sampling,
detokenising) is left out. So it is a lower bound, and says so.
"""

import dataclasses
from collections.abc import Sequence

from intellect3.models.config import ModelConfig
from intellect3.planning.hardware import Hardware

BYTES = 2
"""Of a weight, an activation and a cached number: bfloat16."""
KERNELS_PER_LAYER = 12
"""Norms, projections, rotation, attention, router, sort, two grouped products, sums."""


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What decoding moves and multiplies, in parameters and bytes.

  Attributes:
    always: parameters that every step reads (attention, dense and shared MLPs, router, head).
    expert: parameters of one routed expert, over all its layers.
    num_experts: E; 0 where there are none.
    experts_per_token: A.
    cache_bytes: of one token of context.
    embed_dim: D.
    num_layers: L.
    heads_dim: query heads times their width, all layers: attention's products with the cache.
  """

  always: int
  expert: int
  num_experts: int
  experts_per_token: int
  cache_bytes: int
  embed_dim: int
  num_layers: int
  heads_dim: int

  @property
  def parameters(self) -> int:
    """All that a server holds, but for the embedding, of which it reads a row a token."""
    return self.always + self.expert * self.num_experts


def sizes(model: ModelConfig) -> Sizes:
  """Counts a model's parameters (biases and norms left out) and what a token of context takes."""
  embed, heads = model.embed_dim, model.num_heads * model.head_dim
  cached = model.num_kv_heads * model.head_dim
  sparse = model.num_layers - model.num_dense_layers
  always = model.num_layers * (2 * embed * heads + 2 * embed * cached)
  always += model.num_dense_layers * 3 * embed * model.mlp_dim
  always += sparse * 3 * embed * model.expert_mlp_dim * model.num_shared_experts
  always += (sparse * model.num_experts + model.vocab_size) * embed
  return Sizes(
    always=always,
    expert=sparse * 3 * embed * model.expert_mlp_dim,
    num_experts=model.num_experts if sparse else 0,
    experts_per_token=model.num_experts_per_token if sparse else 0,
    cache_bytes=2 * model.num_layers * cached * BYTES,
    embed_dim=embed,
    num_layers=model.num_layers,
    heads_dim=model.num_layers * heads,
  )


def step_seconds(
  of: Sizes, hardware: Hardware, *, devices: int, running: float, context: float = 0.0
) -> float:
  """Seconds in which each running request gets one token.

  Args:
    of: the model.
    hardware: of one device; its shares of the rates are counted.
    devices: over which one server divides the model.
    running: requests at once.
    context: mean tokens of theirs in the cache.
  """
  _check(devices=devices, running=running)
  read = 0.0
  if of.num_experts:
    read = of.num_experts * (1 - (1 - of.experts_per_token / of.num_experts) ** running)
  moved = (of.always + of.expert * read) * BYTES + running * context * of.cache_bytes
  active = of.always + of.expert * of.experts_per_token
  flops = running * (2 * active + 4 * context * of.heads_dim)
  links = 0.0
  if devices > 1:
    sent = 2 * running * of.embed_dim * BYTES / (hardware.inner * hardware.link_share)
    links = 2 * of.num_layers * (hardware.latency + sent)
  return (
    max(
      hardware.memory_seconds(moved / devices),
      hardware.matrix_seconds(flops / devices, "bf16"),
    )
    + links
    + of.num_layers * KERNELS_PER_LAYER * hardware.launch
  )


def decode_tokens_per_second(
  of: Sizes, hardware: Hardware, *, devices: int, running: Sequence[int]
) -> list[float]:
  """Of a whole server at each number of requests, without what their cached tokens cost."""
  return [count / step_seconds(of, hardware, devices=devices, running=count) for count in running]


def seconds_per_cached_token(of: Sizes, hardware: Hardware, *, devices: int) -> float:
  """That a decode step takes longer for each token in the cache: reading it."""
  _check(devices=devices)
  return hardware.memory_seconds(of.cache_bytes / devices)


def cache_tokens(of: Sizes, hardware: Hardware, *, devices: int, memory_share: float = 0.85) -> int:
  """Tokens that fit into a server's cache.

  Args:
    of: the model.
    hardware: of one device.
    devices: over which one server divides the model.
    memory_share: of the memory that weights and cache may take together (SGLang's
      `mem_fraction_static`).

  Raises:
    ValueError: the weights alone do not fit.
  """
  room = devices * hardware.memory * memory_share - of.parameters * BYTES
  if room <= 0:
    held = f"{of.parameters * BYTES / 1e9:.0f} GB of weights"
    raise ValueError(f"devices: expected enough for {held}, got {devices}")
  return int(room / of.cache_bytes)


def prefill_tokens_per_second(of: Sizes, hardware: Hardware, *, devices: int) -> float:
  """Of short prompts (attention left out): the matrix products alone."""
  _check(devices=devices, running=1)
  active = of.always + of.expert * of.experts_per_token
  return devices / hardware.matrix_seconds(2 * active, "bf16")


def _check(**values: float) -> None:
  for field, value in values.items():
    if value <= 0:
      raise ValueError(f"{field}: expected more than 0, got {value}")

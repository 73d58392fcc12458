"""What the backward pass keeps of a layer, by name.

Place in the ring: the model's layers are rematerialised by one of these policies. Figures and what
was tried: docs/design/0009-context-and-offload.md.
"""

from typing import Any

import jax

from intellect3.kernels.platform import PLATFORMS

LAYER_INPUT = "layer_input"
"""Checkpoint name of the residual stream that enters a layer."""

ATTENTION = ("attention_out", "attention_lse")
"""Checkpoint names of what attention gave."""


def _offload(*names: str) -> Any:
  return jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(names),
    offload_src="device",
    offload_dst="pinned_host",
  )


POLICIES: dict[str, Any] = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION),
  "offload": _offload(LAYER_INPUT),
  "offload_attention": _offload(LAYER_INPUT, *ATTENTION),
}
"""What the backward pass keeps of a layer: everything; its input; matrix products; those that are
projections (not the attention scores); its input and what attention gave (attention does not run
again then). The last two keep their input in the host's memory, and nothing or what attention gave
beside it: copies run next to the computation, each layer's while its neighbour is computed. On a
CPU that memory is the device's own and nothing is copied.

The name `LAYER_INPUT` must be given to a layer's input first of all, inside what is
rematerialised, and the layer may use nothing but the named value: else the device keeps both.
"""


def check(policy: str, platform: str) -> None:
  """Refuses what cannot run.

  Every policy runs on every platform: on cpu the offloading ones save where they would offload.

  Args:
    policy: of `POLICIES`.
    platform: of `PLATFORMS`.

  Raises:
    ValueError: for an unknown policy or platform.
  """
  if policy not in POLICIES:
    raise ValueError(f"remat_policy: expected one of {tuple(POLICIES)}, got {policy!r}")
  if platform not in PLATFORMS:
    raise ValueError(f"platform: expected one of {PLATFORMS}, got {platform!r}")

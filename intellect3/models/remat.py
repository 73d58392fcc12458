"""What the backward pass keeps of a layer, by name.

Place in the ring: the model's layers are rematerialised by one of these policies.
"""

from typing import Any

import jax

LAYER_INPUT = "layer_input"
"""Checkpoint name of the residual stream that enters a layer."""

ATTENTION = ("attention_out", "attention_lse")
"""Checkpoint names of what attention gave."""

POLICIES: dict[str, Any] = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION),
}
"""What the backward pass keeps of a layer: everything; its input; matrix products; those that are
projections (not the attention scores); its input and what attention gave (`blockwise` does not run
again then)."""


def check(policy: str, platform: str) -> None:
  """Raises ValueError for an unknown policy, or one that cannot run on a platform."""
  del platform
  if policy not in POLICIES:
    raise ValueError(f"remat_policy: expected one of {tuple(POLICIES)}, got {policy!r}")

"""The routed experts' MLPs as grouped matrix products: one interface, several implementations.

Read in this order: `interface` (what is promised, and who is chosen), `dense` (the oracle),
`blocked` (any backend, drops nothing), `tokamax` (NVIDIA GPUs); `kernels.dispatch` lays out the
routed tokens for the last two.
"""

from intellect3.kernels.grouped_matmul.interface import IMPLEMENTATIONS as IMPLEMENTATIONS
from intellect3.kernels.grouped_matmul.interface import expert_mlp as expert_mlp
from intellect3.kernels.grouped_matmul.interface import resolve as resolve

"""Grouped-query attention over packed rows: one interface, several implementations.

Read in this order: `interface` (what is promised, and who is chosen), `plain` (the oracle),
`blocks` (which blocks of a packed row see each other), `blockwise` (any backend, memory linear in
length), `tokamax` (NVIDIA GPUs), `context` (rows shared by several devices).
"""

from intellect3.kernels.attention.context import context_attention as context_attention
from intellect3.kernels.attention.context import local_part as local_part
from intellect3.kernels.attention.context import whole as whole
from intellect3.kernels.attention.interface import IMPLEMENTATIONS as IMPLEMENTATIONS
from intellect3.kernels.attention.interface import attention as attention
from intellect3.kernels.attention.interface import resolve as resolve

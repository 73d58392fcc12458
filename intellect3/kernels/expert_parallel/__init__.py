"""Expert parallelism: tokens travel to the devices that hold their experts, and back.

Read in this order: `interface` (what is promised), `rounds` (who sends what when: integers only),
`exchange` (one trip of rows between devices), `experts` (the rounds run, forward and backward).
"""

from intellect3.kernels.expert_parallel.interface import EXCHANGES as EXCHANGES
from intellect3.kernels.expert_parallel.interface import expert_parallel_mlp as expert_parallel_mlp
from intellect3.kernels.expert_parallel.interface import nominal_rounds as nominal_rounds
from intellect3.kernels.expert_parallel.interface import resolve as resolve

"""What an adapter changes. Imports `_linalg`, `_adapters`.

All from its factors: ΔW is formed only where a function says so. Each function works on one
`LowRank` node, under `jit` and `vmap` too; counts of directions are static.

The ΔW of a node that is `residual`, as `pissa` starts it, includes what the start took from W.
What training changed is that of `arithmetic.difference(adapter, initial)`.
"""

from ._directions import amplification as amplification
from ._directions import intruder_dimensions as intruder_dimensions
from ._directions import subspace_similarity as subspace_similarity
from ._size import delta_spectrum as delta_spectrum
from ._size import distance as distance
from ._size import effective_rank as effective_rank
from ._size import norm as norm
from ._size import stable_rank as stable_rank

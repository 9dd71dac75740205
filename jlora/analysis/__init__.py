"""What an adapter changes. Imports `_linalg`, `_adapters`.

Everything is computed from the factors: ΔW is formed only where a function says so. Each function
works on one `LowRank` node, under `jit` and `vmap` too; counts of directions are static.

The ΔW of a `residual` node, as `pissa` makes it, includes what the initializer took from W. To see
what training changed, give nodes of `arithmetic.difference(adapter, initial)`.
"""

from ._directions import amplification as amplification
from ._directions import intruder_dimensions as intruder_dimensions
from ._directions import subspace_similarity as subspace_similarity
from ._size import delta_spectrum as delta_spectrum
from ._size import distance as distance
from ._size import effective_rank as effective_rank
from ._size import norm as norm
from ._size import stable_rank as stable_rank

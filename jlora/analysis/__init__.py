"""Measures what an adapter changes. Imports `_adapters`, `_arrays`, `_linalg` and `_types`.

Each function works on one `LowRank` node, also under `jit` and `vmap`, where numbers of directions
must be static; `measure` is for the host alone. It computes everything from A and B, and forms ΔW
only if it says so.

The ΔW of a `residual` node, which `pissa` makes for example, includes what the initializer moved
out of W. To see what training changed, give nodes of `arithmetic.difference(adapter, initial)`.
"""

from ._directions import amplification as amplification
from ._directions import intruder_dimensions as intruder_dimensions
from ._directions import subspace_similarity as subspace_similarity
from ._measure import Measured as Measured
from ._measure import measure as measure
from ._size import delta_spectrum as delta_spectrum
from ._size import distance as distance
from ._size import effective_rank as effective_rank
from ._size import norm as norm
from ._size import stable_rank as stable_rank

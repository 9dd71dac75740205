r"""Sums, differences and merges of adapters: of their ΔW, never of A and B apart.

Imports `_compat`, `_keys`, `_linalg`, `_rules`, `_tree`, `_types`, `_adapters`, `_core`.

To add two ΔW, their factors are concatenated, $[A_1, A_2] [B_1; B_2]$: the sum is exact, and its
rank is the sum of the ranks. A·G and G⁻¹·B are other factors of the same ΔW: all results here are
the same for both.

A leaf that is trained in full is a change W' - W of the base, which must then be given.

For adapters of a base that an initializer changed (`LowRank.residual`, as by `pissa`), ΔW = 0 is
not the model. A sum of them is defined if the weights add up to 1, and then is for that base, or
if they add up to 0, and then is for the parameters. Everything else raises: use
`difference(adapter, initial)`, where `initial` is what `init` returned.

All functions are pure, and work under `jax.jit` and `jax.vmap` unless they say otherwise.

On a mesh `add`, `scale` and `difference` communicate nothing. The others factor A and B by blocks
of rows, and gather the triangles of r columns: about r rows for each shard of A or B, or A or B
itself if its shards have fewer than 4·r rows. For leaves trained in full, `ties` sums counts.
Nothing of W's size is communicated, and the result is sharded like A and B.
"""

from ._entries import dare as dare
from ._entries import ties as ties
from ._matrices import truncate as truncate
from ._sum import add as add
from ._sum import difference as difference
from ._sum import scale as scale

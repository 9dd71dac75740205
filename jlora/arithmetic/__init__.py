r"""Sums, differences and merges of adapters: of their ΔW, never of A and B separately.

Imports `_adapters`, `_arrays`, `_compat`, `_errors`, `_keys`, `_linalg`, `_rules`, `_tree` and
`_types`.

To add two ΔW, their factors are concatenated, $[A_1, A_2] [B_1; B_2]$. The sum is exact, and its
rank is the sum of the ranks. Results do not depend on how a ΔW is factored: A·G and G⁻¹·B give the
same as A and B.

A leaf trained in full is a change W' - W of the base. For such leaves, give the base.

If an initializer such as `pissa` changed the base (`LowRank.residual`), use
`difference(adapter, initial)`, where `initial` is the adapter that `init` returned: it belongs to
the original parameters. Adapters of the changed base can be added only with weights that add up to
1, for that base, or to 0, for the original parameters. Everything else raises, because ΔW = 0 is
not the original model.

All functions are pure, and work under `jax.jit` and `jax.vmap` unless they say otherwise.

On a mesh the result is sharded like A and B, and nothing of W's size is communicated. `add`,
`scale` and `difference` communicate nothing. The others factor A and B in blocks of rows, and
gather about r rows for each shard of A or B, or all of A or B if its shards have fewer than 4·r
rows. For leaves trained in full, `ties` also sums counts.
"""

from ._entries import dare as dare
from ._entries import ties as ties
from ._matrices import truncate as truncate
from ._sum import add as add
from ._sum import difference as difference
from ._sum import scale as scale

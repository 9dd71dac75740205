r"""Sums, differences and merges of adapters, on what they mean: ΔW, never on A and B apart.

Imports `_compat`, `_keys`, `_linalg`, `_rules`, `_tree`, `_types`, `_adapters`, `_core`.

To add two ΔW, their factors are concatenated, $[A_1, A_2] [B_1; B_2]$: the sum is exact, and its
rank is the sum of the ranks. A·G and G⁻¹·B are other factors of the same ΔW: all results here are
the same for both.

A leaf that is trained in full counts as the change W' - W of the base, which must then be given.

Adapters of a base that their start changed (`LowRank.residual`, as by `pissa`) are not changes of
the model: ΔW = 0 is not the model there. A sum of them is defined where the weights add up to 1,
and is for that base again, or to 0, and is for the parameters. All else is refused; it is defined
for `difference(adapter, initial)`, where `initial` is what `init` returned.
All functions are pure, and work under `jax.jit` and `jax.vmap` but where they say otherwise.

On a mesh `add`, `scale` and `difference` move nothing. The others factor A and B by blocks of rows,
whose triangles of r columns are gathered: about r rows for each part of A or B in all, or A or B
itself where its parts have fewer than 4·r rows. Of leaves in full `ties` adds up counts. Nothing of
W's size is moved, and the result lies as A and B do.
"""

from ._dare import dare as dare
from ._sum import add as add
from ._sum import difference as difference
from ._sum import scale as scale
from ._ties import ties as ties
from ._truncate import truncate as truncate

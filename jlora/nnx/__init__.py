"""Modules of NNX with an adapter, for NNX's optimizers and trainers.

Nothing else in jlora imports Flax. Imports `_adapters`, `_arrays`, `_compat`, `_merge`, `_site`,
`_transform`, `_tree`, `_types`, `sharding`.
"""

from ._adapted import Adapted as Adapted
from ._adapted import adapt as adapt

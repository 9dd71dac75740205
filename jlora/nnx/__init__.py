"""Modules of NNX with an adapter, as the optimizers and trainers of NNX take them.

Nothing else in jlora imports Flax. Imports `_adapters`, `_compat`, `_core`, `_merge`, `_rules`,
`_transform`, `_tree`, `_types`, `sharding`.
"""

from ._adapted import Adapted as Adapted
from ._adapted import adapt as adapt

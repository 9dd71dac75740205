"""Models of Keras with an adapter, for `compile` and `fit`.

Nothing else in jlora imports Keras. Imports `_adapters`, `_merge`, `_rules`, `_site`, `_transform`,
`_tree`, `_types`.
"""

from ._adapted import Adapted as Adapted
from ._adapted import adapt as adapt

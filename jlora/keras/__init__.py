"""Models of Keras with an adapter, for `compile` and `fit`.

Nothing else in jlora imports Keras. Imports `_adapters`, `_merge`, `_rules`, `_site`, `_transform`,
`_tree`, `_types`.
"""

try:
    import keras as keras
except ModuleNotFoundError as e:
    if e.name == "keras":
        raise
    raise ImportError(
        f"Keras cannot import its backend: {e}. Set KERAS_BACKEND=jax in the environment before "
        "Keras is imported."
    ) from e

from ._adapted import Adapted as Adapted
from ._adapted import adapt as adapt

r"""A model of Keras with an adapter, for `compile` and `fit`.

$$\mathrm{adapted}(x) = \mathrm{model}_{W + s \cdot A B}(x)$$
"""

import collections
from typing import Any

import jax
import keras

from .._adapters import is_node
from .._merge import merge
from .._rules import Rule, check_int
from .._transform import dropout, transform
from .._tree import bind, leaves_by_path, name_of
from .._types import PyTree


class _GetMask(keras.Layer):
    """Returns the mask that Keras keeps for its input, or None."""

    def __init__(self) -> None:
        super().__init__()
        self.supports_masking = True

    def call(self, x: Any, mask: Any = None) -> Any:
        return mask


class _SetMask(keras.Layer):
    """Returns its input, for which Keras keeps a mask from then on."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self._mask = mask

    def call(self, x: Any) -> Any:
        return x

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return self._mask


class Adapted(keras.Model):
    r"""A model that computes what `model` computes with W + s·A·B instead of each adapted W.

    `compile`, `fit`, `evaluate`, `predict`, callbacks and `save_weights` work as usual, and train
    only the adapter. To save or serve the adapter without the base, use `adapter`.

    Args:
        model: a built model. Its variables are shared, not copied, and become untrainable. So batch
            normalization uses its moving statistics, as in any frozen layer of Keras.
        adapter: an adapter of the model's weights by their paths, such as
            `sequential/dense/kernel`; for example from `jlora.checkpoint.restore`.
        seed: a seed for the dropout of the low-rank path, which is active in training.

    Attributes:
        base: the model.
        adapter: the adapter as a tree of arrays, for all other functions of jlora.

    Raises:
        RuntimeError: if Keras has another backend than JAX.
        TypeError: if `model` is not a model of Keras, or `adapter` is not an adapter.
        ValueError: if `adapter` does not fit the model, the model is not built, or two of its
            weights have the same path.

    Examples:
        >>> import jlora.keras, keras, numpy as np
        >>> model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(3)])
        >>> jlora.keras.Adapted(model, {}).predict(np.ones((2, 4)), verbose=0).shape
        (2, 3)
    """

    def __init__(self, model: Any, adapter: PyTree, *, seed: int = 0) -> None:
        bind(_weights(model), adapter)  # raises unless it fits
        super().__init__(name=f"{model.name}_adapted", autocast=False)
        self.base = model
        model.trainable = False
        leaves, self._structure = jax.tree.flatten(adapter)
        # Named by numbers, because the patterns of a layout map may match the names of W.
        self._own = [
            self.add_weight(
                name=f"lora_{i}",
                shape=x.shape,
                dtype=x.dtype,
                initializer=lambda shape, dtype=None, x=x: x,
                autocast=False,
            )
            for i, x in enumerate(leaves)
        ]
        self._adapted = {name_of(path) for path in dict(leaves_by_path(adapter, is_node))}
        self._masks = keras.random.SeedGenerator(seed)
        self._is_merged = False
        self.built = True

    @property
    def adapter(self) -> PyTree:
        """The adapter as a tree of arrays."""
        return jax.tree.unflatten(self._structure, [v.value for v in self._own])

    def merge(self) -> Any:
        """Puts W + s·A·B into the variables of the base, and returns the base.

        The adapted model cannot be used afterward, because it would add s·A·B twice.

        Raises:
            RuntimeError: if it was called before.
        """
        self._refuse_merged()
        merged = merge(_weights(self.base), self.adapter)
        for v in self.base.weights:
            if v.path in self._adapted:
                v.assign(merged[v.path])
        self._is_merged = True
        # Functions that Keras has compiled would not raise.
        self.train_function = self.test_function = self.predict_function = None
        return self.base

    def _refuse_merged(self) -> None:
        if self._is_merged:
            raise RuntimeError("this model was merged into its base: call the base instead.")

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Returns what the adapted model returns."""
        self._refuse_merged()
        weights = [v for v in self.base.variables if v.path in self._adapted]
        others = [v for v in self.base.variables if v.path not in self._adapted]
        # Keras knows a loss by its id: those of the trace live until this model has its own.
        scopes = []

        def pure(params: Any, values: Any) -> Any:
            pairs = [*((v, params[v.path]) for v in weights), *zip(others, values, strict=True)]
            with keras.StatelessScope(pairs, collect_losses=True) as scope:
                outputs = self.base(inputs, training=training)
                masks = jax.tree.map(_GetMask(), outputs)
            scopes.append(scope)
            return outputs, masks, [scope.get_current_value(v) for v in others], scope.losses

        adapter = self.adapter
        if training:
            adapter = dropout(adapter, self._masks.next())
        values = [v.value for v in others]
        params = {v.path: v.value for v in weights}
        outputs, masks, new, losses = transform(pure).apply(params, adapter, values)
        for v, old, x in zip(others, values, new, strict=True):
            if x is not old:
                v.assign(x)
        for x in losses:
            self.add_loss(x)
        return jax.tree.map(lambda x, mask: _SetMask(mask)(x), outputs, masks)


def adapt(model: Any, *rules: Rule, example: Any, seed: int = 0) -> Adapted:
    """Adapts a model by rules.

    Args:
        model: a built model.
        *rules: as for `jlora.transform`. They match the paths of Keras, such as
            `sequential/dense/kernel`.
        example: inputs of the model, as arrays or `jax.ShapeDtypeStruct`s; they are only traced.
        seed: a seed for A and for the dropout of the low-rank path.

    Returns:
        The adapted model, which you then compile.

    Raises:
        RuntimeError: if Keras has another backend than JAX.
        TypeError: if `model` is not a model of Keras.
        ValueError: if a rule matches no weight, or a weight that it cannot adapt; if the model is
            not built, or two of its weights have the same path.

    Examples:
        >>> import jlora.keras, keras, numpy as np
        >>> dense = keras.layers.Dense(3)
        >>> model, x = keras.Sequential([keras.layers.Input([4]), dense]), np.ones((2, 4))
        >>> adapted = jlora.keras.adapt(model, jlora.LoRA("kernel", rank=2), example=x)
        >>> adapted.compile("adam", "mse")
        >>> _ = adapted.fit(x, np.ones((2, 3)), verbose=0)
        >>> adapted.merge().predict(x, verbose=0).shape
        (2, 3)
    """
    check_int("`seed`", seed, 0)
    found = _weights(model)

    def pure(params: Any, inputs: Any) -> Any:
        with keras.StatelessScope([(v, params[v.path]) for v in model.weights if v.path in params]):
            return model(inputs)

    base, adapter = transform(pure, *rules).init(jax.random.key(seed), found, example)
    for v in model.weights:
        if v.path in found and base[v.path] is not found[v.path]:  # by an initializer
            v.assign(base[v.path])
    return Adapted(model, adapter, seed=seed)


def _weights(model: Any) -> dict[str, jax.Array]:
    """Returns the weights of a model by their paths."""
    if keras.backend.backend() != "jax":
        raise RuntimeError(
            f"Keras has the backend {keras.backend.backend()!r}; expected 'jax'. Set "
            "KERAS_BACKEND=jax in the environment before Keras is imported."
        )
    if not isinstance(model, keras.Layer):
        raise TypeError(f"`model` must be a model of Keras; got {type(model).__name__}.")
    if not model.built:
        raise ValueError(
            f"`model` {model.name!r} is not built, so it has no weights yet. Call it once, or give "
            "it an Input."
        )
    found = {v.path: v.value for v in model.weights}
    if len(found) < len(model.weights):
        counts = collections.Counter(v.path for v in model.weights)
        [(path, n)] = counts.most_common(1)
        raise ValueError(
            f"`model` has {n} weights with the path {path}, which an adapter could not tell apart. "
            "Give each layer its own name."
        )
    return found

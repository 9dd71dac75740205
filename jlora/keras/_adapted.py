r"""A model of Keras with an adapter, for `compile` and `fit`.

$$\mathrm{adapted}(x) = \mathrm{model}_{W + s \cdot A B}(x)$$
"""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from .._adapters import is_node
from .._merge import merge
from .._rules import check_int
from .._site import Rule
from .._transform import dropout, transform
from .._tree import bind, leaves_by_path, name_of
from .._types import Holder, PyTree
from ._masks import GetMask, SetMask

# Names of an adapter's variables: of jlora, and of a layer's `enable_lora`.
OWN = re.compile(r"lora_(\d+|\w+_[ab])")


class Adapted(Holder, keras.Model):
    r"""A model that computes what `model` computes with W + s·A·B instead of each adapted W.

    `compile`, `fit`, `evaluate`, `predict`, callbacks and `save_weights` work as usual, and train
    only the adapter. To save or serve the adapter without the base, use `adapter`. `trainable` is
    that of the adapter. If the base is made trainable, the lists of variables raise.

    Args:
        model: a built model. Its variables are shared, not copied, and become untrainable. So batch
            normalization uses its moving statistics, as in any frozen layer of Keras.
        adapter: an adapter of the model's weights by their paths, such as
            `sequential/dense/kernel`; for example from `jlora.checkpoint.restore`.
        params: weights by their paths that replace those of the model. Needed if an initializer
            changed W (`LowRank.residual`).
        seed: a seed for the dropout of the low-rank path, which is active in training.

    Attributes:
        base: the model.
        params: the weights by their paths: those of the model, or what replaces them.
        adapter: a copy of the adapter as a tree of arrays, for all other functions of jlora.

    Raises:
        RuntimeError: if Keras has another backend than JAX. Later, if the base is trainable.
        TypeError: if `model` is not a model of Keras, or `adapter` is not an adapter.
        ValueError: if `adapter` or `params` do not fit the model; if the model is not built, has an
            adapter already, or has two weights with the same path.

    Examples:
        >>> import jlora.keras, keras, numpy as np
        >>> model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(3)])
        >>> jlora.keras.Adapted(model, {}).predict(np.ones((2, 4)), verbose=0).shape
        (2, 3)
    """

    def __init__(
        self,
        model: keras.Layer,
        adapter: PyTree,
        *,
        params: Mapping[str, jax.Array] | None = None,
        seed: int = 0,
    ) -> None:
        replaced = _check_params(_weights(model), {} if params is None else params, adapter)
        super().__init__(name=f"{model.name}_adapted", autocast=False)
        self.base = model
        model.trainable = False
        leaves, self._structure = jax.tree.flatten(adapter)
        # Named by numbers, because the patterns of a layout map may match the names of W.
        self._own = [self._add(f"lora_{i}", x, True) for i, x in enumerate(leaves)]
        items = enumerate(replaced.items())
        self._replaced = {path: self._add(f"base_{i}", x, False) for i, (path, x) in items}
        self._adapted = {name_of(path) for path in dict(leaves_by_path(adapter, is_node))}
        self._masks = keras.random.SeedGenerator(seed)
        self._is_merged = False
        self._changed = set[str]()
        self.built = True

    def _add(self, name: str, x: jax.Array, trainable: bool) -> Any:
        return self.add_weight(
            name=name,
            shape=x.shape,
            dtype=x.dtype,
            initializer=lambda shape, dtype=None: jnp.copy(x),  # Keras donates its variables
            trainable=trainable,
            autocast=False,
        )

    @property
    def adapter(self) -> PyTree:
        """A copy of the adapter as a tree of arrays."""
        return jax.tree.map(jnp.copy, self._values())

    def _values(self) -> PyTree:
        return jax.tree.unflatten(self._structure, [v.value for v in self._own])

    @property
    def params(self) -> dict[str, jax.Array]:
        """The weights by their paths: those of the model, or what replaces them."""
        replaced = {path: v.value for path, v in self._replaced.items()}
        return {v.path: v.value for v in self.base.weights} | replaced

    @property
    def trainable(self) -> bool:
        """Whether the adapter is trainable; the base never is."""
        return super().trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.Model.trainable.__set__(self, value)  # which reaches all parts of a model
        self.base.trainable = False

    def find_state(self) -> list[str]:
        """Lists weights of the base that are not trained, but that calls have changed."""
        return [v.path for v in self.base.weights if v.path in self._changed]

    def merge(self) -> Any:
        """Puts W + s·A·B into the variables of the base, and returns the base.

        The adapted model cannot be used afterward, because it would add s·A·B twice. `merged` is
        another name of it.

        Raises:
            RuntimeError: if it was called before.
        """
        self._refuse_merged()
        merged = merge(self.params, self.adapter)
        for v in self.base.weights:
            if v.path in self._adapted or v.path in self._replaced:
                v.assign(merged[v.path])
        self._is_merged = True
        # Functions that Keras has compiled would not raise.
        self.train_function = self.test_function = self.predict_function = None
        return self.base

    merged = merge

    def _refuse_merged(self) -> None:
        if self._is_merged:
            raise RuntimeError("this model was merged into its base: call the base instead.")

    @property
    def variables(self) -> list[Any]:
        """All variables, also of the base; raises if it has become trainable."""
        return self._check_frozen(super().variables)

    @property
    def weights(self) -> list[Any]:
        """All weights, also those of the base; raises if it has become trainable."""
        return self._check_frozen(super().weights)

    def _check_frozen(self, found: list[Any]) -> list[Any]:
        """Returns `found`. Keras asks for them before it trains, and in a step it would be late."""
        if freed := [v.path for v in self.base.weights if v.trainable]:
            raise RuntimeError(
                f"{len(freed)} weights of the base have become trainable, such as {freed[0]}, but "
                "only the adapter is trained. Set adapted.base.trainable = False. To train a "
                "weight too, adapt it by jlora.Full(path)."
            )
        return found

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Raises as `get_config` does, before Keras makes a file."""
        self.get_config()

    def get_config(self) -> dict[str, Any]:
        """Raises `NotImplementedError`: adapters are saved without their base."""
        raise NotImplementedError(
            "an adapted model has no configuration. Save the adapter by "
            "jlora.checkpoint.save(path, adapted, rules), its variables by adapted.save_weights, "
            "or the merged model by adapted.merge().save(path)."
        )

    def call(self, inputs: PyTree, training: bool | None = None) -> Any:
        """Returns what the adapted model returns."""
        self._refuse_merged()
        own = self._adapted.union(self._replaced)
        weights = [v for v in self.base.variables if v.path in own]
        others = [v for v in self.base.variables if v.path not in own]
        # Keras knows a loss by its id: those of the trace live until this model has its own.
        scopes = []

        def pure(params: Mapping[str, jax.Array], values: Sequence[jax.Array]) -> Any:
            pairs = [*((v, params[v.path]) for v in weights), *zip(others, values, strict=True)]
            with keras.StatelessScope(pairs, collect_losses=True) as scope:
                outputs = self.base(inputs, training=training)
                masks = jax.tree.map(GetMask(), outputs)
            scopes.append(scope)
            return outputs, masks, [scope.get_current_value(v) for v in others], scope.losses

        adapter = self._values()
        if training:
            adapter = dropout(adapter, self._masks.next())
        values = [v.value for v in others]
        params = {path: x for path, x in self.params.items() if path in own}
        outputs, masks, new, losses = transform(pure).apply(params, adapter, values)
        for v, old, x in zip(others, values, new, strict=True):
            if x is not old:
                v.assign(x)
                self._changed.add(v.path)
        for x in losses:
            self.add_loss(x)
        return jax.tree.map(lambda x, mask: SetMask(mask)(x), outputs, masks)


def adapt(model: keras.Model, *rules: Rule, example: PyTree, seed: int = 0) -> Adapted:
    """Adapts a model by rules.

    If an initializer changes W, as `jlora.initializers.pissa` does, the adapted model keeps the
    changed W beside the model's own, until `merge` puts W + s·A·B there.

    Args:
        model: a built model. Its values do not change.
        *rules: as for `jlora.transform`. They match the paths of Keras, such as
            `sequential/dense/kernel`.
        example: inputs of the model, as arrays or `jax.ShapeDtypeStruct`s; they are only traced.
        seed: a seed for A and for the dropout of the low-rank path.

    Returns:
        The adapted model, which you then compile.

    Raises:
        RuntimeError: if Keras has another backend than JAX.
        TypeError: if `model` is not a model of Keras.
        ValueError: if a rule matches no weight, or a weight that it cannot adapt; if an initializer
            quantizes W; if the model is not built, has an adapter already, or has two weights with
            the same path; if `seed` is not an integer of at least 0.

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
    check_int("seed", seed, 0)
    found = _weights(model)

    def pure(params: Mapping[str, jax.Array], inputs: PyTree) -> Any:
        with keras.StatelessScope([(v, params[v.path]) for v in model.weights if v.path in params]):
            return model(inputs)

    base, adapter = transform(pure, *rules).init(jax.random.key(seed), found, example)
    return Adapted(model, adapter, params=base, seed=seed)


def _check_params(
    found: Mapping[str, jax.Array], params: Mapping[str, jax.Array], adapter: PyTree
) -> dict[str, jax.Array]:
    """Returns those of `params` that replace weights; raises unless the adapter fits them."""
    replaced = {path: x for path, x in params.items() if x is not found.get(path)}
    for path, x in replaced.items():
        is_array = isinstance(x, jax.Array | np.ndarray)
        if not is_array or path not in found or x.shape != found[path].shape:
            raise ValueError(
                "weights that replace those of `model` must be arrays of their paths and shapes; "
                f"got {type(x).__name__} of shape {getattr(x, 'shape', None)} at {path}."
            )
    bind({**found, **replaced}, adapter)  # raises unless it fits
    nodes = {name_of(path): x for path, x in leaves_by_path(adapter, is_node) if is_node(x)}
    missing = [path for path, x in nodes.items() if x.residual and path not in replaced]
    if missing:
        raise ValueError(
            f"an initializer changed the weights at {', '.join(missing)}, to which the adapter "
            "belongs. Give them too, params=adapted.params of the model that `adapt` returned."
        )
    return replaced


def _weights(model: keras.Layer) -> dict[str, jax.Array]:
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
    if own := [v.path for v in model.weights if OWN.fullmatch(v.name)]:
        raise ValueError(
            "`model` must not have an adapter already, but has variables of one, such as "
            f"{own[0]}. Give adapted.merge() or adapted.base. Of a model with `enable_lora`, load "
            "the file of model.save_weights, which merges, into the same model without it."
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

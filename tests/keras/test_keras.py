"""Models of Keras with an adapter: what the transform computes, in Keras's own loop."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import processes
import pytest
from messages import all_refused, check_text, refused
from own_methods import Diagonal, Gain
from small import every, raw, some

import jlora.keras
from jlora import DoRA, Full, LoRA, Rows, checkpoint
from jlora.keras import Adapted, adapt

# Of Keras, which makes NumPy's arrays of its variables.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
layers = keras.layers
X = np.random.default_rng(0).standard_normal((64, 16)).astype("float32")
LABELS = X[:, :4].argmax(-1).astype("int32")


class Penalty(layers.Layer):
    """Adds a loss, as layers of experts do."""

    def call(self, x: Any) -> Any:
        """Returns its input."""
        self.add_loss(keras.ops.mean(x**2))
        return x


def network(policy: str = "float32") -> Any:
    """Two dense layers, with statistics, a mask that is drawn, and a loss of its own."""
    dense = [layers.Dense(n, "relu", dtype=policy, name=f"dense_{n}") for n in (32, 4)]
    between = [layers.BatchNormalization(dtype=policy), layers.Dropout(0.1), Penalty()]
    return keras.Sequential([layers.Input([16]), dense[0], *between, dense[1]], name="network")


def words(policy: str = "float32") -> Any:
    """A table, in which each column of X looks up a row, and a dense layer."""
    as_ids = layers.Lambda(lambda x: keras.ops.cast(x > 0, "int32"), output_shape=(16,))
    table = layers.Embedding(4, 8, dtype=policy, name="table")
    rest = [layers.Flatten(), layers.Dense(4, dtype=policy, name="dense_4")]
    return keras.Sequential([layers.Input([16]), as_ids, table, *rest], name="words")


def noisy(adapted: Adapted) -> Adapted:
    """With a B that is not zero."""
    for v in adapted.trainable_variables:
        v.assign(v.value + 0.1)
    return adapted


def weights(model: Any) -> dict[str, Any]:
    """Its values by path."""
    return {v.path: v.value for v in model.weights}


# Every method, two of them somebody else's.
RULES = (
    LoRA("kernel", rank=2),
    DoRA("kernel", rank=2),
    Full("kernel"),
    Rows("words/table/embeddings", (0, 1)),
    Gain(".*kernel"),
    Diagonal(".*kernel"),
)
POLICIES = "float32", "mixed_bfloat16"


@pytest.mark.parametrize(
    ("rule", "policy"),
    every(RULES, POLICIES, daily=[(RULES[0], POLICIES[1])]),
)
def test_a_call_is_that_of_the_transform(rule: Any, policy: str) -> None:
    model = words(policy) if isinstance(rule, Rows) else network(policy)
    adapted = noisy(adapt(model, rule, example=X))

    def call(params: Any, x: Any) -> Any:
        values = [(v, params[v.path]) for v in model.weights]
        with keras.StatelessScope(values):
            return model(x)

    params = weights(model)
    within = 1e-5 if policy == "float32" else 0.05
    expected = jax.jit(jlora.transform(call, rule).apply)(params, adapted.adapter, X)
    np.testing.assert_allclose(adapted(X), expected, within, within)
    found = adapted.predict(X, verbose=0)
    np.testing.assert_allclose(found, expected, within, within)
    assert adapted.merge() is model
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, within, within)


def test_fit_trains_the_adapter_alone() -> None:
    model = network()
    before = raw(weights(model))
    adapted = adapt(model, LoRA("kernel", rank=4, dropout=0.1), example=X, seed=1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    adapted.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    stop = keras.callbacks.EarlyStopping("loss", patience=20, restore_best_weights=True)
    found = adapted.fit(X, LABELS, epochs=20, batch_size=32, callbacks=[stop], verbose=0).history
    assert found["loss"][-1] < found["loss"][0] - 0.3
    assert len(adapted.trainable_variables) == 4
    assert len(adapted.optimizer.variables) == 2 + 2 * 4
    assert raw(weights(model)) == before
    drawn = [v for v in model.variables if "seed" in v.path]
    assert [int(v.value[1]) for v in drawn] == [40]  # two batches in each of 20 epochs


class Mean(layers.Layer):
    """Subtracts a mean that training moves, whatever is frozen."""

    def build(self, shape: Any) -> None:
        """Makes the mean."""
        self.mean = self.add_weight(name="mean", shape=shape[1:], trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        """Moves it."""
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(x, 0))
        return x - self.mean


def test_state_is_not_lost_with_the_adapter(tmp_path: Any) -> None:
    """What training has changed in the base is; frozen statistics and drawn masks are not."""
    for more, names in (([], []), ([Mean(name="moved")], ["state/moved/mean"])):
        parts = [layers.Dense(4, name="dense"), layers.BatchNormalization(), layers.Dropout(0.1)]
        model = keras.Sequential([layers.Input([16]), *parts, *more], name="state")
        adapted = adapt(model, LoRA("kernel", rank=2), example=X)
        adapted.compile("adam", "mse")
        adapted.fit(X, X[:, :4], verbose=0)
        assert adapted.find_state() == names
        check = refused(ValueError, "adapter", "state/moved/mean", "Give adapted.adapter")
        with check if names else contextlib.nullcontext():
            checkpoint.save(tmp_path / "a", adapted, [LoRA("kernel", rank=2)])


def test_a_whole_model_is_not_saved(tmp_path: Any) -> None:
    """And no part of a file is left."""
    adapted = adapt(network(), LoRA("kernel", rank=2), example=X)
    remedy = "jlora.checkpoint.save(path, adapted, rules)"
    with refused(NotImplementedError, "", "no configuration", remedy):
        adapted.save(tmp_path / "adapted.keras")
    with refused(NotImplementedError, "", "no configuration", remedy):
        keras.models.clone_model(keras.Sequential([layers.Input([16]), adapted]))
    assert not list(tmp_path.iterdir())


def test_the_adapter_lives_on() -> None:
    """Whatever the models do that were made of it: Keras donates its variables' arrays."""
    model = network()
    adapted = noisy(adapt(model, LoRA("dense_32/kernel", rank=2), Full("dense_4"), example=X))
    adapted.compile("adam", "sparse_categorical_crossentropy")
    adapter = adapted.adapter
    values = jax.tree.map(np.asarray, adapter)
    other = Adapted(network(), adapter)
    for x in (adapted, other):
        x.predict(X, verbose=0)
    adapted.merge().predict(X, verbose=0)
    for found in (adapter, adapted.adapter, other.adapter):
        jax.tree.map(np.testing.assert_array_equal, found, values)


def test_dropout_of_the_low_rank_path_acts_in_training() -> None:
    model = keras.Sequential([layers.Input([16]), layers.Dense(4)])
    adapted = noisy(adapt(model, LoRA("kernel", rank=2, dropout=0.5), example=X))
    first, second = adapted(X, training=True), adapted(X, training=True)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(adapted(X), adapted(X))


def test_losses_and_masks_are_those_of_the_model() -> None:
    model = network()
    adapted = adapt(model, LoRA("kernel", rank=2), example=X)
    for x in (model, adapted):
        x.compile("sgd", "mse")
    zeros = np.zeros((64, 4))
    found = [x.evaluate(X, zeros, verbose=0) for x in (adapted, model)]
    assert found[0] == pytest.approx(found[1])
    assert found[1] > np.mean(model.predict(X, verbose=0) ** 2) + 0.1
    ids = np.array([[1, 2, 0]], "int32")
    table = layers.Embedding(9, 4, mask_zero=True)
    words = keras.Sequential([layers.Input([3], dtype="int32"), table, layers.Dense(2)])
    adapted = adapt(words, LoRA("kernel", rank=2), example=ids)
    adapted.compile("sgd", "mse")
    words.compile("sgd", "mse")
    found = [x.evaluate(ids, np.ones((1, 3, 2)), verbose=0) for x in (adapted, words)]
    assert found[0] == pytest.approx(found[1])  # over two positions of the three


def test_each_loss_counts_once() -> None:
    """Keras knows a loss by its id, which Python gives to another one when the first has gone."""

    class Many(layers.Layer):
        """Adds many losses."""

        def call(self, x: Any) -> Any:
            """Returns its input."""
            for _ in range(100):
                self.add_loss(keras.ops.mean(x**2))
            return x

    model = keras.Sequential([layers.Input([16]), Many(), layers.Dense(2)])
    adapted = adapt(model, LoRA("kernel", rank=2), example=X)

    def count(x: Any) -> Any:
        with keras.StatelessScope([], collect_losses=True):
            adapted(x)
            assert len(adapted.losses) == 100
        return x

    for _ in range(8):
        jax.eval_shape(lambda x: count(x), X)  # traced each time


PISSA = LoRA("kernel", rank=2, init=jlora.initializers.pissa)


def test_a_base_that_a_start_changes(tmp_path: Any) -> None:
    """Stays as it is, beside what the start made of it, until the merge."""
    model = network()
    before = raw(weights(model))
    expected = model.predict(X, verbose=0)
    adapted = adapt(model, PISSA, example=X)
    np.testing.assert_allclose(adapted(X), expected, atol=1e-5)
    changed = noisy(adapted)(X)
    assert not np.allclose(changed, expected, atol=1e-2)
    assert raw(weights(model)) == before

    adapted.save_weights(tmp_path / "own.weights.h5")
    other = adapt(network(), PISSA, example=X, seed=3)
    other.load_weights(tmp_path / "own.weights.h5")
    np.testing.assert_array_equal(other(X), changed)
    on_host = jax.tree.map(np.asarray, adapted.params)
    for params in (adapted.params, on_host):
        again = Adapted(model, adapted.adapter, params=params)
        np.testing.assert_array_equal(again(X), changed)
    with refused(ValueError, "", "weights at network/dense_32/kernel", "params=a"):
        Adapted(model, adapted.adapter)
    np.testing.assert_allclose(
        adapted.merged().predict(X, verbose=0), changed, rtol=1e-5, atol=1e-5
    )


def test_weights_are_not_copied() -> None:
    adapted = adapt(network(), LoRA("kernel", rank=2), example=X)
    assert len(adapted.weights) == len(adapted.base.weights) + 4


@pytest.mark.parametrize("outer", some([False, True], True))
def test_a_frozen_model_that_is_freed_trains_the_adapter_alone(outer: bool) -> None:
    """As the discriminator of a GAN is, alone or as a part of a model."""
    model = network()
    before = raw(weights(model))
    adapted = adapt(model, LoRA("kernel", rank=2), example=X)
    whole = keras.Sequential([layers.Input([16]), adapted]) if outer else adapted
    own = [np.array(v.value) for v in adapted.trainable_variables]
    for trainable in (False, True):
        whole.trainable = trainable
        assert adapted.trainable is trainable and model.trainable is False
        assert len(whole.trainable_weights) == 4 * trainable
        whole.compile(keras.optimizers.SGD(0.1), "mse")
        whole.fit(X, X[:, :4], verbose=0)
        moved = [
            not np.array_equal(v.value, w) for v, w in zip(adapted.weights[:4], own, strict=True)
        ]
        assert any(moved) == trainable
    assert raw(weights(model)) == before


@pytest.mark.parametrize("part", some(["model", "layer"], "layer"))
@pytest.mark.parametrize("compiled", some([False, True], True))
def test_a_base_that_is_freed_is_refused(part: str, compiled: bool) -> None:
    """Also where Keras compiled its step before."""
    model = network()
    adapted = adapt(model, LoRA("kernel", rank=2), example=X)
    adapted.compile("sgd", "mse")
    if compiled:
        adapted.fit(X, X[:, :4], verbose=0)
    (model if part == "model" else model.layers[0]).trainable = True
    before = raw(weights(model))
    with refused(RuntimeError, "", "have become trainable, such as network/d"):
        adapted.fit(X, X[:, :4], verbose=0)
    assert raw(weights(model)) == before
    adapted.base.trainable = False
    adapted.fit(X, X[:, :4], verbose=0)


@pytest.mark.parametrize("use", ["__call__", "predict", "merge"])
def test_a_merged_model_is_refused(use: str) -> None:
    """Also where Keras compiled its call before; s·A·B would be added twice."""
    adapted = noisy(adapt(network(), LoRA("kernel", rank=2), example=X))
    adapted.predict(X, verbose=0)
    adapted.merge()
    with pytest.raises(RuntimeError, match="this model was merged into its base: call the base"):
        adapted.merge() if use == "merge" else getattr(adapted, use)(X)


class Twins(keras.Model):
    """Two layers of one name."""

    def __init__(self) -> None:
        """Makes the layers."""
        super().__init__(name="twins")
        self.first, self.second = layers.Dense(16, name="d"), layers.Dense(16, name="d")

    def call(self, x: Any) -> Any:
        """Calls both."""
        return self.second(self.first(x))


def twins() -> Any:
    model = Twins()
    model(X)
    return model


def with_lora() -> Any:
    """A model with an adapter of Keras's own."""
    model = network()
    model.layers[0].enable_lora(2)
    return model


KERNEL = LoRA("kernel", rank=2)
CODED = LoRA("kernel", rank=2, init=jlora.initializers.loftq(jlora.Int8()))
UNBUILT = keras.Sequential([layers.Dense(3)], name="bare")
MISTAKES: dict[type[Exception], dict[str, Any]] = {
    TypeError: {"`model` ... got dict": lambda: adapt({}, example=X)},
    ValueError: {
        "`model` ... 'bare' is not built": lambda: adapt(UNBUILT, LoRA(), example=X),
        "`params` ... LoRA('kernol')": lambda: adapt(network(), LoRA("kernol"), example=X),
        "`model` ... 2 weights ... twins/d/kernel": lambda: adapt(twins(), LoRA(), example=X),
        "`seed` ... got -1": lambda: adapt(network(), LoRA(), example=X, seed=-1),
        "`model` ... an adapter already ... network_adapted/lora_0": lambda: adapt(
            adapt(network(), KERNEL, example=X), LoRA(), example=X
        ),
        "`model` ... must not have an adapter already": lambda: Adapted(
            keras.Sequential([layers.Input([16]), adapt(network(), KERNEL, example=X)]), {}
        ),
        "`model` ... network/dense_32/lora_kernel_a. ... without it": lambda: adapt(
            with_lora(), LoRA(), example=X
        ),
        "arrays of their paths ... got Quantized of shape (16, 32) at net": lambda: adapt(
            network(), CODED, example=X
        ),
        "got int of shape None at network/dense": lambda: Adapted(
            network(), {}, params={"network/dense": 1}
        ),
        "of shape (3,) at network/dense": lambda: Adapted(
            network(), {}, params={"network/dense": jnp.ones(3)}
        ),
    },
}


test_mistakes = all_refused(MISTAKES)


def test_without_a_backend() -> None:
    """Of an import without a setting, Keras says only that TensorFlow is missing."""
    done = processes.run("-c", "import jlora.keras", env={"KERAS_BACKEND": "tensorflow"})
    assert done.returncode == 1
    check_text(done.stderr.splitlines()[-1])

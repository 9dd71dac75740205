"""`jlora.optimizer` on the adapter alone and on `Params` in Flax's `TrainState`.

The law behind most tests: both forms make the same adapter, and the base is not touched, whatever
its gradients are.
"""

import functools
import itertools
from typing import Any, NamedTuple

import chain
import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from small import raw, some, some_rows

import jlora

FORMS = pytest.mark.parametrize("form", some(["adapter", "params"], "params"))


class Setup(NamedTuple):
    """A transform of a model, base and adapter, and one batch."""

    lora: jlora.types.Transformed
    base: Any
    adapter: Any
    batch: tuple[jax.Array, jax.Array]

    def tree(self, form: str) -> Any:
        """What the optimizer is given: the adapter, or both trees."""
        return self.adapter if form == "adapter" else jlora.Params(self.base, self.adapter)

    def grads(self, n: int, form: str = "adapter", fill: float = 1.0) -> list[Any]:
        """Gradients of the adapter at `n` batches, beside ones of the base that are all `fill`."""
        x, y = self.batch
        grads = [slope(self.lora, self.adapter, self.base, (x + i, (i - 1) * y)) for i in range(n)]
        full = lambda: jax.tree.map(lambda x: np.full_like(x, fill), self.base)  # noqa: E731
        return [g if form == "adapter" else jlora.Params(full(), g) for g in grads]

    def state(self, form: str, tx: Any) -> TrainState:
        """Flax's state of one of the forms."""
        return TrainState.create(apply_fn=self.lora.apply, params=self.tree(form), tx=tx)


def loss(lora: jlora.types.Transformed, adapter: Any, base: Any, batch: Any) -> jax.Array:
    """Mean squared error."""
    x, y = batch
    return jnp.mean((lora.apply(base, adapter, x).astype(jnp.float32) - y) ** 2)


slope = jax.jit(jax.grad(loss, 1), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(lora: jlora.types.Transformed, state: TrainState, base: Any, batch: Any) -> TrainState:
    """A step as users write it; with `Params` in the state `base` is None."""
    if base is None:
        grads = jax.grad(lambda p: loss(lora, p.adapter, p.base, batch))(state.params)
    else:
        grads = jax.grad(loss, 1)(lora, state.params, base, batch)
    return state.apply_gradients(grads=grads)


def setup(kind: str = "scan", width: int = 8, depth: int = 3, dtype: Any = jnp.float32) -> Setup:
    """A chain of low-rank layers under a full head; zeros of both signs in the base."""
    rng = np.random.default_rng(0)
    shapes = {"w": (depth, width, width)} if "scan" in kind else {}
    shapes = shapes or {f"w{i}": (width, width) for i in range(depth)}
    shapes = {"layers": shapes, "head": {"w": (width, 2), "bias": (2,)}}

    def draw(shape: tuple[int, ...]) -> jax.Array:
        values = rng.standard_normal(shape) / width**0.5
        values[..., 0], values[..., 1] = -0.0, 0.0
        return jnp.asarray(values, dtype)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return chain.FORMS[kind](params["layers"], x) @ params["head"]["w"] + params["head"]["bias"]

    params = jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))
    low_rank = jlora.LoRA("layers/.*", rank=2, init=random)
    lora, x = jlora.transform(apply, low_rank, jlora.Full("head")), draw((4, width))
    return Setup(lora, *lora.init(jax.random.key(2), params, x), (x, jnp.ones((4, 2))))


random = functools.partial(laws.start, of_b=0.1)  # at B = 0 a wrong gradient of A would not show


@pytest.fixture(scope="module")
def small() -> Setup:
    """The scanned model."""
    return setup()


def frozen_a(tree: Any) -> Any:
    """A tree of nodes whose A is not trained, as that of a rule with `frozen=("a",)`."""
    is_node = lambda x: isinstance(x, jlora.types.LowRank)  # noqa: E731
    freeze = lambda x: x._replace(frozen=("a",)) if is_node(x) else x  # noqa: E731
    return jax.tree.map(freeze, tree, is_leaf=is_node)


def with_lora_plus(tx: Any, ratio: Any = 4) -> Any:
    """`tx`, with another learning rate for B."""
    return jlora.optimizer(optax.chain(tx, jlora.lora_plus(ratio)))


def size(tree: Any) -> int:
    """The bytes of all leaves."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def norm(tree: Any) -> Any:
    """The Euclidean norm over all leaves."""
    return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


def run(tx: Any, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    """Parameters and state after a compiled step with each of `grads`; the loss is given too."""

    @jax.jit
    def step(params: Any, state: Any, g: Any) -> tuple[Any, Any]:
        updates, state = tx.update(g, state, params, value=jnp.ones(()))
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for g in grads:
        params, state = step(params, state, g)
    return params, state


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Leaf by leaf, relative to the largest entry."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * float(np.abs(y).max()))


# ------------------------------------------------------------------------------------ the base


@pytest.mark.parametrize("freeze_a", some([False, True], True))
@pytest.mark.parametrize("dtype", some([jnp.float32, jnp.bfloat16], jnp.float32))
def test_base_is_unchanged_after_100_steps(dtype: Any, freeze_a: bool) -> None:
    """Under weight decay, clipping and LoRA+, compiled, every byte; every adapter leaf moves."""
    s = setup(dtype=dtype)
    s = s._replace(adapter=frozen_a(s.adapter)) if freeze_a else s
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1))
    state = s.state("params", with_lora_plus(tx, 16))
    before, adapter = raw(s.base), jax.device_get(s.adapter)
    start = float(loss(s.lora, s.adapter, s.base, s.batch))
    for _ in range(100):
        state = step(s.lora, state, None, s.batch)
    assert int(state.step) == 100
    assert raw(state.params.base) == before
    assert np.signbit(np.asarray(state.params.base["layers"]["w"][..., 0])).all()
    changed = jax.tree.map(lambda x, y: bool(np.all(x != y)), state.params.adapter, adapter)
    assert changed == jlora.mask(adapter)
    assert loss(s.lora, state.params.adapter, state.params.base, s.batch) < start


def test_frozen_a_is_not_in_the_clipping_norm(small: Setup) -> None:
    """What is frozen has no part in the norm of what is trained."""
    tx = jlora.optimizer(optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0)))
    grads, adapter = map(frozen_a, (*small.grads(1), small.adapter))
    updates, _ = tx.update(grads, tx.init(adapter), adapter)
    np.testing.assert_allclose(norm(updates), 1e-3, rtol=1e-5)


# ----------------------------------------------------------------------------- state and memory


@FORMS
@pytest.mark.parametrize("freeze_a", [False, True])
def test_moments_are_two_trees_of_what_is_trained(small: Setup, form: str, freeze_a: bool) -> None:
    """Nothing in the state of Adam stands for the base, nor for a frozen A."""
    tx = with_lora_plus(optax.adamw(1e-2))
    adapter = frozen_a(small.adapter) if freeze_a else small.adapter
    tree = adapter if form == "adapter" else jlora.Params(small.base, adapter)
    state = jax.eval_shape(tx.init, tree)
    leaves, kept = map(jax.tree.leaves, (adapter, jlora.mask(adapter)))
    trained = [x.shape for x in itertools.compress(leaves, kept)]
    moments = [x.shape for x in jax.tree.leaves(state) if x.ndim]
    assert sorted(moments) == sorted(2 * trained)
    if not freeze_a:
        assert 0 <= size(state) - 2 * jlora.summary(small.base, small.adapter).trainable_bytes <= 16


STACKS = {
    "loop": {"kind": "plain", "depth": 8},
    "scan": {"kind": "scan", "depth": 16},
    "scan_of_remat": {"kind": "scan+remat", "depth": 16},
}


@FORMS
@pytest.mark.parametrize("stack", some(STACKS, "scan"))
def test_a_step_holds_nothing_of_the_size_of_the_base(stack: str, form: str) -> None:
    """By XLA's own account: the base once, as an argument, and no gradient or moment of it."""
    s = setup(width=256, **STACKS[stack])
    tx = with_lora_plus(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), 16)
    base, adapter = size(s.base), size(s.adapter)
    assert adapter < base / 30
    given = None if form == "params" else s.base
    memory = step.lower(s.lora, s.state(form, tx), given, s.batch).compile().memory_analysis()
    new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # A scan copies out the weights of the layer that it is at: one layer in 16.
    assert new < base / 4
    arguments = memory.argument_size_in_bytes
    assert base + 3 * adapter <= arguments < base + 3 * adapter + 16_384
    assert memory.alias_size_in_bytes >= 3 * adapter + (base if form == "params" else 0)


# ------------------------------------------------------------------------- LoRA+ and LoRA-FA

RATES = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.1),
    "adafactor": lambda rate: optax.adafactor(rate, multiply_by_parameter_scale=False),
}


@FORMS
@pytest.mark.parametrize("name", some(RATES, "adafactor"))
def test_lora_plus_is_a_learning_rate_of_its_own_for_b(small: Setup, name: str, form: str) -> None:
    """As two runs: B with 16 times the rate, everything else with the rate. Bit for bit."""
    grads = small.grads(2, form)
    plus = with_lora_plus(RATES[name](2**-7), 16.0)
    slow, fast = (jlora.optimizer(RATES[name](rate)) for rate in (2**-7, 2**-3))
    tree = small.tree(form)
    states = [tx.init(tree) for tx in (plus, slow, fast)]
    for g in grads:  # at the same parameters, as the decay of B depends on B
        updates = []
        for i, tx in enumerate((plus, slow, fast)):
            u, states[i] = tx.update(g, states[i], tree)
            updates.append(u)
        expected = jax.tree.map(
            lambda name, slow, fast: fast if name == "b" else slow, jlora.labels(tree), *updates[1:]
        )
        assert raw(updates[0]) == raw(expected)


@FORMS
def test_freeze_a_trains_the_rest_as_before(small: Setup, form: str) -> None:
    """A stays bit for bit; without a norm across leaves the others do as they did."""
    grads = small.grads(2, form)
    tree, tx = small.tree(form), with_lora_plus(optax.adamw(1e-2))
    frozen, _ = run(tx, frozen_a(tree), list(map(frozen_a, grads)))
    free, _ = run(tx, tree, grads)
    expected = jax.tree.map(
        lambda name, old, new: old if name == "a" else new, jlora.labels(tree), tree, free
    )
    assert_close(frozen, expected)
    pairs = zip(*map(jax.tree.leaves, (jlora.labels(tree), tree, frozen)), strict=True)
    assert all(raw(old) == raw(new) for label, old, new in pairs if label == "a")


@FORMS
def test_lora_plus_of_an_array(small: Setup, form: str) -> None:
    """As of a number, in the dtype of the updates, also where it is traced."""
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.tree(form))

    def updates(ratio: Any) -> Any:
        tx = with_lora_plus(optax.sgd(1.0), ratio)
        return tx.update(tree, tx.init(tree), tree)[0]

    for f in (updates, jax.jit(updates)):
        assert raw(f(jnp.asarray(16.0))) == raw(updates(16))


@pytest.mark.parametrize("tx", [jlora.lora_plus(16), jlora.precondition(1e-6)])
def test_what_acts_on_a_and_b_needs_an_adapter(small: Setup, tx: Any) -> None:
    for call in (tx.init, lambda tree: tx.update(tree, optax.EmptyState(), tree)):
        with pytest.raises(TypeError, match="acts on the A and B of an adapter, but the tree has"):
            call(small.base)


def test_extra_arguments_are_those_that_the_caller_gave(small: Setup) -> None:
    """Optax hands them to functions of the user's."""
    double = optax.scale(2.0)
    tx = optax.conditionally_transform(double, lambda _, value: value > 0, forward_extra_args=True)
    tree = jlora.Params(small.base, small.adapter)
    wrapped = jlora.optimizer(tx)
    updates, _ = wrapped.update(tree, wrapped.init(tree), tree, value=1.0)
    expected, _ = double.update(small.adapter, double.init(small.adapter))
    assert raw(updates.adapter) == raw(expected)


# ----------------------------------------------------------------------------- serialization


def trained(s: Setup, form: str, state: Any, steps: int) -> Any:
    """`state` after some steps, each of them the same compiled program."""
    x, y = s.batch
    state = jax.tree.map(jnp.copy, state)  # a step donates it
    for _ in range(steps):
        state = step(s.lora, state, None if form == "params" else s.base, (x + state.step, y))
    return state


def through_bytes(like: Any, tree: Any) -> Any:
    """Saved and loaded as msgpack."""
    return serialization.from_bytes(like, serialization.to_bytes(tree))


def through_dict(like: Any, tree: Any) -> Any:
    """Saved and loaded as nested dicts with string keys."""
    return serialization.from_state_dict(like, serialization.to_state_dict(tree))


@pytest.mark.parametrize("through", some([through_bytes, through_dict], through_bytes))
@pytest.mark.parametrize("form", some(["adapter", "params"], "adapter"))
def test_training_goes_on_from_a_saved_state(small: Setup, form: str, through: Any) -> None:
    """Three steps, saved and loaded over a fresh state, three more: as six, bit for bit."""
    tx = optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(optax.linear_schedule(1e-2, 0.0, 6))
    )
    s = small._replace(adapter=frozen_a(small.adapter))
    start = s.state(form, with_lora_plus(tx, 16))
    expected = trained(s, form, start, 6)
    half = trained(s, form, start, 3)
    fresh = start.replace(params=jax.tree.map(jnp.zeros_like, start.params))
    restored = through(fresh, half)
    assert jax.tree.structure(restored) == jax.tree.structure(half)
    assert raw(restored) == raw(half)
    after = trained(s, form, restored, 3)
    assert raw(after) == raw(expected)
    assert raw(after) != raw(half)


def test_a_saved_adapter_keeps_what_is_static() -> None:
    """Scale, layout, slots and flags are those that were saved, not those of the target."""

    def adapt(alpha: float, chosen: tuple[int, ...]) -> Any:
        rule = jlora.LoRA("w", rank=2, alpha=alpha, slots=jlora.Slots(3, chosen), dropout=0.1)
        lora = jlora.transform(lambda p, x: x @ p["w"], rule)
        return lora.init(jax.random.key(0), {"w": jnp.ones((4, 6))}, jnp.ones((1, 4)))[1]

    saved, other = adapt(3.0, (0, 2)), adapt(5.0, (1, 2))
    for through in (through_bytes, through_dict):
        restored = through(jax.tree.map(jnp.zeros_like, other), saved)
        assert jax.tree.structure(restored) == jax.tree.structure(saved)
        assert raw(restored) == raw(saved)
    assert isinstance(through_bytes(other, saved)["w"], jlora.types.LowRank)


def test_a_state_dict_names_the_factors(small: Setup) -> None:
    """The names that a file shows are those of the fields."""
    saved = serialization.to_state_dict(small.tree("params"))
    assert set(saved) == {"base", "adapter"}
    assert set(saved["adapter"]["layers"]["w"]) == set(jlora.types.LowRank._fields)
    assert set(saved["adapter"]["head"]) == {"w", "bias"}


# -------------------------------------------------------------------------------- composition


def is_b(tree: Any) -> Any:
    """True for B alone."""
    return jax.tree.map(lambda name: name == "b", jlora.labels(tree))


COMPOSED = {
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1e-3), optax.adamw(1e-2)),
    "schedule": lambda: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 4)),
    "multi_steps": lambda: optax.MultiSteps(optax.adamw(1e-2), 2).gradient_transformation(),
    "hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "mask": lambda: optax.adamw(1e-2, weight_decay=0.5, mask=jlora.mask),
    "mask_by_label": lambda: optax.adamw(1e-2, weight_decay=0.5, mask=is_b),
    "mask_by_shape": lambda: optax.adamw(
        1e-2, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "partition_by_label": lambda: optax.partition(
        {"a": optax.sgd(0.1), "b": optax.adam(0.2), "full": optax.lion(1e-3)}, jlora.labels
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 2),
    "centralize": lambda: optax.chain(optax.centralize(), optax.adam(1e-2)),
    "adafactor": lambda: optax.adafactor(1e-2),
    "on_plateau": lambda: optax.chain(
        optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)
    ),
}
DAILY = {("clip", False), ("multi_steps", False), ("mask_by_label", True), ("on_plateau", False)}


@pytest.mark.parametrize(
    ("name", "freeze_a"),
    some_rows([(n, f) for n in COMPOSED for f in (False, True)[: 1 + ("by_" in n)]], *DAILY),
)
def test_both_forms_agree_under(small: Setup, name: str, freeze_a: bool) -> None:
    """Any optax transformation trains the adapter as if it were alone, even beside NaN."""
    freeze = frozen_a if freeze_a else lambda tree: tree
    alone, both = (
        list(map(freeze, small.grads(4, form, jnp.nan))) for form in ("adapter", "params")
    )
    adapter, tx = freeze(small.adapter), with_lora_plus(COMPOSED[name](), 4.0)
    alone, state = run(tx, adapter, alone)
    both, wide_state = run(tx, jlora.Params(small.base, adapter), both)
    assert_close(both.adapter, alone)
    assert raw(both.base) == raw(small.base)
    assert raw(alone) != raw(adapter)
    assert size(wide_state) == size(state)


@FORMS
def test_an_injected_rate_can_be_changed(small: Setup, form: str) -> None:
    """The rate that is written into the state is the one that is used, on all labels."""
    [grads] = small.grads(1, form)
    make = lambda rate: with_lora_plus(optax.sgd(rate), 2)  # noqa: E731
    tx = optax.inject_hyperparams(make)(rate=0.5)
    state = tx.init(small.tree(form))
    before, state = tx.update(grads, state, small.tree(form))
    state.hyperparams["rate"] = jnp.asarray(0.25)
    after, _ = tx.update(grads, state, small.tree(form))
    assert raw(jax.tree.map(lambda u: u / 2, before)) == raw(after)
    assert any(np.any(u) for u in jax.tree.leaves(after))


# ------------------------------------------------------------------------------------- labels


def test_labels_and_mask(small: Setup) -> None:
    """Every leaf by what it is, in the structure of the tree; shapes are enough."""
    tree = small.tree("params")
    assert jlora.labels(jax.eval_shape(lambda: tree)) == jlora.labels(tree)
    labels = jlora.labels(tree)
    assert jax.tree.structure(labels) == jax.tree.structure(tree)
    assert jlora.labels(tree.adapter) == labels.adapter
    assert set(jax.tree.leaves(labels.base)) == {"base"}
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): name
        for path, name in jax.tree_util.tree_flatten_with_path(labels.adapter)[0]
    }
    low_rank = {f"layers/w/{x}": x for x in "ab"}
    assert flat == low_rank | {"head/w": "full", "head/bias": "full"}
    assert jlora.mask(tree) == jax.tree.map(lambda name: name != "base", labels)
    assert all(jax.tree.leaves(jlora.mask(tree.adapter)))


@pytest.mark.parametrize("bare", [jnp.ones((4, 4)), [jnp.ones((4, 4))]])
def test_labels_of_trees_without_names(bare: Any) -> None:
    """Parameters that are one array, or a list."""
    f = lambda p, x: x @ jax.tree.leaves(p)[0]  # noqa: E731
    lora = jlora.transform(f, jlora.LoRA(rank=2))
    both = jlora.Params(*lora.init(jax.random.key(0), bare, jnp.ones((1, 4))))
    assert sorted(jax.tree.leaves(jlora.labels(both))) == ["a", "b", "base"]
    tx = jlora.optimizer(optax.adamw(1e-2))
    after, _ = run(tx, both, [jax.tree.map(jnp.ones_like, both)])
    assert raw(after.base) == raw(both.base)

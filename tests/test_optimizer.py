"""`jlora.optimizer` on the adapter alone and on `Params` in Flax's `TrainState`; labels and masks.

The law behind most tests: both forms make the same adapter, and the base is not touched, whatever
its gradients are. The docstrings of `jlora.mask` and `jlora.optimizer` say the rest.
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
from messages import refused
from small import KEY, as_jax, dense, every, raw, set_up, some, some_rows

import jlora
from jlora._tree import leaves_by_path, name_of, size_in_bytes

FORMS = pytest.mark.parametrize("form", some(["adapter", "params"], "params"))
random = functools.partial(laws.start, of_b=0.1)  # at B = 0 a wrong gradient of A would not show


class Setup(NamedTuple):
    """A transform of a model, base and adapter, and one batch."""

    lora: jlora.types.Transformed
    base: Any
    adapter: Any
    batch: tuple[jax.Array, jax.Array]

    def tree(self, form: str) -> Any:
        """What the optimizer is given: the adapter, or both trees."""
        return self.adapter if form == "adapter" else jlora.Params(self.base, self.adapter)

    def grads(self, form: str = "adapter", fill: float = 1.0) -> list[Any]:
        """Of two steps, beside ones of the base that are all `fill`."""
        of = lambda i: jax.tree.map(lambda x: np.cos(np.asarray(x) + i), self.adapter)  # noqa: E731
        full = lambda: jax.tree.map(lambda x: np.full_like(x, fill), self.base)  # noqa: E731
        return [of(i) if form == "adapter" else jlora.Params(full(), of(i)) for i in range(2)]

    def frozen(self) -> "Setup":
        """A is not trained, as by a rule with `frozen=("a",)`."""
        node = self.adapter["layers"]["w"]._replace(frozen=("a",))
        return self._replace(adapter=self.adapter | {"layers": {"w": node}})


def setup(kind: str = "scan", width: int = 8, depth: int = 3, dtype: Any = jnp.float32) -> Setup:
    """A chain of low-rank layers under a full head; zeros of both signs in the base."""
    rng = np.random.default_rng(0)
    shapes = {"w": (depth, width, width)} if "scan" in kind else {}
    shapes = shapes or {f"w{i}": (width, width) for i in range(depth)}
    shapes = {"layers": shapes, "head": {"w": (width, 2), "bias": (2,)}}

    def draw(shape: tuple[int, ...]) -> jax.Array:
        values = rng.standard_normal(shape) / width**0.5
        values[..., 0], values[..., 1] = -0.0, 0.0
        return as_jax(values, dtype)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return chain.FORMS[kind](params["layers"], x) @ params["head"]["w"] + params["head"]["bias"]

    params = jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))
    low_rank = jlora.LoRA("layers/.*", rank=2, init=random)
    lora, x = jlora.transform(apply, low_rank, jlora.Full("head")), draw((4, width))
    return Setup(lora, *lora.init(KEY, params, x), (x, jnp.ones((4, 2))))


@pytest.fixture(scope="module")
def small() -> Setup:
    """The scanned model."""
    return setup()


def loss(lora: jlora.types.Transformed, adapter: Any, base: Any, batch: Any) -> jax.Array:
    """Mean squared error."""
    x, y = batch
    return jnp.mean((lora.apply(base, adapter, x).astype(jnp.float32) - y) ** 2)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(lora: jlora.types.Transformed, state: TrainState, base: Any, batch: Any) -> Any:
    """A step as users write it, and its loss; with `Params` in the state `base` is None."""

    def of(params: Any) -> jax.Array:
        pair = (params.adapter, params.base) if base is None else (params, base)
        return loss(lora, *pair, batch)

    value, grads = jax.value_and_grad(of)(state.params)
    return state.apply_gradients(grads=grads), value


def with_lora_plus(tx: Any, ratio: Any = 4) -> Any:
    """`tx`, with another learning rate for B."""
    return jlora.optimizer(optax.chain(tx, jlora.lora_plus(ratio)))


def run(tx: Any, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    """Parameters and state after steps with each of `grads`, in one program; a loss is given."""

    @jax.jit
    def steps(params: Any, grads: list[Any]) -> tuple[Any, Any]:
        state = tx.init(params)
        for g in grads:
            updates, state = tx.update(g, state, params, value=jnp.ones(()))
            params = optax.apply_updates(params, updates)
        return params, state

    return steps(params, grads)


# ------------------------------------------------------------------------------------ the base


@pytest.mark.parametrize("freeze_a", some([False, True], True))
@pytest.mark.parametrize("dtype", some([jnp.float32, jnp.bfloat16], jnp.float32))
def test_base_is_unchanged_after_100_steps(dtype: Any, freeze_a: bool) -> None:
    """Under weight decay, clipping and LoRA+, compiled, every byte; every adapter leaf moves."""
    s = setup(dtype=dtype).frozen() if freeze_a else setup(dtype=dtype)
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1))
    tree = jax.tree.map(jnp.asarray, s.tree("params"))
    state = TrainState.create(apply_fn=s.lora.apply, params=tree, tx=with_lora_plus(tx, 16))
    before, adapter, losses = raw(s.base), jax.device_get(s.adapter), []
    for _ in range(100):
        state, value = step(s.lora, state, None, s.batch)
        losses.append(float(value))
    assert int(state.step) == 100
    assert raw(state.params.base) == before
    assert np.signbit(np.asarray(state.params.base["layers"]["w"][..., 0])).all()
    changed = jax.tree.map(lambda x, y: bool(np.all(x != y)), state.params.adapter, adapter)
    assert changed == jlora.mask(adapter)
    assert losses[-1] < losses[0]


def test_frozen_a_is_not_in_the_clipping_norm(small: Setup) -> None:
    """What is frozen has no part in the norm of what is trained."""
    tx, s = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0)), small.frozen()
    tx = jlora.optimizer(tx)
    update = jax.jit(lambda tree, g: tx.update(g, tx.init(tree), tree)[0])
    squares = [np.sum(np.square(x)) for x in jax.tree.leaves(update(s.adapter, s.grads()[0]))]
    np.testing.assert_allclose(np.sqrt(sum(squares)), 1e-3, rtol=1e-5)


@FORMS
@pytest.mark.parametrize("freeze_a", [False, True])
def test_moments_are_two_trees_of_what_is_trained(small: Setup, form: str, freeze_a: bool) -> None:
    """Nothing in the state of Adam stands for the base, nor for a frozen A."""
    s = small.frozen() if freeze_a else small
    state = jax.eval_shape(with_lora_plus(optax.adamw(1e-2)).init, s.tree(form))
    leaves, kept = map(jax.tree.leaves, (s.adapter, jlora.mask(s.adapter)))
    trained = [x.shape for x in itertools.compress(leaves, kept)]
    moments = [x.shape for x in jax.tree.leaves(state) if x.ndim]
    assert sorted(moments) == sorted(2 * trained)
    if not freeze_a:
        assert (
            0 <= size_in_bytes(state) - 2 * jlora.summary(s.base, s.adapter).trainable_bytes <= 16
        )


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
    base, adapter = size_in_bytes(s.base), size_in_bytes(s.adapter)
    assert adapter < base / 30
    create = functools.partial(TrainState.create, apply_fn=s.lora.apply, tx=tx)
    state = jax.eval_shape(lambda tree: create(params=tree), s.tree(form))
    given = None if form == "params" else s.base
    memory = step.lower(s.lora, state, given, s.batch).compile().memory_analysis()
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
@pytest.mark.parametrize("name", some(RATES, "adamw"))
def test_lora_plus_is_a_learning_rate_of_its_own_for_b(small: Setup, name: str, form: str) -> None:
    """As two runs: B with 16 times the rate, everything else with the rate. Bit for bit."""
    plus = with_lora_plus(RATES[name](2**-7), 16.0)
    each = plus, *(jlora.optimizer(RATES[name](rate)) for rate in (2**-7, 2**-3))

    @jax.jit
    def updates(tree: Any, grads: list[Any]) -> Any:
        found = []
        for tx in each:  # at the same parameters, as the decay of B depends on B
            state = tx.init(tree)
            for g in grads:
                update, state = tx.update(g, state, tree)
            found.append(update)
        return found

    tree = small.tree(form)
    actual, slow, fast = updates(tree, small.grads(form))
    labels = jlora.labels(tree)
    assert raw(actual) == raw(jax.tree.map(lambda n, *x: x[n == "b"], labels, slow, fast))


@FORMS
def test_freeze_a_trains_the_rest_as_before(small: Setup, form: str) -> None:
    """A stays bit for bit; without a norm across leaves the others do as they did."""
    tx, s = with_lora_plus(optax.adamw(1e-2)), small.frozen()
    free, _ = run(tx, small.tree(form), small.grads(form))
    frozen, _ = run(tx, s.tree(form), s.grads(form))
    labels = jax.tree.leaves(jlora.labels(small.tree(form)))
    each = zip(labels, *map(jax.tree.leaves, (small.tree(form), free, frozen)), strict=True)
    for label, old, new, found in each:
        if label == "a":
            assert raw(found) == raw(old)
        else:
            laws.assert_close(found, new, 1e-6)


@FORMS
def test_lora_plus_of_an_array(small: Setup, form: str) -> None:
    """As of a number, in the dtype of the updates, also where it is traced."""
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.tree(form))

    def updates(tree: Any, ratio: Any) -> Any:
        tx = with_lora_plus(optax.sgd(1.0), ratio)
        return tx.update(tree, tx.init(tree), tree)[0]

    number, array = (jax.jit(lambda tree, x=x: updates(tree, x)) for x in (16, jnp.asarray(16.0)))
    traced = jax.jit(updates)(tree, jnp.asarray(16.0))
    assert raw(array(tree)) == raw(traced) == raw(number(tree))


@pytest.mark.parametrize("tx", [jlora.lora_plus(16), jlora.precondition(1e-6)])
def test_what_acts_on_a_and_b_needs_an_adapter(small: Setup, tx: Any) -> None:
    for call in (tx.init, lambda tree: tx.update(tree, optax.EmptyState(), tree)):
        with refused(TypeError, "", "acts on the A and B of an adapter, but the tree has"):
            call(small.base)


# ----------------------------------------------------------------------------- serialization


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
    s, (x, y) = small.frozen(), small.batch
    schedule = optax.linear_schedule(1e-2, 0.0, 6)
    tx = with_lora_plus(optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(schedule)), 16)

    def trained(state: Any, steps: int) -> Any:
        state = jax.tree.map(jnp.copy, state)  # a step donates it
        for _ in range(steps):
            batch = x + state.step, y
            state, _ = step(s.lora, state, None if form == "params" else s.base, batch)
        return state

    start = TrainState.create(apply_fn=s.lora.apply, params=s.tree(form), tx=tx)
    expected, half = trained(start, 6), trained(start, 3)
    fresh = start.replace(params=jax.tree.map(np.zeros_like, start.params))
    restored = through(fresh, half)
    assert jax.tree.structure(restored) == jax.tree.structure(half)
    assert raw(restored) == raw(half)
    after = trained(restored, 3)
    assert raw(after) == raw(expected)
    assert raw(after) != raw(half)


def test_a_saved_adapter_keeps_what_is_static(small: Setup) -> None:
    """Scale, layout, slots and flags are those that were saved; a file's names are the fields'."""

    def adapt(alpha: float, chosen: tuple[int, ...]) -> Any:
        rule = jlora.LoRA("w", rank=2, alpha=alpha, slots=jlora.Slots(3, chosen), dropout=0.1)
        lora = jlora.transform(lambda p, x: x @ p["w"], rule)
        return lora.init(KEY, {"w": jnp.ones((4, 6))}, jnp.ones((1, 4)))[1]

    saved, other = adapt(3.0, (0, 2)), adapt(5.0, (1, 2))
    for through in (through_bytes, through_dict):
        restored = through(jax.tree.map(np.zeros_like, other), saved)
        assert jax.tree.structure(restored) == jax.tree.structure(saved)
        assert raw(restored) == raw(saved)
    names = serialization.to_state_dict(small.tree("params"))
    assert set(names) == {"base", "adapter"}
    assert set(names["adapter"]["layers"]["w"]) == set(jlora.types.LowRank._fields)


# -------------------------------------------------------------------------------- composition


def is_b(tree: Any) -> Any:
    """True for B alone."""
    return jax.tree.map(lambda name: name == "b", jlora.labels(tree))


ZERO = optax.set_to_zero()  # of a factor that is frozen
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
        {"a": optax.sgd(0.1), "b": optax.adam(0.2), "full": optax.lion(1e-3), "base": ZERO},
        jlora.labels,
    ),
    "conditionally": lambda: optax.conditionally_transform(
        optax.scale(-2.0), lambda _, value: value > 0, forward_extra_args=True
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 2),
    "centralize": lambda: optax.chain(optax.centralize(), optax.adam(1e-2)),
    "adafactor": lambda: optax.adafactor(1e-2),
    "on_plateau": lambda: optax.chain(
        optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)
    ),
}
DAILY = {("multi_steps", False), ("mask_by_label", True), ("conditionally", False)}


@pytest.mark.parametrize(
    ("name", "freeze_a"),
    some_rows([(n, f) for n in COMPOSED for f in (False, True)[: 1 + ("by_" in n)]], *DAILY),
)
def test_both_forms_agree_under(small: Setup, name: str, freeze_a: bool) -> None:
    """Any optax transformation trains the adapter as if it were alone, even beside NaN."""
    s = small.frozen() if freeze_a else small
    tx = with_lora_plus(COMPOSED[name](), 4.0)
    alone, state = run(tx, s.adapter, s.grads())
    both, wide_state = run(tx, s.tree("params"), s.grads("params", np.nan))
    laws.assert_close(both.adapter, alone, 1e-6)
    assert raw(both.base) == raw(s.base)
    assert raw(alone) != raw(s.adapter)
    assert size_in_bytes(wide_state) == size_in_bytes(state)


SEARCHES = {  # transformations that evaluate functions of the parameters, with their arguments
    "lbfgs": (lambda: optax.lbfgs(), ("value", "grad", "value_fn")),
    "sam": (lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), ()),
    "sam opaque": (
        lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True),
        ("grad_fn",),
    ),
}


@pytest.mark.parametrize(
    ("name", "freeze_a"),
    every(SEARCHES, [False, True], daily=[("lbfgs", False), ("sam opaque", True)]),
)
def test_functions_of_the_parameters_get_all_of_them(name: str, freeze_a: bool) -> None:
    """On either form the same step, and with A frozen that of B alone."""
    frozen = ("a",) if freeze_a else ()
    rule = jlora.LoRA("w", rank=2, alpha=2, init=random, frozen=frozen)
    lora, base, adapter = set_up(dense, rule, {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)))
    make, wanted = SEARCHES[name]

    def stepped(tree: Any, loss: Any, tx: Any) -> Any:
        @jax.jit
        def step(tree: Any, state: Any) -> tuple[Any, Any]:
            value, grad = jax.value_and_grad(loss)(tree)
            slope = lambda tree, _: jax.grad(loss)(tree)  # noqa: E731
            extra = {"value": value, "grad": grad, "value_fn": loss, "grad_fn": slope}
            given = {k: extra[k] for k in wanted}
            updates, state = tx.update(grad, state, tree, **given)
            return optax.apply_updates(tree, updates), state

        state = tx.init(tree)
        for _ in range(2):
            tree, state = step(tree, state)
        return tree

    def loss(base: Any, adapter: Any) -> jax.Array:
        return jnp.square(lora.apply(base, adapter, jnp.eye(4)) - 2).sum()

    tx = jlora.optimizer(make())
    alone = stepped(adapter, lambda a: loss(base, a), tx)
    both = stepped(jlora.Params(base, adapter), lambda p: loss(*p), tx)
    laws.assert_close(both.adapter, alone, 1e-5)
    assert raw(both.base) == raw(base)
    if freeze_a:
        node = adapter["w"]
        of_b = stepped(node.b, lambda b: loss(base, {"w": node._replace(b=b)}), make())
        laws.assert_close(alone["w"].b, of_b, 1e-5)
    assert (raw(alone["w"].a) == raw(adapter["w"].a)) == freeze_a


# --------------------------------------------------------------------------- labels and masks


def test_labels_and_mask(small: Setup) -> None:
    """Every leaf by what it is, in the structure of the tree; shapes are enough."""
    tree = small.tree("params")
    labels = jlora.labels(jax.eval_shape(lambda: tree))
    assert labels == jlora.labels(tree)
    assert jlora.labels(tree.adapter) == labels.adapter
    assert set(jax.tree.leaves(labels.base)) == {"base"}
    flat = {name_of(path): name for path, name in leaves_by_path(labels.adapter)}
    low_rank = {f"layers/w/{x}": x for x in "ab"}
    assert flat == low_rank | {"head/w": "full", "head/bias": "full"}
    assert jlora.mask(tree) == jax.tree.map(lambda name: name != "base", labels)
    assert all(jax.tree.leaves(jlora.mask(tree.adapter)))


def beside(**others: Any) -> jlora.Params:
    """A base with `others` beside its weight, and an adapter."""
    lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2, init=random))
    return jlora.Params(*lora.init(KEY, {"w": jnp.ones((4, 3))} | others, jnp.ones((1, 4))))


def ones(tx: Any, params: Any, steps: int = 1) -> tuple[Any, Any]:
    """Parameters and state after steps whose gradients are all ones, also those of the base."""
    return run(tx, params, [jax.tree.map(np.ones_like, params)] * steps)


SGD = optax.sgd(0.5)
FROZEN = {"frozen": ZERO, "base": ZERO}
FREEZING = {
    "optimizer": jlora.optimizer(SGD),
    "by mask": optax.partition(
        {"trained": SGD} | FROZEN,
        lambda p: jax.tree.map({True: "trained", False: "frozen"}.get, jlora.mask(p)),
    ),
    "by labels": optax.partition(dict.fromkeys(("a", "b", "full"), SGD) | FROZEN, jlora.labels),
    "steps outside": optax.MultiSteps(jlora.optimizer(SGD), 1).gradient_transformation(),
}


@pytest.mark.parametrize("name", FREEZING)
def test_what_freezes_the_base(name: str) -> None:
    """The base stays, also integers and keys of the old kind; the adapter takes SGD's step."""
    params = beside(seed=jax.random.PRNGKey(7), steps=jnp.arange(3))
    after, state = ones(FREEZING[name], params)
    assert raw(after.base) == raw(params.base)
    assert raw(after.adapter) == raw(jax.tree.map(lambda x: np.asarray(x) - 0.5, params.adapter))
    accumulates = (4, 3) in {x.shape for x in jax.tree.leaves(state)}
    assert accumulates == (name == "steps outside")  # the gradients of the base as well
    if name == "optimizer":  # by -0.0, the zero that leaves every float as it was
        updates, _ = FREEZING[name].update(after, state, params)
        assert np.signbit(updates.base["w"]).all()


def test_keys_in_the_base() -> None:
    """`optax.apply_updates` cannot add to a key, so `init` says it, also of shapes."""
    params, tx = beside(rngs={"key": KEY}), jlora.optimizer(optax.adam(1e-3))
    for init in (tx.init, lambda p: jax.eval_shape(tx.init, p), jax.jit(tx.init)):
        with refused(TypeError, "params", "at base/rngs/key", "train the adapter alone."):
            init(params)
    tx.init(params.adapter)


@pytest.mark.parametrize("bare", [jnp.ones((4, 4)), [jnp.ones((4, 4))]], ids=["array", "list"])
def test_labels_of_trees_without_names(bare: Any) -> None:
    """Parameters that are one array, or a list."""
    f = lambda p, x: x @ jax.tree.leaves(p)[0]  # noqa: E731
    lora = jlora.transform(f, jlora.LoRA(rank=2))
    both = jlora.Params(*lora.init(KEY, bare, jnp.ones((1, 4))))
    assert sorted(jax.tree.leaves(jlora.labels(both))) == ["a", "b", "base"]
    after, _ = ones(jlora.optimizer(SGD), both)
    assert raw(after.base) == raw(both.base)

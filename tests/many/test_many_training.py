"""Training many adapters at once: slot i of a table is the single run i, whatever the others do.

The laws of `init` run over the cases of `cases`, those of the optimizer over `OPTIMIZERS`: each run
apart, one diverged among them, some that take no part, and new ones in the place of others.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
import small
from cases import CASES, Case
from messages import all_refused, refused
from small import ADAPTED, PARAMS, X, assert_close, raw, some, some_rows

import jlora
from jlora import Full, LoRA, many

N = 3
KEYS = jax.random.split(jax.random.key(7), N)


def slot(tree: Any, i: Any) -> Any:
    """What a table, or a state, has for one run."""
    return jax.tree.map(lambda x: x[i], tree)


def stack(trees: list[Any]) -> Any:
    """Trees of one structure, along a new first axis."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


# ------------------------------------------------------------------------------------------- init


def fits(case: Case) -> bool:
    """Whether an adapter of the case can be trained, and mapped over."""
    return case.vmap and case.grad and case.jit and case.sites > 0 and not case.leaks


ENTRIES = [
    pytest.param(case, id=case.name, marks=[] if case.name == "scan_layers" else pytest.mark.slow)
    for case in filter(fits, CASES)
]


@pytest.mark.parametrize("case", ENTRIES)
def test_slots_are_the_single_runs(case: Case) -> None:
    """The base itself, and to rounding the draws, values and gradients of the mapped loss."""
    dtype = jnp.float64 if case.float64 else jnp.float32
    with laws.precision(case, dtype) as tolerance:
        tolerance *= 1 if case.float64 else 5  # both programs round, each in its own way
        problem = case.build(dtype)
        lora = jlora.transform(problem.apply, *case.rules)
        given = (problem.params, *problem.args)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\w+\(\) does not adapt \d+ weights")
            base, table = many.init(lora, KEYS, *given, **problem.kwargs)
            singles = [lora.init(key, *given, **problem.kwargs)[1] for key in KEYS]
        for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(problem.params), strict=True):
            assert x is y
        for i, single in enumerate(singles):
            assert jax.tree.structure(table) == jax.tree.structure(single)
            laws.assert_close(slot(table, i), single, 1e-6)

        def value(adapter: Any, *args: Any) -> Any:
            return laws.floats(lora.apply(base, adapter, *args, **problem.kwargs))

        f, noisy = laws.value_and_slope(value), [laws.randomize(single) for single in singles]
        shared = [None] * len(problem.args)
        actual = jax.jit(jax.vmap(f, in_axes=(0, *shared)))(stack(noisy), *problem.args)
        alone = jax.jit(f)
        for i, single in enumerate(noisy):
            expected = alone(single, *problem.args)
            laws.assert_close(slot(actual, i), expected, tolerance)


RATES = jnp.array([1e-2, 3e-2, 1e-1])
RANKS, STEPS = [1, 3, 2], 20
# The rules of one rank, and a named rule beside one that clips its rank.
RULES = {
    "alpha": (lambda r: (LoRA("kernel", rank=r, alpha=2.0 * r), Full("bias")), 3),
    "rslora": (lambda r: (LoRA("kernel", rank=r, alpha=2.0 * np.sqrt(r), rslora=True),), 4),
    "clipped": (lambda r: (LoRA(rank=r, alpha=0.5 * r, init=jlora.initializers.gaussian),), 7),
    "dora": (lambda r: (jlora.DoRA("kernel", rank=r, alpha=2.0 * r),), 3),
    "slots": (lambda r: (LoRA("fused", rank=r, alpha=r, slots=jlora.Slots(2, (0, 1))),), 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_ranks_are_those_of_single_runs(name: str) -> None:
    """Padded: the draws of each rank, 0 beyond it throughout, and the same run with decay."""
    rules, largest = RULES[name]
    lora = jlora.transform(small.model, *rules(largest))
    base, table = many.init(lora, KEYS, PARAMS, X, ranks=RANKS)
    assert all(x is y for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(PARAMS), strict=True))
    of_table = jax.eval_shape(lora.init, KEYS[0], PARAMS, X)[1]
    assert jax.tree.structure(of_table) == jax.tree.structure(table)
    assert jax.tree.map(lambda x, y: x.shape[1:] == y.shape, table, of_table)
    tx = many.optimizer(clipped_adamw, learning_rate=RATES, weight_decay=0.1)
    trained, curves = train(lora, base, table, tx, mapped=True)
    for i, rank in enumerate(RANKS):
        single = jlora.transform(small.model, *rules(rank))
        _, adapter = single.init(KEYS[i], PARAMS, X)
        expected, curve = train(single, base, adapter, clipped_adamw(float(RATES[i]), 0.1))
        assert_padded(slot(table, i), adapter, 1e-6)
        assert_padded(slot(trained, i), expected, 1e-5)
        np.testing.assert_allclose(curves[:, i], curve, rtol=1e-5)
        assert curve[-1] < 0.95 * curve[0]


def clipped_adamw(learning_rate: Any, weight_decay: Any) -> Any:
    return optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(learning_rate, weight_decay=weight_decay)
    )


def loss(lora: Any, adapter: Any, base: Any) -> jax.Array:
    """Of a target that takes some steps."""
    return jnp.mean((lora.apply(base, adapter, X) - 1) ** 2)


def train(lora: Any, base: Any, adapter: Any, tx: Any, mapped: bool = False) -> Any:
    """An adapter, or a table of them, after some steps, and the losses of these."""
    slope = jax.value_and_grad(functools.partial(loss, lora))
    slope = jax.vmap(slope, (0, None)) if mapped else slope
    state, losses = tx.init(adapter), []

    @jax.jit
    def step(adapter: Any, state: Any) -> Any:
        value, grads = slope(adapter, base)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    for _ in range(STEPS):
        adapter, state, value = step(adapter, state)
        losses.append(value)
    return adapter, np.array(losses)


def assert_padded(actual: Any, adapter: Any, tolerance: float) -> None:
    """`actual` must be the adapter, and beyond its rank exactly 0."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(adapter), strict=True):
        inside = tuple(map(slice, y.shape))
        laws.assert_close(x[inside], y, tolerance)
        assert not np.any(np.asarray(x.at[inside].set(0)))


def absorbed(key: Any, w: Any, site: Any, rule: Any) -> Any:
    """A part of W that follows from W alone, or from a key, goes from the base to A and B."""
    shape = (site.inputs, rule.rank)
    a = w[:, : rule.rank] if key is None else jax.random.normal(key, shape)
    b = jnp.ones((rule.rank, site.outputs))
    return w - rule.scale * a @ b, a, b


def of_w_alone(_: Any, *args: Any) -> Any:
    return absorbed(None, *args)


def test_a_base_that_follows_from_the_weights_alone_is_shared() -> None:
    lora = jlora.transform(small.model, LoRA("fused", rank=2, init=of_w_alone))
    base, table = jax.jit(lambda params: many.init(lora, KEYS, params, X, ranks=[2] * 3))(PARAMS)
    expected, adapter = jax.jit(lambda params: lora.init(KEYS[0], params, X))(PARAMS)
    laws.assert_close((base, slot(table, 2)), (expected, adapter), 1e-6)
    assert many.init(lora, KEYS, PARAMS, X)[0]["position"] is PARAMS["position"]


@pytest.mark.parametrize(
    ("start", "ranks", "reason"), [(absorbed, None, "key"), (of_w_alone, RANKS, "rank")]
)
def test_a_base_for_each_run_is_refused(start: Any, ranks: Any, reason: str) -> None:
    lora = jlora.transform(small.model, LoRA("kernel|fused", rank=3, init=start))
    with refused(ValueError, "", "fused, layer/kernel", f"for each {reason},", "train one by one"):
        many.init(lora, KEYS, PARAMS, X, ranks=ranks)


def test_init_is_traced_and_abstract() -> None:
    """Under `jit`, of old keys and new, and on shapes, with quantized weights in the base."""
    params = jlora.quantize(PARAMS, jlora.Int8("fused"))
    rules = LoRA("fused", rank=2), jlora.DoRA("kernel", rank=2), Full("bias")
    make = functools.partial(many.init, jlora.transform(small.model, *rules), ranks=[2, 1, 2])
    expected = jax.jit(make)(KEYS, params, X)
    laws.assert_close(jax.jit(make)(jax.random.key_data(KEYS), params, X), expected, 1e-6)
    shapes = jax.eval_shape(make, KEYS, params, X)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, expected)


# -------------------------------------------------------------------------------------- optimizers


def scheduled(peak: Any, warmup: Any) -> Any:
    """Integers and floats, traced, in a schedule."""
    return optax.sgd(lambda count: peak * jnp.minimum(1.0, (count + 1) / warmup), momentum=0.9)


def lora_plus(ratio: Any) -> Any:
    """With keys in its state."""
    noisy = optax.add_noise(0.1, 0.5, key=1)
    return jlora.optimizer(optax.chain(noisy, optax.adam(1e-2), jlora.lora_plus(ratio)))


def preconditioned(damping: Any) -> Any:
    """With the matrices of each run."""
    return jlora.optimizer(optax.chain(jlora.precondition(damping), optax.sgd(1e-2)))


# A transformation or a function of hyperparameters, and these.
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (clipped_adamw, {"learning_rate": RATES, "weight_decay": 0.1}),
    "sgd": (optax.sgd, {"learning_rate": RATES}),
    "scheduled": (scheduled, {"peak": RATES, "warmup": jnp.array([1, 2, 4])}),
    "lora_plus": (lora_plus, {"ratio": jnp.array([1.0, 4.0, 16.0])}),
    "wrapped": (jlora.optimizer(optax.adamw(1e-2)), {}),
    "accumulated": (optax.MultiSteps(optax.adam(1e-2), 2), {}),
    "plateau": (optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)), {}),
    "adafactor": (optax.adafactor(1e-2), {}),
    "preconditioned": (preconditioned, {"damping": jnp.array([1e-3, 1e-2, 1.0])}),
}
EACH = pytest.mark.parametrize("name", some(OPTIMIZERS, "lora_plus"))
ROUNDS, BAD = 4, 1


@functools.cache
def table_and_grads() -> tuple[Any, list[Any]]:
    """A table of random adapters, and gradients of each step."""
    lora = jlora.transform(small.model, *ADAPTED)
    one = lora.init(KEYS[0], PARAMS, X)[1]
    table = laws.randomize(jax.tree.map(lambda x: np.stack([x] * N), one))
    of_step = lambda i: jax.tree.map(lambda x: jnp.asarray(np.cos(x * (i + 1))), table)  # noqa: E731
    return table, list(map(of_step, range(ROUNDS)))


class Run:
    """Compiled steps of one optimizer, which count how often they are traced.

    Of `many`, or of a single run, which is told its hyperparameters as arguments.
    """

    def __init__(self, name: str, single: bool = False) -> None:
        """Compiles nothing yet."""
        self.traced = 0
        make, hyperparams = OPTIMIZERS[name]
        self.tx = None if single else many.optimizer(make, **hyperparams)
        self.extra = {"value": jnp.ones(() if single else N)} if name == "plateau" else {}

        def of(values: dict[str, Any]) -> Any:
            tx = self.tx or (make(**values) if values else make)
            return optax.with_extra_args_support(tx)

        def step(values: Any, table: Any, state: Any, grads: Any, kwargs: Any) -> Any:
            self.traced += 1
            updates, state = of(values).update(grads, state, table, **kwargs)
            return optax.apply_updates(table, updates), state

        self.init, self.step = jax.jit(lambda values, table: of(values).init(table)), jax.jit(step)

    def __call__(
        self, table: Any, grads: list[Any], state: Any = None, values: Any = None, **kwargs: Any
    ) -> Any:
        """Table and state after a step with each of `grads`."""
        values = values or {}
        state = self.init(values, table) if state is None else state
        for g in grads:
            table, state = self.step(values, table, state, g, {**self.extra, **kwargs})
        return table, state


run_of = functools.cache(Run)


def alone(name: str, i: int, table: Any, grads: list[Any]) -> Any:
    """The run of slot `i` by itself."""
    values = {k: jnp.broadcast_to(v, N)[i] for k, v in OPTIMIZERS[name][1].items()}
    return run_of(name, True)(table, grads, values=values)


@pytest.mark.parametrize("name", some(OPTIMIZERS, "lora_plus"))
def test_each_run_is_its_own(name: str) -> None:
    """Parameters and states of each slot are those of a single run; the state is no larger."""
    table, grads = table_and_grads()
    actual, state = run_of(name)(table, grads)
    assert list(state.steps) == [ROUNDS] * N and all(state.running)
    for i in range(N):
        expected, inner = alone(name, i, slot(table, i), [slot(g, i) for g in grads])
        assert_close((slot(actual, i), slot(state.inner, i)), (expected, inner))
    assert all(x.shape[0] == N for x in jax.tree.leaves(state))


def spoiled(grads: list[Any], at: int, value: float) -> list[Any]:
    """Gradients of which those of one run have, in one step, a value that is not finite."""
    bad = jax.tree.map(lambda x: np.where(np.arange(N) == BAD, value, x.T).T, grads[at])
    bad = jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), bad, grads[at])
    return [*grads[:at], bad, *grads[at + 1 :]]


def assert_others_are(actual: Any, expected: Any) -> None:
    """Bit for bit, all runs but one."""
    for i in {0, 1, 2} - {BAD}:
        assert raw(slot(actual, i)) == raw(slot(expected, i))


# The square of the last overflows in the state; the step alone would be finite.
VALUES = [
    *((name, value) for name in OPTIMIZERS for value in (np.nan, np.inf)),
    ("lora_plus", 1e30),
]


@pytest.mark.parametrize(("name", "value"), some_rows(VALUES, VALUES[-1]))
def test_a_diverged_run_is_contained(name: str, value: float) -> None:
    """It stops at what it had, for good; to the others, bit for bit, nothing has happened."""
    table, grads = table_and_grads()
    run, at = run_of(name), 2
    before, state_before = run(table, grads[:at])
    actual, state = run(table, spoiled(grads, at, value))
    assert list(state.running) == [True, False, True]
    assert list(state.steps) == [ROUNDS, at, ROUNDS]
    assert raw(slot(actual, BAD)) == raw(slot(before, BAD))
    assert raw(slot(state.inner, BAD)) == raw(slot(state_before.inner, BAD))
    assert_others_are((actual, state), run(table, grads))


@EACH
def test_runs_that_take_no_part_stay_as_they_are(name: str) -> None:
    """Bit for bit, with whatever gradients; the others step as they do without them."""
    table, grads = table_and_grads()
    run, mask = run_of(name), np.array([True, False, True])
    expected = run(table, grads, active=np.ones(N, bool))
    actual, state = run(table, spoiled(grads, 1, np.nan), active=mask)
    assert list(state.running) == [True] * N
    assert list(state.steps) == [ROUNDS, 0, ROUNDS]
    start = table, run.init({}, table)
    assert raw(slot((actual, state), BAD)) == raw(slot(start, BAD))
    assert_others_are((actual, state), expected)
    # Later it takes part as if there had been no steps before.
    actual, state = run(actual, grads, state, active=~mask)
    assert raw(slot(actual, BAD)) == raw(slot(expected[0], BAD))
    assert list(state.steps) == [ROUNDS] * N


@EACH
def test_runs_are_replaced_without_compilation(name: str) -> None:
    """One is stopped, and another starts in its place: as a fresh one, with one program for all."""
    table, grads = table_and_grads()
    run = run_of(name)
    halfway, state = run(table, grads[:2])
    traced = run.traced
    state = many.stop(state, BAD)
    still, state = run(halfway, grads[2:], state)
    assert raw(slot(still, BAD)) == raw(slot(halfway, BAD))
    assert list(state.steps) == [ROUNDS, 2, ROUNDS]
    assert list(state.running) == [True, False, True]

    values = {k: jnp.broadcast_to(v, N)[2] for k, v in OPTIMIZERS[name][1].items()}
    fresh = jax.tree.map(lambda x, y: x.at[BAD].set(y[2] / 2), still, table)
    state = many.restart(run.tx, state, fresh, BAD, **values)
    assert list(state.steps) == [ROUNDS, 0, ROUNDS] and all(state.running)
    actual, state = run(fresh, grads[:2], state)
    expected = alone(name, 2, slot(fresh, BAD), [slot(g, BAD) for g in grads[:2]])
    assert_close((slot(actual, BAD), slot(state.inner, BAD)), expected)
    doubled = {k: 2 * v for k, v in state.hyperparams.items()}  # between steps, with no new start
    run(stack([slot(table, i) for i in (0, 0, 2)]), grads, state._replace(hyperparams=doubled))
    assert run.traced == traced


def test_many_slots_at_once() -> None:
    """Lists and masks, as arguments of a compiled function too."""
    table, _ = table_and_grads()
    tx = many.optimizer(optax.sgd, learning_rate=RATES)
    state = tx.init(table, learning_rate=jnp.array([1.0, 2.0, 3.0]))
    masked = jax.jit(many.stop)(state, jnp.array([True, False, True]))
    listed = jax.jit(many.stop)(state, jnp.array([0, 2]))
    assert list(masked.running) == list(listed.running) == [False, True, False]
    again = many.restart(tx, masked, table, [0, 1], learning_rate=jnp.array([5.0, 6.0, 7.0]))
    assert list(again.running) == [True, True, False]
    assert list(again.hyperparams["learning_rate"]) == [5.0, 6.0, 3.0]


def test_a_function_of_nothing_and_a_narrow_adapter() -> None:
    """Updates keep the dtype of bfloat16 factors, as with numbers that are no arrays."""
    table = {"w": jnp.ones((2, 4), jnp.bfloat16)}

    def updates(tx: Any) -> Any:
        return tx.update(table, tx.init(table), table)[0]

    for tx in (
        many.optimizer(lambda: optax.sgd(0.1)),
        many.optimizer(optax.sgd, learning_rate=0.1),
    ):
        actual, expected = jax.jit(lambda tx=tx: (updates(tx), updates(optax.sgd(0.1))))()
        assert raw(actual) == raw(expected)


# ------------------------------------------------------------------------------------- what is said

TABLE = {"w": jnp.ones((3, 4))}
STATE = many.optimizer(optax.sgd, learning_rate=0.1).init(TABLE)
LORA = jlora.transform(small.dense, LoRA("w", rank=2))


def init(keys: Any, lora: Any = LORA, **kwargs: Any) -> Any:
    return many.init(lora, keys, small.W, X, **kwargs)


def step(tx: Any = optax.sgd(0.1), table: Any = TABLE, **kwargs: Any) -> Any:  # noqa: B008
    tx = many.optimizer(tx)
    return tx.update(TABLE, tx.init(TABLE), table, **kwargs)


MISTAKES: dict[type[Exception], dict[str, Any]] = {
    TypeError: {
        "`keys` ... got key<fry>[].": lambda: init(KEYS[0]),
        "`keys` ... got rbg.": lambda: init(jax.random.split(jax.random.key(0, impl="rbg"), 2)),
        "`ranks` ... got [1, 1.5, 2].": lambda: init(KEYS, ranks=[1, 1.5, 2]),
        "`ranks` ... shapes depend on them. ... Give a list": lambda: jax.jit(
            lambda r: init(KEYS, ranks=r)
        )(jnp.array([1, 1, 2])),
        "`learning_rate` ... `tx` is a transformation. ... Give a function": lambda: many.optimizer(
            optax.sgd(0.1), learning_rate=0.1
        ),
        "unexpected keyword argument 'lr'": lambda: many.optimizer(optax.sgd, lr=0.1).init(TABLE),
        "`tx` ... got ": lambda: many.optimizer(lambda rate: rate, rate=0.1).init(TABLE),
        "`table` ... got w: LowRank(a=float32[4,2],": lambda: many.optimizer(optax.sgd(0.1)).init(
            LORA.init(KEYS[0], small.W, X)[1]
        ),
        "`table` ... got b: float32[], w: float32[3,4].": lambda: many.optimizer(
            optax.sgd(0.1)
        ).init({"w": jnp.ones((3, 4)), "b": jnp.ones(())}),
        "`params` ... b=float32[3,2,6] ... Use jlora.many.optimizer(tx)": lambda: jax.eval_shape(
            jlora.optimizer(optax.sgd(0.1)).init, jax.eval_shape(init, KEYS)[1]
        ),
        "`active` ... got int32[3].": lambda: step(active=[0, 1, 2]),
        "`slots` ... got bool[2].": lambda: many.stop(STATE, [True, False]),
        "`slots` ... got 0.5.": lambda: many.stop(STATE, 0.5),
        "`momentum` ... it has 'learning_rate'.": lambda: many.restart(
            many.optimizer(optax.sgd, learning_rate=0.1), STATE, TABLE, 0, momentum=0.9
        ),
    },
    ValueError: {
        "`learning_rate` ... must be an integer ... got float32. ... such as 1.0": lambda: (
            many.restart(
                many.optimizer(optax.sgd, learning_rate=1),
                many.optimizer(optax.sgd, learning_rate=1).init(TABLE),
                TABLE,
                0,
                learning_rate=0.5,
            )
        ),
        "`ranks` ... got 2.": lambda: init(KEYS, ranks=[1, 2]),
        "`ranks` ... got 4. ... Raise it to the largest.": lambda: init(KEYS, ranks=[1, 4, 2]),
        "`ranks` ... but no rule of `lora` has a rank. ... Leave it out.": lambda: init(
            KEYS, lora=jlora.transform(small.dense, Full("w")), ranks=[1, 1, 1]
        ),
        "`learning_rate` ... got shape (2,).": lambda: many.optimizer(
            optax.sgd, learning_rate=RATES[:2]
        ).init(TABLE),
        "call update(grads, state, table).": lambda: step(table=None),
        "`slots` ... got 3.": lambda: many.stop(STATE, [0, 3]),
    },
}


test_mistakes = all_refused(MISTAKES)

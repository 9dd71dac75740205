"""A table of adapters, and rows of a batch with one each: each row is what it is alone."""

import functools
import itertools
import re
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from cases import CASES, Case
from small import some

import jlora
from jlora import many
from jlora.many._route import FORMS

LAYOUT = jlora.types.Layout((), (0,), (1,))


# ------------------------------------------------------------------------------------- the cases


def is_routed(case: Case) -> bool:
    """Whether the whole call of a case can be a row: its model can be mapped over."""
    return case.sites > 0 and case.jit and case.vmap and case.subject != "model"


DAILY = ("convolution-side by side", "experts-gathered")  # of the first case of a subject


def table() -> list[Any]:
    """Each case in each form; two for every day."""
    firsts = {case.subject: case for case in reversed(CASES) if is_routed(case)}
    rows = []
    for case, form in itertools.product(filter(is_routed, CASES), FORMS):
        daily = firsts[case.subject] is case and f"{case.subject}-{form}" in DAILY
        marks = [] if daily else [pytest.mark.slow]
        rows.append(pytest.param(case, form, id=f"{case.name}-{form}", marks=marks))
    return rows


@pytest.mark.parametrize(("case", "form"), table())
def test_a_row_is_what_its_adapter_gives(case: Case, form: str) -> None:
    """In values and in gradients; the call of the case is a row, -1 is the base."""
    ids = (1, -1, 0)
    with laws.precision(case, jnp.float32) as tolerance:
        made = laws.make(case, jnp.float32)
        adapters = [made.adapter, jax.tree.map(lambda x: x / 2, made.adapter)]

        def apply(base: Any, adapter: Any, *args: Any) -> Any:
            one = made._replace(base=base)
            return [y[None] for y in one.value(adapter, *jax.tree.map(lambda x: x[0], args))]

        rows = jax.tree.map(lambda x: jnp.stack([x] * len(ids)), made.traced)

        def routed(adapters: Any) -> Any:
            stacked = many.stack(adapters, base=made.base)
            return many.route(apply, form=form)(made.base, stacked, jnp.array(ids), *rows)

        def alone(adapters: Any) -> Any:
            each = [made.value(adapters[i] if i >= 0 else {}, *made.traced) for i in ids]
            return [jnp.stack(ys) for ys in zip(*each, strict=True)]

        actual, expected = (
            jax.jit(laws.value_and_slope(f, case.grad))(adapters) for f in (routed, alone)
        )
        laws.assert_close(actual, expected, max(tolerance, 1e-5))


# ------------------------------------------------------------------------------------- the form


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["v"] + params["c"]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


@functools.cache
def made(
    count: int = 3, ranks: tuple[int, ...] = (2, 1, 3), full: bool = True
) -> tuple[Any, Any, list[Any]]:
    """The transform, its base and random adapters; their scales differ as their ranks do."""
    shapes = {"w": (64, 48), "v": (48, 4), "c": (4,)}
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(normal(rng, *shape) / 8) for name, shape in shapes.items()}
    adapters = []
    for r in itertools.islice(itertools.cycle(ranks), count):
        rules = [jlora.LoRA("w|v", rank=r, init=laws.start), *[jlora.Full("c")] * full]
        lora = jlora.transform(model, *rules)
        base, adapter = lora.init(jax.random.key(1), params, jnp.ones((1, 64)))
        noisy = jax.tree.map(lambda x: np.asarray(x) + normal(rng, *x.shape) / 8, adapter)
        adapters.append(jax.tree.map(jnp.asarray, noisy))
    return lora, base, adapters


X = jnp.asarray(normal(np.random.default_rng(5), 6, 5, 64))
IDS = (2, 0, -1, 1, 0, 2)
each_form = pytest.mark.parametrize("form", some([None, *FORMS], None))


compiled = functools.cache(jax.jit)  # one program for each function


def alone(f: Any, base: Any, adapters: list[Any], ids: Any = IDS, x: Any = X) -> jax.Array:
    one = compiled(f)
    each = [one(base, adapters[i] if i >= 0 else {}, x[k : k + 1]) for k, i in enumerate(ids)]
    return jnp.stack(each) if each[0].ndim == 0 else jnp.concatenate(each)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


@each_form
def test_ranks_scales_and_full_leaves_differ(form: str | None) -> None:
    lora, base, adapters = made()
    stacked = many.stack(adapters, base=base)
    assert stacked["w"].a.shape == (3, 64, 3)
    expected = alone(lora.apply, base, adapters)
    for ids in (jnp.array(IDS), np.array(IDS)):
        route = many.route(lora.apply, form=form)
        f = jax.jit(lambda base, table, x, ids=ids, route=route: route(base, table, ids, x))
        close(f(base, stacked, X), expected)


@pytest.mark.slow
@each_form
@pytest.mark.parametrize("ids", [jnp.array(IDS), np.array([1, 1, 0, 0, 2, 2])], ids=str)
def test_a_loss_is_one_for_each_row(ids: Any, form: str | None) -> None:
    """With its gradients: each adapter's from its own rows."""
    lora, base, adapters = made(full=False)

    def loss(base: Any, adapter: Any, x: jax.Array) -> jax.Array:
        return (lora.apply(base, adapter, x) ** 2).sum()

    def routed(adapters: Any) -> Any:
        return many.route(loss, form=form)(base, many.stack(adapters), ids, X)

    both = [lambda adapters: alone(loss, base, adapters, ids.tolist()), routed]
    expected, actual = (jax.jit(laws.value_and_slope(f))(adapters) for f in both)
    laws.assert_close(actual, expected, 1e-5)


RUNS = [(0, 0, 1, 1, 2, 2), (0, 0, 0, 0, 1, 1), (1,) * 6, IDS]


@pytest.mark.parametrize("ids", some(RUNS, RUNS[1]))
def test_runs_of_known_ids_are_batches(ids: tuple[int, ...]) -> None:
    lora, base, adapters = made()
    seen = []

    def apply(base: Any, adapter: Any, x: jax.Array) -> jax.Array:
        seen.append(len(x))
        return lora.apply(base, adapter, x)

    y = many.route(apply)(base, many.stack(adapters, base=base), np.array(ids), X)
    close(y, alone(lora.apply, base, adapters, ids))
    assert set(seen) == {{(1,) * 6: 6, IDS: 1}.get(ids, 2)}


def test_form_follows_from_the_size() -> None:
    """Side by side are the sites of which A and B of all slots are a quarter of W, or less."""

    def forms(slots: int) -> dict[str, str]:
        lora, base, adapters = made(1, (1,))
        stacked, seen = many.stack(adapters * slots, base=base), {}

        def apply(base: Any, adapter: Any, x: jax.Array) -> jax.Array:
            seen.update({path: type(node).__name__ for path, node in adapter.items()})
            return lora.apply(base, adapter, x)

        jax.eval_shape(many.route(apply), base, stacked, jnp.array(IDS) % slots, X)
        return {path: seen[path] for path in ("w", "v")}

    assert forms(1) == {"w": "Routed", "v": "LowRank"}  # 112 of 3,072, 52 of 192
    assert forms(6) == {"w": "Routed", "v": "LowRank"}
    assert forms(7) == {"w": "LowRank", "v": "LowRank"}


def test_rows_lie_along_any_axis() -> None:
    """Those of keyword arguments along the first; what is no array is shared."""
    lora, base, adapters = made()
    stacked = many.stack(adapters, base=base)

    def apply(
        base: Any, adapter: Any, x: jax.Array, shared: Any, double: bool, *, plus: Any
    ) -> Any:
        y = lora.apply(base, adapter, x.swapaxes(0, 1)) * shared * (2 if double else 1)
        return {"y": y.swapaxes(0, 2) + plus, "n": None}

    f = many.route(apply, in_axes=(1, None, 0), out_axes=2)
    ids, plus = jnp.array(IDS), jnp.arange(6.0)
    y = f(base, stacked, ids, X.swapaxes(0, 1), jnp.array(3.0), True, plus=plus)["y"]
    close(y, 6 * alone(lora.apply, base, adapters).swapaxes(0, 2) + plus)


@each_form
def test_a_prepared_table_is_the_table(form: str | None) -> None:
    """It is an adapter to nobody else."""
    lora, base, adapters = made()
    table = many.stack(adapters, base=base)
    prepared = jax.jit(functools.partial(many.prepare, form=form))(table)
    f = jax.jit(many.route(lora.apply, form=form))
    y, expected = (f(base, t, jnp.array(IDS), X) for t in (prepared, table))
    close(y, expected)
    assert jlora.count(prepared) == jlora.count(table)
    if form == "side by side":
        with pytest.raises(TypeError, match=r"`adapter` is a table from jlora\.many\.prepare, of"):
            lora.apply(base, prepared | {"c": base["c"]}, X)


def test_only_the_base_for_minus_one_to_the_bit() -> None:
    lora, base, adapters = made()
    for form in FORMS:
        f = jax.jit(many.route(lora.apply, form=form))
        table = many.stack(adapters, base=base)
        y = f(base, table, jnp.full(6, -1), X)
        expected = f(base, many.remove(table, 0, base=base), jnp.full(6, 0), X)
        np.testing.assert_array_equal(y, expected)
        close(y, model(base, X))


INTEGERS = some([f"{sign}int{bits}" for sign in ("", "u") for bits in (4, 8, 16, 32, 64)], "int8")


def numbered(count: int) -> tuple[Any, Any, Any]:
    """Transform, base and a table in whose slot i every output is i of x = 1."""
    lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=1))
    ones = {"w": jlora.types.LowRank(jnp.ones((4, 1)), jnp.ones((1, 2)) / 4, 1.0, LAYOUT)}
    table = many.stack([ones] * count)
    scale = jnp.arange(float(count))[:, None, None]
    return lora, {"w": jnp.zeros((4, 2))}, {"w": table["w"]._replace(b=table["w"].b * scale)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_ids_may_be_integers_of_any_dtype(dtype: str, form: str) -> None:
    """Also where the table has more slots than they have numbers: known, or traced."""
    with jax.enable_x64(dtype.endswith("64")):
        lora, base, table = numbered(200)
        limits = jnp.iinfo(dtype)
        ids = [0, 5, min(101, limits.max), 1, *[-1] * (limits.min < 0)]
        expected = np.array([max(i, 0) for i in ids], "f")
        ids, x = jnp.array(ids, dtype), jnp.ones((len(ids), 4))
        routed = many.route(lora.apply, form=form)
        for found in (ids, np.asarray(ids), [int(i) for i in ids], list(ids)):
            np.testing.assert_allclose(routed(base, table, found, x)[:, 0], expected)
        y = jax.jit(routed)(base, table, ids, x)
        np.testing.assert_allclose(y[:, 0], expected)
        none = jnp.array([limits.max, limits.min, 0], dtype)
        is_none = [not -1 <= int(i) < 200 for i in none]
        y = jax.jit(routed)(base, table, none, jnp.ones((3, 4)))
        assert np.isnan(y[:, 0]).tolist() == is_none
        if any(is_none):
            with pytest.raises(ValueError, match=r"`ids` must lie in \[-1, 200\)"):
                routed(base, table, none, jnp.ones((3, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["known", "traced"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_slots_may_be_integers_of_any_dtype(dtype: str, jit: Any) -> None:
    """Of `take`, `insert`, `remove`, `stop` and `restart`."""
    with jax.enable_x64(dtype.endswith("64")):
        _, _, table = numbered(200)
        tx = many.optimizer(optax.sgd, learning_rate=0.1)
        state, i = tx.init(table), min(101, int(jnp.iinfo(dtype).max))
        new = jax.tree.map(lambda x: x[0] + 7, table)
        first = lambda table: np.array(table["w"].b[:, 0, 0])  # noqa: E731
        for slot in (jnp.array(i, dtype), np.array(i, dtype)):
            expected = first(table)
            np.testing.assert_allclose(jit(many.take)(table, slot)["w"].b[0, 0], expected[i])
            for f, value in ((lambda *x: many.insert(*x, new), 7), (many.remove, 0)):
                expected[i] = value
                np.testing.assert_allclose(first(jit(f)(table, slot)), expected)
            for slots in (slot, slot[None], [slot]):
                stopped = jit(many.stop)(state, slots)
                assert np.flatnonzero(~stopped.running).tolist() == [i]
                assert jit(functools.partial(many.restart, tx))(stopped, table, slots).running.all()


# ---------------------------------------------------------------------------------- isolation

# A use of W, and the factor that an activation, or an index, meets first.
USES: dict[str, Any] = {
    "dense": (lambda p, x: x @ p["w"], "a"),
    "lookup": (lambda p, x: p["w"][x[:, 0].astype(int)], "a"),
    "tied head": (lambda p, x: x @ p["w"].T, "b"),
    "both": (lambda p, x: p["w"][x[:, 0].astype(int)] @ p["w"].T, None),
}


@pytest.mark.parametrize("bad", some([np.nan, np.inf], np.nan))
@pytest.mark.parametrize("factor", "ab")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use", some(USES, "dense", "both"))
def test_isolation_is_as_stated(use: str, form: str, factor: str, bad: float) -> None:
    """What a value that is not finite does to rows that do not name its slot."""
    model, first = USES[use]
    lora, rng = jlora.transform(model, jlora.LoRA("w")), np.random.default_rng(3)
    table = {"w": jlora.types.LowRank(normal(rng, 3, 8, 2), normal(rng, 3, 2, 8), 1.0, LAYOUT)}
    table = jax.tree.map(jnp.asarray, table)
    broken = jax.tree.map(
        lambda x, label: x.at[1].set(bad) if label == factor else x, table, jlora.labels(table)
    )
    ids, x = jnp.array([0, 2, -1, 0]), jnp.asarray(normal(rng, 4, 8))

    def value(table: Any, x: jax.Array) -> jax.Array:
        return many.route(lora.apply, form=form)(params, table, ids, x)

    def slope(table: Any, x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: (value(table, x) ** 2).sum())(x)

    params = {"w": jnp.asarray(normal(rng, 8, 8))}
    for f, alone in ((value, factor == first), (slope, use in ("lookup", "both"))):
        if form == "gathered" or alone:
            close(f(broken, x), f(table, x))
        else:
            assert not np.isfinite(f(broken, x)).all()


# ---------------------------------------------------------------------------------- the table


def test_insert_and_remove_compile_nothing() -> None:
    lora, base, adapters = made()
    traced = []

    @jax.jit
    def step(base: Any, table: Any, ids: jax.Array, x: jax.Array) -> jax.Array:
        traced.append(1)
        return many.route(lora.apply)(base, table, ids, x)

    stacked = many.stack(adapters[:1], size=4, rank=3, base=base)
    held: list[Any] = [adapters[0], {}, {}, {}]
    ids = np.array([0, 1, 2, 3, -1, 0])
    for slot, adapter in [(3, adapters[2]), (1, adapters[1]), (0, {}), (3, adapters[1])]:
        stacked = many.insert(stacked, slot, adapter, base=base)
        held[slot] = adapter
        close(step(base, stacked, ids, X), alone(lora.apply, base, held, ids))
    stacked = many.remove(stacked, jnp.array(1), base=base)
    close(step(base, stacked, ids, X)[1], model(base, X[1]))
    assert len(traced) == 1


def test_take_is_the_inverse_of_stack() -> None:
    _, base, adapters = made(2)
    stacked = many.stack(adapters, base=base)
    for i, adapter in enumerate(adapters):
        found = many.take(stacked, i)
        expected = jlora.merge(base, adapter)
        jax.tree.map(close, jlora.merge(base, found), expected)
    exact = jlora.arithmetic.truncate(found, energy=1.0)
    assert exact["w"].a.shape == adapter["w"].a.shape == (64, 1)
    same = many.stack([adapters[0]] * 2)
    jax.tree.map(np.testing.assert_array_equal, many.take(same, 1), adapters[0])


def test_what_a_traced_function_closes_over_is_known() -> None:
    """Tables, adapters, slots and ids: the same results, and the same refusals."""
    lora, base, adapters = made()
    table = many.stack(adapters, base=base)
    tx = many.optimizer(optax.sgd, learning_rate=0.1)
    state, one, ids = tx.init(table), jnp.array(1), jnp.array(IDS)
    broken, three, bad = jax.tree.map(lambda x: x * jnp.nan, adapters[0]), one + 2, ids + 2
    for f in (
        lambda: many.stack(adapters, base=base),
        lambda: many.insert(table, one, adapters[0]),
        lambda: many.remove(table, one, base=base),
        lambda: many.take(table, one),
        lambda: many.prepare(table),
        lambda: many.route(lora.apply)(base, table, ids, X),
        lambda: many.stop(state, one),
        lambda: many.stop(state, [0, 2]),
        lambda: many.restart(tx, state, table, one, learning_rate=0.2),
    ):
        expected = f()
        laws.assert_close(jax.jit(f)(), expected, 1e-5)
        assert jax.tree.structure(jax.eval_shape(f)) == jax.tree.structure(expected)
    for f, message in (
        (lambda: many.stack([broken], base=base), "is not finite"),
        (lambda: many.insert(table, 0, broken), "is not finite"),
        (lambda: many.take(table, three), r"`slot` must lie in \[0, 3\)"),
        (lambda: many.stop(state, [0, 3]), r"`slots` must lie in \[0, 3\)"),
        (lambda: many.stop(state, three), r"`slots` must lie in \[0, 3\)"),
        (lambda: many.route(lora.apply)(base, table, bad, X), r"`ids` must lie in \[-1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.jit(f)()


def node(
    rank: int, shape: tuple[int, int] = (6, 4), dtype: Any = jnp.float32
) -> jlora.types.LowRank:
    a, b = jnp.ones((shape[0], rank), dtype), jnp.ones((rank, shape[1]), dtype)
    return jlora.types.LowRank(a, b, 1.0, LAYOUT)


SLOTTED = jlora.types.LowRank(
    jnp.ones((1, 6, 2)), jnp.ones((1, 2, 2)), 1.0, LAYOUT._replace(slots=(2, (1,), 1))
)


def test_slots_of_a_kernel_meet_whole_ones() -> None:
    base = {"w": jnp.zeros((6, 4))}
    stacked = many.stack([{"w": SLOTTED}, {"w": node(1)}])
    for i, x in enumerate([SLOTTED, node(1)]):
        expected = jlora.merge(base, {"w": x})
        jax.tree.map(close, jlora.merge(base, many.take(stacked, i)), expected)


# ---------------------------------------------------------------------------------- refusals

NOT_FINITE = (
    r"a table cannot hold what is at these paths:\n  c: is not finite\n  v: is not finite\n"
    r"In one slot of a table it would reach the rows of others\."
)
# Zeros in DoRA's magnitudes are no adapter of the base: neither -1 nor an empty slot.
ANOTHER = r"a table cannot hold what is at these paths:\n  w: is a Decomposed\n"
NO_TABLE = r"`table` must be an adapter with a leading"


@functools.cache
def given() -> types.SimpleNamespace:
    """What the calls of `WRONG` need: a table and its adapters, and some that are no such."""
    lora, base, adapters = made()
    v = adapters[0]["v"]
    broken = {"v": v._replace(b=v.b.at[0, 0].set(-np.inf)), "c": np.full(4, np.nan, np.float32)}
    dora = jlora.transform(lambda p, x: x @ p["w"], jlora.DoRA("w", rank=1))
    params, keys = {"w": jnp.eye(64, 4)}, jax.random.split(jax.random.key(0), 3)
    return types.SimpleNamespace(
        apply=lora.apply,
        base=base,
        adapters=adapters,
        table=many.stack(adapters, base=base),
        prepared=many.prepare(many.stack(adapters, base=base), form="side by side"),
        broken=adapters[0] | broken,
        two=many.stack([{"w": node(2)}, {"w": node(1)}]),
        dora=dora,
        params=params,
        doras=many.init(dora, keys, params, X)[1],
    )


def call(apply: Any, base: Any, table: Any, ids: Any = IDS, **how: Any) -> Any:
    return many.route(apply, **how)(base, table, np.array(ids), X)


# Messages, and what provokes them.
WRONG: list[tuple[str, Callable[[Any], Any]]] = [
    (r"`adapters` must be a list of adapters.*got an empty", lambda _: many.stack([])),
    (NO_TABLE, lambda t: many.take(t.adapters[0], 0)),
    (NO_TABLE, lambda t: many.take(t.prepared, 0)),
    (NO_TABLE, lambda t: call(t.apply, t.base, t.prepared | {"c": jnp.ones((2, 4))})),
    (r"`ids` must be integers of shape", lambda t: call(t.apply, t.base, t.table, np.ones(6))),
    *(
        (r"`slot` must be one integer, from 0 on; got ", lambda t, f=f, i=i: f(t.table, i))
        for i in (True, 1.0, jnp.array([1]), jnp.array(1.0), None, "0")
        for f in (many.take, many.remove)
    ),
    (NOT_FINITE, lambda t: many.stack([t.adapters[1], t.broken], base=t.base)),
    (NOT_FINITE, lambda t: many.insert(t.table, 0, t.broken)),
    (ANOTHER, lambda t: call(t.dora.apply, t.params, t.doras)),
    (ANOTHER, lambda t: many.prepare(t.doras, form="gathered")),
    (ANOTHER, lambda t: many.insert(t.doras, 0, {})),
    (
        r"  w: is for weights of \(shape, stack, inputs, outputs\) \[.*\(6, 4\).*\(6, 5\).*\]\n",
        lambda t: many.insert(t.two, 0, {"w": node(1, (6, 5))}),
    ),
    (
        r"  v: is no site of the table\n",
        lambda t: many.insert(t.two, 0, {"w": node(1), "v": node(1)}),
    ),
    (
        r"  w: has the rank 3, above the table's 2\n",
        lambda t: many.insert(t.two, 0, {"w": node(3)}),
    ),
    (
        r"  w: is of low rank in one and trained in full in an",
        lambda t: many.insert(t.two, 0, {"w": jnp.ones((6, 4))}),
    ),
    (
        r"  w: has the slots None, where the table has \(2, \(1,\), 1\)\n",
        lambda _: many.insert(many.stack([{"w": SLOTTED}]), 0, {"w": node(1)}),
    ),
    (
        r"  w: is of float32, where the table has bfloat16",
        lambda _: many.insert(many.stack([{"w": node(2, dtype="bfloat16")}]), 0, {"w": node(1)}),
    ),
    (r"`size` must be at least the 3 adapt", lambda t: many.stack(t.adapters, size=2)),
    (r"  v: has the rank 3, above", lambda t: many.stack(t.adapters, rank=2, base=t.base)),
    (r"  c: is trained in full, so that a", lambda t: many.stack([t.adapters[0], {}])),
    (r"`slot` must lie in \[0, 3\).*got 3", lambda t: many.insert(t.table, 3, {})),
    (r"`slot` must lie in \[0, 3\).*got -1", lambda t: many.take(t.table, -1)),
    (r"  c: is trained in full.*\nGive `base`", lambda t: many.remove(t.table, 0)),
    (
        r"  c: expected shape \(5,\) as in `base`, got \(4,\)",
        lambda t: many.remove(t.table, 0, base=t.base | {"c": jnp.ones(5)}),
    ),
    (
        r"`form` is 'gathered', but `table` was prepared side by side: give the",
        lambda t: call(t.apply, t.base, t.prepared, form="gathered"),
    ),
    (r"`form` must be one of 'side by s", lambda t: many.route(t.apply, form="x")),
    (r"argument \[0\]\[0\] after `ids` must", lambda t: call(t.apply, t.base, t.table, [0, 1])),
    (r"`ids` must lie in \[-1, 3\)", lambda t: call(t.apply, t.base, t.table, [0] * 5 + [3])),
    (
        r"result of `apply` must have the rows along its axis 0, or no axis; got ",
        lambda t: call(lambda *args: t.apply(*args)[0], t.base, t.table),
    ),
    (r"does not fit `base` at 3", lambda t: call(t.apply, {"w": X}, t.table)),
]


@pytest.mark.parametrize(("message", "provoke"), WRONG, ids=[m[:50] for m, _ in WRONG])
def test_what_is_wrong_is_named(message: str, provoke: Callable[[Any], Any]) -> None:
    is_type = re.match(r"`(adapters|table|ids|slot)` must be [ailo]", message)
    with pytest.raises(TypeError if is_type else ValueError, match=f"(?s){message}"):
        provoke(given())


def test_tables_of_other_methods_are_for_vmap() -> None:
    t = given()
    close(t.dora.apply(t.params, many.take(t.doras, 1), X), X @ t.params["w"])

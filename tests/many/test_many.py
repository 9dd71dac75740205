"""A table of adapters, and rows of a batch with one each: each row is what it is alone."""

import functools
import itertools
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
from jax import export
from messages import all_refused, refused
from small import as_jax, set_up, some

import jlora
from jlora import many
from jlora.many._route import FORMS

LAYOUT = jlora.types.Layout((), (0,), (1,))


# ------------------------------------------------------------------------------------- the cases


def is_routed(case: Case) -> bool:
    """Whether the whole call of a case can be a row."""
    return case.sites > 0 and case.jit and case.subject != "model"


DAILY = ("experts-gathered",)  # of the first case of a subject


def table() -> list[Any]:
    """Each case in each form; one for every day."""
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
def made(*ranks: int) -> tuple[Any, Any, list[Any]]:
    """The transform, its base and random adapters; their scales differ as their ranks do."""
    shapes = {"w": (64, 48), "v": (48, 4), "c": (4,)}
    rng = np.random.default_rng(0)
    params = {name: as_jax(normal(rng, *shape) / 8) for name, shape in shapes.items()}
    adapters = []
    for r in ranks or (2, 1, 3):
        rules = jlora.LoRA("w|v", rank=r, init=laws.start), jlora.Full("c")
        lora, base, adapter = set_up(model, rules, params, jnp.ones((1, 64)))
        noisy = jax.tree.map(lambda x: np.asarray(x) + normal(rng, *x.shape) / 8, adapter)
        adapters.append(jax.tree.map(jnp.asarray, noisy))
    return lora, base, adapters


@functools.cache
def table_of_all() -> Any:
    """Made by one program."""
    _, base, adapters = made()
    return jax.jit(lambda adapters: many.stack(adapters, base=base))(adapters)


X = as_jax(normal(np.random.default_rng(5), 6, 5, 64))
IDS = (2, 0, -1, 1, 0, 2)


def alone(adapters: list[Any], ids: Any = IDS) -> np.ndarray:
    """Each row of X with its adapter, by NumPy."""
    base, rows = jax.device_get(made()[1]), []
    for i, x in zip(ids, np.asarray(X), strict=True):
        params = base | (jax.device_get(adapters[i]) if i >= 0 else {})
        for name in ("w", "v"):
            if params[name] is not base[name]:
                node = params[name]
                params[name] = base[name] + node.scale * node.a @ node.b
        rows.append(np.tanh(x @ params["w"]) @ params["v"] + params["c"])
    return np.stack(rows)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", some([None, *FORMS], None))
def test_ranks_scales_and_full_leaves_differ(form: str | None) -> None:
    """Of a loss there is one for each row; -1 is the base; a prepared table is the table."""
    lora, base, adapters = made()
    table = table_of_all()
    assert table["w"].a.shape == (3, 64, 3)

    @jax.jit
    def routed(table: Any, ids: Any) -> Any:
        loss = lambda *args: (lora.apply(*args) ** 2).sum()  # noqa: E731
        return [many.route(f, form=form)(base, table, ids, X) for f in (lora.apply, loss)]

    prepared = jax.jit(many.prepare)(table)
    expected = alone(adapters)
    for given in (table, prepared):
        y, losses = routed(given, jnp.array(IDS))
        close(y, expected)
        np.testing.assert_allclose(losses, (expected**2).sum((1, 2)), rtol=1e-4)
    assert jlora.count(prepared) == jlora.count(table)
    removed = jax.jit(lambda table: many.remove(table, 0, base=base))(table)
    y, other = routed(table, np.full(6, -1))[0], routed(removed, np.zeros(6, int))[0]
    np.testing.assert_array_equal(y, other)
    close(y, alone(adapters, [-1] * 6))


RUNS = [(0, 0, 1, 1, 2, 2), (0, 0, 0, 0, 1, 1), (1,) * 6, IDS]


@pytest.mark.parametrize("ids", some(RUNS, RUNS[1]))
def test_runs_of_known_ids_are_batches(ids: tuple[int, ...]) -> None:
    lora, base, adapters = made()
    seen = []

    def apply(base: Any, adapter: Any, x: jax.Array) -> jax.Array:
        seen.append(len(x))
        return lora.apply(base, adapter, x)

    routed = jax.jit(lambda table, x: many.route(apply)(base, table, np.array(ids), x))
    close(routed(table_of_all(), X), alone(adapters, ids))
    assert set(seen) == {{(1,) * 6: 6, IDS: 1}.get(ids, 2)}


@pytest.mark.parametrize("ids", [np.zeros(0, int), jnp.zeros(0, jnp.int32)], ids=["known", "array"])
@pytest.mark.parametrize("form", some(FORMS, "gathered"))
def test_no_rows(ids: Any, form: str) -> None:
    """An empty batch gives no rows, and gradients of zero."""
    lora, base, _ = made()
    routed = many.route(lora.apply, form=form)
    expected = jax.eval_shape(jax.vmap(lambda x: lora.apply(base, {}, x)), X[:0])

    def f(table: Any) -> Any:
        y = routed(base, table, ids, X[:0])
        return y.sum(), y

    slope, y = jax.jit(jax.grad(f, has_aux=True))(table_of_all())
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert not any(np.any(x) for x in jax.tree.leaves(slope))


def test_form_follows_from_the_size() -> None:
    """Side by side are the sites of which A and B of all slots are a quarter of W, or less."""
    lora, base, [adapter] = made(1)

    def are_beside(slots: int) -> dict[str, bool]:
        seen = {}

        def apply(base: Any, adapter: Any, x: jax.Array) -> jax.Array:
            seen.update({path: adapter[path].gate.ndim == 1 for path in ("w", "v")})
            return lora.apply(base, adapter, x)

        def routed(adapter: Any) -> jax.Array:
            table = many.stack([adapter] * slots, base=base)
            return many.route(apply)(base, table, np.array(IDS) % slots, X)

        jax.eval_shape(routed, adapter)
        return seen

    assert are_beside(1) == {"w": True, "v": False}  # 112 of 3,072, 52 of 192
    assert are_beside(6) == {"w": True, "v": False}
    assert are_beside(7) == {"w": False, "v": False}


@pytest.mark.parametrize("form", some([None, *FORMS], "side by side"))
def test_any_number_of_rows_is_one_exported_program(form: str | None) -> None:
    """Of a prepared table too."""
    lora, base, adapters = made()
    rows = export.symbolic_shape("n")
    ids, x = (
        jax.ShapeDtypeStruct(rows, jnp.int32),
        jax.ShapeDtypeStruct((*rows, *X.shape[1:]), X.dtype),
    )
    f = jax.jit(many.route(lora.apply, form=form))
    for table in (table_of_all(), jax.jit(many.prepare)(table_of_all())):
        program = export.export(f)(base, table, ids, x)
        for n in (6, 2):
            close(program.call(base, table, jnp.array(IDS[:n]), X[:n]), alone(adapters)[:n])


def test_rows_lie_along_any_axis() -> None:
    """Those of keyword arguments along the first; what is no array is shared."""
    lora, base, adapters = made()

    def apply(
        base: Any, adapter: Any, x: jax.Array, shared: Any, double: bool, *, plus: Any
    ) -> Any:
        y = lora.apply(base, adapter, x.swapaxes(0, 1)) * shared * (2 if double else 1)
        return {"y": y.swapaxes(0, 2) + plus, "n": None}

    f = many.route(apply, in_axes=(1, None, 0), out_axes=2)
    ids, plus, x = jnp.array(IDS), np.arange(6, dtype=np.float32), np.asarray(X).swapaxes(0, 1)
    given = table_of_all(), ids, jnp.asarray(x), jnp.array(3.0), jnp.asarray(plus)
    routed = jax.jit(lambda t, ids, x, three, plus: f(base, t, ids, x, three, True, plus=plus))
    close(routed(*given)["y"], 6 * alone(adapters).swapaxes(0, 2) + plus)


INTEGERS = some([f"{sign}int{bits}" for sign in ("", "u") for bits in (4, 8, 16, 32, 64)], "int8")


def numbered(count: int) -> tuple[Any, Any, Any]:
    """Transform, base and a table in whose slot i every output is i of x = 1."""
    lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=1))
    b = np.tile(np.arange(count, dtype=np.float32)[:, None, None] / 4, (1, 1, 2))
    node = jlora.types.LowRank(jnp.ones((count, 4, 1)), jnp.asarray(b), 1.0, LAYOUT)
    return lora, {"w": jnp.zeros((4, 2))}, {"w": node}


@pytest.mark.parametrize("form", some(FORMS, "gathered"))
@pytest.mark.parametrize("dtype", INTEGERS)
def test_ids_may_be_integers_of_any_dtype(dtype: str, form: str) -> None:
    """Also where the table has more slots than they have numbers: known, or traced."""
    with jax.enable_x64(dtype.endswith("64")):
        lora, base, table = numbered(200)
        limits = jnp.iinfo(dtype)

        def first(ids: Any) -> Any:
            x = jnp.ones((len(ids), 4))
            return many.route(lora.apply, form=form)(base, table, ids, x)[:, 0]

        expected = [0, 5, min(101, limits.max), 1, -1 if limits.min < 0 else 2]
        ids = jnp.array(expected, dtype)
        every = [ids, np.asarray(ids), expected, list(ids)]
        for y in jax.jit(lambda ids: [first(ids), *map(first, every)])(ids):
            np.testing.assert_allclose(y, np.maximum(expected, 0))
        none = jnp.array([limits.max, limits.min, 0, 0, 0], dtype)
        is_none = [not -1 <= int(i) < 200 for i in none]
        assert np.isnan(jax.jit(first)(none)).tolist() == is_none
        if any(is_none):
            with refused(ValueError, "ids", "must be in [-1, 200)"):
                first(none)


# ---------------------------------------------------------------------------------- isolation

# A use of W, and the factor that an activation, or an index, meets first.
USES: dict[str, Any] = {
    "dense": (lambda p, x: x @ p["w"], "a"),
    "lookup": (lambda p, x: p["w"][x[:, 0].astype(int)], "a"),
    "tied head": (lambda p, x: x @ p["w"].T, "b"),
    "both": (lambda p, x: p["w"][x[:, 0].astype(int)] @ p["w"].T, None),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use", some(USES, "dense", "both"))
def test_isolation_is_as_stated(use: str, form: str) -> None:
    """What a value that is not finite does to rows that do not name its slot."""
    model, first = USES[use]
    lora, rng = jlora.transform(model, jlora.LoRA("w")), np.random.default_rng(3)
    node = jlora.types.LowRank(normal(rng, 3, 8, 2), normal(rng, 3, 2, 8), 1.0, LAYOUT)
    params, ids = {"w": jnp.asarray(normal(rng, 8, 8))}, np.array([0, 2, -1, 0])

    @jax.jit
    def both(node: Any, ids: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = many.route(lora.apply, form=form)(params, {"w": node}, ids, x)
            return (y**2).sum(), y

        slope, y = jax.grad(loss, has_aux=True)(x)
        return y, slope

    x = normal(rng, 4, 8)
    expected = both(node, ids, x)
    for factor, bad in itertools.product("ab", (np.nan, np.inf)):
        broken = np.array(getattr(node, factor))
        broken[1] = bad
        found = both(node._replace(**{factor: broken}), ids, x)
        stays = factor == first, use in ("lookup", "both")
        for actual, value, alone in zip(found, expected, stays, strict=True):
            if form == "gathered" or alone:
                close(actual, value)
            else:
                assert not np.isfinite(actual).all()


# ---------------------------------------------------------------------------------- the table


def test_insert_and_remove_compile_nothing() -> None:
    lora, base, adapters = made()
    traced = []

    @jax.jit
    def step(table: Any, ids: jax.Array) -> jax.Array:
        traced.append(1)
        return many.route(lora.apply)(base, table, ids, X)

    insert = jax.jit(functools.partial(many.insert, base=base))
    table = jax.jit(lambda x: many.stack([x], size=4, rank=3, base=base))(adapters[0])
    held: list[Any] = [adapters[0], {}, {}, {}]
    ids = np.array([0, 1, 2, 3, -1, 0])
    for slot, adapter in [(3, adapters[2]), (1, adapters[1]), (0, {}), (3, adapters[1])]:
        table = insert(table, slot, adapter)
        held[slot] = adapter
        close(step(table, ids), alone(held, ids))
    table = jax.jit(functools.partial(many.remove, base=base))(table, 1)
    close(step(table, ids)[1], alone([{}], [-1] * 6)[1])
    assert len(traced) == 1


def test_what_a_traced_function_closes_over_is_known() -> None:
    """Tables, adapters, slots and ids: the same results, and the same refusals."""
    lora, base, adapters = made()
    table = table_of_all()
    tx = many.optimizer(optax.sgd, learning_rate=0.1)
    state, one, ids = tx.init(table), jnp.array(1), jnp.array(IDS)
    broken, three, bad = jax.tree.map(lambda x: x * np.nan, adapters[0]), one + 2, ids + 2
    for f, *given in (
        (many.insert, table, one, adapters[0]),
        (lambda *args: many.route(lora.apply)(base, *args, X), table, ids),
        (lambda *args: many.restart(tx, *args, learning_rate=0.2), state, table, one),
    ):
        expected = jax.jit(f)(*given)
        laws.assert_close(jax.jit(lambda f=f, given=given: f(*given))(), expected, 1e-5)
    for argument, f in (
        ("adapters", lambda: many.stack([broken], base=base)),
        ("adapters", lambda: many.insert(table, 0, broken)),
        ("slot", lambda: many.take(table, three)),
        ("slots", lambda: many.stop(state, [0, 3])),
        ("slots", lambda: many.stop(state, three)),
        ("ids", lambda: many.route(lora.apply)(base, table, bad, X)),
    ):
        with refused(ValueError, argument):
            jax.jit(f)()


def node(
    rank: int, shape: tuple[int, int] = (6, 4), dtype: Any = jnp.float32
) -> jlora.types.LowRank:
    a, b = np.ones((shape[0], rank), np.float32), np.ones((rank, shape[1]), np.float32)
    return jlora.types.LowRank(jnp.asarray(a, dtype), jnp.asarray(b, dtype), 1.0, LAYOUT)


SLOTTED = jlora.types.LowRank(
    jnp.ones((1, 6, 2)), jnp.ones((1, 2, 2)), 1.0, LAYOUT._replace(slots=(2, (1,), 1))
)


def test_take_is_the_inverse_of_stack() -> None:
    """Of two ranks and scales, and of slots of a kernel beside a whole one."""
    of_base = made()[1]
    kernel = {"w": jnp.zeros((6, 4))}
    for base, adapters in ((of_base, made()[2][:2]), (kernel, [{"w": SLOTTED}, {"w": node(1)}])):

        @jax.jit
        def both(adapters: Any, base: Any = base) -> Any:
            table = many.stack(adapters, base=base)
            taken = [many.take(table, i) for i in range(2)]
            return [[jlora.merge(base, x) for x in each] for each in (taken, adapters)]

        laws.assert_close(*both(adapters), 2e-5)
    padded = jax.jit(many.take)(table_of_all(), 1)["w"]
    exact = jlora.arithmetic.truncate({"w": padded}, energy=1.0)
    assert (padded.a.shape, exact["w"].a.shape) == ((64, 3), (64, 1))


def test_numbers_are_rounded_once() -> None:
    """B of 8 bits of another scale, in a table of float32 and of 8 bits; a scale of 0 is any."""
    one, half = node(2), node(1, dtype="bfloat16")
    half, zero = half._replace(scale=3 * one.scale / 7), one._replace(scale=0.0)
    table = many.stack([{"w": one}, {"w": half}])["w"]
    exact = np.float32(half.b) * np.float32(3 / 7)
    np.testing.assert_allclose(table.b[1, :1] * (table.scale / one.scale), exact, rtol=1e-6)
    zeros = many.insert(many.stack([{"w": zero}, {}]), 1, {"w": one})
    assert delta_is(zeros, 0, 0 * one.a @ one.b)
    assert delta_is(zeros, 1, one.scale * one.a @ one.b)
    small = jax.tree.map(lambda x: x.astype("float8_e4m3fn"), many.stack([{"w": one}]))
    same = many.insert(small, 0, many.take(small, 0))
    assert {x.dtype for x in jax.tree.leaves(same)} == {jnp.dtype("float8_e4m3fn")}


def delta_is(table: Any, slot: int, expected: Any) -> bool:
    found = many.take(table, slot)["w"]
    return np.allclose(found.scale * found.a @ found.b, expected, rtol=1e-5)


# ---------------------------------------------------------------------------------- refusals


@functools.cache
def given() -> types.SimpleNamespace:
    """What the calls of `WRONG` need: a table and its adapters, and some that are no such."""
    lora, base, adapters = made()
    v = adapters[0]["v"]
    broken = {"v": v._replace(b=v.b - np.inf), "c": np.full(4, np.nan, np.float32)}
    dora = jlora.transform(lambda p, x: x @ p["w"], jlora.DoRA("w", rank=1))
    params = {"w": jnp.asarray(np.eye(64, 4, dtype=np.float32))}
    _, adapter = dora.init(jax.random.key(0), params, X)
    return types.SimpleNamespace(
        apply=lora.apply,
        base=base,
        adapters=adapters,
        table=table_of_all(),
        prepared=jax.jit(many.prepare)(table_of_all()),
        broken=adapters[0] | broken,
        two=many.stack([{"w": node(2)}, {"w": node(1)}]),
        dora=dora,
        params=params,
        doras=jax.tree.map(lambda x: np.stack([x] * 3), adapter),
    )


def call(apply: Any, base: Any, table: Any, ids: Any = IDS, **how: Any) -> Any:
    return many.route(apply, **how)(base, table, np.array(ids), X)


WRONG: dict[type[Exception], dict[str, Callable[[Any], Any]]] = {
    TypeError: {
        "`adapters` ... got an empty": lambda _: many.stack([]),
        "`adapter` ... is a table of several adapters": lambda t: t.apply(  # no adapter to others
            t.base, t.prepared | {"c": t.base["c"]}, X
        ),
        "`table` ... whose arrays have a leading": lambda t: many.take(t.adapters[0], 0),
        "`table` ... arrays have a leading": lambda t: many.take(t.prepared, 0),
        "`table` ... have a leading": lambda t: call(
            t.apply, t.base, t.prepared | {"c": jnp.ones((2, 4))}
        ),
        "`ids` ... integers of shape": lambda t: call(t.apply, t.base, t.table, np.ones(6)),
        **{
            f"`slot` ... {words}got {got}": lambda t, f=f, i=i: f(t.table, i)
            for i, got in (
                (True, "True"),
                (1.0, "1.0"),
                (np.array([1]), "int64[1]"),
                (None, "None"),
                ("0", "'0'"),
            )
            for words, f in {"": many.take, "from 0 on; ": many.remove}.items()
        },
    },
    ValueError: {
        "`adapters` ... c ... is not finite": lambda t: many.stack(
            [t.adapters[1], t.broken], base=t.base
        ),
        "`adapters` ... v ... is not finite": lambda t: many.insert(t.table, 0, t.broken),
        # Zeros in DoRA's magnitudes are no adapter of the base: neither -1 nor an empty slot.
        "`adapters` ... w ... a Decomposed": lambda t: call(t.dora.apply, t.params, t.doras),
        "`adapters` ... w ... is a Decomposed": lambda t: many.prepare(t.doras),
        "`adapters` ... w ... Decomposed": lambda t: many.insert(t.doras, 0, {}),
        "`adapters` ... w ... (6, 5)": lambda t: many.insert(t.two, 0, {"w": node(1, (6, 5))}),
        "`adapters` ... v ... is not a site of the table": lambda t: many.insert(
            t.two, 0, {"w": node(1), "v": node(1)}
        ),
        "`adapters` ... w ... rank 3, above": lambda t: many.insert(t.two, 0, {"w": node(3)}),
        "`adapters` ... w ... in full in an": lambda t: many.insert(
            t.two, 0, {"w": jnp.ones((6, 4))}
        ),
        "`adapters` ... w ... the parts 1 of 2": lambda _: many.insert(
            many.stack([{"w": SLOTTED}]), 0, {"w": node(1)}
        ),
        "`adapters` ... w ... has dtype float32": lambda _: many.insert(
            many.stack([{"w": node(2, dtype="bfloat16")}]), 0, {"w": node(1)}
        ),
        "`size` ... at least the 3 adapt": lambda t: many.stack(t.adapters, size=2),
        "`rank` ... of at least 1; got -1": lambda t: many.stack(t.adapters, rank=-1),
        "`rank` ... an integer ... got 2.5": lambda t: many.stack(t.adapters, rank=2.5),
        "`adapters` ... v ... has rank 3, above": lambda t: many.stack(
            t.adapters, rank=2, base=t.base
        ),
        "`adapters` ... c ... is trained in full": lambda t: many.stack([t.adapters[0], {}]),
        "`slot` ... got 3": lambda t: many.insert(t.table, 3, {}),
        "`slot` ... got -1": lambda t: many.take(t.table, -1),
        "`adapters` ... c ... Give `base`": lambda t: many.remove(t.table, 0),
        "c ... in `base`, got (4,)": lambda t: many.remove(
            t.table, 0, base=t.base | {"c": jnp.ones(5)}
        ),
        "`form` ... one of 'side by s": lambda t: many.route(t.apply, form="x"),
        "argument [0][0] after `ids` must": lambda t: call(t.apply, t.base, t.table, [0, 1]),
        "argument [1]['by'] after ... by position, with None": lambda t: many.route(t.apply)(
            t.base, t.table, np.array(IDS), X, by=jnp.ones(())
        ),
        "`ids` ... in [-1, 3)": lambda t: call(t.apply, t.base, t.table, [0] * 5 + [3]),
        "result of `apply` ... rows along axis 0": lambda t: call(
            lambda *args: t.apply(*args)[0], t.base, t.table
        ),
        "`adapter` ... does not fit `base` at 3": lambda t: call(t.apply, {"w": X}, t.table),
    },
}


test_what_is_wrong_is_named = all_refused(WRONG, lambda call: call(given()))


def test_tables_of_other_methods_are_for_vmap() -> None:
    t = given()
    close(t.dora.apply(t.params, many.take(t.doras, 1), X), X @ t.params["w"])

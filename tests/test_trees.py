"""Trees in and out: `bind`, `wrap`, `merge`, `unmerge`, `init`, counts, tables, and the import.

The law behind most tests: an adapter changes values, never the structure, container, dtype, place
or identity of what the user brought.
"""

import copy
import functools
import importlib.metadata
import pathlib
import pickle
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import laws
import ml_dtypes
import numpy as np
import processes
import pytest
from cases.trees import CONTAINERS, two_products
from jax import lax
from laws import assert_close
from messages import check_text, refused
from nodes import PLAIN
from own_methods import Diagonal
from small import KEY, X, every, normal, raw, set_up, some

import jlora
from jlora._arrays import is_on_host

Struct = jax.ShapeDtypeStruct


random = functools.partial(laws.start, of_b=0.3)  # a B that is not zero, and no program


def kinds(tree: Any) -> Any:
    """The tree with shape and dtype in the place of each leaf."""
    return jax.tree.map(lambda x: Struct(x.shape, x.dtype), tree)


class Setup(NamedTuple):
    """A model and everything around it."""

    f: Any
    params: Any
    x: Any
    lora: jlora.types.Transformed
    base: Any
    adapter: Any


@functools.cache
def setup(
    container: str = "dict", dtype: Any = jnp.float32, dtype_of_adapter: Any = None, **options: Any
) -> Setup:
    """Two products in a container; the adapter's B is random."""
    make, split = CONTAINERS[container]
    f = two_products(split)
    params = make(normal(1, 6, 8, dtype=dtype), normal(2, 8, 4, dtype=dtype))
    x = normal(3, 3, 6, dtype=dtype)
    options = {"rank": 2, "alpha": 4, "init": random} | options
    return Setup(f, params, x, *set_up(f, jlora.LoRA(**options, dtype=dtype_of_adapter), params, x))


# ------------------------------------------------------------------------------ bind and wrap


def test_bound_trees_in_any_argument() -> None:
    """By position and by keyword, within other trees, beside plain arguments and plain trees."""
    one, two = setup(), setup("list")

    def f(batch: Any, models: list[Any], *, scale: float, teacher: Any, flag: bool) -> Any:
        assert flag is True
        student, plain = models
        x = batch["x/y"] + batch["x"]["y"]
        return {"y": scale * one.f(student, x) - two.f(teacher, x), "z": one.f(plain, x)}

    def both(one: Any, two: Any, x: Any, join: Any) -> Any:
        student = [join(*one), one[0]]
        call = jlora.wrap(f) if join is jlora.bind else f
        batch = {"x/y": x, "x": {"y": 1.0}}  # equal paths, but not of weights
        return call(batch, student, scale=2.0, teacher=join(*two), flag=True)

    trees = (one.base, one.adapter), (two.base, two.adapter), one.x
    actual, expected = (
        jax.jit(both, static_argnums=3)(*trees, join) for join in (jlora.bind, jlora.merge)
    )
    assert_close(actual, expected, 1e-5)
    assert jlora.wrap(f).__name__ == f.__name__


# ----------------------------------------------------------------------------- merge, unmerge


@pytest.mark.parametrize("container", CONTAINERS)
def test_bind_and_merge_keep_what_a_tree_is(container: str) -> None:
    """Container, structure, shapes and dtypes; a bound tree has the arrays of both."""
    s = setup(container)
    bound = jlora.bind(s.base, s.adapter)
    merged = jlora.merge(s.base, s.adapter)
    back = jlora.unmerge(merged, s.adapter)
    assert type(bound) is type(s.params)
    for tree in (s.base, merged, back):
        assert type(tree) is type(s.params)
        assert jax.tree.structure(tree) == jax.tree.structure(s.params)
        assert jax.tree.leaves(kinds(tree)) == jax.tree.leaves(kinds(s.params))
    is_leaf = lambda x: isinstance(x, jlora.types.BoundLeaf | jlora.types.LowRank)  # noqa: E731
    leaves = jax.tree.leaves(bound, is_leaf=is_leaf)
    assert all(x.base is w for x, w in zip(leaves, jax.tree.leaves(s.params), strict=True))
    plain = jax.tree.leaves(jlora.bind(s.base, {}))
    assert all(x is w for x, w in zip(plain, jax.tree.leaves(s.params), strict=True))
    nodes = jax.tree.leaves(s.adapter, is_leaf=is_leaf)
    assert {id(x.delta.a) for x in leaves} == {id(x.a) for x in nodes}


def odd(w: Any, dtype: Any) -> Any:
    """`w` with those floats that adding zero may change."""
    w = np.array(w, dtype)
    tiny = np.asarray(float(jnp.finfo(dtype).tiny) / 4).astype(dtype)
    w[0, :3] = np.asarray([-0.0, tiny, np.inf], dtype)
    return w


LEAVES = {
    "float32": lambda w: odd(w, np.float32),
    "bfloat16": lambda w: jnp.asarray(odd(w, ml_dtypes.bfloat16)),
    "float16": lambda w: jnp.asarray(odd(w, np.float16)),
    "numpy_bfloat16": lambda w: odd(w, ml_dtypes.bfloat16),
    "read_only": lambda w: np.frombuffer(np.asarray(w).tobytes(), np.float32).reshape(w.shape),
    "fortran": lambda w: np.asfortranarray(np.asarray(w)),
}


@pytest.mark.parametrize("leaf", LEAVES)
def test_merging_a_fresh_adapter_gives_the_parameters(leaf: str) -> None:
    """`merge(init(params)) == params`, every bit of every kind of array."""
    s = setup()
    params = jax.tree.map(LEAVES[leaf], s.params)
    lora = jlora.transform(s.f, jlora.LoRA("up", rank=2), jlora.Full("down"))
    base, adapter = lora.init(KEY, params, Struct(s.x.shape, params["up"].dtype))
    merged = jlora.merge(base, adapter)
    assert raw(merged) == raw(params)
    assert kinds(merged) == kinds(params)


CHANGES, AT = (jlora.merge, jlora.unmerge), (0, 1, 16, 17, 24)


@pytest.mark.parametrize(
    ("change", "rank"),
    every(CHANGES, AT, daily={(jlora.merge, 0), (jlora.merge, 16), (jlora.unmerge, 17)}),
)
def test_merge_at_every_rank(change: Any, rank: int) -> None:
    """A stack of W with two input axes ± s·A·B, and its derivatives, forward and backward."""
    w = {"w": normal(1, 2, 3, 4, 5)}
    layout = jlora.types.Layout((0,), (1, 2), (3,))
    node = jlora.types.LowRank(normal(2, 2, 3, 4, rank), normal(3, 2, rank, 5), 0.3, layout)
    sign = 1 if change is jlora.merge else -1

    def plainly(w: Any, adapter: Any) -> Any:
        delta = jnp.einsum("sijr,srk->sijk", adapter["w"].a, adapter["w"].b)
        return {"w": w["w"] + sign * 0.3 * delta}

    @functools.partial(jax.jit, static_argnums=0)
    def found(f: Any, w: Any, adapter: Any) -> Any:
        forward = jax.jvp(f, (w, adapter), (w, {"w": node}))
        return forward, jax.vjp(f, w, adapter)[1](w)

    for b in (node.b, np.zeros_like(node.b)):  # at B = 0, where training starts, nothing is added
        adapter = {"w": node._replace(b=b)}
        actual, expected = (found(f, w, adapter) for f in (change, plainly))
        assert_close(actual, expected, 1e-5)
        assert_close(change(w, adapter), expected[0][0], 1e-5)


HOST = jax.memory.Space.Host
TWO = {"w": normal(4, 2, 32, 6, dtype=jnp.float32), "table": normal(5, 5, 32, dtype=jnp.float32)}


def looked_up(p: Any, ids: Any) -> Any:
    """Rows of a table, and matrices of a stack."""
    p = jax.device_put(p, jax.memory.Space.Device)
    return jnp.einsum("ti,sio->sto", p["table"][ids], p["w"])


def start(rule: Any, params: Any) -> Any:
    """What `init` gives."""
    return jlora.transform(looked_up, rule).init(KEY, params, jnp.arange(3))


def to_codes(params: Any) -> Any:
    return jlora.quantize(params, jlora.NF4("w|table", block=32))


# Functions of a base and an adapter that read W; they give a base, and what is trained.
READERS: dict[str, Any] = {
    "merge": lambda p, a: (jlora.merge(p, a), None),
    "unmerge": lambda p, a: (jlora.unmerge(p, a), None),
    "quantize": lambda p, a: (to_codes(p), None),
    "dequantize": lambda p, a: (jlora.dequantize(to_codes(p)), None),
    "requantize": lambda p, a: (jlora.merge(to_codes(p), a, requantize=True), None),
    "dora of codes": lambda p, a: start(jlora.DoRA("w", rank=2), to_codes(p)),
}
RULES = {
    "full": jlora.Full("w|table"),
    "dora": jlora.DoRA("w", rank=2),
    "rows": jlora.Rows("table", [3, 1]),
    "loftq": jlora.LoRA("w", rank=2, init=jlora.initializers.loftq(jlora.Int8())),
}
for name in ("pissa", "olora", "milora"):
    RULES[name] = jlora.LoRA("w", rank=2, init=getattr(jlora.initializers, name))
READERS |= {name: lambda p, a, rule=rule: start(rule, p) for name, rule in RULES.items()}


DAILY = ("unmerge", "dequantize", "dora", "full")


@pytest.mark.parametrize("name", some(READERS, *DAILY))
def test_a_base_in_host_memory_stays_there(name: str) -> None:
    """Eagerly and compiled, with the values of a base on the device; what is trained is there."""
    f = READERS[name]
    adapter = start(jlora.LoRA("w", rank=2, init=random), TWO)[1]
    expected, host = jax.jit(f)(TWO, adapter), jax.device_put(TWO, HOST)
    for found in (f(host, adapter), jax.jit(f)(host, adapter)):
        base, trained = found
        assert {jax.typeof(x).memory_space for x in jax.tree.leaves(base)} == {HOST}
        assert not any(map(is_on_host, jax.tree.leaves(trained)))
        laws.assert_same_codes(found, expected)


def test_merge_of_low_rank_writes_no_change() -> None:
    """Nothing of the size of W is beside it, also in bfloat16."""
    for dtype in (jnp.float32, jnp.bfloat16):
        node = jlora.types.LowRank(jnp.ones((64, 16)), jnp.ones((16, 32)), 1.0, PLAIN)
        merge = jax.jit(jlora.merge, donate_argnums=0)
        program = merge.lower({"w": jnp.ones((64, 32), dtype)}, {"w": node}).compile()
        assert program.memory_analysis().temp_size_in_bytes < 64 * 32


def test_merge_rounds_once() -> None:
    """In bfloat16: the float32 sum rounded, which is within one ulp of the float64 sum.

    A and B are multiples of 1/8, so that their product and its sum with W are exact in float32.
    """
    w = normal(1, 64, 32, dtype=jnp.bfloat16)
    a, b = (jnp.round(8 * normal(i, *shape)) / 8 for i, shape in ((2, (64, 4)), (3, (4, 32))))
    adapter = {"w": jlora.types.LowRank(a, b, 0.5, PLAIN)}
    merged = jlora.merge({"w": w}, adapter)["w"]
    assert_close(jlora.unmerge({"w": merged}, adapter)["w"], w, 4 * 2.0**-8)
    delta = 0.5 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    exact = np.asarray(w, np.float64) + delta
    assert raw(merged) == raw(exact.astype(np.float32).astype(ml_dtypes.bfloat16))
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - 7)
    assert np.all(np.abs(np.asarray(merged, np.float64) - exact) <= ulp / 2)
    twice = np.asarray(w + jnp.asarray(delta, jnp.bfloat16), np.float64)  # ΔW rounded, then the sum
    assert np.any(twice != np.asarray(merged, np.float64))


def test_full_leaves_are_copies() -> None:
    """A step may donate the adapter without deleting the base; `unmerge` leaves them alone."""
    s = setup()
    _, base, adapter = set_up(s.f, (jlora.LoRA("up", rank=2), jlora.Full("down")), s.params, s.x)
    before = raw(base)
    doubled = jax.jit(lambda a: jax.tree.map(lambda x: 2 * x, a), donate_argnums=0)(adapter)
    assert raw(base) == before
    merged = jlora.merge(base, doubled)
    assert raw(merged["down"]) == raw(2 * np.asarray(base["down"]))
    later = merged | {"down": merged["down"] + 1}
    assert raw(jlora.unmerge(later, doubled)["down"]) == raw(later["down"])


# ---------------------------------------------------------------------------------------- init


def test_keys_are_folded_per_path() -> None:
    """Another rule, leaf or container changes no draw; sites, layers and keys draw differently."""

    def drawn(container: str = "dict", pattern: Any = None, seed: int = 0, **more: Any) -> Any:
        make, split = CONTAINERS[container]
        params = make(np.ones((4, 4), np.float32), np.ones((3, 4, 4), np.float32))

        def f(p: Any, x: jax.Array) -> jax.Array:
            up, down = split(p)
            return lax.scan(lambda x, w: (x @ w, None), x @ up, down)[0]

        key = jax.random.key(seed)
        rule = jlora.LoRA(pattern, rank=2)
        return jlora.transform(f, rule).init(key, {**params, **more} if more else params, X)[1]

    both, one = drawn(), drawn(pattern="up")
    assert raw(both["up"]) == raw(one["up"])
    assert raw(drawn(pattern="up", another=np.ones((3, 3)))) == raw(one)
    for container in ("ordered", "frozen", "namedtuple", "dataclass", "state"):
        assert raw(drawn(container)) == raw(both), container
    draws = [x for a in (both, drawn(seed=1)) for x in (a["up"].a, *a["down"].a)]
    assert len({np.asarray(x).tobytes() for x in draws}) == 2 * 4


@pytest.mark.parametrize("name", ["kaiming_uniform", "gaussian"])
def test_distribution_of_a(name: str) -> None:
    """Uniform in ±1/√inputs with variance 1/(3·inputs), or normal with variance 1/inputs; B = 0.

    Of an embedding a lookup has one input, whatever the vocabulary.
    """
    shape, x = (3, 4, 100, 64), Struct((3, 2, 4, 100), jnp.float32)
    f = lambda p, x: (jnp.einsum("lbhi,lhio->lbo", x, p["w"]), p["table"][jnp.arange(2)])  # noqa: E731
    rule = jlora.LoRA(".*", rank=32, init=getattr(jlora.initializers, name))
    params = {"w": Struct(shape, jnp.float32), "table": Struct((1000, 32), jnp.float32)}
    _, adapter = jlora.transform(f, rule).init(KEY, params, x)
    for node, inputs in ((adapter["w"], 400), (adapter["table"], 1)):
        a = np.asarray(node.a, np.float64)
        assert not np.any(node.b)
        variance = 1 / inputs if name == "gaussian" else 1 / (3 * inputs)
        kurtosis = 3.0 if name == "gaussian" else 1.8
        assert abs(a.mean()) < 6 * np.sqrt(variance / a.size)
        assert abs(a.var() / variance - 1) < 6 * np.sqrt((kurtosis - 1) / a.size)
        assert abs((a**4).mean() / variance**2 / kurtosis - 1) < 0.1
        largest = np.abs(a).max() * np.sqrt(inputs)
        assert 0.99 < largest <= 1 if name == "kaiming_uniform" else largest > 3
    assert adapter["w"].a.shape == (*shape[:-1], 32)


DTYPES = ("float16", "bfloat16", "float32", "float64")


@pytest.mark.parametrize(
    ("base", "chosen"), every(DTYPES, [None, *DTYPES], daily={(base, None) for base in DTYPES})
)
def test_dtype_of_the_factors(base: str, chosen: str | None) -> None:
    """The weight's own, at least float32, or the rule's; outputs keep the model's."""
    with jax.enable_x64("float64" in (base, chosen)):
        made = jax.eval_shape(lambda: setup.__wrapped__(dtype=base, dtype_of_adapter=chosen)[4:])
        s = setup()
        expected = chosen or ("float64" if base == "float64" else "float32")
        assert {x.dtype.name for x in jax.tree.leaves(made[1])} == {expected}
        x = Struct(s.x.shape, base)
        assert jax.eval_shape(s.lora.apply, *made, x).dtype.name == base
        assert jax.eval_shape(jlora.merge, *made)["up"].dtype.name == base


def test_shapes_everywhere() -> None:
    """Any mix of arrays and shapes gives the same adapter; so do `jit` and `eval_shape`."""
    sizes = {"tokens": (11, 4), "positions": (4, 4), "blocks": (2, 4, 4)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(sizes.items())}
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 7, 10]])

    def f(p: Any, ids: jax.Array) -> jax.Array:
        x = p["tokens"][ids] + p["positions"][None]
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["blocks"])[0]

    rules = (jlora.LoRA("blocks", rank=2), jlora.LoRA("tokens", rank=3), jlora.Full("positions"))
    lora = jlora.transform(f, *rules)
    shapes, ids = kinds(params), Struct(tokens.shape, tokens.dtype)
    base, adapter = lora.init(KEY, params, tokens)
    assert raw(base) == raw(params)
    for p, x in ((params, ids), (shapes, tokens), (shapes, ids)):
        abstract, other = lora.init(KEY, p, x)
        assert kinds(abstract) == kinds(base)
        assert kinds(other) == kinds(adapter)
        other["positions"] = adapter["positions"]
        assert raw(other) == raw(adapter)
    assert kinds(jax.eval_shape(lora.init, KEY, shapes, ids)) == kinds((base, adapter))
    compiled = jax.jit(lambda key, p: lora.init(key, p, ids))(KEY, params)
    assert kinds(compiled) == kinds((base, adapter))
    assert_close(compiled[1], adapter, 1e-6)
    assert raw(compiled[0]) == raw(params)
    tables = {str(lora.sites(p, x)) for p in (params, shapes) for x in (tokens, ids)}
    assert len(tables) == 1


# --------------------------------------------------------------------------------------- nodes


def test_nodes_are_pytrees() -> None:
    """Copies keep values and what is static; leaves have names; other scales are another tree."""
    s = setup(slots=jlora.Slots(2, (1,)), dropout=0.25)
    leaves, structure = jax.tree.flatten(s.adapter)
    copies = [
        pickle.loads(pickle.dumps(s.adapter)),
        copy.copy(s.adapter),
        copy.deepcopy(s.adapter),
        jax.tree.unflatten(structure, leaves),
        jax.device_get(s.adapter),
        jax.jit(lambda a: a)(s.adapter),
    ]
    for other in copies:
        assert jax.tree.structure(other) == structure
        assert raw(other) == raw(s.adapter)
    assert s.adapter["up"].layout.slots == (2, (1,), 1)
    for tree, expected in (
        (setup("nested").adapter, ["a/1/a", "a/1/b", "b/0/d/a", "b/0/d/b"]),
        (
            jlora.dropout(s.adapter, KEY),
            [f"{w}/{x}" for w in ("down", "up") for x in ["a", "b", "key"]],
        ),
    ):
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
        assert names == expected
    with pytest.raises(ValueError, match=r"[Mm]ismatch|different pytree metadata"):
        jax.tree.map(lambda x, y: (x + y) / 2, s.adapter, setup(alpha=8).adapter)


# -------------------------------------------------------------------------------------- serving


def test_serving_does_not_copy_the_base() -> None:
    """By XLA's account: 16 adapters take no temporary memory of the size of the base."""
    n, width = 16, 512
    lora = jlora.transform(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], jlora.LoRA(rank=2))
    params = {"w": Struct((width, width), jnp.float32), "v": Struct((width, width), jnp.float32)}
    base, adapter = jax.eval_shape(lora.init, KEY, params, Struct((width,), jnp.float32))
    many = jax.tree.map(lambda x: Struct((n, *x.shape), x.dtype), adapter)
    serve = jax.jit(jax.vmap(lora.apply, (None, 0, 0)))
    compiled = serve.lower(base, many, Struct((n, width), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * width * width / 2


# ------------------------------------------------------------------------- counts and tables


def test_count_and_summary() -> None:
    """Sizes of arrays, shapes and Python numbers; keys are no parameters."""
    arrays = {"a": np.ones((2, 3), np.int8), "b": [Struct((4,), jnp.bfloat16), 2.0]}
    assert jlora.count(arrays | {"k": KEY, "n": None}) == 6 + 4 + 1
    assert jlora.count({}) == 0
    s = setup(dtype=jnp.bfloat16)
    found = jlora.summary(s.base, s.adapter)
    assert found == jlora.types.Summary(80, 2 * (6 + 8) + 2 * (8 + 4), 160, 4 * 52)
    assert found.share == 52 / 80


@pytest.mark.parametrize("method", ["frozen", "diagonal"])
def test_what_is_not_trained_does_not_count(method: str) -> None:
    """Frozen factors of a rule, and arrays that a method labels as base: no moments, no bytes."""
    rules = {"frozen": jlora.LoRA("w", rank=2, frozen=("a",)), "diagonal": Diagonal("w")}
    lora = jlora.transform(lambda p, x: x @ p["w"], rules[method])
    params, x = {"w": jnp.ones((64, 32))}, jnp.ones((1, 64))
    adapter = lora.init(KEY, params, x)[1]
    n = lora.sites(params, x).trainable
    found = jlora.summary(params, adapter)
    assert (found.trainable, found.trainable_bytes) == (n, 4 * n)


def test_paths_that_join_alike_are_refused() -> None:
    """Of two leaves with one name a rule could not tell which is an embedding."""
    params = {"a/b": jnp.ones((9, 4)), "a": {"b": jnp.ones((4, 3))}}
    lora = jlora.transform(lambda p, ids: p["a/b"][ids] @ p["a"]["b"], jlora.LoRA(rank=2))
    for call in (lora.sites, functools.partial(lora.init, KEY)):
        with refused(ValueError, "", "two leaves have the path a/b", "Rename one of them"):
            call(params, jnp.array([0]))


def test_the_table_word_for_word() -> None:
    """An embedding, a stack with slots, a convolution, a head of two inputs, a scale, a bias."""

    def f(p: Any, ids: jax.Array) -> jax.Array:
        x = p["tokens"][ids] * p["scale"] + p["shift"]
        layer = lambda x, w: (jnp.tanh(jnp.split(x @ w, 3, -1)[0]) + x, None)  # noqa: E731
        x = lax.scan(layer, x, p["blocks"])[0]
        numbers = ("NWC", "WIO", "NWC")
        x = lax.conv_general_dilated(x, p["conv"], (1,), "SAME", dimension_numbers=numbers)
        return jnp.einsum("btij,ijk->btk", x.reshape(*x.shape[:2], 2, 4), p["head"])

    shapes = {"tokens": (1000, 8), "scale": (8,), "shift": (4, 8), "blocks": (3, 8, 24)}
    shapes |= {"conv": (5, 8, 8), "head": (2, 4, 3)}
    params = {name: Struct(shape, jnp.float32) for name, shape in shapes.items()}
    rules = (
        jlora.LoRA("blocks", rank=2, slots=jlora.Slots(3, (0, 2))),
        jlora.Full("scale"),
        jlora.LoRA("^.o.*", rank=4),
    )
    sites = jlora.transform(f, *rules).sites(params, Struct((2, 4), jnp.int32))
    table = re.sub(r"at \S*py:\d+ \(.*\)", "at …", str(sites))
    check_text(re.sub("─+", "─", table))
    rows, _, _ = str(sites).partition("\nnote 1: used in")
    assert max(map(len, rows.splitlines())) <= 120  # whatever the file is called
    assert sites.trainable == 2 * 3 * 2 * (8 + 8) + 4 * (40 + 8) + 8 + 4 * (1000 + 8)
    # As a collection: of sites, by path, with sums over all leaves.
    assert [site.path for site in sites] == ["blocks", "conv", "head", "tokens"]
    assert (len(sites), len(sites.leaves), sites.total) == (4, 6, jlora.count(params))
    assert (sites["shift"].kind, sites["shift"].trainable) == (None, 0)
    head = sites["head"]
    assert (head.kind, head.inputs, head.outputs, head.size) == ("dense", 8, 3, 24)
    with pytest.raises(KeyError, match=r"no leaf 'heads'.*head"):
        sites["heads"]


def test_a_long_rule_is_named_once() -> None:
    """By its number; a rule that one leaf has stays in its row."""
    names = [f"{name}_projection_of_attention" for name in ("query", "value", "output")]
    f = lambda p, x: sum(x @ p[name] for name in names)  # noqa: E731
    both = jlora.LoRA("|".join(names[:2]), rank=2)
    lora = jlora.transform(f, both, jlora.DoRA(names[2], rank=2))
    lines = str(lora.sites(dict.fromkeys(names, X.T @ X), X)).splitlines()
    assert [line.split()[0] for line in lines if "  rule 1  " in line] == names[:2]
    assert lines[-1] == f"rule 1: LoRA({both.pattern!r})"
    assert f"DoRA({names[2]!r})" in lines[2]


def stacked(n: int) -> tuple[Any, dict]:
    """A model of `n` blocks by name, with two experts in each, and its parameters."""
    block = {"up": jnp.ones((8, 8)), "experts": {"e0": jnp.ones((8, 8)), "e1": jnp.ones((8, 8))}}

    def f(params: dict, x: jax.Array) -> jax.Array:
        for i in range(n):
            now = params[f"h_{i}"]
            x = x @ now["up"] @ now["experts"]["e0"] @ now["experts"]["e1"]
        return x

    return f, {f"h_{i}": block for i in range(n)}


def test_the_printed_table_folds_equal_layers() -> None:
    """Three or more that follow each other; `table()` has them all, and the sums are the same."""
    f, params = stacked(12)
    rules = jlora.LoRA("h_4/up", rank=3), jlora.LoRA(".*/up", rank=2)
    sites = jlora.transform(f, *rules).sites(params, Struct((2, 8), jnp.float32))
    rows = [line.split("  ")[0] for line in str(sites).splitlines()[2:-2]]
    assert rows == [
        *("h_0…11/experts/e0", "h_0…11/experts/e1"),
        *("h_0…3/up", "h_4/up", "h_5…11/up"),
    ]
    assert "h_5…11/up          7 × 8×8   dense  8 → 8         448  " in str(sites)
    assert [r.split()[0] for r in sites.table().splitlines()[2:-2]] == [s.path for s in sites]
    assert str(sites).splitlines()[-1] == sites.table().splitlines()[-1]
    kept = [int(r.split("8 → 8")[1].split()[0]) for r in str(sites).splitlines()[2:-2]]
    assert sum(kept) == sites.total
    f, params = stacked(2)  # which are not folded
    sites = jlora.transform(f).sites(params, Struct((2, 8), jnp.float32))
    assert str(sites) == sites.table()


# ------------------------------------------------------------------------ places and processes


SUBMODULES = ["analysis", "arithmetic", "checkpoint", "initializers", "many", "peft", "sharding"]


def test_import_is_light() -> None:
    """`import jlora` loads JAX alone: no optax, Flax, Orbax, bars or file format.

    `jlora.peft` then loads no library of PyTorch, and every submodule is there as an attribute.
    """
    heavy = ("absl.flags", "click", "flax", "keras", "optax", "orbax", "pandas", "safetensors")
    heavy += ("tensorflow", "tensorstore", "torch", "tqdm", "transformers")
    code = (
        "import sys, jlora; dir(jlora), jlora.__version__; "
        f"print([m for m in {(*heavy, 'jlora.peft')!r} if m in sys.modules]); "
        "jlora.peft.Name; print({'torch', 'peft', 'transformers'} & set(sys.modules)); "
        f"print(*[n for n in {SUBMODULES} if n not in dir(jlora) or not getattr(jlora, n)])"
    )
    env = {"PYTHONPATH": str(pathlib.Path(jlora.__file__).parents[1])}
    done = processes.run("-c", code, env=env, cwd=pathlib.Path(__file__).with_name("support"))
    assert done.stdout.split() == ["[]", "set()"], done.stderr


def test_version() -> None:
    """That of the installed package; other names are an error as of any module."""
    assert jlora.__version__ == importlib.metadata.version("jlora")
    assert "__version__" in dir(jlora)
    with pytest.raises(AttributeError, match="module 'jlora' has no attribute 'pfet'"):
        jlora.pfet  # noqa: B018

"""Every method passes the laws of LoRA, and is merged, saved, counted, sharded and trained alike.

The set of methods is open: two of `own_methods` are among them.
"""

import copy
import dataclasses
import gc
import inspect
import math
import operator
import re
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from cases import CASES, Case
from jax import export
from jax.sharding import PartitionSpec as P
from messages import all_refused, each_refusal, refused
from own_methods import Diagonal, Gain, GainNode
from small import array, set_up, set_up_noisy, some

import jlora
from jlora import DoRA, Frozen, Full, LoRA, Rows, checkpoint, peft
from jlora import _adapters as adapters
from jlora.extend import Node, register

# A gain is no factor: where W is joined, or multiplied with another weight, along the inputs of the
# product, it would be one of inputs and outputs at once.
NOT_A_GAIN = {
    "padded",
    "concatenate_inputs",
    "weight_times_weight",
    "weights_multiplied_with_one_repeated",
    "two_weights_meet_along_a_new_axis",
}


def of_rule(rule: Any, method: type) -> Any:
    """A rule of LoRA as one of another method."""
    if not isinstance(rule, LoRA):
        return rule
    if method is DoRA:
        return DoRA(**{f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)})
    return method(rule.pattern)


def with_rows(case: Case) -> Case:
    """A case whose embeddings have rows trained, and which keeps its rules for the rest."""
    problem = case.build(jnp.float32)
    sites = jlora.transform(problem.apply).sites(problem.params, *problem.args, **problem.kwargs)
    rules = []
    for site in sites:
        if site.kind == "embed" and len(site.layout.inputs) == 1:
            n = site.inputs
            rows = list(dict.fromkeys((n - 1, 0, n // 2)))
            rules.append(Rows(f"^{re.escape(site.path)}$", rows))
    rest = [r for r in case.rules if isinstance(r, Full)]
    return dataclasses.replace(case, rules=(*rules, *rest) if rules else ())


def is_for(case: Case, method: type) -> bool:
    """Whether the case is one for another method than LoRA."""
    if method is Rows:
        return bool(case.sites) and case.subject in ("lookup", "model", "no_site")
    low_rank = [r for r in case.rules if isinstance(r, LoRA)]
    if method is DoRA:
        fits = not any(r.dropout or r.share == "outputs" or r.frozen for r in low_rank)
    else:
        fits = all(r == LoRA(r.pattern, rank=r.rank, alpha=r.alpha) for r in low_rank)
    fits = fits and not (method in (Gain, DoRA) and case.name in NOT_A_GAIN)
    return fits and case.sites > 0 and case.subject != "model"


# With every law, or only that adapted is merged.
DAILY = {
    DoRA: {
        "conv_nchw": False,
        "depthwise_kernel_of_multipliers": False,
        "concatenate_adapted_all": False,
        "experts_einsum": False,
    },
    Rows: {"lookup_under_vmap": False, "lookup_in_each_of_a_stack": False},
    Gain: {"experts_einsum": False},
    Diagonal: {"matmul": True},
}


def entries() -> Any:
    names = {case.name for case in CASES}
    for method, daily in DAILY.items():
        assert daily.keys() <= names
        for case in CASES:
            if is_for(case, method):
                marks = [] if case.name in daily else [pytest.mark.slow]
                name = f"{method.__name__}-{case.name}"
                yield pytest.param(method, case, daily.get(case.name, True), id=name, marks=marks)


@pytest.mark.parametrize(("method", "case", "every_law"), [*entries()])
def test_laws(method: type, case: Case, every_law: bool) -> None:
    """Those of LoRA itself; DoRA starts as the base up to rounding."""
    if method is Rows:
        case = with_rows(case)
    else:
        case = dataclasses.replace(case, rules=tuple(of_rule(r, method) for r in case.rules))
    if not case.rules:
        pytest.skip("no embedding")
    case = dataclasses.replace(case, exact_at_zero=case.exact_at_zero and method is not DoRA)
    # In float32 some second derivatives are what rounding leaves.
    is_mixed = any(getattr(rule, "dtype", None) for rule in case.rules)
    is_daily = case.name in DAILY[method]
    dtype = jnp.float64 if case.float64 and not (is_daily or is_mixed) else jnp.float32
    with laws.precision(case, dtype) as tolerance:
        made = laws.make(case, dtype)
        laws.hold(made, tolerance, every_law)
        if every_law:
            laws.frozen_is_left_out(made)
        if every_law and method in (DoRA, Rows):
            laws.quantized_is_dequantized(made, max(tolerance, 1e-5))


# --------------------------------------------------------------------------------- one small model


def model(params: Any, ids: jax.Array) -> jax.Array:
    """A table that is looked up, layers in a scan, and a head."""
    x = params["table"][ids]
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
    return x @ params["head"]


PARAMS = {"layers": array(3, 4, 4) / 2, "head": array(4, 2) / 2, "table": array(7, 4)}
IDS = jnp.array([3, 0, 6, 5, 1])


class Method(NamedTuple):
    """A rule for one leaf, and what is to be found there.

    Attributes:
        rule: the rule.
        trained: the number of parameters that it trains.
        shards: the partitions of the arrays where W has (s, i, o), or (i, o) without a stack.
        is_invertible: whether it can be unmerged.
        values: whether it starts from the values of W.
        path: the leaf.
        label: of the array of its own.
    """

    rule: Any
    trained: int
    shards: dict[str, P]
    is_invertible: bool = True
    values: bool = False
    path: str = "layers"
    label: str = ""


AB = {"a": P("s", "i", None), "b": P("s", None, "o")}
AB_OF_SLOTS = {"a": P("s", None, "i", None), "b": P("s", None, None, "o")}
METHODS = {
    "gain": Method(Gain("layers"), 3 * 4, {"gain": P("s", "o")}, label="gain"),
    "diagonal": Method(Diagonal("layers"), 3 * 2, AB | {"d": P("s", None)}, label="d"),
    "dora": Method(
        DoRA("layers", 2, rslora=True), 3 * 20, AB | {"m": P("s", "o")}, False, True, label="m"
    ),
    "slots": Method(
        DoRA("layers", 2, slots=jlora.Slots(2, (1,))),
        3 * 14,
        AB_OF_SLOTS | {"m": P("s", None, "o")},
        False,
        True,
        label="m",
    ),
    "rows": Method(
        Rows("table", range(3, 6)), 3 * 4, {"v": P(None, "o")}, False, True, "table", "rows"
    ),
}


class Made(NamedTuple):
    """A method with the small model: its transform, base and random adapter."""

    method: Method
    rules: tuple[Any, ...]
    lora: jlora.types.Transformed
    base: Any
    adapter: Any

    @property
    def node(self) -> Any:
        """The node of the method."""
        return self.adapter[self.method.path]


@pytest.fixture(params=METHODS, scope="module")
def made(request: Any) -> Made:
    """Each method."""
    method = METHODS[request.param]
    [rest] = PARAMS.keys() - {method.path, "head"}
    rules = (method.rule, Full("head"), Frozen(rest))
    return Made(method, rules, *set_up_noisy(model, rules, PARAMS, IDS))


def test_merged_and_back(made: Made) -> None:
    path, node = made.method.path, type(made.node).__name__
    merged = jlora.merge(made.base, made.adapter)
    both = jax.jit(lambda base, a, merged: (model(merged, IDS), made.lora.apply(base, a, IDS)))
    np.testing.assert_allclose(*both(made.base, made.adapter, merged), rtol=1e-5, atol=1e-5)
    if made.method.is_invertible:
        back = jlora.unmerge(merged, made.adapter)[path]
        np.testing.assert_allclose(back, made.base[path], atol=1e-6)
        return
    message = f"`unmerge` cannot undo {node} at {path!r}: its change depends on the original weight"
    with pytest.raises(ValueError, match=message):
        jlora.unmerge(merged, made.adapter)


def test_saved_and_restored(made: Made, tmp_path: Any) -> None:
    checkpoint.save(tmp_path / "a", made.adapter, made.rules, base=made.base)
    assert checkpoint.read(tmp_path / "a").rules == made.rules
    for like in (None, made.adapter):
        restored = checkpoint.restore(tmp_path / "a", like=like, base=made.base)
        assert jax.tree.structure(restored) == jax.tree.structure(made.adapter)
        jax.tree.map(np.testing.assert_array_equal, restored, made.adapter)


@pytest.mark.parametrize("made", some(METHODS, "dora"), indirect=True)
def test_exported_with_the_adapter_as_an_argument(made: Made) -> None:
    """The file has the form of the adapter; other numbers of rows are the same program."""
    types = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (made.base, made.adapter)
    )
    ids = jax.ShapeDtypeStruct(export.symbolic_shape("n"), jnp.int32)
    written = export.export(jax.jit(made.lora.apply))(*types, ids).serialize()
    f = export.deserialize(written)
    assert f.in_tree == jax.tree.structure(((made.base, made.adapter, IDS), {}))
    for rows in (IDS, IDS[:2]):
        expected = jax.jit(made.lora.apply)(made.base, made.adapter, rows)
        np.testing.assert_allclose(f.call(made.base, made.adapter, rows), expected, 1e-5, 1e-6)


def test_sites_and_counts(made: Made) -> None:
    method, sites = made.method, made.lora.sites(made.base, IDS)
    assert sites[method.path].trainable == method.trained
    assert f"{type(method.rule).__name__}({method.path!r}" in str(sites)
    [frozen] = (site for site in sites.leaves if isinstance(site.rule, Frozen))
    assert frozen.trainable == 0 and frozen.path not in made.adapter
    mask = jlora.mask(made.adapter)
    sizes = jax.tree.map(lambda x, is_trained: is_trained * x.size, made.adapter, mask)
    assert sum(jax.tree.leaves(sizes)) == sites.trainable == method.trained + 4 * 2
    shape = list(made.base[method.path].shape)
    if method.shards.keys() in ({"v"}, {"gain"}):
        shape[-2] = 0  # no array follows the inputs
    assert adapters.weight_shape(made.node) == tuple(shape)


def test_only_what_is_trained_changes(made: Made) -> None:
    params, tx = jlora.Params(made.base, made.adapter), jlora.optimizer(optax.sgd(0.1))

    @jax.jit
    def updates(params: Any) -> Any:
        grads = jax.grad(lambda p: made.lora.apply(p.base, p.adapter, IDS).sum())(params)
        return tx.update(grads, tx.init(params), params)[0]

    changed = jax.tree.map(lambda u: bool(np.any(np.asarray(u) != 0)), updates(params))
    assert changed == jlora.mask(params)
    assert made.method.label in jlora.labels(made.node)


def test_is_sharded_like_the_base(made: Made) -> None:
    specs = {"layers": P("s", "i", "o"), "head": P(), "table": P("i", "o")}
    found = jlora.sharding.specs(specs, made.adapter)[made.method.path]
    assert {name: getattr(found, name) for name in adapters.arrays(made.node)} == made.method.shards


def test_misfit_is_named(made: Made) -> None:
    path = made.method.path
    outputs = 10 if made.node.layout.slots is not None else 5
    other = made.base | {path: jnp.ones((*made.base[path].shape[:-1], outputs))}
    shape = re.escape(str(other[path].shape))
    with pytest.raises(ValueError, match=rf"{path}: a weight of shape {shape} needs "):
        made.lora.apply(other, made.adapter, IDS)


def test_on_shapes(made: Made) -> None:
    """`init` traces the model alone; what starts from values says that it needs them."""
    shapes = jax.eval_shape(lambda: made.base)
    found = jax.eval_shape(made.lora.init, jax.random.key(0), shapes, IDS)[1]
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, made.adapter)
    if made.method.values:
        name = rf"{type(made.method.rule).__name__}\({made.method.path!r}"
        at = rf"has only a shape at {made.method.path!r}"
        with pytest.raises(ValueError, match=rf"{at}, but .*{name}"):
            made.lora.init(jax.random.key(0), shapes, IDS)


def test_a_node_is_a_named_tuple(made: Made) -> None:
    node = made.node
    assert type(node).__match_args__ == node._fields
    again = type(node)._make(node)
    assert again._asdict() == node._asdict()
    assert node.replace(layout=None).layout is None
    if sys.version_info >= (3, 13):
        assert copy.replace(node, layout=None).layout is None  # pyright: ignore


def test_pefts_files_have_no_place_for_methods_of_your_own(tmp_path: Any) -> None:
    names = [peft.Name("layers", r"layers.{}", "lio")]
    base, adapter = jlora.transform(model, Gain("layers")).init(jax.random.key(0), PARAMS, IDS)
    with refused(ValueError, "adapter", "layers", "no form for a GainNode"):
        peft.save(tmp_path / "p", base, adapter, names)


def test_a_node_is_made_whole_whenever_garbage_is_collected() -> None:
    class Mine(Node):
        labels: ClassVar = {"a": "a"}
        a: Any
        layout: Any = None
        axes, lower = GainLike.axes, GainLike.lower

    def collect(frame: Any, *_: Any) -> Any:  # before every line of the module
        if frame.f_code.co_filename == inspect.getfile(register):
            gc.collect()
        return collect

    before = sys.gettrace()
    gc.freeze()  # what is there already takes long
    sys.settrace(collect)
    try:
        register(Mine)
    finally:
        sys.settrace(before)
        gc.unfreeze()
    assert Mine(1)._replace(a=2) == (2, None)


class GainLike:
    """The methods of a node with one array, `a`."""

    @staticmethod
    def axes(layout: jlora.types.Layout) -> Any:
        """Those of the outputs."""
        return {"a": layout.outputs}

    def lower(self, w: Any) -> Any:
        """Nothing."""


def node(bases: tuple[type, ...] = (GainLike, Node), **attributes: Any) -> type:
    """A class of nodes that is complete but for what is changed; None leaves it out."""
    given = {"labels": {"a": "a"}, "__annotations__": {"a": Any, "layout": Any}} | attributes
    return type("Mine", bases, {k: x for k, x in given.items() if x is not None})


def rule(bases: tuple[type, ...] = (jlora.extend.Rule,), frozen: bool = True, **attributes: Any):
    """A class of rules, likewise."""
    given = {"node": adapters.LowRank, "__annotations__": {"pattern": Any}, "start": lambda: 0}
    given = {k: x for k, x in (given | attributes).items() if x is not None}
    return dataclasses.dataclass(frozen=frozen)(type("Mine", bases, given))


INCOMPLETE: dict[str, Callable[[], Any]] = {
    "fields of Mine with a default ... got a, layout, with defaults for a.": lambda: node(a=7),
    "Mine must define `labels` ... labels: ClassVar": lambda: node(labels=None),
    "it lacks layout among a.": lambda: node(__annotations__={"a": Any}),
    "it lacks gane among a, layout.": lambda: node(labels={"gane": "a"}),
    "Mine must define `axes` and `lower`.": lambda: node((Node,)),
    "`axes` ... that `labels` has, a; got b.": lambda: node(
        axes=staticmethod(lambda layout: {"b": ()})
    ),
    "Mine must not extend LowRank ... Derive it from": lambda: node((jlora.types.LowRank,)),
    "Mine must define `start`.": lambda: rule(start=None),
    "Mine must be a frozen dataclass": lambda: rule(frozen=False),
    "Mine must have a field `pattern`.": lambda: rule(__annotations__={"other": Any}),
    "`cls` ... got <class": lambda: rule(node=None),
}


test_an_incomplete_class_is_refused = all_refused(
    {TypeError: INCOMPLETE}, lambda call: register(call())
)


def test_a_node_has_the_fields_of_a_class_that_is_not_registered() -> None:
    mine = register(node((node(),), __annotations__={"more": Any}))
    assert mine(1, 2, 3)._fields == ("a", "layout", "more")


def test_a_name_that_is_taken() -> None:
    """Of a rule and of a primitive; what is defined once more replaces itself."""

    def define(name: str = "LoRA") -> type:
        return dataclasses.dataclass(frozen=True)(type(name, (LoRA,), {}))

    with refused(TypeError, "", "cannot be registered as the rule 'LoRA'"):
        register(define())
    with refused(TypeError, "", "whose class is not registered under its name"):
        jlora.transform(lambda p, x: x @ p["w"], define()("w"))
    with refused(TypeError, "", "cannot be registered as the primitive 'dot_general'"):
        jlora.extend.primitive("dot_general")(lambda eqn, *xs: xs)
    assert jlora.transform(lambda p, x: x @ p["w"], LoRA("w"))
    register(define("Again"))
    again = register(define("Again"))
    assert adapters.RULES.pop("Again") is again

    @dataclasses.dataclass(frozen=True)
    class Mine(LoRA):
        """A subclass without `register`."""

    with refused(TypeError, "rules", "Mine('w')", "whose class is not registered"):
        jlora.transform(lambda p, x: x @ p["w"], Mine("w"))


STARTS: dict[type[Exception], dict[str, Callable[[Any, Any, Any], Any]]] = {
    ValueError: {
        "gain: expected (3,), got (4,)": lambda w, x, s: (w, GainNode(x[0], s.layout)),
        "got ((3, 4), dtype('float32'))": lambda w, x, s: (w.T, GainNode(x[:3, 0], s.layout)),
    },
    TypeError: {
        "its GainNode, as a tuple; got ArrayImpl and tuple": lambda w, x, s: (w, (x, s)),
        "as a tuple; got GainNode for 'w'": lambda w, x, s: GainNode(x[:3, 0], s.layout),
    },
}


@each_refusal(STARTS)
def test_what_a_rule_starts_with(error: Any, call: Any, facts: Any) -> None:
    """`init` holds it to the shapes of the rule, and names rule and path."""

    class Wrong(Gain):
        def start(self, key: Any, w: Any, site: Any) -> Any:
            return call(w, jnp.ones((4, 4)), site)

    dataclass = dataclasses.dataclass(frozen=True)(Wrong)
    lora = jlora.transform(lambda p, x: x @ p["w"], register(dataclass, override=True)("w"))
    with refused(error, "start", "Wrong('w')", *facts):
        lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)))
    del adapters.RULES["Wrong"]


@pytest.mark.parametrize(("pattern", "error"), [("(", ValueError), (3, TypeError)])
def test_patterns_of_any_rule_are_checked(pattern: Any, error: type[Exception]) -> None:
    with refused(error, "pattern", "regular expression"):
        jlora.transform(lambda p, x: x @ p["w"], Gain(pattern))


STATIC = {
    "scale": (None, 1j, "2", math.nan, math.inf, True, np.float32(jnp.inf)),
    "dropout": (None, "0"),
    "materialize": (1, "false", None),
    "layout": (np.ones(3),),
}


@pytest.mark.parametrize(("field", "value"), [(k, x) for k, each in STATIC.items() for x in each])
def test_a_static_field_is_a_value_of_python(field: str, value: Any) -> None:
    """What is traced, or of another kind, is refused where it is given; later calls are right."""
    lora = jlora.transform(lambda p, x: x @ p["w"], LoRA("w", rank=2))
    x = jnp.ones((1, 4))
    base, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, x)
    replaced = adapter["w"]._replace
    for give in (
        lambda: replaced(**{field: value}),
        lambda: jax.jit(lambda s: replaced(**{field: s}))(1.0),
    ):
        with refused(TypeError, field, "multiply `b` by it"):
            give()
    assert replaced(scale=np.float32(2)).scale == 2
    jax.jit(lora.apply)(base, adapter, x)


@pytest.mark.parametrize("other", [2, 2.0, np.float32(2), np.ones(2), "node"])
def test_a_node_is_no_tuple_to_repeat(made: Made, other: Any) -> None:
    other = made.node if isinstance(other, str) else other
    for operate in (operator.add, operator.mul):
        for pair in ((made.node, other), (other, made.node)):
            with refused(TypeError, "", "is a node of an adapter, not an array"):
                operate(*pair)


GAINS = (0.0, -0.0, 1e-20, -1e-20, 1e-36, -1.0, 3.0)


@pytest.mark.parametrize("dtype", some([jnp.float32, jnp.bfloat16, jnp.float16], jnp.bfloat16))
@pytest.mark.parametrize("size", [1.0, 1e30])
def test_a_gain_of_any_size_is_that_of_the_merged_weight(dtype: Any, size: float) -> None:
    """Values and gradients where a gain is 0, tiny or negative, also for large inputs."""
    limits = jnp.finfo(dtype)
    size = 1e3 if size > float(limits.max) else size
    w = {"w": jnp.ones((4, len(GAINS)), dtype)}
    x = jnp.asarray([[1.0, 2.0, -1.0, 2.0]], dtype) * jnp.asarray(size, dtype)
    lora, base, adapter = set_up(lambda p, x: x @ p["w"], Gain("w"), w, x)
    gain = jnp.asarray(GAINS, jnp.float32)

    def adapted(gain: jax.Array) -> jax.Array:
        return lora.apply(base, {"w": adapter["w"]._replace(gain=gain)}, x)[0].astype(jnp.float32)

    expected = np.float32(4 * size) * np.asarray(GAINS, np.float32)
    np.testing.assert_allclose(jax.jit(adapted)(gain), expected, rtol=1e-2, atol=float(limits.tiny))
    slope = jax.jit(jax.grad(lambda g: adapted(g).sum()))(gain)
    np.testing.assert_allclose(slope, np.full(len(GAINS), 4 * size), rtol=1e-2)

"""What a user reads: where something is given in a wrong place, and what `print` shows."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from flax import nnx
from jax import lax
from small import NO_ARRAY, exactly

import jlora
from jlora import Full, LoRA
from jlora._foreign import check_apply_fn, check_leaf

KEY = jax.random.key(0)
X = jnp.ones((1, 4))


def dense(params: Any, x: jax.Array) -> jax.Array:
    """The smallest model."""
    return x @ params["w"]


W = {"w": jnp.arange(12.0).reshape(4, 3)}


# ------------------------------------------------------------------- a bound tree without `wrap`

BOUND = (
    "`params` is a tree from jlora.bind, which holds adapters beside its weights. Only functions "
    "under jlora.wrap accept it: call jlora.wrap(model.apply)(params, ...) instead of "
    "model.apply(params, ...), or lora.apply(base, adapter, ...)."
)


def bound(fn: Callable[..., Any], params: Any, *args: Any) -> Any:
    """The tree of `fn` with an adapter at every matrix in it."""
    rule = LoRA(".*", rank=1, init=laws.start)
    return jlora.bind(*jlora.transform(fn, rule).init(KEY, params, *args))


IDS = jnp.array([1, 2])


def module(kind: str) -> tuple[Callable[..., Any], Any, Any]:
    """A module's apply function, its parameters and its input."""
    if kind == "nnx":
        return lambda m, x: m(x), nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0)), X
    linen, shape, x = {
        "dense": (nn.Dense(3, use_bias=False), {"kernel": (4, 3)}, X),
        "embed": (nn.Embed(4, 3), {"embedding": (4, 3)}, IDS),
        "conv": (nn.Conv(3, (2,), use_bias=False), {"kernel": (2, 4, 3)}, X[None]),
    }[kind]
    return linen.apply, {"params": {k: jnp.ones(s) for k, s in shape.items()}}, x


@pytest.mark.parametrize("kind", ["dense", "embed", "conv", "nnx"])
def test_a_tree_in_a_module_that_cannot_take_it(kind: str) -> None:
    """`model.apply(jlora.bind(base, adapter), x)`: the message says what takes such a tree."""
    fn, params, x = module(kind)
    trees = {BOUND: bound(fn, params, x), NO_ARRAY: jlora.quantize(params, jlora.Int8(".*"))}
    for message, tree in trees.items():
        for f in (fn, jax.jit(fn)):
            with pytest.raises(TypeError, match=exactly(message)):
                f(tree, x)


USES: dict[str, Callable[[Any], Any]] = {
    "x @ w": lambda w: X @ w,
    "w @ x": lambda w: w @ X.T,
    "numpy": lambda w: np.ones((1, 4)) @ w,
    "dot": lambda w: jnp.dot(X, w),
    "lax.dot": lambda w: lax.dot(X, w),
    "einsum": lambda w: jnp.einsum("bi,io->bo", X, w),
    "take": lambda w: jnp.take(w, 0, axis=0),
    "row": lambda w: w[0],
    "rows": lambda w: w[IDS],
    "all": lambda w: w[...],
    "loop": lambda w: list(w),
    "scaled": lambda w: 2 * w,
    "divided": lambda w: w / 2,
    "negative": lambda w: -w,
    "sum": lambda w: w + 1,
    "difference": lambda w: 1 - w,
    "norm": lambda w: jnp.linalg.norm(w),
    "transpose": lambda w: jnp.transpose(w),
    "asarray": lambda w: jnp.asarray(w),
    "numpy.asarray": lambda w: np.asarray(w),
}


@functools.cache
def leaves() -> list[tuple[str, Any]]:
    """A weight that is bound, and ones that are quantized to 8 bits and to 4."""
    eight = jlora.quantize(W, jlora.Int8("w"))
    four = jlora.quantize({"w": jnp.ones((4, 64))}, jlora.NF4("w"))
    return [(BOUND, bound(dense, W, X)["w"]), (NO_ARRAY, eight["w"]), (NO_ARRAY, four["w"])]


@pytest.mark.parametrize("use", list(USES))
def test_leaf_is_no_array(use: str) -> None:
    """However a model takes hold of it."""
    for message, leaf in leaves()[: 1 if use == "lax.dot" else 3]:
        with pytest.raises(TypeError, match=exactly(message)):
            USES[use](leaf)


def test_a_leaf_has_no_attributes_of_an_array() -> None:
    """`w.T`, `w.shape`; and what asks politely, as `hasattr` and copies do, gets an answer."""
    [(_, leaf), (_, eight), _] = leaves()
    for kind, x, message in (("Adapted", leaf, BOUND), ("Quantized", eight, NO_ARRAY)):
        said = exactly(f"{kind} has no attribute 'T': {message}")
        with pytest.raises(AttributeError, match=said):
            x.T  # noqa: B018
    assert not hasattr(leaf, "shape")
    for same in (copy.deepcopy(leaf), pickle.loads(pickle.dumps(leaf))):
        assert jax.tree.structure(same) == jax.tree.structure(leaf)


# -------------------------------------------------------------------- patterns that reach too far

BLOCK = {
    "out": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
    "norm": {"scale": jnp.ones(4)},
    "blocks/0": {"query": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}},
}


def block(params: Any, x: jax.Array) -> jax.Array:
    """Two dense layers with biases, and a norm's scale."""
    for layer in (params["blocks/0"]["query"], params["out"]):
        x = x @ layer["kernel"] + layer["bias"]
    return x * params["norm"]["scale"]


PATTERNS = {  # a pattern: the leaf that it should not match, and what is advised
    "out": ("out/bias", "out/kernel"),
    "blocks": ("blocks/0/query/bias", "blocks/.*kernel"),
    "out/bias": ("out/bias", "out/kernel"),
    "bias": ("blocks/0/query/bias", "kernel"),
    "(query|out)/bias$": ("blocks/0/query/bias", "(query|out)/kernel$"),
    "(query|out)": ("blocks/0/query/bias", "(query|out)/kernel"),
    "query|out": ("blocks/0/query/bias", "(query|out)/kernel"),
    ".*": ("blocks/0/query/bias", ".*/kernel"),
    "scale": ("norm/scale", None),
}


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_pattern_that_hits_a_vector(pattern: str) -> None:
    """A pattern like it that takes matrices only, where there is one."""
    path, better = PATTERNS[pattern]
    hint = "" if better is None else f" (did you mean {better!r}?)"
    message = (
        f"LoRA({pattern!r}) matches {path!r} of shape (4,), which is not a matrix. Narrow the "
        f"pattern{hint}, or train the leaf in full with jlora.Full."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        jlora.transform(block, LoRA(pattern, rank=2)).init(KEY, BLOCK, X)
    if better is not None:
        sites = jlora.transform(block, LoRA(better, rank=2)).sites(BLOCK, X)
        assert any(site.is_adapted for site in sites)


def test_advice_that_would_be_no_regular_expression() -> None:
    """A range that begins with the name of the vector: `[w-9]` is none, so nothing is advised."""
    fn = lambda p, x: x @ p["w"] + p["0"]  # noqa: E731
    with pytest.raises(ValueError, match="Narrow the pattern, or"):
        jlora.transform(fn, LoRA("[0-9]", rank=2)).init(KEY, {"0": jnp.ones(3), **W}, X)


# ------------------------------------------------------------------- objects of other libraries


def stand_in(module: str, name: str, **members: Any) -> Any:
    """An object of a class that derives from `name` of a package that need not be there."""
    base = type(name, (), {"__module__": module} | members)
    return type("Mine", (base,), {"__module__": "mine"})()


CALLED = {"__call__": lambda self, x: x}
MODULES_GIVEN = {
    "linen": (
        lambda: nn.Dense(3),
        "the module Dense of flax.linen. Give its apply: jlora.transform(model.apply, ...), with "
        "the variables of model.init as the parameters.",
    ),
    "nnx": (
        lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0)),
        "the module Linear of flax.nnx. Give a function of a module, lambda model, x: model(x), "
        "and the module itself as the parameters. If it has state (batch statistics, dropout), "
        "split it by graph, params, rest = nnx.split(model, nnx.Param, ...). Then give a function "
        "of params and rest that merges them by nnx.merge(graph, params, rest, copy=True), and "
        "returns the new rest beside its outputs.",
    ),
    "equinox": (
        lambda: stand_in("equinox._module._module", "Module", **CALLED),
        "the module Mine of equinox. Split it by params, static = eqx.partition(model, "
        "eqx.is_array), and give lambda params, x: eqx.combine(params, static)(x).",
    ),
    "keras": (
        lambda: stand_in("keras.src.layers.layer", "Layer", **CALLED),
        "the module Mine of keras. Give {v.path: v.value for v in model.trainable_variables} as "
        "the parameters, and lambda params, rest, x: model.stateless_call([params[v.path] for v in "
        "model.trainable_variables], rest, x) as the function.",
    ),
    "torch": (
        lambda: stand_in("torch.nn.modules.module", "Module", **CALLED),
        "the module Mine of torch. Give what jlora.torch.extract makes of it: params, apply = "
        "jlora.torch.extract(model).",
    ),
    "parameters": (
        lambda: {"kernel": jnp.ones((64, 64))},  # which are not printed
        "an object of type dict. The function comes first: transform(model.apply, LoRA(...)).",
    ),
}


@pytest.mark.parametrize("case", list(MODULES_GIVEN))
def test_module_in_the_place_of_a_function(case: str) -> None:
    """A module that holds its parameters is not a function of them; what is, is said."""
    make, got = MODULES_GIVEN[case]
    with pytest.raises(
        TypeError, match=exactly(f"`apply_fn` must be a function of parameters; got {got}")
    ):
        check_apply_fn(make())


def test_functions_of_modules_pass() -> None:
    """Methods, partials, compiled functions, and modules of packages with a similar name."""
    module = nn.Dense(3)
    other = stand_in("kerasaurus", "Layer", **CALLED)
    for fn in (module.apply, functools.partial(module.apply, mutable=["x"]), jax.jit(dense), other):
        check_apply_fn(fn)


LEAVES = {
    "function": (
        np.tanh,
        "<ufunc 'tanh'> of type ufunc. Separate the arrays from the rest and combine both in the "
        "function. In Equinox: params, static = eqx.partition(model, eqx.is_array), and "
        "lambda params, x: eqx.combine(params, static)(x).",
    ),
    "keras": (
        stand_in(
            "keras.src.backend.jax.core", "Variable", shape=(3,), __repr__=lambda _: "VALUES" * 9
        ),
        "VALUESVALUESV...ESVALUESVALUES of type Mine. Give {v.path: v.value for v in "
        "model.trainable_variables} as the parameters, and lambda params, rest, x: "
        "model.stateless_call([params[v.path] for v in model.trainable_variables], rest, x) as the "
        "function.",
    ),
    "tensor": (
        stand_in("torch", "Tensor", shape=(3,), __repr__=lambda _: "tensor"),
        "tensor of type Mine. Convert it with jnp.asarray.",
    ),
    "name": ("gelu", "'gelu' of type str."),
}


@pytest.mark.parametrize("case", list(LEAVES))
def test_leaf_that_is_no_array(case: str) -> None:
    """The path, what is there, and what to give instead."""
    leaf, got = LEAVES[case]
    message = f"`params` must be a pytree of arrays; the leaf 'layer/act' is {got}"
    with pytest.raises(TypeError, match=exactly(message)):
        check_leaf(leaf, ("layer", "act"))


@pytest.mark.parametrize(
    "leaf", [X, np.ones(3), np.float32(1), 1, 1.5, True, 1j, KEY, jax.ShapeDtypeStruct((3,), int)]
)
def test_arrays_and_numbers_pass(leaf: Any) -> None:
    """All that JAX takes for an array."""
    check_leaf(leaf, ("w",))


def test_module_whose_state_would_be_lost() -> None:
    """What a step changes is named; a module that changes nothing may have state."""
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    model = nnx.Sequential(*layers)
    lora = jlora.transform(lambda model, x: model(x), jlora.LoRA("kernel", rank=2))
    message = (
        "`apply_fn` changes variables of the module of flax.nnx that it gets, at layers/1/mean, "
        "layers/1/var, layers/2/rngs/count. The change would be lost: each step would start with "
        "the same statistics and dropout keys. Call model.eval() before, or split it by "
        "graph, params, rest = nnx.split(model, nnx.Param, ...). Then give a function of params "
        "and rest that merges them by nnx.merge(graph, params, rest, copy=True), and returns the "
        "new rest beside its outputs."
    )
    for given in (model, nnx.eval_shape(lambda: nnx.clone(model))):
        with pytest.raises(ValueError, match=exactly(message)):
            lora.sites(given, jnp.ones((2, 3)))
    model.eval()
    base, adapter = lora.init(KEY, model, jnp.ones((2, 3)))
    np.testing.assert_array_equal(
        lora.apply(base, adapter, jnp.ones((2, 3))), model(jnp.ones((2, 3)))
    )


# -------------------------------------------------------------------------------- what is printed


def adapter_of(rule: Any, w: Any = W["w"]) -> Any:
    """A product with a rule, over a stack if W has one."""
    fn = dense if w.ndim == 2 else lambda p, x: lax.scan(lambda x, w: (x, x @ w), x, p["w"])[1]
    return jax.eval_shape(jlora.transform(fn, rule).init, KEY, {"w": w}, X)[1]


def traced(adapter: Any) -> str:
    """An adapter as a traced function prints it."""
    shown = []
    jax.eval_shape(lambda a: shown.append(str(a)), adapter)
    return shown[0]


def transformed(fn: Any) -> Any:
    """A transform of `fn`."""
    return jlora.transform(fn, LoRA("(query|value)/kernel", rank=4), Full("classifier"))


PLAIN, SLOTS = LoRA("w", rank=2), LoRA("w", rank=2, slots=jlora.Slots(3, (0, 2)))
MANY = LoRA("w", rank=2, alpha=3, dropout=0.5, materialize=True)
NODE = "LowRank(a=float32[4,2], b=float32[2,3], scale={})"
ROWS = jlora.types.Replaced(jnp.ones((9, 2, 4)), (2, 3), jlora.types.Layout((0,), (1,), (2,)))
RULES = "LoRA('(query|value)/kernel'), Full('classifier'))"
PRINTED: list[tuple[Callable[[], Any], str]] = [
    # A node is a line of shapes, with what is not as it is by default.
    (lambda: adapter_of(PLAIN), f"{{'w': {NODE.format(16.0)}}}"),
    (
        lambda: adapter_of(MANY),
        f"{{'w': {NODE.format('1.5, dropout=0.5, materialize=True')}}}",
    ),
    (
        lambda: jax.eval_shape(jlora.dropout, adapter_of(MANY), KEY),
        f"{{'w': {NODE.format('1.5, dropout=0.5, materialize=True, key=key<fry>[]')}}}",
    ),
    (
        lambda: adapter_of(SLOTS, jnp.ones((5, 4, 12)))["w"],
        "LowRank(a=float32[5,2,4,2], b=float32[5,2,2,4], scale=16.0, stack=(0,), "
        "slots=(3, (0, 2), 2))",
    ),
    (lambda: ROWS, "Replaced(v=float32[9,2,4], rows=(2, 3), stack=(0,))"),
    (
        lambda: ROWS._replace(rows=tuple(range(10, 60))),
        "Replaced(v=float32[9,2,4], rows=(10, 11, …, 59), stack=(0,))",
    ),
    # Labels, tracers and bound leaves.
    (
        lambda: jlora.labels(adapter_of(PLAIN)),
        "{'w': LowRank(a='a', b='b', scale=16.0)}",
    ),
    (lambda: traced(adapter_of(PLAIN)), f"{{'w': {NODE.format(16.0)}}}"),
    (
        lambda: jlora.bind(W, adapter_of(PLAIN))["w"],
        f"Adapted(base=float32[4,3], delta={NODE.format(16.0)})",
    ),
    # The function and the rules of a transform.
    (lambda: transformed(nn.Dense(3).apply), f"Transformed(Dense.apply, {RULES}"),
    (lambda: transformed(dense), f"Transformed(dense, {RULES}"),
    (
        lambda: transformed(functools.partial(nn.Dense(3).apply, mutable=["x"])),
        f"Transformed(partial(Dense.apply), {RULES}",
    ),
    (lambda: transformed(jax.jit(dense)), f"Transformed(dense, {RULES}"),
]


@pytest.mark.parametrize(("make", "text"), PRINTED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_printed(make: Callable[[], Any], text: str) -> None:
    assert str(make()) == text

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
import messages
import numpy as np
import pytest
from flax import nnx
from jax import lax
from messages import STALE, check_text, refused
from small import KEY, dense

import jlora
from jlora import Full, LoRA
from jlora._foreign import check_apply_fn, check_leaf

X = jnp.ones((1, 4))


W = {"w": jnp.arange(12.0).reshape(4, 3)}


# ------------------------------------------------------------------- a bound tree without `wrap`


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
    for tree in (bound(fn, params, x), jlora.quantize(params, jlora.Int8(".*"))):
        for f in (fn, jax.jit(fn)):
            with refused(TypeError, "", "jlora.wrap(model.apply)(params, ...)"):
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
def leaves() -> tuple[Any, ...]:
    """A weight that is bound, and ones that are quantized to 8 bits and to 4."""
    eight = jlora.quantize(W, jlora.Int8("w"))
    four = jlora.quantize({"w": jnp.ones((4, 64))}, jlora.NF4("w"))
    return bound(dense, W, X)["w"], eight["w"], four["w"]


@pytest.mark.parametrize("use", list(USES))
def test_leaf_is_no_array(use: str) -> None:
    """However a model takes hold of it."""
    for leaf in leaves()[: 1 if use == "lax.dot" else 3]:
        with refused(TypeError, "", "jlora.wrap(model.apply)(params, ...)"):
            USES[use](leaf)


def test_a_leaf_has_no_attributes_of_an_array() -> None:
    """`w.T`, `w.shape`; and what asks politely, as `hasattr` and copies do, gets an answer."""
    leaf, eight, _ = leaves()
    for kind, x in (("BoundLeaf", leaf), ("Quantized", eight)):
        with refused(AttributeError, "", f"{kind} has no attribute 'T'", "jlora.wrap"):
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


PATTERNS = {  # a pattern: the leaf that it should not match, and the matrix that is named
    "out": ("out/bias", "out/kernel"),
    "blocks": ("blocks/0/query/bias", "blocks/0/query/kernel"),
    "out/bias": ("out/bias", "out/kernel"),
    "scale": ("norm/scale", None),
}


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_pattern_that_hits_a_vector(pattern: str) -> None:
    """A matrix that it matches, or one beside the vector, where there is one."""
    path, matrix = PATTERNS[pattern]
    hint = "" if matrix is None else f" to matrices, such as {matrix!r}"
    got = f"matches {path!r} of shape (4,), which is not a matrix. Narrow the pattern{hint}, or"
    with refused(ValueError, "", f"LoRA({pattern!r})", got, "jlora.Full."):
        jlora.transform(block, LoRA(pattern, rank=2)).init(KEY, BLOCK, X)


# ------------------------------------------------------------------- objects of other libraries


def stand_in(module: str, name: str, **members: Any) -> Any:
    """An object of a class that derives from `name` of a package that need not be there."""
    base = type(name, (), {"__module__": module} | members)
    return type("Mine", (base,), {"__module__": "mine"})()


def call(self: Any, *args: Any) -> Any:
    """A module's call, or another method."""
    return args[-1]


def stateless_call(self: Any, params: Any, rest: Any, x: Any) -> Any:
    """The call that gets its parameters."""
    return x


CALLED = {"__call__": call}
MODULES_GIVEN: dict[str, tuple[Callable[[], Any], str, str]] = {
    "linen": (lambda: nn.Dense(3), "Dense of flax.linen", "jlora.transform(model.apply"),
    "nnx": (lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0)), "Linear of flax.nnx", "lambda model, x: "),
    "equinox": (
        lambda: stand_in("equinox._module._module", "Module", **CALLED),
        *("Mine of equinox", "eqx.combine(params, static)(x)."),
    ),
    "keras": (
        lambda: stand_in("keras.src.layers.layer", "Layer", **CALLED),
        *("Mine of keras", "model.stateless_call("),
    ),
    "torch": (
        lambda: stand_in("torch.nn.modules.module", "Module", **CALLED),
        *("Mine of torch", "jlora.torch.extract(model)"),
    ),
    # Which are not printed.
    "parameters": (lambda: {"kernel": jnp.ones((64, 64))}, "of type dict. ", "(model.apply, "),
}  # fmt: skip


@pytest.mark.parametrize("case", list(MODULES_GIVEN))
def test_module_in_the_place_of_a_function(case: str) -> None:
    """A module that holds its parameters, or its call, is no function of them; what is, is said."""
    make, got, remedy = MODULES_GIVEN[case]
    given = make()
    forms = [given]
    if case not in ("linen", "parameters"):  # whose methods get the variables; none has any
        own = given.__call__
        forms += [own, jax.jit(own), functools.partial(own), functools.partial(given)]
    for form in forms:
        with refused(TypeError, "apply_fn", "", got, remedy):
            check_apply_fn(form)


def test_functions_of_modules_pass() -> None:
    """Methods, partials, compiled functions, and modules of packages with a similar name."""
    module = nn.Dense(3)
    other = stand_in("kerasaurus", "Layer", **CALLED)
    keras = stand_in("keras.src.layers.layer", "Layer", stateless_call=stateless_call)
    wraps = functools.wraps(nnx.Linear(4, 3, rngs=nnx.Rngs(0)).__call__)
    wrapper = wraps(lambda params, x: x @ params["kernel"])
    compiled = jax.jit(functools.partial(module.apply, mutable=["x"]))
    for fn in (module.apply, compiled, jax.jit(dense), other, wrapper, keras.stateless_call):
        check_apply_fn(fn)


VALUES: dict[str, Any] = {"shape": (3,), "__repr__": lambda _: "VALUES" * 9}
LEAVES: dict[str, tuple[Any, str, str]] = {
    "function": (np.tanh, "<ufunc 'tanh'> of type ufunc", "eqx.combine(params, static)(x)."),
    "keras": (
        stand_in("keras.src.backend.jax.core", "Variable", **VALUES),
        *("VALUESVALUESV...ESVALUESVALUES of type Mine", "model.stateless_call("),
    ),
    "tensor": (
        stand_in("torch", "Tensor", shape=(3,), __repr__=lambda _: "tensor"),
        *("tensor of type Mine", "Convert it with jnp.asarray."),
    ),
    "name": ("gelu", "'gelu' of type str.", ""),
}


@pytest.mark.parametrize("case", list(LEAVES))
def test_leaf_that_is_no_array(case: str) -> None:
    """The path, what is there, and what to give instead."""
    leaf, got, remedy = LEAVES[case]
    with refused(TypeError, "params", "'layer/act'", got, remedy):
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
    changed = "layers/1/mean, layers/1/var, layers/2/rngs/count"
    for given in (model, nnx.eval_shape(lambda: nnx.clone(model))):
        with refused(ValueError, "apply_fn", changed, "flax.nnx", "Call model.eval() before"):
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
ROWS = jlora.types.Replaced(jnp.ones((9, 2, 4)), (2, 3), jlora.types.Layout((0,), (1,), (2,)))
PRINTED: dict[str, Callable[[], Any]] = {
    # A node is a line of shapes, with what is not as it is by default.
    "node": lambda: adapter_of(PLAIN),
    "fields": lambda: adapter_of(MANY),
    "a key": lambda: jax.eval_shape(jlora.dropout, adapter_of(MANY), KEY),
    "slots": lambda: adapter_of(SLOTS, jnp.ones((5, 4, 12)))["w"],
    "rows": lambda: ROWS,
    "many rows": lambda: ROWS._replace(rows=tuple(range(10, 60))),
    "labels": lambda: jlora.labels(adapter_of(PLAIN)),
    "tracers": lambda: traced(adapter_of(PLAIN)),
    "a bound leaf": lambda: jlora.bind(W, adapter_of(PLAIN))["w"],
    # The function and the rules of a transform.
    "a method": lambda: transformed(nn.Dense(3).apply),
    "a function": lambda: transformed(dense),
    "a partial": lambda: transformed(functools.partial(nn.Dense(3).apply, mutable=["x"])),
    "compiled": lambda: transformed(jax.jit(dense)),
}


@pytest.mark.parametrize("case", PRINTED)
def test_what_is_printed(case: str) -> None:
    check_text(str(PRINTED[case]()))


# ---------------------------------------------------------------------------- messages.txt


def test_no_text_is_of_a_test_that_is_gone(request: pytest.FixtureRequest) -> None:
    """Of the files whose tests were all collected."""
    assert not request.config.stash[STALE]


def test_the_file_is_what_the_option_writes() -> None:
    """Its order is that of the names; all that a text may have comes back."""
    assert messages.form(messages.EXPECTED) == messages.FILE.read_text(encoding="utf-8")
    odd = {"b.py::x[- y]": ["", "a\n\n  - b"], "a.py::x": ["a\u2028b", "\n"]}
    assert messages.read(messages.form(odd)) == odd


def test_a_wording_has_one_text() -> None:
    """The first test by name has it; values alone make no other wording, a word does."""
    texts = {
        "b": ["`rank` of LoRA('w') must be at least 1; got 0.", "`rank` is missing"],
        "a": ["`alpha` of LoRA('v') must be at least 0.5; got [1, 2]."],
        "c": ["it fails. 2 problems:\n  w/0: is missing\n  w, v and u: are wrong"],
    }
    chosen = {"a": texts["a"], "b": texts["b"][1:], "c": texts["c"]}
    assert messages.choose(texts, {}) == chosen
    assert messages.choose(texts, {"d": ["`x` of y(z) must be at most 3; got 4."]}) == chosen
    assert messages.choose({"e": ["  w/1 and w/2: is missing"]}, chosen) == {}
    assert messages.choose({"e": ["  w/1: is there"]}, chosen) == {"e": ["  w/1: is there"]}

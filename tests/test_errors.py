"""What jlora refuses, in which words, and that a refusal leaves nothing half done.

Messages are written out in full wherever they do not depend on a place on disk.
"""

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.errors import FlaxError
from jax import lax

import jlora
from jlora import Full, LoRA, Params, Slots

KEY = jax.random.key(0)


def array(*shape: int) -> jax.Array:
    """Normal values, the same for the same shape."""
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)


X = array(2, 4)
PARAMS = {
    "layer": {"kernel": array(4, 6), "bias": array(6), "scale": array(6)},
    "fused": array(6, 6),
    "position": array(2, 6),
    "unused": array(3, 5),
    "bucket": jnp.ones((3, 3), jnp.int32),
    "vocabulary": array(9, 4),
}


def model(params: Any, x: jax.Array) -> jax.Array:
    """Two dense sites, a lookup, a bias, a norm scale, an added position; two leaves unused."""
    p = params["layer"]
    y = (x + params["vocabulary"][jnp.array([1, 2])]) @ p["kernel"] + p["bias"]
    return (y + params["position"]) * p["scale"] @ params["fused"]


def dense(params: Any, x: jax.Array) -> jax.Array:
    """The smallest model: one product."""
    return x @ params["w"]


W = {"w": array(4, 6)}
SQUARE = {"w": array(4, 4)}


def init(*rules: Any, apply: Callable[..., Any] = model, params: Any = None) -> tuple[Any, Any]:
    """`init` of the given model under `rules`."""
    return jlora.transform(apply, *rules).init(KEY, PARAMS if params is None else params, X)


def randomize(adapter: Any) -> Any:
    """Every floating leaf plus noise, so that B is not zero."""
    return jax.tree.map(lambda a: a + 0.3 * array(*a.shape), adapter)


def exactly(message: str) -> str:
    """A pattern that matches `message` as a whole, with or without JAX's note on tracebacks."""
    return r"\A" + re.escape(message) + r"(\n-+\nFor simplicity, JAX has removed .*)?\Z"


# ----------------------------------------------------------------------- rules that are malformed

MALFORMED = [
    pytest.param(
        lambda: LoRA("w", rank=0),
        ValueError,
        "`rank` of LoRA('w') must be an integer of at least 1; got 0.",
        id="rank-zero",
    ),
    pytest.param(
        lambda: LoRA("w", rank=-3),
        ValueError,
        "`rank` of LoRA('w') must be an integer of at least 1; got -3.",
        id="rank-negative",
    ),
    pytest.param(
        lambda: LoRA("w", rank=8.0),
        ValueError,
        "`rank` of LoRA('w') must be an integer of at least 1; got 8.0.",
        id="rank-float",
    ),
    pytest.param(
        lambda: LoRA(rank=float("inf")),
        ValueError,
        "`rank` of LoRA() must be an integer of at least 1; got inf.",
        id="rank-infinite",
    ),
    pytest.param(
        lambda: LoRA("w", rank=True),
        ValueError,
        "`rank` of LoRA('w') must be an integer of at least 1; got True.",
        id="rank-bool",
    ),
    pytest.param(
        lambda: LoRA("w", rank="8"),
        ValueError,
        "`rank` of LoRA('w') must be an integer of at least 1; got '8'.",
        id="rank-string",
    ),
    pytest.param(
        lambda: LoRA("w", alpha=float("nan")),
        ValueError,
        "`alpha` of LoRA('w') must be a positive finite number; got nan.",
        id="alpha-nan",
    ),
    pytest.param(
        lambda: LoRA(alpha=float("-inf")),
        ValueError,
        "`alpha` of LoRA() must be a positive finite number; got -inf.",
        id="alpha-infinite",
    ),
    pytest.param(
        lambda: LoRA("w", alpha=None),
        ValueError,
        "`alpha` of LoRA('w') must be a positive finite number; got None.",
        id="alpha-none",
    ),
    pytest.param(
        lambda: LoRA("w", alpha=True),
        ValueError,
        "`alpha` of LoRA('w') must be a positive finite number; got True.",
        id="alpha-bool",
    ),
    pytest.param(
        lambda: LoRA("w", alpha=0),
        ValueError,
        "`alpha` of LoRA('w') must be a positive finite number; got 0.",
        id="alpha-zero",
    ),
    pytest.param(
        lambda: LoRA("w", alpha=-16.0),
        ValueError,
        "`alpha` of LoRA('w') must be a positive finite number; got -16.0.",
        id="alpha-negative",
    ),
    pytest.param(
        lambda: LoRA("w", dtype=jnp.int32),
        TypeError,
        "`dtype` of LoRA('w') must be a floating-point one; got <class 'jax.numpy.int32'>.",
        id="dtype-integer",
    ),
    pytest.param(
        lambda: LoRA("w", dropout=1.0),
        ValueError,
        "`dropout` of LoRA('w') must lie in [0, 1); got 1.0.",
        id="dropout-one",
    ),
    pytest.param(
        lambda: LoRA("w", dropout=-0.1),
        ValueError,
        "`dropout` of LoRA('w') must lie in [0, 1); got -0.1.",
        id="dropout-negative",
    ),
    pytest.param(
        lambda: LoRA("w", dropout=float("nan")),
        ValueError,
        "`dropout` of LoRA('w') must lie in [0, 1); got nan.",
        id="dropout-nan",
    ),
    pytest.param(
        lambda: LoRA(7),
        TypeError,
        "`pattern` of LoRA must be a regular expression as a string; got 7 of type int.",
        id="pattern-int",
    ),
    pytest.param(
        lambda: LoRA(re.compile("w")),
        TypeError,
        "`pattern` of LoRA must be a regular expression as a string; "
        "got re.compile('w') of type Pattern.",
        id="pattern-compiled",
    ),
    pytest.param(
        lambda: LoRA(["query", "value"]),
        TypeError,
        "`pattern` of LoRA must be a regular expression as a string; "
        "got ['query', 'value'] of type list.",
        id="pattern-list",
    ),
    pytest.param(
        lambda: Full(None),
        TypeError,
        "`pattern` of Full must be a regular expression as a string; got None of type NoneType.",
        id="full-pattern-none",
    ),
    pytest.param(
        lambda: LoRA("(query"),
        ValueError,
        "`pattern` '(query' is not a regular expression: "
        "missing ), unterminated subpattern at position 0.",
        id="pattern-unbalanced",
    ),
    pytest.param(
        lambda: Full("*kernel"),
        ValueError,
        "`pattern` '*kernel' is not a regular expression: nothing to repeat at position 0.",
        id="pattern-glob",
    ),
    pytest.param(
        lambda: LoRA("w", slots=3),
        TypeError,
        "`slots` of LoRA('w') must be a jlora.Slots; got 3.",
        id="slots-int",
    ),
    pytest.param(
        lambda: Slots(0, (0,)),
        ValueError,
        "`count` of Slots must be an integer of at least 1; got 0.",
        id="slots-none-to-choose",
    ),
    pytest.param(
        lambda: Slots(3.0, (0,)),
        ValueError,
        "`count` of Slots must be an integer of at least 1; got 3.0.",
        id="slots-count-float",
    ),
    pytest.param(
        lambda: Slots(3, ()),
        ValueError,
        "`chosen` of Slots must name distinct slots, at least one; got ().",
        id="slots-empty",
    ),
    pytest.param(
        lambda: Slots(3, (0, 2, 0)),
        ValueError,
        "`chosen` of Slots must name distinct slots, at least one; got (0, 2, 0).",
        id="slots-duplicate",
    ),
    pytest.param(
        lambda: Slots(3, (0, 3)),
        ValueError,
        "`chosen` of Slots must lie in [0, 3), the slots; got [3].",
        id="slots-above",
    ),
    pytest.param(
        lambda: Slots(3, (-1, 1)),
        ValueError,
        "`chosen` of Slots must lie in [0, 3), the slots; got [-1].",
        id="slots-below",
    ),
    pytest.param(
        lambda: Slots(3, (0, 1.0)),
        TypeError,
        "`chosen` of Slots must be a tuple of integers; got (0, 1.0).",
        id="slots-float",
    ),
    pytest.param(
        lambda: jlora.transform(model, [LoRA("w", rank=2)]),
        TypeError,
        f"`rules` must be jlora.LoRA or jlora.Full; got [{LoRA('w', rank=2)!r}].",
        id="rules-list",
    ),
    pytest.param(
        lambda: jlora.transform(model, "kernel"),
        TypeError,
        "`rules` must be jlora.LoRA or jlora.Full; got 'kernel'.",
        id="rules-string",
    ),
    pytest.param(
        lambda: jlora.transform(model, LoRA),
        TypeError,
        "`rules` must be jlora.LoRA or jlora.Full; got <class 'jlora._rules.LoRA'>.",
        id="rules-class",
    ),
    pytest.param(
        lambda: jlora.optimizer(optax.sgd(1.0), lora_plus=0),
        ValueError,
        "`lora_plus` must be a positive finite number; got 0.",
        id="lora-plus-zero",
    ),
    pytest.param(
        lambda: jlora.optimizer(optax.sgd(1.0), lora_plus=-16.0),
        ValueError,
        "`lora_plus` must be a positive finite number; got -16.0.",
        id="lora-plus-negative",
    ),
    pytest.param(
        lambda: jlora.optimizer(optax.sgd(1.0), lora_plus=float("nan")),
        ValueError,
        "`lora_plus` must be a positive finite number; got nan.",
        id="lora-plus-nan",
    ),
    pytest.param(
        lambda: jlora.optimizer(optax.sgd(1.0), lora_plus=float("inf")),
        ValueError,
        "`lora_plus` must be a positive finite number; got inf.",
        id="lora-plus-infinite",
    ),
]


@pytest.mark.parametrize(("provoke", "error", "message"), MALFORMED)
def test_malformed_rule(provoke: Callable[[], Any], error: type[Exception], message: str) -> None:
    """A rule, slots or optimizer that cannot mean anything is refused where it is written."""
    with pytest.raises(error, match=exactly(message)):
        provoke()


# ------------------------------------------------------------------ rules that do not fit the model

IN_FULL = "Narrow the pattern, or train the leaf in full with jlora.Full."
REMEDY = (
    "Narrow the pattern, train the leaf in full with jlora.Full, or let W + ΔW be formed with "
    "LoRA(..., materialize=True)."
)


def conv(params: Any, x: jax.Array) -> jax.Array:
    """A convolution of width 3 over one feature."""
    return lax.conv_general_dilated(
        x[..., None], params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


UNFIT = [
    pytest.param(
        lambda: init(),
        "`rules` is empty, so that nothing would be trained. "
        "Give transform(apply_fn, ...) a jlora.LoRA() or a jlora.Full(pattern).",
        id="no-rules",
    ),
    pytest.param(
        lambda: init(LoRA("layer/kernal", rank=2)),
        "LoRA('layer/kernal') matches no leaf of `params`. "
        "Near misses: layer/kernel, vocabulary, fused.",
        id="typo",
    ),
    pytest.param(
        lambda: init(LoRA("(Layer|LAYER)/kernel$", rank=2)),
        "LoRA('(Layer|LAYER)/kernel$') matches no leaf of `params`. "
        "Near misses: layer/kernel, vocabulary, fused.",
        id="case",
    ),
    pytest.param(
        lambda: init(Full("layer/bais")),
        "Full('layer/bais') matches no leaf of `params`. "
        "Near misses: layer/bias, layer/kernel, layer/scale.",
        id="full-typo",
    ),
    pytest.param(
        lambda: init(LoRA("kernel", rank=2), Full("clasifier")),
        "Full('clasifier') matches no leaf of `params`. "
        "Near misses: layer/bias, layer/kernel, layer/scale.",
        id="second-rule-typo",
    ),
    pytest.param(
        lambda: init(LoRA("w", rank=2), apply=lambda p, x: x, params={}),
        "LoRA('w') matches no leaf of `params`. There is no leaf to match.",
        id="no-params",
    ),
    pytest.param(
        lambda: init(LoRA("kernel|fused", rank=2), Full("kernel")),
        "Full('kernel') is left with no leaf: earlier rules take all 1 that it matches "
        "(LoRA('kernel|fused')). The first match wins; reorder the rules or drop this one.",
        id="shadowed",
    ),
    pytest.param(
        lambda: init(LoRA(rank=2), LoRA("kernel", rank=4)),
        "LoRA('kernel') is left with no leaf: earlier rules take all 1 that it matches (LoRA()). "
        "The first match wins; reorder the rules or drop this one.",
        id="shadowed-by-all-linear",
    ),
    pytest.param(
        lambda: init(LoRA("fused", rank=2), Full("layer"), Full("kernel|fused")),
        "Full('kernel|fused') is left with no leaf: earlier rules take all 2 that it matches "
        "(LoRA('fused'), Full('layer')). The first match wins; reorder the rules or drop this one.",
        id="shadowed-by-two",
    ),
    pytest.param(
        lambda: init(LoRA(rank=2), apply=lambda p, x: x * p["scale"], params={"scale": array(4)}),
        "LoRA() without a pattern adapts every dense and conv site, but the model has none. "
        "Name leaves by a pattern; print(transform(apply_fn).sites(...)) lists the sites.",
        id="all-linear-none",
    ),
    pytest.param(
        lambda: init(
            LoRA(rank=2), apply=lambda p, x: p["table"][jnp.array([0, 1])], params={"table": X}
        ),
        "LoRA() without a pattern adapts every dense and conv site, but the model has none. "
        "Name leaves by a pattern; print(transform(apply_fn).sites(...)) lists the sites.",
        id="all-linear-embedding-only",
    ),
    pytest.param(
        lambda: init(LoRA("layer", rank=2)),
        "LoRA('layer') matches 'layer/bias' of shape (6,), which is used by nothing linear: "
        f"it is no matrix (shape (6,)). {IN_FULL}",
        id="bias",
    ),
    pytest.param(
        lambda: init(LoRA("scale", rank=2)),
        "LoRA('scale') matches 'layer/scale' of shape (6,), which is used by nothing linear: "
        f"it is no matrix (shape (6,)). {IN_FULL}",
        id="norm-scale",
    ),
    pytest.param(
        lambda: init(LoRA("unused", rank=2)),
        "LoRA('unused') matches 'unused' of shape (3, 5), which is used by nothing linear: "
        f"it is not used by the traced call. {IN_FULL}",
        id="unused",
    ),
    pytest.param(
        lambda: init(LoRA("bucket", rank=2)),
        "LoRA('bucket') matches 'bucket' of shape (3, 3), which is used by nothing linear: "
        "it is not floating-point (int32). Narrow the pattern.",
        id="integer",
    ),
    pytest.param(
        lambda: init(Full("bucket")),
        "Full('bucket') matches 'bucket' of dtype int32, which cannot be trained. "
        "Narrow the pattern to floating-point leaves.",
        id="full-integer",
    ),
    pytest.param(
        lambda: init(LoRA("kernel", rank=5)),
        "`rank` of LoRA('kernel') is 5, above min(inputs, outputs) = 4 of 'layer/kernel' with "
        "shape (4, 6). Lower the rank, or put a rule of its own for this leaf first, such as "
        "jlora.Full('layer/kernel').",
        id="rank-dense",
    ),
    pytest.param(
        lambda: init(LoRA("vocabulary", rank=5)),
        "`rank` of LoRA('vocabulary') is 5, above min(inputs, outputs) = 4 of 'vocabulary' with "
        "shape (9, 4). Lower the rank, or put a rule of its own for this leaf first, such as "
        "jlora.Full('vocabulary').",
        id="rank-embed",
    ),
    pytest.param(
        lambda: init(LoRA(rank=4), apply=conv, params={"kernel": array(3, 1, 8)}),
        "`rank` of LoRA() is 4, above min(inputs, outputs) = 3 of 'kernel' with shape (3, 1, 8). "
        "Lower the rank, or put a rule of its own for this leaf first, such as "
        "jlora.Full('kernel').",
        id="rank-conv",
    ),
    pytest.param(
        lambda: init(LoRA("fused", rank=3, slots=Slots(3, (0, 2)))),
        "`rank` of LoRA('fused') is 3, above min(inputs, outputs) = 2 of 'fused' with shape "
        "(6, 6). Lower the rank, or put a rule of its own for this leaf first, such as "
        "jlora.Full('fused').",
        id="rank-slots",
    ),
    pytest.param(
        lambda: init(LoRA("fused", rank=1, slots=Slots(4, (0,)))),
        "`count` of Slots is 4, which does not divide the 6 outputs of 'fused' with shape (6, 6).",
        id="slots-count",
    ),
    pytest.param(
        lambda: init(LoRA("fused", rank=1, slots=Slots(3, (0,), axis=1))),
        "`axis` of Slots is 1, but 'fused' has 1 output axes; it must lie in [0, 1).",
        id="slots-axis-above",
    ),
    pytest.param(
        lambda: init(LoRA("fused", rank=1, slots=Slots(3, (0,), axis=-1))),
        "`axis` of Slots is -1, but 'fused' has 1 output axes; it must lie in [0, 1).",
        id="slots-axis-negative",
    ),
]


@pytest.mark.parametrize(("provoke", "message"), UNFIT)
def test_unfit_rule(provoke: Callable[[], Any], message: str) -> None:
    """A rule that would train nothing, or cannot apply to a leaf that it matches."""
    with pytest.raises(ValueError, match=exactly(message)):
        provoke()


def test_added_position() -> None:
    """A position embedding that is added is no site; the line that adds it is named."""
    line = line_of(model, 'params["position"]')
    message = (
        "LoRA('position') matches 'position' of shape (2, 6), which is used by nothing linear: "
        f"it is used only by `add` at {line} (model). {REMEDY}"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        init(LoRA("position", rank=2))


def test_sites_need_no_rules() -> None:
    """`sites` of a transform without rules lists the model, as its errors advise."""
    table = jlora.transform(model).sites(PARAMS, X)
    assert [site.path for site in table] == ["fused", "layer/kernel", "vocabulary"]


def test_unknown_site() -> None:
    """A site that is asked for by a wrong path."""
    with pytest.raises(KeyError, match=re.escape("no leaf 'layer/kernal'. Near misses: layer/ke")):
        jlora.transform(model).sites(PARAMS, X)["layer/kernal"]


def test_leaf_that_is_no_array() -> None:
    """Names and functions among the parameters are named by path, value and type."""
    message = (
        "`params` must be a pytree of arrays; the leaf 'layer/activation' is 'gelu' of type str."
    )
    params = PARAMS | {"layer": PARAMS["layer"] | {"activation": "gelu"}}
    with pytest.raises(TypeError, match=exactly(message)):
        init(LoRA("kernel", rank=2), params=params)


def wrong_a(key: Any, w: Any, site: Any, rule: Any) -> tuple[Any, Any, Any]:
    """An initializer that mistakes A for its transpose."""
    del key, site
    return w, jnp.zeros((rule.rank, w.shape[0])), jnp.zeros((rule.rank, w.shape[1]))


def test_initializer_with_wrong_shapes() -> None:
    """A and B as the initializer gave them, and as they should be."""
    message = exactly(
        "`init` of LoRA('kernel') must give W, A and B for 'layer/kernel', floating-point, of "
        "shapes ((4, 6), (4, 2), (2, 6)) and with W's dtype float32; got (((4, 6), "
        "'floating-point'), ((2, 4), 'floating-point'), ((2, 6), 'floating-point'))."
    )
    with pytest.raises(ValueError, match=message):
        init(LoRA("kernel", rank=2, init=wrong_a))


# ------------------------------------------------------------------------ uses outside of the rules


def line_of(f: Callable[..., Any], mark: str) -> str:
    """`file:line` of the only line of `f` that has `mark` in it."""
    lines, start = inspect.getsourcelines(f)
    [found] = [start + i for i, line in enumerate(lines) if mark in line]
    return f"{inspect.getsourcefile(f)}:{found}"


@jax.custom_vjp
def vjp_product(w: jax.Array, x: jax.Array) -> jax.Array:
    """x·W with a gradient of its own, twice what it should be."""
    return x @ w


vjp_product.defvjp(
    lambda w, x: (x @ w, (w, x)),
    lambda saved, g: (2 * saved[1].T @ g, 2 * g @ saved[0].T),
)


@jax.custom_jvp
def jvp_product(w: jax.Array, x: jax.Array) -> jax.Array:
    """x·W with a derivative of its own, twice what it should be."""
    return x @ w


@jvp_product.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (w, x), (dw, dx) = primals, tangents
    return x @ w, 2 * (x @ dw + dx @ w)


def use_sin(p: Any, x: jax.Array) -> Any:
    """Element for element."""
    return x @ jnp.sin(p["w"])  # here


def use_sum(p: Any, x: jax.Array) -> Any:
    """A reduction: weight normalization."""
    return x @ p["w"] / jnp.sum(p["w"])  # here


def use_vjp(p: Any, x: jax.Array) -> Any:
    """A function with its own backward pass."""
    return vjp_product(p["w"], x)  # here


def use_jvp(p: Any, x: jax.Array) -> Any:
    """A function with its own derivative."""
    return jvp_product(p["w"], x)  # here


def use_carry(p: Any, x: jax.Array) -> Any:
    """A loop whose carry is the weight and changes."""

    def body(carry: Any, _: None) -> Any:
        w, x = carry
        return (w * 0.5, x @ w), None

    return lax.scan(body, (p["w"], x), length=2)[0]  # here


def use_fori(p: Any, x: jax.Array) -> Any:
    """A loop that squares the weight."""
    return x @ lax.fori_loop(0, 2, lambda i, w: w @ w, p["w"])  # here


def use_cond(p: Any, x: jax.Array) -> Any:
    """One branch of two."""
    return lax.cond(
        x[0, 0] > 0,
        lambda w: x @ jnp.sin(w),  # here
        lambda w: x @ w,
        p["w"],
    )


def use_chosen(p: Any, x: jax.Array) -> Any:
    """Branches that return a weight."""
    return x @ lax.cond(x[0, 0] > 0, lambda w: w.T, lambda w: w, p["w"])  # here


def use_predicate(p: Any, x: jax.Array) -> Any:
    """A predicate that looks at the weight."""
    return lax.cond(p["w"][0, 0] > 0, lambda: x @ p["w"], lambda: -x)  # here


def use_scan(p: Any, x: jax.Array) -> Any:
    """The body of a scan."""
    return lax.scan(lambda c, _: (c @ jnp.sin(p["w"]), None), x, length=2)[0]  # here


def use_stacked(p: Any, x: jax.Array) -> Any:
    """A scan that stacks multiples of the weight."""
    return lax.scan(lambda c, _: (c @ p["w"], p["w"] * 2), x, length=2)  # here


def use_remat(p: Any, x: jax.Array) -> Any:
    """The body of a remat."""

    def body(w: jax.Array, x: jax.Array) -> jax.Array:
        return x @ jnp.sin(w)  # here

    return jax.checkpoint(body)(p["w"], x)


def use_jit(p: Any, x: jax.Array) -> Any:
    """A function of the user's under jit."""

    @jax.jit
    def body(w: jax.Array, x: jax.Array) -> jax.Array:
        return x @ jnp.sin(w)  # here

    return body(p["w"], x)


def use_nested(p: Any, x: jax.Array) -> Any:
    """All of them at once."""

    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.jit(lambda w: x @ jnp.sin(w))(p["w"]), None  # here

    return lax.scan(jax.checkpoint(body), x, length=2)[0]


def use_divisor(p: Any, x: jax.Array) -> Any:
    """The weight divides."""
    return x @ (1 / (3 + p["w"]))  # here


def use_padding(p: Any, x: jax.Array) -> Any:
    """Padded with an entry of itself."""
    corner = lax.squeeze(lax.slice(p["w"], (0, 0), (1, 1)), (0, 1))
    return x @ lax.pad(p["w"], corner, ((0, 0, 0), (0, 2, 0)))  # here


def use_mask(p: Any, x: jax.Array) -> Any:
    """A product with a mask."""
    return x @ (p["w"] * jnp.eye(4))  # here


def use_kernel_of_itself(p: Any, x: jax.Array) -> Any:
    """A sum with its own transpose."""
    return x @ (p["w"] + p["w"].T)  # here


def use_integer(p: Any, x: jax.Array) -> Any:
    """Fake quantization: nothing of the weight's gradient is left, that of x is."""
    return (x + p["w"][:2]) @ p["w"].astype(jnp.int8).astype(jnp.float32)


def use_output(p: Any, x: jax.Array) -> Any:
    """The weight as one of the outputs."""
    return x @ p["w"], p["w"]


class Outside(NamedTuple):
    """A use that no rule covers.

    Attributes:
        apply: the model, its line marked `# here`.
        what: the primitive and the line, as the error names them first; `{here}` is the place.
        only: whether the weight has no linear use beside it.
    """

    apply: Callable[..., Any]
    what: str
    only: bool = True


OUTSIDE = [
    Outside(use_sin, "`sin` at {here} ({name})"),
    Outside(use_sum, "`reduce_sum` at {here} ({name})", only=False),
    Outside(use_vjp, "`custom_vjp_call` at {here} ({name})"),
    Outside(use_jvp, "`custom_jvp_call` at {here} ({name})"),
    Outside(use_carry, "an output of `scan` at {here} ({name})"),
    Outside(use_fori, "an output of `scan` at {here} ({name})"),
    Outside(use_cond, "`sin` at {here} ({name}.<locals>.<lambda>)", only=False),
    Outside(use_chosen, "an output of `cond` at {here} ({name})"),
    Outside(use_predicate, "`gt` at {here} ({name})", only=False),
    Outside(use_scan, "`sin` at {here} ({name}.<locals>.<lambda>)"),
    Outside(use_stacked, "an output of `scan` at {here} ({name})", only=False),
    Outside(use_remat, "`sin` at {here} ({name}.<locals>.body)"),
    Outside(use_jit, "`sin` at {here} ({name}.<locals>.body)"),
    Outside(use_nested, "`sin` at {here} ({name}.<locals>.body.<locals>.<lambda>)"),
    Outside(use_divisor, "`add` at {here} ({name})"),
    Outside(use_padding, "`pad` at {here} ({name}), where the weight is a padding value"),
    Outside(use_mask, "`mul` at {here} ({name}), where it is scaled by more than a scalar"),
    Outside(use_kernel_of_itself, "`add` at {here} ({name})"),
]
OUTPUT = Outside(use_output, "the function's outputs", only=False)


def named(outsides: list[Outside]) -> list[Any]:
    """The entries as parameters with their names."""
    return [pytest.param(o, id=o.apply.__name__.removeprefix("use_")) for o in outsides]


def first_use(outside: Outside) -> str:
    """What the error says of the first use."""
    if "{here}" not in outside.what:
        return outside.what
    here = line_of(outside.apply, "# here")
    return outside.what.format(here=here, name=outside.apply.__name__)


@pytest.mark.parametrize("outside", named([*OUTSIDE, OUTPUT]))
def test_outside_is_refused_by_init(outside: Outside) -> None:
    """The leaf, the primitive, the line in this file, and what to do."""
    if outside.only:
        error: Any = ValueError
        start = "LoRA('w') matches 'w' of shape (4, 4), which is used by nothing linear: "
        start += f"it is used only by {first_use(outside)}"
        end = REMEDY
    else:
        error = NotImplementedError
        start = "LoRA('w') matches 'w', which the model also uses where W + s·A·B has no "
        start += f"factored form: {first_use(outside)}"
        end = "Leave it out of the rules, or let W + ΔW be formed there with "
        end += "LoRA(..., materialize=True): exact, but at full memory and time."
    with pytest.raises(error) as caught:
        init(LoRA("w", rank=2), apply=outside.apply, params=SQUARE)
    message = str(caught.value)
    assert message.startswith(start)
    assert message.endswith(f". {end}")
    others = message[len(start) : -len(f". {end}")]
    assert re.fullmatch(r"(; .* at .*)*", others)


# One entry of W is as cheap as an activation: `apply` forms it, although `init` refuses.
SEEN = [o for o in [*OUTSIDE, OUTPUT] if o.apply is not use_predicate]


@pytest.mark.parametrize("outside", named(SEEN))
def test_outside_is_refused_by_apply(outside: Outside) -> None:
    """The same for a call that `init` did not see, eagerly and under `jit`."""
    base, adapter = init(LoRA("w", rank=2), apply=dense, params=SQUARE)
    message = (
        f"the weight 'w' reaches {first_use(outside)}, for which there is no factored form of "
        "W + s·A·B. Leave the weight out of the rules, or let W + ΔW be formed there with "
        "LoRA(..., materialize=True): exact, but at full memory and time."
    )
    lora = jlora.transform(outside.apply, LoRA("w", rank=2))
    for apply in (lora.apply, jax.jit(lora.apply)):
        with pytest.raises(NotImplementedError, match=exactly(message)):
            apply(base, adapter, X)


@pytest.mark.parametrize("outside", named([*OUTSIDE, OUTPUT, Outside(use_integer, "")]))
def test_outside_is_exact_when_formed(outside: Outside) -> None:
    """With `materialize=True`: values and gradients are those of the merged weights."""
    rule = LoRA("w", rank=2, materialize=True)
    base, adapter = init(rule, apply=outside.apply, params=SQUARE)
    adapter = randomize(adapter)

    def adapted(adapter: Any, x: jax.Array) -> Any:
        return jlora.transform(outside.apply, rule).apply(base, adapter, x)

    def merged(adapter: Any, x: jax.Array) -> Any:
        return outside.apply(jlora.merge(base, adapter), x)

    assert_same(adapted(adapter, X), merged(adapter, X))
    slope = jax.jit(jax.grad(lambda f, a, x: scalar(f(a, x)), (1, 2)), static_argnums=0)
    expected = slope(merged, adapter, X)
    assert any(np.any(g) for g in jax.tree.leaves(expected))
    assert_same(slope(adapted, adapter, X), expected)


def scalar(outputs: Any) -> jax.Array:
    """A scalar that depends on every entry of the outputs in its own way."""
    return sum(jnp.vdot(jnp.cos(jnp.arange(y.size)), y.ravel()) for y in jax.tree.leaves(outputs))


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal structures and leaves, relative to each leaf's largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        scale = max(float(jnp.max(jnp.abs(y))), 1e-6)
        np.testing.assert_allclose(x / scale, y / scale, rtol=0, atol=tolerance)


def test_every_use_is_named() -> None:
    """Two uses without a factored form, two places; the same twice, one place."""

    def twice(p: Any, x: jax.Array) -> jax.Array:
        y = x @ jnp.sin(p["w"])  # first
        y = y @ jnp.tanh(p["w"])  # second
        return y @ p["w"]

    with pytest.raises(NotImplementedError) as caught:
        init(LoRA("w", rank=2), apply=twice, params=SQUARE)
    first, second = line_of(twice, "# first"), line_of(twice, "# second")
    where = "test_every_use_is_named.<locals>.twice"
    assert f"`sin` at {first} ({where}); `tanh` at {second} ({where})." in str(caught.value)
    assert str(caught.value).count("`sin`") == 1


def test_unused_result_is_no_use() -> None:
    """What the model computes and drops stands in no rule's way."""

    def dropped(p: Any, x: jax.Array) -> jax.Array:
        jnp.sin(p["w"])
        return x @ p["w"]

    _, adapter = init(LoRA("w", rank=2), apply=dropped, params=SQUARE)
    assert list(adapter) == ["w"]


def test_dropout_where_formed() -> None:
    """Dropout has no input to act on where W + ΔW is formed, and `init` says so."""
    message = (
        f"dropout cannot act where W + ΔW is formed (`sin` at {line_of(use_sin, '# here')} "
        "(use_sin)): there is no input to drop. Give this site a rule with dropout=0."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        init(LoRA("w", rank=2, dropout=0.5, materialize=True), apply=use_sin, params=SQUARE)


# ------------------------------------------------------------------------- fields named `value`


class Projections(NamedTuple):
    """Three weights under the names of an attention layer."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def attend(p: Any, x: jax.Array) -> jax.Array:
    """Three products."""
    w = p["attention"]
    return (x @ w.query) * (x @ w.key) + x @ w.value


ATTENTION = {"attention": Projections(array(4, 4), array(4, 4) + 1, array(4, 4) + 2)}


def test_field_named_value() -> None:
    """A field `value` of a NamedTuple is a path of its own, not an NNX variable."""
    base, adapter = init(LoRA(rank=2), apply=attend, params=ATTENTION)
    assert jlora.count(adapter) == 3 * (4 * 2 + 2 * 4)
    assert sorted(adapter["attention"]) == ["key", "query", "value"]
    assert_same(jlora.merge(base, adapter), ATTENTION)
    adapter = randomize(adapter)
    actual = jlora.transform(attend).apply(base, adapter, X)
    assert_same(actual, attend(jlora.merge(base, adapter), X))


def test_pattern_of_a_field_named_value() -> None:
    """The quickstart's own pattern finds both of its leaves."""
    table = jlora.transform(attend, LoRA("query|value", rank=2)).sites(ATTENTION, X)
    assert sum(site.rule is not None for site in table) == 2


class Scaled(NamedTuple):
    """A weight and the scale of its outputs."""

    value: jax.Array
    scale: jax.Array


def test_field_named_value_with_a_sibling() -> None:
    """A `value` with a sibling that is trained in full."""
    _, adapter = init(
        LoRA("w/value", rank=2),
        Full("scale"),
        apply=lambda p, x: x @ p["w"].value * p["w"].scale,
        params={"w": Scaled(array(4, 6), array(6))},
    )
    assert sorted(adapter["w"]) == ["scale", "value"]


# -------------------------------------------------------------------- adapters that do not fit

ADAPTED = (LoRA("kernel|fused", rank=2), Full("bias"))
USE = "Use the adapter with the parameters that it was made for, or make one with `init`."


def swap(tree: Mapping[str, Any], path: str, leaf: Any) -> dict[str, Any]:
    """`tree` with another leaf at `path`; without it for `leaf=None`."""
    head, _, tail = path.partition("/")
    if tail:
        return {**tree, head: swap(tree[head], tail, leaf)}
    rest = {k: v for k, v in tree.items() if k != head}
    return rest if leaf is None else {**rest, head: leaf}


MISFITS = [
    pytest.param(
        lambda base, adapter: (swap(base, "layer/kernel", None), adapter),
        "`adapter` does not fit `base` at 1 of 3 paths:\n  layer/kernel: not in `base`\n" + USE,
        id="missing",
    ),
    pytest.param(
        lambda base, adapter: (swap(base, "layer/kernel", array(5, 6)), adapter),
        "`adapter` does not fit `base` at 1 of 3 paths:\n"
        "  layer/kernel: a weight of shape (5, 6) needs A (5, 2) and B (2, 6), got (4, 2) and "
        f"(2, 6)\n{USE}",
        id="other-shape",
    ),
    pytest.param(
        lambda base, adapter: (swap(base, "layer/kernel", array(3, 4, 6)), adapter),
        "`adapter` does not fit `base` at 1 of 3 paths:\n"
        f"  layer/kernel: made for a weight of 2 axes, got one of shape (3, 4, 6) in `base`\n{USE}",
        id="more-axes",
    ),
    pytest.param(
        lambda base, adapter: (swap(base, "layer/bias", array(7)), adapter),
        "`adapter` does not fit `base` at 1 of 3 paths:\n"
        f"  layer/bias: expected shape (7,) as in `base`, got (6,)\n{USE}",
        id="full-shape",
    ),
    pytest.param(
        lambda base, adapter: (base, swap(adapter, "fused", adapter["layer"]["kernel"])),
        "`adapter` does not fit `base` at 1 of 3 paths:\n"
        "  fused: a weight of shape (6, 6) needs A (6, 2) and B (2, 6), got (4, 2) and (2, 6)\n"
        + USE,
        id="other-leaf",
    ),
    pytest.param(
        lambda base, adapter: (
            base,
            swap(adapter, "fused", adapter["fused"]._replace(b=array(3, 6))),
        ),
        "`adapter` does not fit `base` at 1 of 3 paths:\n"
        "  fused: a weight of shape (6, 6) needs A (6, 2) and B (2, 6), got (6, 2) and (3, 6)\n"
        + USE,
        id="ranks-differ",
    ),
    pytest.param(
        lambda base, adapter: (base, {"adapter": adapter}),
        "`adapter` does not fit `base` at 3 of 3 paths:\n"
        "  adapter/fused: not in `base`\n"
        "  adapter/layer/bias: not in `base`\n"
        f"  adapter/layer/kernel: not in `base`\n{USE}",
        id="one-level-too-deep",
    ),
    pytest.param(
        lambda base, adapter: ({"fused": array(2, 2), "layer": {"bias": base["fused"]}}, adapter),
        "`adapter` does not fit `base` at 3 of 3 paths:\n"
        "  fused: a weight of shape (2, 2) needs A (2, 2) and B (2, 2), got (6, 2) and (2, 6)\n"
        "  layer/bias: expected shape (6, 6) as in `base`, got (6,)\n"
        f"  layer/kernel: not in `base`\n{USE}",
        id="all-at-once",
    ),
    pytest.param(
        lambda base, adapter: (base, jax.tree.map(lambda a: jnp.stack([a, a]), adapter)),
        "`adapter` does not fit `base` at 3 of 3 paths:\n"
        "  fused: a weight of shape (6, 6) needs A (6, 2) and B (2, 6), got (2, 6, 2) and "
        "(2, 2, 6)\n"
        "  layer/bias: expected shape (6,) as in `base`, got (2, 6)\n"
        "  layer/kernel: a weight of shape (4, 6) needs A (4, 2) and B (2, 6), got (2, 4, 2) and "
        f"(2, 2, 6)\n{USE}",
        id="stack-without-vmap",
    ),
]

WRONG_TREES = [
    pytest.param(
        lambda base, adapter: (adapter, base),
        "`base` holds LowRank nodes, so it is an adapter, or a tree from `bind`: are `base` "
        "and `adapter` swapped?",
        id="swapped",
    ),
    pytest.param(
        lambda base, adapter: (base, "adapter.npz"),
        "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it; "
        "got the root: str.",
        id="string",
    ),
    pytest.param(
        lambda base, adapter: (base, swap(adapter, "fused", "fused.npz")),
        "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it; "
        "got fused: str.",
        id="string-leaf",
    ),
    pytest.param(
        lambda base, adapter: (base, swap(swap(adapter, "fused", 1.5), "layer/bias", 0)),
        "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it; "
        "got fused: float, layer/bias: int.",
        id="numbers",
    ),
    pytest.param(
        lambda base, adapter: (base, jlora.bind(base, adapter)),
        "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it; "
        "got fused: Adapted, layer/kernel: Adapted.",
        id="bound",
    ),
]


LORA = jlora.transform(model, *ADAPTED)
CALLS = {
    "apply": lambda base, adapter: LORA.apply(base, adapter, X),
    "bind": jlora.bind,
    "merge": jlora.merge,
    "unmerge": jlora.unmerge,
}
JITTED = {
    "jit-apply": lambda base, adapter: jax.jit(LORA.apply)(base, adapter, X),
    "jit-merge": lambda base, adapter: jax.jit(jlora.merge)(base, adapter),
}


@pytest.mark.parametrize(("change", "message"), MISFITS)
@pytest.mark.parametrize("call", [*CALLS, *JITTED])
def test_adapter_does_not_fit(change: Callable[..., Any], message: str, call: str) -> None:
    """Every differing path once, whoever takes the two trees."""
    base, adapter = change(*init(*ADAPTED))
    with pytest.raises(ValueError, match=exactly(message)):
        (CALLS | JITTED)[call](base, adapter)


@pytest.mark.parametrize(("change", "message"), WRONG_TREES)
@pytest.mark.parametrize("call", list(CALLS))
def test_wrong_tree(change: Callable[..., Any], message: str, call: str) -> None:
    """A tree that is no adapter, or the two in the wrong order."""
    base, adapter = change(*init(*ADAPTED))
    with pytest.raises(TypeError, match=exactly(message)):
        CALLS[call](base, adapter)


# ------------------------------------------------------------------------------- not finite


def test_merge_check_names_paths() -> None:
    """Every leaf with NaN or infinity, and how many; nothing without `check`, or if all is well."""
    base, adapter = init(*ADAPTED)
    assert jlora.merge(base, adapter, check=True)
    broken = swap(adapter, "layer/bias", adapter["layer"]["bias"].at[2].set(jnp.nan))
    fused = adapter["fused"]
    broken = swap(broken, "fused", fused._replace(b=fused.b.at[:, 1].set(jnp.inf)))
    assert jax.tree.structure(jlora.merge(base, broken)) == jax.tree.structure(base)
    message = (
        "`merge` gave values that are not finite at:\n"
        "  fused: 6 of 36 values\n"
        "  layer/bias: 1 of 6 values\n"
        "The adapter or the base holds NaN or infinity there; use an earlier checkpoint."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        jlora.merge(base, broken, check=True)


def test_merge_check_sees_overflow() -> None:
    """Finite factors whose sum with W is not finite in W's dtype."""
    params = {"w": jnp.full((4, 6), 6e4, jnp.float16)}
    base, adapter = init(LoRA("w", rank=2), apply=dense, params=params)
    big = jax.tree.map(lambda a: jnp.full_like(a, 100.0), adapter)
    with pytest.raises(ValueError, match=re.escape("\n  w: 24 of 24 values\n")):
        jlora.merge(base, big, check=True)


# -------------------------------------------------------------------------- nothing is half done


def test_failed_init_leaves_inputs() -> None:
    """A refused `init` changes neither the parameters nor the transform."""
    params = copy.deepcopy(jax.tree.map(np.asarray, PARAMS))
    leaves, before = jax.tree.leaves(params), copy.deepcopy(params)
    lora = jlora.transform(model, LoRA("kernel", rank=2), LoRA("fused", rank=7))
    for _ in range(2):
        with pytest.raises(ValueError, match="is 7, above"):
            lora.init(KEY, params, X)
    assert all(x is y for x, y in zip(jax.tree.leaves(params), leaves, strict=True))
    assert_same(params, before, 0.0)
    base, _ = jlora.transform(model, LoRA("kernel|fused", rank=2)).init(KEY, params, X)
    assert all(x is y for x, y in zip(jax.tree.leaves(base), leaves, strict=True))


def test_failed_initializer_leaves_inputs() -> None:
    """An initializer that raises at the second site passes its error on, and nothing else."""
    seen = []

    def failing(key: Any, w: Any, site: Any, rule: Any) -> Any:
        seen.append(site.path)
        if len(seen) > 1:
            raise RuntimeError("no memory left")
        return jlora.initializers.gaussian(key, w, site, rule)

    before = jax.tree.map(np.array, PARAMS)
    with pytest.raises(RuntimeError, match=exactly("no memory left")):
        init(LoRA("kernel|fused", rank=2, init=failing))
    assert seen == ["fused", "layer/kernel"]
    assert_same(PARAMS, jax.tree.map(jnp.asarray, before), 0.0)


def test_failed_apply_leaves_inputs() -> None:
    """After a call that raises, the next call on the same trees is right."""

    def switchable(p: Any, x: jax.Array, odd: bool = False) -> jax.Array:
        return x @ (jnp.sin(p["w"]) if odd else p["w"])

    lora = jlora.transform(switchable, LoRA("w", rank=2))
    base, adapter = lora.init(KEY, W, X)
    adapter = randomize(adapter)
    before = jax.tree.map(np.array, (base, adapter))
    expected = dense(jlora.merge(base, adapter), X)
    with pytest.raises(NotImplementedError, match="the weight 'w' reaches `sin`"):
        lora.apply(base, adapter, X, odd=True)
    with pytest.raises(TypeError, match="dot_general"):
        lora.apply(base, adapter, X[:, :3])
    with pytest.raises(ValueError, match="does not fit"):
        jlora.merge({"w": X}, adapter)
    assert_same(lora.apply(base, adapter, X), expected)
    assert_same((base, adapter), jax.tree.map(jnp.asarray, before), 0.0)
    assert base["w"] is W["w"]


def test_errors_of_the_model_pass() -> None:
    """What the user's own function raises arrives as it is, from each of the three."""

    class OwnError(Exception):
        pass

    def failing(p: Any, x: jax.Array, fail: bool) -> jax.Array:
        if fail:
            raise OwnError("mine")
        return x @ p["w"]

    lora = jlora.transform(failing, LoRA("w", rank=2))
    base, adapter = lora.init(KEY, W, X, False)
    for call in (
        lambda: lora.init(KEY, W, X, True),
        lambda: lora.sites(W, X, fail=True),
        lambda: lora.apply(base, adapter, X, True),
    ):
        with pytest.raises(OwnError, match=exactly("mine")):
            call()


# ============================================================================ wrong numbers


def joined(p: Any, x: jax.Array) -> jax.Array:
    """[W W] over [V V], of which only W is adapted."""
    double = [jnp.concatenate([p[k], p[k]], axis=1) for k in ("w", "v")]
    return jnp.einsum("bi,sio->sbo", x, jnp.stack(double))


def test_stack_of_a_joined_weight() -> None:
    """Stacked with a weight that no rule names, a concatenated one is still merged exactly."""
    params = {"w": array(4, 6), "v": array(4, 6) + 1}
    base, adapter = init(LoRA("w", rank=2), apply=joined, params=params)
    adapter = randomize(adapter)
    actual = jlora.transform(joined).apply(base, adapter, X)
    assert_same(actual, joined(jlora.merge(base, adapter), X))


def repeated(p: Any, x: jax.Array) -> jax.Array:
    """W three times, and V twice, as a stack of five."""
    stack = [jnp.broadcast_to(p[k], (n, *p[k].shape)) for k, n in (("w", 3), ("v", 2))]
    return jnp.einsum("sbi,sio->sbo", jnp.stack([x, -x, 2 * x, 1 + x, x]), jnp.concatenate(stack))


@pytest.mark.parametrize("pattern", ["w", "w|v"])
def test_join_of_a_broadcast_weight(pattern: str) -> None:
    """A weight that is broadcast along a stack, and then concatenated along it."""
    params = {"w": array(4, 6), "v": array(4, 6) + 1}
    base, adapter = init(LoRA(pattern, rank=2), apply=repeated, params=params)
    adapter = randomize(adapter)
    actual = jlora.transform(repeated).apply(base, adapter, X)
    assert_same(actual, repeated(jlora.merge(base, adapter), X))


def test_weakly_typed_weight() -> None:
    """`jnp.full` gives a weakly typed array, which does not widen a bfloat16 activation."""
    params, x = {"w": jnp.full((4, 6), 0.5)}, X.astype(jnp.bfloat16)
    base, adapter = jlora.transform(dense, LoRA("w", rank=2)).init(KEY, params, x)
    assert dense(params, x).dtype == jnp.bfloat16
    assert jlora.transform(dense).apply(base, adapter, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("call", ["init", "apply", "refusal"])
def test_tracers_do_not_leak(call: str) -> None:
    """Nothing that is traced outlives its trace, whether the call succeeds or is refused."""
    base, adapter = init(LoRA("w", rank=2), apply=dense, params=SQUARE)
    with jax.checking_leaks():
        if call == "init":
            init(LoRA("w", rank=2), apply=dense, params=SQUARE)
        elif call == "apply":
            jlora.transform(dense).apply(base, adapter, X)
        else:
            with pytest.raises(ValueError, match="used only by `sin`"):
                init(LoRA("w", rank=2), apply=use_sin, params=SQUARE)


# ========================================================================== silent misses


TREES = [
    pytest.param(lambda base, adapter: (base, adapter), lambda t: t[0], id="what-init-returns"),
    pytest.param(
        lambda base, adapter: {"m": Params(base, adapter)}, lambda t: t["m"].base, id="nested"
    ),
    pytest.param(
        lambda base, adapter: [Params(base, adapter)] * 2, lambda t: t[0].base, id="two-models"
    ),
    pytest.param(jlora.bind, lambda t: t["fused"].base, id="bound"),
]


@pytest.mark.parametrize(("tree", "base_of"), TREES)
def test_optimizer_never_trains_the_base(
    tree: Callable[..., Any], base_of: Callable[[Any], Any]
) -> None:
    """Whatever holds a base and an adapter, the base gets no updates, or an error."""
    params = tree(*init(*ADAPTED))
    tx = jlora.optimizer(optax.sgd(1.0))
    grads = jax.tree.map(jnp.ones_like, params)
    try:
        updates, _ = tx.update(grads, tx.init(params), params)
    except (TypeError, ValueError):
        return
    floats = [u for u in jax.tree.leaves(base_of(updates)) if u.dtype == jnp.float32]
    assert not any(np.any(u) for u in floats)


@pytest.mark.parametrize("adapter", [None, {"w": None}, {"w": {}}, []], ids=repr)
@pytest.mark.parametrize("call", ["apply", "merge"])
def test_adapter_of_nothing(adapter: Any, call: str) -> None:
    """None is no adapter: a checkpoint that was not found must not pass as the base model."""
    base, _ = init(LoRA("w", rank=2), apply=dense, params=W)
    with pytest.raises(TypeError, match="`adapter` must be a nested dict"):
        if call == "apply":
            jlora.transform(dense).apply(base, adapter, X)
        else:
            jlora.merge(base, adapter)


def test_same_rule_twice() -> None:
    """The second of two equal rules takes nothing."""
    rule = LoRA("w", rank=2)
    with pytest.raises(ValueError, match=re.escape("LoRA('w') is left with no leaf")):
        init(rule, rule, apply=dense, params=W)


@pytest.mark.parametrize("flag", ["materialize", "rslora"])
def test_flag_that_is_a_string(flag: str) -> None:
    """`"false"` from a configuration file is not False."""
    with pytest.raises(TypeError, match=f"`{flag}` of"):
        LoRA("w", **{flag: "false"})


def test_lora_plus_bool() -> None:
    """`lora_plus=True` does not mean a ratio of 1."""
    with pytest.raises(ValueError, match=re.escape("`lora_plus` must be a positive")):
        jlora.optimizer(optax.sgd(1.0), lora_plus=True)


def changed_dtype(key: Any, w: Any, site: Any, rule: Any) -> Any:
    """An initializer that rounds W."""
    w, a, b = jlora.initializers.gaussian(key, w, site, rule)
    return w.astype(jnp.float16), a, b


def integers(key: Any, w: Any, site: Any, rule: Any) -> Any:
    """An initializer whose factors cannot be trained."""
    w, a, b = jlora.initializers.gaussian(key, w, site, rule)
    return w, jnp.ones_like(a, jnp.int32), jnp.zeros_like(b, jnp.int32)


@pytest.mark.parametrize("initializer", [changed_dtype, integers])
def test_initializer_with_wrong_dtypes(initializer: Callable[..., Any]) -> None:
    """W keeps its dtype, and A and B are floating-point."""
    with pytest.raises((TypeError, ValueError), match=r"`init` of LoRA.*float"):
        init(LoRA("w", rank=2, init=initializer), apply=dense, params=W)


# =================================================== right uses that are refused or crash


def test_keyword_arguments_of_the_model() -> None:
    """Models with `key=`, `params=`, `base=` or `adapter=` of their own."""

    def keyed(p: Any, x: jax.Array, *, key: Any, params: Any, base: Any, adapter: Any) -> jax.Array:
        del key, params, base, adapter
        return x @ p["w"]

    own = {"key": KEY, "params": 1, "base": 2, "adapter": 3}
    lora = jlora.transform(keyed, LoRA("w", rank=2))
    assert len(lora.sites(W, X, **own)) == 1
    base, adapter = lora.init(KEY, W, X, **own)
    assert lora.apply(base, adapter, X, **own).shape == (2, 6)


@pytest.mark.parametrize(
    ("field", "number"),
    [("rank", np.int64(4)), ("alpha", np.float32(16)), ("dropout", np.float32(0.1))],
    ids=["rank", "alpha", "dropout"],
)
def test_numpy_numbers(field: str, number: Any) -> None:
    """A sweep over `np.arange` or `np.linspace` gives NumPy's numbers."""
    assert getattr(LoRA("w", **{field: number}), field) == number


PYTHON_VALUES = {
    "int": ({"heads": 2}, lambda p, x: (x @ p["w"]).reshape(p["heads"], -1)),
    "bool": ({"flag": True}, lambda p, x: x @ p["w"] if p["flag"] else x),
    "vector": ({"gate": jnp.ones(1)}, lambda p, x: x @ p["w"] if p["gate"][0] > 0 else x),
    "float": ({"scale": jnp.float32(2)}, lambda p, x: x @ p["w"] * float(p["scale"])),
    "numpy": ({"mask": np.eye(4, 6)}, lambda p, x: x @ (p["w"] * np.asarray(p["mask"]))),
}


@pytest.mark.parametrize("case", list(PYTHON_VALUES))
def test_python_reads_a_leaf_that_is_not_adapted(case: str) -> None:
    """Leaves that no rule takes keep their values, as `apply` keeps them."""
    extra, apply = PYTHON_VALUES[case]
    materialize = case == "numpy"
    base, adapter = init(LoRA("w", rank=2, materialize=materialize), apply=apply, params=W | extra)
    actual = jlora.transform(apply).apply(base, adapter, X)
    assert_same(actual, apply(W | extra, X))


def test_python_leaves_that_are_not_read() -> None:
    """Numbers among the parameters are leaves like others, as long as JAX alone uses them."""
    params = W | {"scale": 0.5}
    base, adapter = init(
        LoRA("w", rank=2), apply=lambda p, x: x @ p["w"] * p["scale"], params=params
    )
    assert base["scale"] == 0.5
    assert list(adapter) == ["w"]


def test_merge_of_python_numbers() -> None:
    """A Python number that is trained in full, merged and checked."""
    rules = LoRA("w", rank=2), Full("scale")
    base, adapter = init(
        *rules, apply=lambda p, x: x @ p["w"] * p["scale"], params=W | {"scale": 0.5}
    )
    assert jlora.merge(base, adapter)["scale"] == 0.5


def test_merge_check_of_python_numbers() -> None:
    """A Python number beside the adapted weight."""
    base, adapter = init(LoRA("w", rank=2), apply=dense, params=W | {"layers": 3})
    assert jlora.merge(base, adapter, check=True)["layers"] == 3


def test_numpy_float64_is_quiet() -> None:
    """NumPy's default dtype gives no warnings: JAX takes such an array as float32 silently."""
    params = {"w": np.random.default_rng(0).standard_normal((4, 6))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base, adapter = init(LoRA("w", rank=2), apply=dense, params=params)
        assert jlora.transform(dense).apply(base, adapter, X).dtype == jnp.float32


def use_raveled(p: Any, x: jax.Array) -> Any:
    """Element for element, on a vector."""
    return x @ jnp.sin(p["w"].ravel()).reshape(4, 4)


def use_mixed(p: Any, x: jax.Array) -> Any:
    """Element for element, with axes mixed."""
    return x @ jnp.sin(p["w"].reshape(8, 2)).reshape(4, 4)


def use_batched(p: Any, x: jax.Array) -> Any:
    """A product that contracts one axis and batches the other."""
    return jnp.einsum("bio,io->bo", jnp.stack([x, x, x, x], 2), p["w"])


def use_one_output(p: Any, x: jax.Array) -> Any:
    """All axes contracted: a product with one output."""
    return jnp.tile(x, (1, 4)) @ p["w"].reshape(16, 1)


def use_rows(p: Any, x: jax.Array) -> Any:
    """One row at a time, as a scale."""
    return lax.scan(lambda c, row: (c * row, None), x, p["w"])[0]


def use_row(p: Any, x: jax.Array) -> Any:
    """One row, added."""
    return x + p["w"][0]


@pytest.mark.parametrize(
    "apply",
    [use_raveled, use_mixed, use_batched, use_one_output, use_rows, use_row],
    ids=lambda f: f.__name__.removeprefix("use_"),
)
def test_materialize_reaches_every_use(apply: Callable[..., Any]) -> None:
    """With `materialize=True` any use is exact."""
    rule = LoRA("w", rank=2, materialize=True)
    base, adapter = init(rule, apply=apply, params=SQUARE)
    adapter = randomize(adapter)
    actual = jlora.transform(apply, rule).apply(base, adapter, X)
    assert_same(actual, apply(jlora.merge(base, adapter), X))


# ======================================================== messages that mislead, or are JAX's


def message_of(provoke: Callable[[], Any]) -> str:
    """The message of the error that `provoke` raises."""
    with pytest.raises(Exception) as caught:
        provoke()
    return str(caught.value)


def test_used_leaf_is_not_called_unused() -> None:
    """The message says what stands in the way."""
    text = message_of(lambda: init(LoRA("w", rank=2), apply=use_one_output, params=SQUARE))
    assert "not used by the traced call" not in text


@pytest.mark.parametrize(
    ("pattern", "no_help"),
    [
        ("bias", "materialize"),
        ("bucket", "Full"),
        ("bucket", "materialize"),
        ("unused", "materialize"),
    ],
)
def test_remedies_help(pattern: str, no_help: str) -> None:
    """No advice that cannot work: a vector or an integer is never formed or trained."""
    assert no_help not in message_of(lambda: init(LoRA(pattern, rank=2)))


def test_near_misses_beside_sites() -> None:
    """A typo in a model that has leaves but no linear site."""
    provoke = lambda: init(  # noqa: E731
        LoRA("scael", rank=1), apply=lambda p, x: x * p["scale"], params={"scale": array(4)}
    )
    assert "There is no leaf to match" not in message_of(provoke)


def use_where(p: Any, x: jax.Array) -> Any:
    """A function of `jax.numpy` that is jitted."""
    return x @ jnp.where(x[0, 0] > 0, p["w"], 0.0)  # here


def use_clip(p: Any, x: jax.Array) -> Any:
    """Another."""
    return x @ jnp.clip(p["w"], -1, 1)  # here


@pytest.mark.parametrize("apply", [use_where, use_clip])
def test_line_of_a_library_function(apply: Callable[..., Any]) -> None:
    """The user's line that calls `jnp.where` or `jnp.clip`."""
    text = message_of(lambda: init(LoRA("w", rank=2), apply=apply, params=SQUARE))
    assert line_of(apply, "# here") in text


BRANCHES = {
    "weight": lambda p, x: x @ p["w"] if p["w"].sum() > 0 else x,
    "activation": lambda p, x: x @ p["w"] if (x @ p["w"]).sum() > 0 else x,
    "numpy": lambda p, x: x @ np.asarray(p["w"]),
    "float": lambda p, x: x @ p["w"] * float(p["w"][0, 0]),
}


@pytest.mark.parametrize("case", list(BRANCHES))
def test_python_reads_an_adapted_weight(case: str) -> None:
    """Python code that asks for the value of an adapted weight is refused, by both."""
    apply = BRANCHES[case]
    with pytest.raises(TypeError, match="asks in Python for the value"):
        init(LoRA("w", rank=2), apply=apply, params=SQUARE)
    base, adapter = init(LoRA("w", rank=2), apply=dense, params=SQUARE)
    with pytest.raises(TypeError, match="asks in Python for the value"):
        jlora.transform(apply).apply(base, adapter, X)


@pytest.mark.parametrize("case", list(BRANCHES))
def test_python_reads_an_adapted_weight_wording(case: str) -> None:
    """The error names the leaf, and no line of jlora."""
    text = message_of(lambda: init(LoRA("w", rank=2), apply=BRANCHES[case], params=SQUARE))
    assert "'w'" in text
    assert "_interpret.py" not in text


def one_site() -> jlora.LowRank:
    """The node of an adapter of `dense`."""
    return init(LoRA("w", rank=2), apply=dense, params=W)[1]["w"]


LEAKS = {
    "slots-chosen-int": (lambda: Slots(3, 0), "`chosen` of Slots"),
    "slots-axis-string": (lambda: Slots(3, (0,), axis="out"), "`axis` of Slots"),
    "slots-axis-float": (lambda: Slots(3, (0,), axis=0.5), "`axis` of Slots"),
    "initializer-string": (lambda: LoRA("w", init="gaussian"), "`init` of LoRA('w')"),
    "dtype-unknown": (lambda: LoRA("w", dtype="float33"), "`dtype` of LoRA('w')"),
    "alpha-huge": (lambda: LoRA("w", alpha=10**400), "`alpha` of LoRA('w')"),
    "no-apply-function": (lambda: jlora.transform(LoRA("w"), LoRA("w")), "`apply_fn`"),
    "tx-not-called": (lambda: jlora.optimizer(optax.adamw), "`tx`"),
    "tx-learning-rate": (lambda: jlora.optimizer(1e-3), "`tx`"),
    "lora-plus-string": (lambda: jlora.optimizer(optax.sgd(1.0), lora_plus="16"), "`lora_plus`"),
    "key-int": (lambda: jlora.transform(dense, LoRA("w", rank=2)).init(0, W, X), "`key`"),
    "key-and-params-swapped": (
        lambda: jlora.transform(dense, LoRA("w", rank=2)).init(W, KEY, X),
        "`key`",
    ),
    "initializer-pair": (
        lambda: init(LoRA("w", rank=2, init=lambda *_: (X, X)), apply=dense, params=W),
        "`init` of LoRA",
    ),
    "initializer-lists": (
        lambda: init(LoRA("w", rank=2, init=lambda *_: (X, [], [])), apply=dense, params=W),
        "`init` of LoRA",
    ),
    "initializer-other-w": (
        lambda: init(
            LoRA("w", rank=2, init=lambda k, w, s, r: jlora.initializers.gaussian(k, w[:3], s, r)),
            apply=dense,
            params=W,
        ),
        "`init` of LoRA",
    ),
    "dropout-key-int": (lambda: jlora.dropout(init(*ADAPTED)[1], 0), "`key`"),
    "dropout-keys": (
        lambda: jlora.dropout(
            init(LoRA("w", rank=2, dropout=0.5), apply=dense, params=W)[1],
            jax.random.split(KEY, 2),
        ),
        "`key`",
    ),
    "factor-none": (
        lambda: jlora.merge(W, {"w": one_site()._replace(a=None)}),
        "w: ",
    ),
    "factor-string": (
        lambda: jlora.merge(W, {"w": one_site()._replace(b="b")}),
        "w: ",
    ),
    "merge-check-under-jit": (
        lambda: jax.jit(lambda a: jlora.merge(PARAMS, a, check=True))(init(*ADAPTED)[1]),
        "`check`",
    ),
    "adapter-forgotten": (lambda: jlora.transform(dense).apply(W, X), "the root"),
    "root-rank": (lambda: init(LoRA(rank=9), apply=lambda w, x: x @ w, params=W["w"]), "the root"),
    "bound-base": (
        lambda: jlora.merge(jlora.bind(*init(*ADAPTED)), init(*ADAPTED)[1]),
        "bind",
    ),
}


@pytest.mark.parametrize("case", list(LEAKS))
def test_clear_error(case: str) -> None:
    """The argument or the path is named."""
    provoke, named_in = LEAKS[case]
    assert named_in in message_of(provoke)


# ------------------------------------------------------------------------ other modules' mistakes


def test_module_instead_of_its_apply() -> None:
    """Flax's own errors arrive: an unbound module, and parameters without their collection."""
    module = nn.Dense(3)
    variables = module.init(KEY, X)
    lora = jlora.transform(module.apply, LoRA("kernel", rank=2))
    with pytest.raises(FlaxError, match="unbound"):
        jlora.transform(module, LoRA("kernel", rank=2)).init(KEY, variables, X)
    with pytest.raises(FlaxError, match="collections"):
        lora.init(KEY, variables["params"], X)


def test_nnx_path_with_value() -> None:
    """The pattern `kernel/value` of an NNX variable finds its near miss."""
    graph, state = nnx.split(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    message = "LoRA('kernel/value') matches no leaf of `params`. Near misses: kernel."
    with pytest.raises(ValueError, match=exactly(message)):
        init(
            LoRA("kernel/value", rank=2),
            apply=lambda s, x: nnx.merge(graph, s)(x),
            params=state,
        )

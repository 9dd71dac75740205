"""Rules that mean nothing, where they are written; and rules that do not fit the model."""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.nn.initializers import lecun_normal, normal, zeros
from small import REMEDY, SQUARE, X, each_refusal, exactly, init, line_of, model

import jlora
from jlora import Full, LoRA, Slots, checkpoint, initializers
from jlora._adapters._lora import KEYWORDS_OF_PEFT

NUMBERS = "must be a positive finite number"
PATTERN = "`pattern` of {} must be a regular expression as a string; got {!r} of type {}."
# A field of LoRA and what it must be, and values that it must not be.
INITIALIZER = "must be an initializer such as jlora.initializers.gaussian"
UNCALLED = (initializers.loftq, initializers.eva, normal, lecun_normal)
FIELDS: list[tuple[str, type[Exception], str, tuple[Any, ...]]] = [
    ("rank", ValueError, "must be an integer of at least 1", (0, -3, 8.0, math.inf, True, "8")),
    ("alpha", ValueError, NUMBERS, (math.nan, -math.inf, None, True, 0, -16.0, 10**400)),
    ("dropout", ValueError, "must be in [0, 1)", (1.0, -0.1, math.nan)),
    ("dtype", TypeError, "must be a floating-point dtype", (jnp.int32, "float33")),
    ("slots", TypeError, "must be a jlora.Slots", (3,)),
    ("init", TypeError, INITIALIZER, ("gaussian",)),
    ("init", TypeError, f"{INITIALIZER}, called with its options", UNCALLED),
    # `"false"` from a configuration file is not False.
    ("materialize", TypeError, "must be True or False", ("false",)),
    ("rslora", TypeError, "must be True or False", ("false",)),
]


@pytest.mark.parametrize("pattern", ["w", None])
@pytest.mark.parametrize(("field", "error", "must", "values"), FIELDS, ids=lambda x: str(x)[:8])
def test_field(field: str, error: Any, must: str, values: tuple[Any, ...], pattern: Any) -> None:
    """The rule is named, with or without a pattern."""
    rule = "LoRA()" if pattern is None else f"LoRA({pattern!r})"
    for value in values:
        with pytest.raises(error, match=exactly(f"`{field}` of {rule} {must}; got {value!r}.")):
            LoRA(pattern, **{field: value})


@pytest.mark.parametrize("value", [7, re.compile("w"), ["query", "value"]], ids=str)
@pytest.mark.parametrize("rule", [LoRA, Full])
def test_pattern(rule: Any, value: Any) -> None:
    """A string, or for some rules none."""
    message = PATTERN.format(rule.__name__, value, type(value).__name__)
    with pytest.raises(TypeError, match=exactly(message)):
        rule(value)


RULES = "`rules` must be rules, such as jlora.LoRA(); got "
SCHEMES = (
    "`schemes` must be jlora.NF4, jlora.FP4, jlora.Int8, jlora.Int4, jlora.FP8 or jlora.MXFP4; got "
)
COUNT = "`count` of Slots must be an integer of at least 1; got "
DISTINCT = "`chosen` of Slots must name distinct slots, at least one; got "
ENDS = (
    "must not start or end with `/`, because a pattern matches whole components of a path. Write "
)
TX = "`tx` must be an optax transformation, such as optax.adamw(2e-4); got "
NO_PATTERN = "is not a regular expression: "
MALFORMED: dict[type[Exception], dict[str, Callable[[], Any]]] = {
    ValueError: {
        f"`pattern` '(query' {NO_PATTERN}missing ), unterminated subpattern at position 0.": (
            lambda: LoRA("(query")
        ),
        f"`pattern` '*kernel' {NO_PATTERN}nothing to repeat at position 0.": (
            lambda: Full("*kernel")
        ),
        f"`pattern` 'head(?i)' {NO_PATTERN}global flags not at the start of the expression at "
        "position 4.": lambda: LoRA("head(?i)"),
        f"`pattern` 'encoder/' of Full {ENDS}'encoder'.": lambda: Full("encoder/"),
        f"`pattern` '/(q|v)/kernel' of DoRA {ENDS}'(q|v)/kernel'.": (
            lambda: jlora.DoRA("/(q|v)/kernel")
        ),
        f"{COUNT}0.": lambda: Slots(0, (0,)),
        f"{DISTINCT}(0, 2, 0).": lambda: Slots(3, (0, 2, 0)),
        "`chosen` of Slots must be in [0, 3); got (-1, 1).": lambda: Slots(3, (-1, 1)),
        **{
            f"`{name}` {NUMBERS}; got {x!r}.": (lambda f=f, x=x: f(x))
            for name, f in {"ratio": jlora.lora_plus, "damping": jlora.precondition}.items()
            for x in (0, math.nan, True, "16")
        },
    },
    TypeError: {
        "`chosen` of Slots must be a tuple of integers; got (0, 1.0).": lambda: Slots(3, (0, 1.0)),
        "`chosen` of Slots must be a tuple of integers; got 0.": lambda: Slots(3, 0),
        "`axis` of Slots must be an integer; got 0.5.": lambda: Slots(3, (0,), axis=0.5),
        f"{TX}{optax.adamw!r}.": lambda: jlora.optimizer(optax.adamw),
        "`apply_fn` must be a function of parameters; got an object of type LoRA. The function "
        "comes first: transform(model.apply, LoRA(...)).": lambda: jlora.transform(
            LoRA("w"), LoRA("w")
        ),
        f"{RULES}a list; unpack it with `*`, transform(apply_fn, *rules).": (
            lambda: jlora.transform(model, [LoRA("w", rank=2)])
        ),
        f"{RULES}'kernel'.": lambda: jlora.transform(model, "kernel"),
        f"{RULES}the class LoRA; call it, LoRA(...).": lambda: jlora.transform(model, LoRA),
        f"{RULES}{jlora.NF4()!r}.": lambda: jlora.transform(model, jlora.NF4()),
        f"{SCHEMES}a list; unpack it with `*`, quantize(params, *schemes).": (
            lambda: jlora.quantize({}, [jlora.NF4()])
        ),
        "`scheme` of loftq must be a scheme such as jlora.NF4(); got the class Int8; call it, "
        "Int8(...).": lambda: jlora.initializers.loftq(jlora.Int8),
        f"{RULES}the class Full; call it, Full(...).": (
            lambda: checkpoint.save("nowhere", {"w": jnp.ones((2, 2))}, [Full])
        ),
        f"{SCHEMES}the class FP8; call it, FP8(...).": lambda: jlora.quantize({}, jlora.FP8),
    },
}


@each_refusal(MALFORMED)
def test_malformed_rule(provoke: Callable[[], Any], error: type[Exception], message: str) -> None:
    """A rule, slots or optimizer that cannot mean anything is refused where it is written."""
    with pytest.raises(error, match=exactly(message)):
        provoke()


@pytest.mark.parametrize("rule", [LoRA, jlora.DoRA])
def test_keywords_of_peft(rule: type) -> None:
    """Each says what to give; another keyword is Python's own error, and the signature stays."""
    for name, remedy in KEYWORDS_OF_PEFT.items():
        message = f"{rule.__name__} does not have PEFT's keywords: `{name}` is {remedy}."
        with pytest.raises(TypeError, match=exactly(message)):
            rule("w", **{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        rule("w", ranks=1)
    several = "LoRA does not have PEFT's keywords: `r` is `rank`; `lora_alpha` is `alpha`."
    with pytest.raises(TypeError, match=exactly(several.replace("LoRA", rule.__name__))):
        rule(r=8, lora_alpha=16)
    fields = [field.name for field in dataclasses.fields(rule)]
    assert list(inspect.signature(rule).parameters) == fields


# ------------------------------------------------------------------------ with their model


def constant(p: Any, x: Any) -> Any:
    """Uses a weight only where it gets no gradient."""
    return x @ lax.stop_gradient(p["w"])


IN_FULL = "Narrow the pattern, or train the leaf in full with jlora.Full."


def bad_start(*given: str) -> str:
    return (
        "`init` of LoRA('kernel') must return floating-point W, A and B for 'layer/kernel', of "
        "shapes ((4, 6), (4, 2), (2, 6)) and with W's dtype float32; got "
        f"({', '.join(given)})."
    )


W, A, B = (f"(({n}), 'floating-point')" for n in ("4, 6", "4, 2", "2, 6"))


def started(change: Callable[..., Any]) -> Callable[[], Any]:
    """`init` by an initializer that gives something else than W, A and B."""

    def initializer(key: Any, w: Any, site: Any, rule: Any) -> Any:
        return change(*jlora.initializers.gaussian(key, w, site, rule))

    return lambda: init(LoRA("kernel", rank=2, init=initializer))


UNFIT = {
    "`rules` is empty, so nothing would be trained. "
    "Give transform(apply_fn, ...) a jlora.LoRA() or a jlora.Full(pattern).": lambda: init(),
    "LoRA('layer/kernal') matches no leaf of `params`. "
    "Near misses: layer/kernel, vocabulary, fused.": lambda: init(LoRA("layer/kernal", rank=2)),
    "LoRA('w') matches no leaf of `params`. There is no leaf to match.": lambda: init(
        LoRA("w", rank=2), apply=lambda p, x: x, params={}
    ),
    "Full('kernel|fused') gets no leaf: earlier rules match all 2 leaves that it matches "
    "(LoRA('fused'), Full('layer')). The first match wins; reorder the rules or drop this one.": (
        lambda: init(LoRA("fused", rank=2), Full("layer"), Full("kernel|fused"))
    ),
    "LoRA() without a pattern adapts every dense and conv site, but the model has none. "
    "Name leaves by a pattern; print(transform(apply_fn).sites(...)) lists the sites.": lambda: (
        init(LoRA(rank=2), apply=lambda p, x: p["table"][jnp.array([0, 1])], params={"table": X})
    ),
    "LoRA('layer') matches 'layer/bias' of shape (6,), which is not a matrix. Narrow the pattern "
    "(did you mean 'layer/kernel'?), or train the leaf in full with jlora.Full.": lambda: init(
        LoRA("layer", rank=2)
    ),
    "LoRA('unused') matches 'unused' of shape (3, 5), which the traced call does not use, or only "
    f"behind stop_gradient. {IN_FULL}": lambda: init(LoRA("unused", rank=2)),
    "LoRA('w') matches 'w' of shape (4, 4), which the traced call does not use, or only behind "
    f"stop_gradient. {IN_FULL}": lambda: init(LoRA("w", rank=2), apply=constant, params=SQUARE),
    "Full('w') matches 'w' of shape (4, 4), which the traced call does not use, or only behind "
    "stop_gradient, so it would get no gradient. Narrow the pattern, or give `init` the arguments "
    "of a call that uses it.": lambda: init(Full("w"), apply=constant, params=SQUARE),
    "LoRA('bucket') matches 'bucket' of dtype int32, which is not floating-point. Narrow the "
    "pattern.": lambda: init(LoRA("bucket", rank=2)),
    "Full('bucket') matches 'bucket' of dtype int32, which cannot be trained. "
    "Narrow the pattern to floating-point leaves.": lambda: init(Full("bucket")),
    "`rank` of LoRA('kernel') is 5, above min(inputs, outputs) = 4 of 'layer/kernel' with "
    "shape (4, 6). Lower the rank, or put a separate rule for this leaf first, such as "
    "jlora.Full('layer/kernel').": lambda: init(LoRA("kernel", rank=5)),
    "`rank` of LoRA('fused') is 3, above min(inputs, outputs) = 2 of 'fused' with shape "
    "(6, 6). Lower the rank, or put a separate rule for this leaf first, such as "
    "jlora.Full('fused').": lambda: init(LoRA("fused", rank=3, slots=Slots(3, (0, 2)))),
    "`count` of Slots must divide the 6 outputs of 'fused' with shape (6, 6); got 4.": (
        lambda: init(LoRA("fused", rank=1, slots=Slots(4, (0,))))
    ),
    "`axis` of Slots must be in [0, 1), as 'fused' has 1 output axes; got 1.": lambda: init(
        LoRA("fused", rank=1, slots=Slots(3, (0,), axis=1))
    ),
    "`init` of LoRA('fused') makes A zero at 'fused', where B is zero too: neither would get a "
    "gradient. Give an initializer that draws A.": lambda: init(LoRA("fused", rank=2, init=zeros)),
    bad_start(W, "((2, 4), 'floating-point')", B): started(lambda w, a, b: (w, a.T, b)),
    bad_start(W, "((4, 2), 'int32')", B): started(lambda w, a, b: (w, a.astype(int), b)),
    bad_start("((3, 6), 'floating-point')", A, B): started(lambda w, a, b: (w[:3], a, b)),
    bad_start(W, A, B): started(lambda w, a, b: (w.astype(jnp.float16), a, b)),
    bad_start(W, A): started(lambda w, a, b: (w, a)),
    bad_start(W, "(None, 'None')", "(None, 'None')"): started(lambda w, a, b: (w, [], [])),
}


@each_refusal({ValueError: UNFIT})
def test_unfit_rule(provoke: Callable[[], Any], error: Any, message: str) -> None:
    """A rule that would train nothing, or cannot apply to a leaf that it matches."""
    with pytest.raises(error, match=exactly(message)):
        provoke()


def test_added_position() -> None:
    """A position embedding that is added is no site; the line that adds it is named."""
    line = line_of(model, 'params["position"]')
    message = (
        "LoRA('position') matches 'position' of shape (2, 6), which the model uses only in "
        f"`add` at {line} (model). {REMEDY}"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        init(LoRA("position", rank=2))

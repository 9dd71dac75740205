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
from jax.nn.initializers import lecun_normal, normal, zeros
from messages import refused
from small import REMEDY, X, each_refusal, init, line_of, model

import jlora
from jlora import Full, LoRA, Slots, checkpoint, initializers
from jlora._adapters._lora import KEYWORDS_OF_PEFT

# Values that a field of LoRA must not have.
UNCALLED = (initializers.loftq, initializers.eva, normal, lecun_normal)
FIELDS: list[tuple[str, type[Exception], tuple[Any, ...]]] = [
    ("rank", ValueError, (0, -3, 8.0, math.inf, True, "8")),
    ("alpha", ValueError, (math.nan, -math.inf, None, True, 0, -16.0, 10**400)),
    ("dropout", ValueError, (1.0, -0.1, math.nan)),
    ("dtype", TypeError, (jnp.int32, "float33")),
    ("slots", TypeError, (3,)),
    ("init", TypeError, ("gaussian",)),
    ("init", TypeError, UNCALLED),
    # `"false"` from a configuration file is not False.
    ("materialize", TypeError, ("false",)),
    ("rslora", TypeError, ("false",)),
]


@pytest.mark.parametrize("pattern", ["w", None])
@pytest.mark.parametrize(("field", "error", "values"), FIELDS, ids=lambda x: str(x)[:8])
def test_field(field: str, error: Any, values: tuple[Any, ...], pattern: Any) -> None:
    """The rule is named, with or without a pattern."""
    rule = "LoRA()" if pattern is None else f"LoRA({pattern!r})"
    for value in values:
        with refused(error, field, rule, f"; got {value!r}."):
            LoRA(pattern, **{field: value})


@pytest.mark.parametrize("value", [7, re.compile("w"), ["query", "value"]], ids=str)
@pytest.mark.parametrize("rule", [LoRA, Full])
def test_pattern(rule: Any, value: Any) -> None:
    """A string, or for some rules none."""
    with refused(TypeError, "pattern", rule.__name__, f"got {value!r} of type "):
        rule(value)


MALFORMED: dict[type[Exception], dict[str, tuple[Any, ...]]] = {
    ValueError: {
        "unterminated": (lambda: LoRA("(query"), "pattern", "'(query'", "at position 0"),
        "nothing to repeat": (lambda: Full("*kernel"), "pattern", "'*kernel'", "at position 0"),
        "flags": (lambda: LoRA("head(?i)"), "pattern", "'head(?i)'", "at position 4"),
        "at the end": (lambda: Full("encoder/"), "pattern", "Full", "'encoder/'", "'encoder'."),
        "at the start": (lambda: jlora.DoRA("/(q|v)/w"), "pattern", "DoRA", "'/(q", "'(q|v)/w'."),
        "no slots": (lambda: Slots(0, (0,)), "count", "", "got 0."),
        "slots twice": (lambda: Slots(3, (0, 2, 0)), "chosen", "", "got (0, 2, 0)."),
        "no such slot": (lambda: Slots(3, (-1, 1)), "chosen", "[0, 3)", "got (-1, 1)."),
        **{
            f"{name} {x!r}": (lambda f=f, x=x: f(x), name, "", f"got {x!r}.")
            for name, f in {"ratio": jlora.lora_plus, "damping": jlora.precondition}.items()
            for x in (0, math.nan, True, "16")
        },
    },
    TypeError: {
        "half a slot": (lambda: Slots(3, (0, 1.0)), "chosen", "", "got (0, 1.0)."),
        "one slot": (lambda: Slots(3, 0), "chosen", "", "got 0."),
        "half an axis": (lambda: Slots(3, (0,), axis=0.5), "axis", "", "got 0.5."),
        "optax": (lambda: jlora.optimizer(optax.adamw), "tx", "", f"got {optax.adamw!r}."),
        "the rule first": (
            lambda: jlora.transform(LoRA("w"), LoRA("w")),
            *("apply_fn", "", "of type LoRA", "transform(model.apply, LoRA(...))"),
        ),
        "a list": (lambda: jlora.transform(model, [LoRA("w")]), "rules", "", "a list", "*rules"),
        "a string": (lambda: jlora.transform(model, "kernel"), "rules", "", "got 'kernel'."),
        "a class": (lambda: jlora.transform(model, LoRA), "rules", "", "class LoRA", "LoRA(...)"),
        "a scheme": (lambda: jlora.transform(model, jlora.NF4()), "rules", "", "got NF4("),
        "schemes": (
            lambda: jlora.quantize({}, [jlora.NF4()]), "schemes", "", "a list", "*schemes"
        ),
        "a class of loftq": (
            lambda: initializers.loftq(jlora.Int8), "scheme", "loftq", "class Int8", "Int8(...)"
        ),
        "a class to save": (
            lambda: checkpoint.save("nowhere", {"w": jnp.ones((2, 2))}, [Full]),
            *("rules", "", "class Full", "Full(...)"),
        ),
        "a class to quantize": (
            lambda: jlora.quantize({}, jlora.FP8), "schemes", "", "class FP8", "FP8(...)"
        ),
    },
}  # fmt: skip


@each_refusal(MALFORMED)
def test_malformed_rule(error: Any, call: Callable[[], Any], facts: Any) -> None:
    """A rule, slots or optimizer that cannot mean anything is refused where it is written."""
    with refused(error, *facts):
        call()


@pytest.mark.parametrize("rule", [LoRA, jlora.DoRA])
def test_keywords_of_peft(rule: type) -> None:
    """Each says what to give; another keyword is Python's own error, and the signature stays."""
    for name, remedy in KEYWORDS_OF_PEFT.items():
        with refused(TypeError, name, rule.__name__, "PEFT's keywords", remedy):
            rule("w", **{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        rule("w", ranks=1)
    with refused(TypeError, "r", remedy="`lora_alpha` is `alpha`."):
        rule(r=8, lora_alpha=16)
    fields = [field.name for field in dataclasses.fields(rule)]
    assert list(inspect.signature(rule).parameters) == fields


# ------------------------------------------------------------------------ with their model


def started(change: Callable[..., Any]) -> Callable[[], Any]:
    """`init` by an initializer that gives something else than W, A and B."""

    def initializer(key: Any, w: Any, site: Any, rule: Any) -> Any:
        return change(*jlora.initializers.gaussian(key, w, site, rule))

    return lambda: init(LoRA("kernel", rank=2, init=initializer))


def table(p: Any, x: Any) -> Any:
    """A lookup and no product."""
    return p["table"][jnp.array([0, 1])]


HIGH, THIRD = LoRA("fused", rank=3, slots=Slots(3, (0, 2))), Slots(3, (0,), axis=1)
# What a rule matches, of why that does not do, and of the remedy.
UNFIT: dict[str, Any] = {
    "no rules": (lambda: init(), "`rules`", "is empty", "a jlora.LoRA() or a jlora.Full(pattern)"),
    "misspelled": (lambda: init(LoRA("layer/kernal", rank=2)), "kernal", "layer/kernel"),
    "no leaf": (
        lambda: init(LoRA("w", rank=2), apply=lambda p, x: x, params={}),
        *("LoRA('w')", "There is no leaf"),
    ),
    "after others": (
        lambda: init(LoRA("fused", rank=2), Full("layer"), Full("kernel|fused")),
        *("Full('kernel|fused')", "(LoRA('fused'), Full('layer'))", "reorder the rules"),
    ),
    "no site": (
        lambda: init(LoRA(rank=2), apply=table, params={"table": X}),
        *("LoRA()", "the model has none", "Name leaves by a pattern"),
    ),
    "a vector": (
        lambda: init(LoRA("layer", rank=2)), "'layer/bias'", "shape (6,)", "'layer/kernel'?"
    ),
    "unused": (lambda: init(LoRA("unused", rank=2)), "'unused'", "shape (3, 5)", "jlora.Full."),
    "integers": (lambda: init(LoRA("bucket", rank=2)), "'bucket'", "dtype int32", "Narrow"),
    "integers in full": (lambda: init(Full("bucket")), "'bucket'", "dtype int32", "Narrow"),
    "rank": (lambda: init(LoRA("kernel", rank=5)), "'layer/kernel'", "is 5", "Lower the rank"),
    "rank of slots": (lambda: init(HIGH), "'fused'", "is 3", "jlora.Full('fused')"),
    "slots": (lambda: init(LoRA("fused", rank=1, slots=Slots(4, (0,)))), "'fused'", "got 4."),
    "axis of slots": (lambda: init(LoRA("fused", rank=1, slots=THIRD)), "'fused'", "got 1."),
    "zeros": (lambda: init(LoRA("fused", rank=2, init=zeros)), "'fused'", "A zero", "draws A"),
    "A": (started(lambda w, a, b: (w, a.T, b)), "'layer/kernel'", "got (((4, 6), "),
    "dtype of A": (started(lambda w, a, b: (w, a.astype(int), b)), "'layer/kernel'", "'int32')"),
    "W": (started(lambda w, a, b: (w[:3], a, b)), "'layer/kernel'", "got (((3, 6), "),
    "dtype of W": (started(lambda w, a, b: (w.astype("f2"), a, b)), "'layer/kernel'", "float32"),
    "no B": (started(lambda w, a, b: (w, a)), "'layer/kernel'", "((4, 2), 'floating-point'))."),
    "no arrays": (started(lambda w, a, b: (w, [], [])), "'layer/kernel'", "(None, 'None'))."),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_rule(case: str) -> None:
    """A rule that would train nothing, or cannot apply to a leaf that it matches."""
    call, *facts = UNFIT[case]
    with refused(ValueError, "", *facts):
        call()


def test_added_position() -> None:
    """A position embedding that is added is no site; the line that adds it is named."""
    line = line_of(model, 'params["position"]')
    with refused(ValueError, "add", "'position'", f"{line} (model)", REMEDY):
        init(LoRA("position", rank=2))

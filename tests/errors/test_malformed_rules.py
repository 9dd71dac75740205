"""What cannot mean anything is refused where it is written: rules, slots, the optimizer."""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
import pytest
from small import each_refusal, exactly, model

import jlora
from jlora import Full, LoRA, Slots, checkpoint
from jlora._adapters._lora import KEYWORDS_OF_PEFT

NUMBERS = "must be a positive finite number"
PATTERN = "`pattern` of {} must be a regular expression as a string; got {!r} of type {}."
# A field of LoRA and what it must be, and values that it must not be.
INITIALIZER = "must be an initializer such as jlora.initializers.gaussian"
FIELDS: list[tuple[str, type[Exception], str, tuple[Any, ...]]] = [
    ("rank", ValueError, "must be an integer of at least 1", (0, -3, 8.0, math.inf, True, "8")),
    ("alpha", ValueError, NUMBERS, (math.nan, -math.inf, None, True, 0, -16.0, 10**400)),
    ("dropout", ValueError, "must lie in [0, 1)", (1.0, -0.1, math.nan)),
    ("dtype", TypeError, "must be a floating-point one", (jnp.int32, "float33")),
    ("slots", TypeError, "must be a jlora.Slots", (3,)),
    ("init", TypeError, INITIALIZER, ("gaussian",)),
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
ENDS = "starts or ends with `/`, but a pattern matches whole components of a path: write "
TX = "`tx` must be an optax transformation, such as optax.adamw(2e-4); got "
NO_PATTERN = "is not a regular expression: "
CALLED = [jlora.NF4, jlora.FP4, jlora.Int8, jlora.Int4, jlora.FP8, jlora.MXFP4]
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
        f"{COUNT}3.0.": lambda: Slots(3.0, (0,)),
        f"{DISTINCT}().": lambda: Slots(3, ()),
        f"{DISTINCT}(0, 2, 0).": lambda: Slots(3, (0, 2, 0)),
        "`chosen` of Slots must lie in [0, 3), the slots; got (0, 3).": lambda: Slots(3, (0, 3)),
        "`chosen` of Slots must lie in [0, 3), the slots; got (-1, 1).": lambda: Slots(3, (-1, 1)),
        **{
            f"`{name}` {NUMBERS}; got {x!r}.": (lambda f=f, x=x: f(x))
            for name, f in {"ratio": jlora.lora_plus, "damping": jlora.precondition}.items()
            for x in (0, -16.0, math.nan, math.inf, True, "16")
        },
    },
    TypeError: {
        PATTERN.format("Full", None, "NoneType"): lambda: Full(None),
        "`chosen` of Slots must be a tuple of integers; got (0, 1.0).": lambda: Slots(3, (0, 1.0)),
        "`chosen` of Slots must be a tuple of integers; got 0.": lambda: Slots(3, 0),
        "`axis` of Slots must be an integer; got 'out'.": lambda: Slots(3, (0,), axis="out"),
        "`axis` of Slots must be an integer; got 0.5.": lambda: Slots(3, (0,), axis=0.5),
        f"{TX}{optax.adamw!r}.": lambda: jlora.optimizer(optax.adamw),
        f"{TX}0.001.": lambda: jlora.optimizer(1e-3),
        "`apply_fn` must be a function of parameters; got one of type LoRA. Give it first: "
        "transform(model.apply, LoRA(...)).": lambda: jlora.transform(LoRA("w"), LoRA("w")),
        f"{RULES}a list; unpack it with `*`, transform(apply_fn, *rules).": (
            lambda: jlora.transform(model, [LoRA("w", rank=2)])
        ),
        f"{RULES}'kernel'.": lambda: jlora.transform(model, "kernel"),
        f"{RULES}the class LoRA; call it, LoRA(...).": lambda: jlora.transform(model, LoRA),
        f"{RULES}{jlora.NF4()!r}.": lambda: jlora.transform(model, jlora.NF4()),
        f"{SCHEMES}a list; unpack it with `*`, quantize(params, *schemes).": (
            lambda: jlora.quantize({}, [jlora.NF4()])
        ),
        "`scheme` of loftq must be one such as jlora.NF4(); got the class Int8; call it, "
        "Int8(...).": lambda: jlora.initializers.loftq(jlora.Int8),
        f"{RULES}the class Full; call it, Full(...).": (
            lambda: checkpoint.save("nowhere", {"w": jnp.ones((2, 2))}, [Full])
        ),
        "LoRA does not have the keywords of PEFT: `r` is `rank`; `lora_alpha` is `alpha`; "
        "`target_modules` is `pattern`, a regular expression for paths, such as "
        "'(query|value)/kernel'.": (
            lambda: LoRA(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        ),
        **{
            f"{SCHEMES}the class {x.__name__}; call it, {x.__name__}(...).": (
                lambda x=x: jlora.quantize({}, x)
            )
            for x in CALLED
        },
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
        message = f"{rule.__name__} does not have the keywords of PEFT: `{name}` is {remedy}."
        with pytest.raises(TypeError, match=exactly(message)):
            rule("w", **{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        rule("w", ranks=1)
    fields = [field.name for field in dataclasses.fields(rule)]
    assert list(inspect.signature(rule).parameters) == fields

"""What cannot mean anything is refused where it is written: rules, slots, the optimizer."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
from small import exactly, model

import jlora
from jlora import Full, LoRA, Slots, checkpoint
from jlora._adapters import _keywords

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
        lambda: Full("encoder/"),
        ValueError,
        "`pattern` 'encoder/' of Full starts or ends with `/`, but a pattern matches whole "
        "components of a path: write 'encoder'.",
        id="pattern-slash-at-the-end",
    ),
    pytest.param(
        lambda: jlora.DoRA("/(q|v)/kernel"),
        ValueError,
        "`pattern` '/(q|v)/kernel' of DoRA starts or ends with `/`, but a pattern matches whole "
        "components of a path: write '(q|v)/kernel'.",
        id="pattern-slash-at-the-start",
    ),
    pytest.param(
        lambda: LoRA("head(?i)"),
        ValueError,
        "`pattern` 'head(?i)' is not a regular expression: "
        "global flags not at the start of the expression at position 4.",
        id="pattern-flags-at-the-end",
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
        "`rules` must be rules, such as jlora.LoRA(); got a list; unpack it with `*`, "
        "transform(apply_fn, *rules).",
        id="rules-list",
    ),
    pytest.param(
        lambda: jlora.transform(model, "kernel"),
        TypeError,
        "`rules` must be rules, such as jlora.LoRA(); got 'kernel'.",
        id="rules-string",
    ),
    pytest.param(
        lambda: jlora.transform(model, LoRA),
        TypeError,
        "`rules` must be rules, such as jlora.LoRA(); got the class LoRA; call it, LoRA(...).",
        id="rules-class",
    ),
    pytest.param(
        lambda: jlora.transform(model, jlora.NF4()),
        TypeError,
        f"`rules` must be rules, such as jlora.LoRA(); got {jlora.NF4()!r}.",
        id="rules-scheme",
    ),
    pytest.param(
        lambda: jlora.quantize({}, jlora.NF4),
        TypeError,
        "`schemes` must be jlora.NF4, jlora.FP4, jlora.Int8, jlora.Int4, jlora.FP8 or jlora.MXFP4; "
        "got the class NF4; call it, NF4(...).",
        id="schemes-class",
    ),
    pytest.param(
        lambda: jlora.quantize({}, [jlora.NF4()]),
        TypeError,
        "`schemes` must be jlora.NF4, jlora.FP4, jlora.Int8, jlora.Int4, jlora.FP8 or jlora.MXFP4; "
        "got a list; unpack it with `*`, quantize(params, *schemes).",
        id="schemes-list",
    ),
    pytest.param(
        lambda: jlora.initializers.loftq(jlora.Int8),
        TypeError,
        "`scheme` of loftq must be one such as jlora.NF4(); got the class Int8; call it, "
        "Int8(...).",
        id="loftq-class",
    ),
    pytest.param(
        lambda: checkpoint.save("nowhere", {"w": jnp.ones((2, 2))}, [Full]),
        TypeError,
        "`rules` must be rules, such as jlora.LoRA(); got the class Full; call it, Full(...).",
        id="checkpoint-class",
    ),
    pytest.param(
        lambda: LoRA(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        TypeError,
        "LoRA does not have the keywords of PEFT: `r` is `rank`; `lora_alpha` is `alpha`; "
        "`target_modules` is `pattern`, a regular expression for paths, such as "
        "'(query|value)/kernel'.",
        id="keywords-of-peft",
    ),
    pytest.param(
        lambda: jlora.DoRA("w", use_dora=True, modules_to_save=["head"]),
        TypeError,
        "DoRA does not have the keywords of PEFT: `use_dora` is jlora.DoRA in the place of LoRA; "
        "`modules_to_save` is a rule of its own, jlora.Full(pattern).",
        id="keywords-of-peft-dora",
    ),
    pytest.param(
        lambda: jlora.lora_plus(0),
        ValueError,
        "`ratio` must be a positive finite number; got 0.",
        id="lora-plus-zero",
    ),
    pytest.param(
        lambda: jlora.lora_plus(-16.0),
        ValueError,
        "`ratio` must be a positive finite number; got -16.0.",
        id="lora-plus-negative",
    ),
    pytest.param(
        lambda: jlora.lora_plus(float("nan")),
        ValueError,
        "`ratio` must be a positive finite number; got nan.",
        id="lora-plus-nan",
    ),
    pytest.param(
        lambda: jlora.lora_plus(float("inf")),
        ValueError,
        "`ratio` must be a positive finite number; got inf.",
        id="lora-plus-infinite",
    ),
]


@pytest.mark.parametrize(("provoke", "error", "message"), MALFORMED)
def test_malformed_rule(provoke: Callable[[], Any], error: type[Exception], message: str) -> None:
    """A rule, slots or optimizer that cannot mean anything is refused where it is written."""
    with pytest.raises(error, match=exactly(message)):
        provoke()


@pytest.mark.parametrize("flag", ["materialize", "rslora"])
def test_flag_that_is_a_string(flag: str) -> None:
    """`"false"` from a configuration file is not False."""
    with pytest.raises(TypeError, match=f"`{flag}` of"):
        LoRA("w", **{flag: "false"})


def test_lora_plus_bool() -> None:
    """`lora_plus(True)` does not mean a ratio of 1."""
    with pytest.raises(ValueError, match=re.escape("`ratio` must be a positive")):
        jlora.lora_plus(True)


@pytest.mark.parametrize("rule", [LoRA, jlora.DoRA])
def test_keywords_of_peft(rule: type) -> None:
    """Each says what to give; another keyword is Python's own error, and the signature stays."""
    for name, remedy in _keywords.PEFT.items():
        message = f"{rule.__name__} does not have the keywords of PEFT: `{name}` is {remedy}."
        with pytest.raises(TypeError, match=exactly(message)):
            rule("w", **{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        rule("w", ranks=1)
    fields = [field.name for field in dataclasses.fields(rule)]
    assert list(inspect.signature(rule).parameters) == fields


@pytest.mark.parametrize("scheme", ["NF4", "FP4", "Int8", "Int4", "FP8", "MXFP4"])
def test_class_of_a_scheme(scheme: str) -> None:
    """Every scheme is called."""
    with pytest.raises(TypeError, match=rf"got the class {scheme}; call it, {scheme}\(\.\.\.\)"):
        jlora.quantize({}, getattr(jlora, scheme))

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
from messages import all_refused, refused
from small import REMEDY, SQUARE, W, X, dense, init, line_of, model

import jlora
from jlora import Full, LoRA, Slots, checkpoint, initializers
from jlora._adapters._lora import KEYWORDS_OF_PEFT

# Values that a field of LoRA must not have.
UNCALLED = (initializers.loftq, initializers.eva, normal, lecun_normal, max)
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


MALFORMED: dict[type[Exception], dict[str, Callable[[], Any]]] = {
    ValueError: {
        "`pattern` ... '(query' ... at position 0": lambda: LoRA("(query"),
        "`pattern` ... '*kernel' ... at position 0": lambda: Full("*kernel"),
        "`pattern` ... 'head(?i)' ... at position 4": lambda: LoRA("head(?i)"),
        "`rules` ... LoRA(), DoRA() ... only one": lambda: jlora.transform(
            model, LoRA(), Full("head"), jlora.DoRA()
        ),
        "`pattern` ... Full ... 'encoder/' ... 'encoder'.": lambda: Full("encoder/"),
        "`pattern` ... DoRA ... '/(q ... '(q|v)/w'.": lambda: jlora.DoRA("/(q|v)/w"),
        "`count` ... got 0.": lambda: Slots(0, (0,)),
        "`chosen` ... got (0, 2, 0).": lambda: Slots(3, (0, 2, 0)),
        "`chosen` ... [0, 3) ... got (-1, 1).": lambda: Slots(3, (-1, 1)),
        **{
            f"`{name}` ... got {x!r}.": lambda f=f, x=x: f(x)
            for name, f in {"ratio": jlora.lora_plus, "damping": jlora.precondition}.items()
            for x in (0, math.nan, True, "16")
        },
    },
    TypeError: {
        "`chosen` ... got (0, 1.0).": lambda: Slots(3, (0, 1.0)),
        "`chosen` ... got 0.": lambda: Slots(3, 0),
        "`axis` ... got 0.5.": lambda: Slots(3, (0,), axis=0.5),
        "`tx` ... got <function adamw at": lambda: jlora.optimizer(optax.adamw),
        "`apply_fn` ... of type LoRA ... transform(model.apply, LoRA(...))": lambda: (
            jlora.transform(LoRA("w"), LoRA("w"))
        ),
        "`rules` ... a list ... unpack it": lambda: jlora.transform(model, [LoRA("w")]),
        "`rules` ... got 'kernel'.": lambda: jlora.transform(model, "kernel"),
        "`rules` ... class LoRA ... LoRA(...)": lambda: jlora.transform(model, LoRA),
        "`rules` ... got NF4(": lambda: jlora.transform(model, jlora.NF4()),
        "`schemes` ... a list ... unpack it": lambda: jlora.quantize({}, [jlora.NF4()]),
        "`scheme` ... loftq ... class Int8 ... Int8(...)": lambda: initializers.loftq(jlora.Int8),
        "`rules` ... a Transformed ... lora.rules": lambda: checkpoint.save(
            "/nowhere", {"w": jnp.ones((2, 2))}, jlora.transform(model)
        ),
        "`rules` ... class Full ... Full(...)": lambda: checkpoint.save(
            "nowhere", {"w": jnp.ones((2, 2))}, [Full]
        ),
        "`schemes` ... class FP8 ... FP8(...)": lambda: jlora.quantize({}, jlora.FP8),
    },
}


# A rule, slots or optimizer that cannot mean anything is refused where it is written.
test_malformed_rule = all_refused(MALFORMED)


@pytest.mark.parametrize("rule", [LoRA, jlora.DoRA])
def test_keywords_of_peft(rule: type) -> None:
    """Each says what to give; another keyword is Python's own error, and the signature stays."""
    for name, remedy in KEYWORDS_OF_PEFT.items():
        with refused(TypeError, name, rule.__name__, "PEFT's keywords", remedy):
            rule("w", **{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        rule("w", ranks=1)
    with refused(TypeError, "r", "`lora_alpha` is `alpha`."):
        rule(r=8, lora_alpha=16)
    fields = [field.name for field in dataclasses.fields(rule)]
    assert list(inspect.signature(rule).parameters) == fields


# ------------------------------------------------------------------------ with their model


def constant(p: Any, x: Any) -> Any:
    """Uses a weight only where it gets no gradient."""
    return x @ lax.stop_gradient(p["w"])


def started(change: Callable[..., Any]) -> Callable[[], Any]:
    """`init` by an initializer that gives something else than W, A and B."""

    def initializer(key: Any, w: Any, site: Any, rule: Any) -> Any:
        return change(*jlora.initializers.gaussian(key, w, site, rule))

    return lambda: init(LoRA("kernel", rank=2, init=initializer))


def table(p: Any, x: Any) -> Any:
    """A lookup and no product."""
    return p["table"][jnp.array([0, 1])]


HIGH, THIRD = LoRA("fused", rank=3, slots=Slots(3, (0, 2))), Slots(3, (0,), axis=1)
UNFIT: dict[str, Callable[[], Any]] = {
    "`rules` ... is empty ... a jlora.LoRA() or a jlora.Full(pattern)": lambda: init(),
    "LoRA('layer/kernal') ... layer/kernel": lambda: init(LoRA("layer/kernal", rank=2)),
    "LoRA('w') ... There is no leaf": lambda: init(
        LoRA("w", rank=2), apply=lambda p, x: x, params={}
    ),
    "Full('kernel|fused') ... (LoRA('fused'), Full('layer')) ... reorder or narrow": lambda: init(
        LoRA("fused", rank=2), Full("layer"), Full("kernel|fused")
    ),
    "LoRA() ... (Full('.*')) ... without a pattern come last": lambda: init(
        LoRA(rank=2), Full(".*"), apply=dense, params=W
    ),
    "LoRA() ... the model has none ... Name leaves by a pattern": lambda: init(
        LoRA(rank=2), apply=table, params={"table": X}
    ),
    "'layer/bias' ... shape (6,) ... such as 'layer/kernel'": lambda: init(LoRA("layer", rank=2)),
    "'unused' ... shape (3, 5) ... a call that uses it": lambda: init(LoRA("unused", rank=2)),
    "LoRA('w') ... behind stop_gradient, ... a call that uses it": lambda: init(
        LoRA("w", rank=2), apply=constant, params=SQUARE
    ),
    "Full('w') ... no gradient ... a call that uses it": lambda: init(
        Full("w"), apply=constant, params=SQUARE
    ),
    "LoRA('bucket') ... int32 ... Narrow": lambda: init(LoRA("bucket", rank=2)),
    "Full('bucket') ... int32 ... Narrow": lambda: init(Full("bucket")),
    "`rank` ... 'layer/kernel' ... is 5 ... Lower the rank": lambda: init(LoRA("kernel", rank=5)),
    "`rank` ... 'fused' ... is 3 ... jlora.Full('fused')": lambda: init(HIGH),
    "`count` ... 'fused' ... got 4.": lambda: init(LoRA("fused", rank=1, slots=Slots(4, (0,)))),
    "`axis` ... 'fused' ... got 1.": lambda: init(LoRA("fused", rank=1, slots=THIRD)),
    "`init` ... 'fused' ... draws A": lambda: init(LoRA("fused", rank=2, init=zeros)),
    "`init` ... 'layer/kernel' ... ((2, 4), ": started(lambda w, a, b: (w, a.T, b)),
    "`init` ... 'layer/kernel' ... 'int32')": started(lambda w, a, b: (w, a.astype(int), b)),
    "`init` ... 'layer/kernel' ... got (((3, 6), ": started(lambda w, a, b: (w[:3], a, b)),
    "`init` ... W's dtype float32": started(lambda w, a, b: (w.astype(jnp.float16), a, b)),
    "`init` ... ((4, 2), 'floating-point')).": started(lambda w, a, b: (w, a)),
    "`init` ... (None, 'None')).": started(lambda w, a, b: (w, [], [])),
}


# A rule that would train nothing, or cannot apply to a leaf that it matches.
test_unfit_rule = all_refused({ValueError: UNFIT})


def test_added_position() -> None:
    """A position embedding that is added is no site; the line that adds it is named."""
    line = line_of(model, 'params["position"]')
    with refused(NotImplementedError, "add", "'position'", f"{line} (model)", REMEDY):
        init(LoRA("position", rank=2))

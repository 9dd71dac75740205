"""Rules that do not fit the model: that match nothing, take nothing, or cannot apply to a leaf."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
from small import (
    REMEDY,
    X,
    each_refusal,
    exactly,
    init,
    line_of,
    model,
)

import jlora
from jlora import Full, LoRA, Slots

IN_FULL = "Narrow the pattern, or train the leaf in full with jlora.Full."


def bad_start(*given: str) -> str:
    return (
        "`init` of LoRA('kernel') must give W, A and B for 'layer/kernel', floating-point, of "
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
    "`rules` is empty, so that nothing would be trained. "
    "Give transform(apply_fn, ...) a jlora.LoRA() or a jlora.Full(pattern).": lambda: init(),
    "LoRA('layer/kernal') matches no leaf of `params`. "
    "Near misses: layer/kernel, vocabulary, fused.": lambda: init(LoRA("layer/kernal", rank=2)),
    "LoRA('w') matches no leaf of `params`. There is no leaf to match.": lambda: init(
        LoRA("w", rank=2), apply=lambda p, x: x, params={}
    ),
    "Full('kernel|fused') is left with no leaf: earlier rules take all 2 that it matches "
    "(LoRA('fused'), Full('layer')). The first match wins; reorder the rules or drop this one.": (
        lambda: init(LoRA("fused", rank=2), Full("layer"), Full("kernel|fused"))
    ),
    "LoRA() without a pattern adapts every dense and conv site, but the model has none. "
    "Name leaves by a pattern; print(transform(apply_fn).sites(...)) lists the sites.": lambda: (
        init(LoRA(rank=2), apply=lambda p, x: p["table"][jnp.array([0, 1])], params={"table": X})
    ),
    "LoRA('layer') matches 'layer/bias' of shape (6,), which is used by nothing linear: it is "
    "no matrix (shape (6,)). Narrow the pattern (did you mean 'layer/kernel'?), or train the "
    "leaf in full with jlora.Full.": lambda: init(LoRA("layer", rank=2)),
    "LoRA('unused') matches 'unused' of shape (3, 5), which is used by nothing linear: "
    f"it is not used by the traced call. {IN_FULL}": lambda: init(LoRA("unused", rank=2)),
    "LoRA('bucket') matches 'bucket' of shape (3, 3), which is used by nothing linear: "
    "it is not floating-point (int32). Narrow the pattern.": lambda: init(LoRA("bucket", rank=2)),
    "Full('bucket') matches 'bucket' of dtype int32, which cannot be trained. "
    "Narrow the pattern to floating-point leaves.": lambda: init(Full("bucket")),
    "`rank` of LoRA('kernel') is 5, above min(inputs, outputs) = 4 of 'layer/kernel' with "
    "shape (4, 6). Lower the rank, or put a rule of its own for this leaf first, such as "
    "jlora.Full('layer/kernel').": lambda: init(LoRA("kernel", rank=5)),
    "`rank` of LoRA('fused') is 3, above min(inputs, outputs) = 2 of 'fused' with shape "
    "(6, 6). Lower the rank, or put a rule of its own for this leaf first, such as "
    "jlora.Full('fused').": lambda: init(LoRA("fused", rank=3, slots=Slots(3, (0, 2)))),
    "`count` of Slots is 4, which does not divide the 6 outputs of 'fused' with shape (6, 6).": (
        lambda: init(LoRA("fused", rank=1, slots=Slots(4, (0,))))
    ),
    "`axis` of Slots is 1, but 'fused' has 1 output axes; it must lie in [0, 1).": lambda: init(
        LoRA("fused", rank=1, slots=Slots(3, (0,), axis=1))
    ),
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
        "LoRA('position') matches 'position' of shape (2, 6), which is used by nothing linear: "
        f"it is used only by `add` at {line} (model). {REMEDY}"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        init(LoRA("position", rank=2))

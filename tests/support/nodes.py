"""Nodes of low rank at sites of all kinds, and their ΔW in float64."""

import jax
import numpy as np
from small import as_jax

import jlora
from jlora._adapters import factor_shapes
from jlora.types import Layout, LowRank

PLAIN = Layout((), (0,), (1,))
# The shape of W and its layout.
SITES: dict[str, tuple[tuple[int, ...], Layout]] = {
    "plain": ((12, 9), PLAIN),
    "turned": ((12, 9), Layout((), (1,), (0,))),
    "stacked": ((3, 12, 9), Layout((0,), (1,), (2,))),
    "stacked in between": ((12, 3, 9), Layout((1,), (0,), (2,))),
    "heads": ((12, 3, 5), Layout((), (0,), (1, 2))),
    "conv": ((3, 4, 9), Layout((), (0, 1), (2,))),
    "experts": ((2, 3, 12, 9), Layout((0, 1), (2,), (3,))),
    "slots": ((12, 18), PLAIN._replace(slots=(3, (0, 2), 1))),
}


def draw(
    seed: int, shape: tuple[int, ...], layout: Layout, rank: int, scale: float = 1.0
) -> LowRank:
    """Random factors in float32."""
    rng = np.random.default_rng(seed)
    a, b = (np.float32(rng.standard_normal(x)) for x in factor_shapes(layout, shape, rank))
    return LowRank(as_jax(a), as_jax(b), scale, layout)


merge = jax.jit(jlora.merge)


def delta(node: LowRank, shape: tuple[int, ...]) -> np.ndarray:
    """ΔW in float64, by merging into zeros."""
    with jax.enable_x64(True):
        wide = node._replace(a=np.asarray(node.a, np.float64), b=np.asarray(node.b, np.float64))
        return np.asarray(merge({"w": np.zeros(shape)}, {"w": wide})["w"])


def matrices(w: np.ndarray, layout: Layout) -> np.ndarray:
    """A weight as (stack…, slots…, inputs, outputs), with an axis of slots if there are any."""
    stack, inputs, outputs, slots = layout
    w = np.asarray(w)
    parts = [w] if slots is None else np.split(w, slots[0], slots[2])
    n = [int(np.prod([parts[0].shape[d] for d in dims])) for dims in (inputs, outputs)]
    beside = [w.shape[d] for d in stack]
    each = [x.transpose(*stack, *inputs, *outputs).reshape(*beside, *n) for x in parts]
    return each[0] if slots is None else np.stack([each[i] for i in slots[1]], len(stack))

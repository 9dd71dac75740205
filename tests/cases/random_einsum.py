"""Strategies for hypothesis: random einsums of an activation and a stored weight.

A weight is made of *atoms*, the smallest axes, each of which is stacked, contracted or produced.
The leaf stores its atoms in a random order, some neighbors of one kind merged to one axis, some
axes longer than what is used of them. The model slices, reshapes and transposes the leaf to
the axes that the einsum names, each of one or two atoms. Axes are of length 1 to 4; there are at
least two inputs and two outputs, as the kinds of a single one do not survive a reshape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax
from jax.typing import DTypeLike

from ._case import Problem, normal

STACK, INPUT, OUTPUT, BATCH = "stack", "input", "output", "batch"


class Product(NamedTuple):
    """A problem of one leaf `w`, and what is to be found out about it.

    Attributes:
        problem: y = einsum(x, w) or einsum(w, x), of `params = {"w": w}`.
        stack: axes of the leaf over which it is a stack.
        inputs: axes of the leaf that are contracted.
        outputs: axes of the leaf that are produced.
        rank: a rank from 1 to min(inputs, outputs) of the leaf.
        unclear: axes of length 1. Once reshaped, these may be counted to any kind.
    """

    problem: Problem
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rank: int
    unclear: tuple[int, ...]


class Atom(NamedTuple):
    """A smallest axis: its kind, the letter that it is part of, its place therein, its length."""

    kind: str
    letter: str
    place: int
    length: int


class Cut(NamedTuple):
    """What is used of a stored axis: `length` entries from `start` on, every `stride`-th."""

    start: int
    length: int
    stride: int
    after: int

    @property
    def stored(self) -> int:
        """The length of the stored axis."""
        return self.start + (self.length - 1) * self.stride + 1 + self.after


@st.composite
def products(draw: st.DrawFn, dtype: DTypeLike = jnp.float32) -> Product:
    """Draws a product; arrays are of `dtype`."""
    names = iter("abcdefghijklmnopqrstuvwxyz")
    atoms: list[Atom] = []
    kinds: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for kind, least in ((STACK, 0), (INPUT, 1), (OUTPUT, 1), (BATCH, 0)):
        for i in range(draw(st.integers(least, 2))):
            letter = next(names)
            lengths = draw(_lengths(kind, 2 if i < least else 1))
            kinds[letter], sizes[letter] = kind, math.prod(lengths)
            if kind != BATCH:
                atoms += [Atom(kind, letter, i, n) for i, n in enumerate(lengths)]

    def letters(*wanted: str) -> str:
        return "".join(draw(st.permutations([c for c in kinds if kinds[c] in wanted])))

    x_axes, w_axes = letters(STACK, INPUT, BATCH), letters(STACK, INPUT, OUTPUT)
    y_axes = letters(STACK, OUTPUT, BATCH)
    weight_left = draw(st.booleans())
    spec = f"{w_axes},{x_axes}->{y_axes}" if weight_left else f"{x_axes},{w_axes}->{y_axes}"

    axes = draw(_stored(atoms))
    cuts = [draw(_cut(math.prod(atom.length for atom in axis))) for axis in axes]
    prepare = draw(_preparation(axes, cuts, w_axes, sizes))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        w = prepare(params["w"])
        return jnp.einsum(spec, *((w, x) if weight_left else (x, w)))

    shape = tuple(cut.stored for cut in cuts)
    layout = {
        kind: tuple(d for d, axis in enumerate(axes) if axis[0].kind == kind)
        for kind in (STACK, INPUT, OUTPUT)
    }
    unclear = tuple(d for d, length in enumerate(shape) if length == 1)
    limit = min(math.prod(shape[d] for d in layout[kind]) for kind in (INPUT, OUTPUT))
    problem = Problem(
        apply,
        {"w": normal("w", shape, dtype)},
        (normal("x", tuple(sizes[c] for c in x_axes), dtype),),
    )
    return Product(
        problem,
        layout[STACK],
        layout[INPUT],
        layout[OUTPUT],
        draw(st.integers(1, min(limit, 3))),
        unclear,
    )


def _lengths(kind: str, least: int) -> st.SearchStrategy[list[int]]:
    """The lengths of a letter's atoms: one from `least` to 4, or two of which one is 2."""
    one = st.lists(st.integers(least, 4), min_size=1, max_size=1)
    return one if kind == BATCH else one | st.sampled_from([[1, 2], [2, 1], [2, 2]])


@st.composite
def _stored(draw: st.DrawFn, atoms: Sequence[Atom]) -> list[list[Atom]]:
    """A random order of the atoms, in which some neighbors of one kind are merged."""
    axes: list[list[Atom]] = []
    for atom in draw(st.permutations(atoms)):
        if axes and axes[-1][0].kind == atom.kind and draw(st.booleans()):
            axes[-1].append(atom)
        else:
            axes.append([atom])
    return axes


@st.composite
def _cut(draw: st.DrawFn, length: int) -> Cut:
    """The whole axis, more often than not; always one of length 1: it is no stack."""
    if length == 1 or draw(st.integers(0, 3)):
        return Cut(0, length, 1, 0)
    start, stride, after = (draw(st.integers(low, 2)) for low in (0, 1, 0))
    return Cut(start, length, stride, after)


@st.composite
def _preparation(
    draw: st.DrawFn,
    axes: Sequence[Sequence[Atom]],
    cuts: Sequence[Cut],
    w_axes: str,
    sizes: dict[str, int],
) -> Any:
    """What the model does with the leaf before the einsum."""
    stored = [atom for axis in axes for atom in axis]
    used = sorted(stored, key=lambda atom: (w_axes.index(atom.letter), atom.place))
    dynamic = draw(st.booleans())
    factor = draw(st.sampled_from([1.0, 1.0, -1.0, 0.5]))
    flipped = draw(st.booleans())

    def prepare(w: jax.Array) -> jax.Array:
        for d, cut in enumerate(cuts):
            if cut.stored == cut.length:
                continue
            if dynamic and cut.stride == 1:
                w = lax.dynamic_slice_in_dim(w, jnp.int32(cut.start), cut.length, d)
            else:
                end = cut.start + (cut.length - 1) * cut.stride + 1
                w = lax.slice_in_dim(w, cut.start, end, cut.stride, d)
        # No operation where there is nothing to do, as a model's author would have it.
        if any(len(axis) > 1 for axis in axes):
            w = w.reshape([atom.length for atom in stored])
        if used != stored:
            w = jnp.transpose(w, [stored.index(atom) for atom in used])
        if len(w_axes) != len(used):
            w = w.reshape([sizes[letter] for letter in w_axes])
        if flipped:
            w = jnp.flip(w, 0)
        return w if factor == 1 else w * jnp.asarray(factor, w.dtype)

    return prepare

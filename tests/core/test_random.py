"""The laws over random products: random axes, orders, slices, reshapes and transposes of W.

A weight is made of *atoms*, the smallest axes, each of which is stacked, contracted or produced.
The leaf stores its atoms in a random order, some neighbors of one kind merged to one axis, some
axes longer than what is used of them. The model slices, reshapes and transposes the leaf to
the axes that the einsum names, each of one or two atoms. Axes are of length 1 to 4; there are at
least two inputs and two outputs, as the kinds of a single one do not survive a reshape.
"""

import math
import random
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases._case import normal
from jax import lax
from laws import assert_close, randomize, start, value_and_slope

import jlora

STACK, INPUT, OUTPUT, BATCH = range(4)


def product(seed: int) -> tuple[Any, jax.Array, jax.Array, list[int]]:
    """An einsum of `params["w"]` and x, both arrays, and the kinds of the leaf's axes."""
    rng, letters = random.Random(seed), iter("abcdefgh")
    atoms: list[tuple[int, str, int, int]] = []  # kind, letter, place therein, length
    kinds, sizes = {}, {}
    for kind, least in ((STACK, 0), (INPUT, 1), (OUTPUT, 1), (BATCH, 0)):
        for i in range(rng.randint(least, 2)):
            letter, one = next(letters), [rng.randint(2 if i < least else 1, 4)]
            parts = one if kind == BATCH else rng.choice([one, one, one, [1, 2], [2, 1], [2, 2]])
            kinds[letter], sizes[letter] = kind, math.prod(parts)
            atoms += [(kind, letter, j, n) for j, n in enumerate(parts) if kind != BATCH]

    def axes_of(*wanted: int) -> str:
        found = [c for c in kinds if kinds[c] in wanted]
        return "".join(rng.sample(found, len(found)))

    of_x, of_w = axes_of(STACK, INPUT, BATCH), axes_of(STACK, INPUT, OUTPUT)
    of_y, is_left = axes_of(STACK, OUTPUT, BATCH), rng.random() < 0.5
    spec = f"{of_w},{of_x}->{of_y}" if is_left else f"{of_x},{of_w}->{of_y}"
    rng.shuffle(atoms)
    axes: list[list[Any]] = []
    for atom in atoms:
        if axes and axes[-1][0][0] == atom[0] and rng.random() < 0.5:
            axes[-1].append(atom)
        else:
            axes.append([atom])
    cuts = []  # of each axis what is used: start, length and stride; and how long it is
    for axis in axes:
        length, (start, stride, after) = math.prod(n for *_, n in axis), (0, 1, 0)
        if length > 1 and rng.random() < 0.25:
            start, stride, after = (rng.randint(low, 2) for low in (0, 1, 0))
        cuts.append((start, length, stride, start + (length - 1) * stride + 1 + after))
    order = sorted(atoms, key=lambda atom: (of_w.index(atom[1]), atom[2]))
    is_dynamic, is_flipped = rng.random() < 0.5, rng.random() < 0.5
    factor = rng.choice([1.0, 1.0, -1.0, 0.5])

    def apply(params: Any, x: jax.Array) -> jax.Array:
        w = params["w"]
        for d, (start, length, stride, stored) in enumerate(cuts):
            if stored > length and is_dynamic and stride == 1:
                w = lax.dynamic_slice_in_dim(w, jnp.int32(start), length, d)
            elif stored > length:
                w = lax.slice_in_dim(w, start, start + (length - 1) * stride + 1, stride, d)
        # No operation where there is nothing to do, as a model's author would have it.
        if len(axes) < len(atoms):
            w = w.reshape([atom[3] for atom in atoms])
        if order != atoms:
            w = w.transpose([atoms.index(atom) for atom in order])
        if len(of_w) < len(order):
            w = w.reshape([sizes[c] for c in of_w])
        w = jnp.flip(w, 0) if is_flipped else w
        w = w if factor == 1 else w * factor
        return jnp.einsum(spec, *((w, x) if is_left else (x, w)))

    w = normal("w", tuple(stored for *_, stored in cuts), jnp.float64)
    return (
        apply,
        w,
        normal("x", tuple(sizes[c] for c in of_x), jnp.float64),
        [a[0][0] for a in axes],
    )


@pytest.fixture(autouse=True)
def float64():
    """As of many seeds, some magnify what float32 rounds."""
    with jax.enable_x64(True):
        yield


FRESH = random.SystemRandom().randrange(10**9)
SEEDS = [range(2), pytest.param(range(FRESH, FRESH + 500), marks=pytest.mark.slow)]


@pytest.mark.parametrize("seeds", SEEDS, ids=["daily", "fresh"])
def test_random_products(seeds: range) -> None:
    """The layout is the expected one but for axes of length 1, and adapted is merged."""
    for seed in seeds:
        apply, w, x, kinds = product(seed)
        params, law = {"w": w}, f"seed {seed}: adapted is merged"
        [layout] = [s.layout for s in jlora.transform(apply).sites(params, x)]
        for kind, found in enumerate(layout[:3]):
            expected = [d for d, k in enumerate(kinds) if k == kind]
            assert {d for d in found if w.shape[d] > 1} == {d for d in expected if w.shape[d] > 1}
        rank = min(
            1 + seed % 3, *(math.prod(w.shape[d] for d in layout[kind]) for kind in (INPUT, OUTPUT))
        )
        lora = jlora.transform(apply, jlora.LoRA("w", rank=rank, alpha=2, init=start))
        base, adapter = lora.init(jax.random.key(0), params, x)
        adapted = value_and_slope(lambda a: lora.apply(base, a, x))  # noqa: B023
        merged = value_and_slope(lambda a: apply(jlora.merge(base, a), x))  # noqa: B023
        both = jax.jit(lambda a: (adapted(a), merged(a)))  # noqa: B023
        assert_close(*both(randomize(adapter)), 1e-10, law)

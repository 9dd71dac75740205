"""An entry of the tables, and what the builders of its problems share."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from small import as_jax

from jlora import LoRA

LORA = LoRA(rank=2, alpha=4)  # all-linear


class Problem(NamedTuple):
    """A model, its parameters and one call: `apply(params, *args, **kwargs)`."""

    apply: Callable[..., Any]
    params: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - never written to


@dataclass(frozen=True)
class Case:
    """A model that the transform must get exactly right.

    Attributes:
        name: Unique; the pytest id.
        subject: What is difficult about it.
        trainable: Expected number of trainable parameters: size(A) + size(B) of every site, and
            the size of every leaf that is trained in full.
        build: Float dtype to problem. Small and deterministic.
        rules: The jlora rules.
        sites: Expected number of low-rank leaves.
        float64: Whether the model computes in float64 when it is built so.
        tolerance: Relative tolerance of models that compute or store in a low precision.
        exact_at_zero: Whether the output at B = 0 is the base model's bit for bit. False where
            the base product is rearranged, or compiled together with the low-rank one.
        jit: Whether `args` may be traced. `kwargs` are never traced.
        grad: Whether the base model has a reverse-mode derivative.
        forward: Whether it has a forward-mode derivative, the transpose of that of reverse mode.
        twice: Whether its reverse-mode derivative has one itself.
        vmap: Whether the base model can be mapped over its parameters.
        strict: Whether the base model runs, in both float dtypes, under strict dtype promotion
            and with rank promotion as an error.
        leaks: Whether JAX finds leaked tracers in the base model itself, or fails in the search.
    """

    name: str
    subject: str
    trainable: int
    build: Callable[[DTypeLike], Problem] = field(repr=False)
    rules: tuple[Any, ...] = (LORA,)
    sites: int = 1
    float64: bool = True
    tolerance: float | None = None
    exact_at_zero: bool = True
    jit: bool = True
    grad: bool = True
    forward: bool = True
    twice: bool = True
    vmap: bool = True
    strict: bool = True
    leaks: bool = False


def entry(cases: list[Case], **defaults: Any) -> Callable[..., Any]:
    """The decorator that makes a function, from a dtype to a problem, an entry of `cases`."""

    def case(subject: str, trainable: int, name: str = "", **fields: Any) -> Callable[..., Case]:
        def decorate(build: Callable[[DTypeLike], Problem]) -> Case:
            given = defaults | fields
            cases.append(Case(name or build.__name__, subject, trainable, build, **given))
            return cases[-1]

        return decorate

    return case


def model(cases: list[Case], **defaults: Any) -> Callable[..., Any]:
    """The decorator that makes `apply(params, *args)` an entry of `cases`; see `case` below."""
    add = entry(cases, **defaults)

    def case(
        subject: str,
        trainable: int,
        params: dict[str, tuple[int, ...]] | tuple[int, ...],
        *args: Any,
        called: bool = False,
        name: str = "",
        **fields: Any,
    ) -> Callable[[Callable[..., Any]], Case]:
        """`params` is the shape of each, or that of one `w`; `args` are shapes or arrays.

        If it is `called`, its jitted helpers are traced with the base parameters before.
        """
        shapes = params if isinstance(params, dict) else {"w": params}

        def decorate(apply: Callable[..., Any]) -> Case:
            def build(dtype: DTypeLike) -> Problem:
                given = [
                    normal(n, x, dtype) if isinstance(x, tuple) else jnp.asarray(x)
                    for n, x in zip("xyz", args, strict=False)
                ]
                problem = Problem(apply, normals(dtype, **shapes), tuple(given))
                if called:
                    apply(problem.params, *given)
                return problem

            return add(subject, trainable, name or apply.__name__, **fields)(build)

        return decorate

    return case


def normal(name: str, shape: tuple[int, ...], dtype: DTypeLike, scale: float = 0.5) -> jax.Array:
    """Draws scale · N(0, 1), the same for the same name and shape in every version of JAX."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    return as_jax(scale * draw, dtype)


def normals(dtype: DTypeLike, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Draws one array per keyword, its value the shape."""
    return {name: normal(name, shape, dtype) for name, shape in shapes.items()}


def fill(tree: Any, dtype: DTypeLike, scale: float = 0.5) -> Any:
    """Replaces every float leaf by random numbers; shapes by arrays.

    Initial biases are zero and initial norm scales one: a test on them would hold trivially.
    Scales are drawn around one, and variances are positive, as gradients are inexact otherwise.
    """

    def leaf(path: tuple[Any, ...], x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return as_jax(np.zeros(x.shape, x.dtype)) if isinstance(x, jax.ShapeDtypeStruct) else x
        name = jax.tree_util.keystr(path)
        draw = np.asarray(normal(name, x.shape, dtype, scale))
        last = name.lower().rsplit("[", 1)[-1]
        if "var" in last:
            draw = draw**2 + 0.5
        return as_jax(draw + 1 if "scale" in last else draw, dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)

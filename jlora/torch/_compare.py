"""A module of PyTorch and its function of JAX, compared on the user's own batch."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .._types import PyTree
from ..peft import Name
from ._differences import Differences

if TYPE_CHECKING:
    import torch  # pyright: ignore[reportMissingImports]


def compare(
    model: "torch.nn.Module",  # pyright: ignore[reportAttributeAccessIssue]
    params: PyTree,
    apply: Callable[..., Any],
    *args: Any,
    rows: int | None = None,
    gradients: bool = True,
    adapter: PyTree | None = None,
    names: Sequence[Name] = (),
    **kwargs: Any,
) -> Differences:
    r"""Compares `apply` with the module itself, on your own batch. Call it before you train.

    PyTorch runs the module twice, with grad mode on: a function has one result, so the two must be
    equal. The first time it also computes the gradients of all parameters, for a random cotangent
    of the outputs. JAX compiles the same of `apply`. The module does not change: a copy runs, which
    shares its parameters. What comes after a difference is not compared.

    What differs in float32 is compared with what PyTorch computes in float64: an error is a
    difference if it is more than eight times that of PyTorch, and than 1e-4 of the largest entry.
    For gradients it is the largest error of all, as rounding beside a kink, such as that of ReLU,
    changes one gradient in PyTorch and another in JAX. Integers must be equal. Where PyTorch cannot
    compute in float64, the bound is 1e-3, or 8 units in the last place of 16 bits.

    It takes the time and the memory of two forward passes and a backward pass of PyTorch on the
    host, of which a line tells before they start. Another branch, for another batch, is not seen.

    Examples:
        >>> import jax.numpy as jnp, jlora, torch  # doctest: +SKIP
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())  # doctest: +SKIP
        >>> params, apply = jlora.torch.extract(net.eval())  # doctest: +SKIP
        >>> print(jlora.torch.compare(net, params, apply, jnp.ones((1, 4))))  # doctest: +SKIP
        `apply` computes what PyTorch does.

    Args:
        model: the module that `jlora.torch.extract` took, with values.
        params: its parameters.
        apply: the function that `extract` returned, or a `functools.partial` of it with keywords.
        *args: arguments of `apply`: your batch. Arrays of JAX are traced, and PyTorch gets their
            values.
        rows: takes so many rows of each array that has as many as the first; by default all.
        gradients: whether gradients are compared too; without them it takes half the time.
        adapter: an adapter of `params`, whose outputs are compared with PEFT's. Random numbers are
            added to its arrays, as those that were just made change nothing.
        names: the names with which its file is written, of `jlora.torch.names`.
        **kwargs: arguments of `apply` by name, and `method`.

    Returns:
        What differs; it is false if nothing does, and its text says what to look at.

    Raises:
        TypeError: if `apply` is no function of `extract`.
        ValueError: if `model` is on the meta device, or what `extract` refuses.
        ImportError: if there is an adapter, and PEFT is not installed.
    """
    from ._judge import Judge

    if isinstance(apply, functools.partial) and not apply.args:
        kwargs = apply.keywords | kwargs
        apply = apply.func
    judge = Judge(model, params, apply, (args, kwargs), rows)
    found, module = judge.compare(gradients, adapter, names)
    return Differences(tuple(found), module)

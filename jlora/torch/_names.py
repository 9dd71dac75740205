"""The names of leaves in PyTorch, by how the model uses them."""

import re
from typing import Protocol

from .._site import Site
from .._sites import Sites
from ..peft import Name


class Structure(Protocol):
    """What the uses of leaves do not tell; `apply` of `jlora.torch.extract` knows it."""

    tied: dict[str, tuple[str, ...]]
    transposed: frozenset[str]


def names(sites: Sites, apply: Structure | None = None) -> tuple[Name, ...]:
    r"""Makes the name table of a model of `jlora.torch.extract`: one row for each leaf.

    The path of a leaf is its name in PyTorch. How the model uses the leaf says what it is there:
    the weight of a linear module, of GPT-2's `Conv1D`, of an embedding or a convolution, or a
    parameter of experts. All other leaves have a row too, with their axes as they are.

    Args:
        sites: all sites of the model, `jlora.transform(apply).sites(params, …)`, with or without
            rules.
        apply: the function that `extract` returned. It knows which heads share the weight of an
            embedding, and how PEFT reads transposed experts. Without it, no head does.

    Returns:
        Rows for `jlora.peft.save`, `load`, `load_base` and all others that take `names`.

    Raises:
        ValueError: if the traced call does not use a matrix, so that nothing says what it is.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> def apply(params, x):
        ...     return x @ params["model"]["up_proj"]["weight"].T + params["model"]["up_proj"]["bias"]
        >>> params = {"model": {"up_proj": {"weight": jnp.ones((4, 3)), "bias": jnp.ones(4)}}}
        >>> for row in jlora.torch.names(jlora.transform(apply).sites(params, jnp.ones((1, 3)))):
        ...     print(row.module, row.axes, row.parameter)
        model.up_proj o bias
        model.up_proj oi weight
    """
    tied = {} if apply is None else apply.tied
    swapped = frozenset[str]() if apply is None else apply.transposed
    return tuple(_row(site, tied.get(site.path.replace("/", "."), ()), swapped) for site in sites.leaves)


def _row(site: Site, others: tuple[str, ...], swapped: frozenset[str]) -> Name:
    *parents, parameter = site.parts
    module = ".".join(parents)
    axes = _axes(site)
    is_transposed = axes.endswith("io")
    ...

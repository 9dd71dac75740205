"""The names of leaves in PyTorch, by how the model uses them."""

import re
from typing import NamedTuple, Protocol

from .._site import Site
from .._sites import Sites
from ..peft import Name


class Structure(NamedTuple):
    """What a module tells, and the uses of its parameters do not.

    Attributes:
        order: the names of parameters and saved buffers, in PyTorch's order.
        tied: the first name of each parameter that has several, with the others.
        adaptable: the modules that PEFT adapts as a whole.
        transposed: the modules with the attribute `is_transposed`, by which PEFT knows experts.
    """

    order: tuple[str, ...]
    tied: dict[str, tuple[str, ...]]
    adaptable: frozenset[str]
    transposed: frozenset[str]


class Structured(Protocol):
    """A function that knows the module of which it was made."""

    structure: Structure


def names(sites: Sites, apply: Structured | None = None) -> tuple[Name, ...]:
    r"""Makes the name table of a model in PyTorch: a row for each leaf, by how the model uses it.

    The path of a leaf is its name in PyTorch. Its use says what it is: the weight of a linear
    module, of GPT-2's `Conv1D`, of an embedding or a convolution, or a parameter of experts. The
    other leaves, such as norms, biases and position tables, have a row for `Full` and for
    checkpoints.

    Args:
        sites: `jlora.transform(apply).sites(params, …)`, with or without rules.
        apply: the function that `jlora.torch.extract` returned. It knows the order of the
            parameters, which heads share the weight of an embedding, and which modules PEFT can
            adapt: adapters elsewhere are then refused by `jlora.peft.save`. Without it, each weight
            counts as one of such a module, and no head as tied.

    Returns:
        Rows for `jlora.peft.save`, `load`, `load_base` and all others that take `names`.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> def apply(params, x):
        ...     return x @ params["up_proj"]["weight"].T + params["up_proj"]["bias"]
        >>> params = {"up_proj": {"weight": jnp.ones((4, 3)), "bias": jnp.ones(4)}}
        >>> for row in jlora.torch.names(jlora.transform(apply).sites(params, jnp.ones((1, 3)))):
        ...     print(row.module, row.parameter, row.axes)
        up_proj bias o
        up_proj weight oi
    """
    own = {".".join(site.parts): site for site in sites.leaves}
    if apply is None:
        modules = frozenset(name.rpartition(".")[0] for name in own)
        structure = Structure(tuple(own), {}, modules, frozenset())
    else:
        structure = apply.structure
    return tuple(_row(own[name], name, structure) for name in structure.order if name in own)


def _row(site: Site, name: str, structure: Structure) -> Name:
    module, _, parameter = name.rpartition(".")
    others = [x.removesuffix(".weight") for x in structure.tied.get(name, ())]
    axes = _axes(site)
    n = len(site.shape)
    is_whole = parameter == "weight" and module in structure.adaptable
    is_tied = "v" in axes and len(others) == 1
    if ("e" not in axes and not is_whole) or (others and not is_tied):
        axes = ""  # PEFT has no form for an adapter of it
    return Name(
        re.escape(site.path),
        module,
        axes or ("o" + "k" * (n - 1) if n else ""),
        parameter,
        transposed=axes.endswith("io"),
        tied=others[0] if is_tied else None,
        is_transposed="e" in axes and module in structure.transposed,
    )


def _axes(site: Site) -> str:
    """Returns the letters of a site's axes; an empty string if PEFT has no such weight."""
    stack, inputs, outputs, _ = site.layout
    n = len(site.shape)
    match (site.kind, len(stack), inputs, outputs):
        case ("embed", 0, (0,), (1,)):
            return "vo"
        case ("dense" | "conv", 0, _, (0,)):
            return "oi" + "k" * (n - 2)
        case ("dense", 0, (0,), (1,)):
            return "io"
        case ("dense", 1, (2,), (1,)) if stack == (0,):
            return "eoi"
        case ("dense", 1, (1,), (2,)) if stack == (0,):
            return "eio"
    return ""

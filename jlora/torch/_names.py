"""The names of leaves in PyTorch, by how the model uses them."""

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from .._errors import InputError
from .._site import Site
from .._sites import Sites
from ..peft import Name


class Stack(NamedTuple):
    """Layers of a `ModuleList` that one scan runs, a period of them in each step.

    Attributes:
        name: the list.
        start: the first layer; those before it run as they are.
        period: how many layers a step has.
        steps: how many steps there are; layers after the last one run as they are.
    """

    name: str
    start: int
    period: int
    steps: int

    @property
    def stop(self) -> int:
        """The first layer after the stack."""
        return self.start + self.period * self.steps

    def place(self, name: str) -> str | None:
        """Returns the name of the leaf that has a layer's tensor; None of what is in no layer."""
        inside = name.removeprefix(f"{self.name}.")
        number, _, rest = inside.partition(".")
        if inside == name or not self.start <= int(number) < self.stop:
            return None
        return f"{self.name}.{self.start + (int(number) - self.start) % self.period}.{rest}"

    def template(self, module: str) -> str:
        """Writes the name of a module of the first step as rows of names have it for all."""
        number, _, rest = module.removeprefix(f"{self.name}.").partition(".")
        return f"{self.name}.{{{self.period}*+{number}}}.{rest}".removesuffix(".")


class Structure(NamedTuple):
    """What a module tells, and the uses of its parameters do not.

    Attributes:
        order: the names of parameters and saved buffers, in PyTorch's order.
        tied: the first name of each parameter that has several, with the others.
        refused: why PEFT does not adapt a module as a whole, by module.
        bare: the refused modules whose `weight` PEFT adapts as a parameter, such as routers.
        transposed: the modules with the attribute `is_transposed`, by which PEFT knows experts.
        linear: the parameters that PEFT adapts for `target_modules="all-linear"`.
        stacks: the layers that one leaf holds.
    """

    order: tuple[str, ...]
    tied: dict[str, tuple[str, ...]]
    refused: dict[str, str]
    bare: frozenset[str]
    transposed: frozenset[str]
    linear: tuple[str, ...]
    stacks: tuple[Stack, ...] = ()

    def nest(self, prefix: str) -> "Structure":
        """Returns the structure with longer names, as of a model in another module."""

        def lengthen(name: str) -> str:
            return f"{prefix}{name}".removesuffix(".")

        return Structure(
            tuple(map(lengthen, self.order)),
            {lengthen(x): tuple(map(lengthen, others)) for x, others in self.tied.items()},
            {lengthen(x): why for x, why in self.refused.items()},
            frozenset(map(lengthen, self.bare)),
            frozenset(map(lengthen, self.transposed)),
            tuple(map(lengthen, self.linear)),
            tuple(stack._replace(name=lengthen(stack.name)) for stack in self.stacks),
        )

    def find_prefixes(self, names: Collection[str]) -> list[str]:
        """Finds the parts of a tree that are the model: what is there before the model's names."""
        leaves = list(dict.fromkeys(place(x, self.stacks) for x in self.order))
        if not leaves:
            return [""]
        starts = [x.removesuffix(leaves[0]) for x in names if f".{x}".endswith(f".{leaves[0]}")]
        return [x for x in starts if all(f"{x}{leaf}" in names for leaf in leaves)]


def place(name: str, stacks: Sequence[Stack]) -> str:
    """Returns the name of the leaf that has a tensor: that of the first step if layers are one."""
    return next(filter(None, (stack.place(name) for stack in stacks)), name)


UNKNOWN = Structure((), {}, {}, frozenset(), frozenset(), ())


@runtime_checkable
class Structured(Protocol):
    """A function that knows the module of which it was made."""

    structure: Structure


Extracted = Structured | functools.partial[Any]
NOT_EXTRACTED = "`apply` must be the function that jlora.torch.extract returned, or a partial of it"


def structure_of(apply: Extracted) -> Structure:
    """Returns what is known of the module; raises if the function was made of none."""
    function = apply.func if isinstance(apply, functools.partial) else apply
    if not isinstance(function, Structured):
        raise TypeError(f"{NOT_EXTRACTED}; got {type(function).__name__}.")
    return function.structure


class Subtree(NamedTuple):
    """A part of a tree that has the parameters of the model.

    Attributes:
        prefix: what is before its names.
        structure: that of the model, with the names of the whole tree.
    """

    prefix: str
    structure: Structure

    def is_called(self, name: str, site: Site) -> bool:
        """Whether each product with a weight is in a call of one of its modules."""
        others = self.structure.tied.get(name, ())
        owners = {x.removeprefix(self.prefix).rpartition(".")[0] for x in (name, *others)}
        scopes = (set(re.split(r"[/()]", x)) for x in site.scopes)
        return all(not x.isdisjoint(map(name_scope, owners)) for x in scopes)


def name_scope(module: str) -> str:
    """Names the scope of JAX in which the calls of a module run."""
    return f"torch:{module}"


def names(sites: Sites, apply: Extracted | None = None) -> tuple[Name, ...]:
    r"""Makes the name table of a model in PyTorch: a row for each leaf, by how the model uses it.

    The path of a leaf is its name in PyTorch, also in a larger tree: if the parameters of the model
    are at `model` and those of a head at `score`, the names are those of a module that has the
    model as `model` and the head as `score`. The use of a leaf says what it is: the weight of a
    linear module, of GPT-2's `Conv1D`, of an embedding or a convolution, or a parameter of experts.
    The other leaves, such as norms, biases and position tables, have a row for `Full` and for
    checkpoints.

    Args:
        sites: `jlora.transform(apply).sites(params, …)`, with or without rules; or those of a
            function that calls `apply` with a part of its parameters.
        apply: the function that `jlora.torch.extract` returned, or a `functools.partial` of it. It
            knows the order of the parameters, which heads share the weight of an embedding, and
            which modules PEFT adapts. `sites` knows which modules the model calls: adapters
            elsewhere are refused, by `jlora.peft.check_sites` before training and by `save`.
            Without `apply`, each weight counts as one of a module that is called, and no head as
            tied.

    Returns:
        Rows for `jlora.peft.save`, `load`, `load_base` and all others that take `names`.

    Raises:
        TypeError: if `apply` is no function of `extract`.
        ValueError: if no part of `sites` has the leaves of `apply`: `sites` is of another function.

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
    rows = dict[str, Name]()
    for part in () if apply is None else find_parts(structure_of(apply), own):
        for name in filter(own.__contains__, part.structure.order):
            is_called = part.is_called(name, own[name])
            rows[name] = _row(own[name], name, part.structure, is_called)
    others = {x: _row(site, x, UNKNOWN, True) for x, site in own.items() if x not in rows}
    return (*rows.values(), *others.values())


def find_parts(structure: Structure, own: Mapping[str, Site]) -> list[Subtree]:
    """Finds the parts of a tree that are the model; raises if there is none."""
    prefixes = structure.find_prefixes(own)
    if not prefixes:
        raise InputError(
            "apply",
            f"is of a model with a leaf {structure.order[0]!r} and others, and no part of "
            f"`sites` has them all: its first leaf is {next(iter(own), None)!r}.",
            remedy="Give the function of which `sites` was made.",
        )
    return [Subtree(x, structure.nest(x)) for x in prefixes]


def _row(site: Site, name: str, structure: Structure, is_called: bool) -> Name:
    module, _, parameter = name.rpartition(".")
    others = [x.removesuffix(".weight") for x in structure.tied.get(name, ())]
    stack = next((x for x in structure.stacks if x.place(name)), None)
    axes = _axes(site, layers=stack is not None)
    n = len(site.shape) - (stack is not None)
    is_tied = "v" in axes and len(others) == 1
    is_bare = axes == "oi" and parameter == "weight" and module in structure.bare
    refused = ""
    if site.kind:
        refused = _explain(name, axes, [] if is_tied else others, structure, is_bare, is_called)
    if is_bare:  # PEFT adapts it as a parameter: here of the module around its own
        module, _, last = module.rpartition(".")
        parameter = f"{last}.{parameter}"
    return Name(
        re.escape(site.path),
        module if stack is None else stack.template(module),
        "l" * (stack is not None) + (axes or ("o" + "k" * (n - 1) if n else "")),
        parameter,
        transposed=axes.endswith("io"),
        tied=others[0] if is_tied else None,
        is_transposed="e" in axes and module in structure.transposed,
        refused=refused,
    )


def _explain(
    name: str, axes: str, others: list[str], structure: Structure, is_bare: bool, is_called: bool
) -> str:
    """Explains why PEFT has no form for an adapter of a weight; empty if it has one."""
    module, _, parameter = name.rpartition(".")
    if others:
        verb = "shares" if len(others) == 1 else "share"
        return f"{', '.join(others)} {verb} it, and PEFT would change one of them"
    if not module:
        return "it is a parameter of the model itself, and PEFT changes modules in it"
    if not is_called:
        return "the model reads it without calling its module, where PEFT's adapter would act"
    if "e" in axes or is_bare:
        return ""
    kind = structure.refused.get(module)
    if parameter != "weight":
        return f"it is no `weight`, but a parameter of {kind or module}"
    if kind:
        return f"its module is {kind}"
    return "" if axes else "the model uses it otherwise than the modules that PEFT adapts"


def _axes(site: Site, layers: bool) -> str:
    """Returns the letters of a site's axes; an empty string if PEFT has no such weight.

    Of a leaf with several `layers`, those of one.
    """
    stack, inputs, outputs = (tuple(d - layers for d in axes) for axes in site.layout[:3])
    stack = stack[layers:]
    n = len(site.shape) - layers
    match (site.kind, len(stack), inputs, outputs):
        case ("embed", 0, (0,), (1,)) if not layers:
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

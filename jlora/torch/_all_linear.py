"""The pattern of what PEFT adapts as all-linear."""

import functools
import re
from collections.abc import Mapping

from .._errors import InputError
from .._rules import compile_pattern
from .._site import Site
from .._sites import Sites
from ._names import Extracted, Subtree, find_parts, structure_of


def all_linear(apply: Extracted, sites: Sites | None = None) -> str:
    r"""Makes the pattern of the weights that PEFT adapts for `target_modules="all-linear"`.

    These are the linear modules of the model and GPT-2's `Conv1D`, without the output head. In
    models with experts that PEFT renames, such as Qwen 3, Mixtral and DeepSeek V3, they are the
    attention, the experts and their router, but not dense layers and shared experts.

    Weights of one row or column, such as gates, are left out, as A and B would be larger. So are
    weights that several modules share, as PEFT cannot adapt them, and those of
    `torch.nn.MultiheadAttention`. With `sites`, so are all that the model reads without calling
    their module, modules that it does not call, and those that no output depends on, such as the
    pooler of an image encoder whose tokens are used.

    Args:
        apply: the function that `jlora.torch.extract` returned, or a `functools.partial` of it.
        sites: `jlora.transform(apply).sites(params, …)`, of `apply` or of a function that calls it.

    Returns:
        A pattern for `jlora.LoRA` and the like.

    Raises:
        TypeError: if `apply` is no function of `extract`.
        ValueError: if the model has no such weight, or `sites` is of another one.

    Source: PEFT 0.21.

    Examples:
        >>> import jlora, torch  # doctest: +SKIP
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())  # doctest: +SKIP
        >>> params, apply = jlora.torch.extract(net.eval())  # doctest: +SKIP
        >>> jlora.torch.all_linear(apply)  # doctest: +SKIP
        '\\d+/weight'
    """
    structure = structure_of(apply)
    every = structure.order
    chosen = [x for x in structure.linear if x not in structure.tied]
    if sites is not None:
        own = {".".join(site.parts): site for site in sites.leaves}
        every = tuple(own)
        chosen = [x for part in find_parts(structure, own) for x in _list_used(part, own)]
    if not chosen:
        raise InputError("apply", "is of a model without linear modules that PEFT adapts.")
    others = tuple(_path(name) for name in every if name not in chosen)
    return "|".join(dict.fromkeys(_shorten(_path(name), others) for name in chosen))


def _list_used(part: Subtree, own: Mapping[str, Site]) -> list[str]:
    """Lists the linear leaves of a model that outputs depend on, by calls of their modules."""
    known = (x for x in part.structure.linear if x in own and x not in part.structure.tied)
    return [x for x in known if own[x].kind and own[x].used and part.is_called(x, own[x])]


def _path(name: str) -> str:
    return name.replace(".", "/")


def _shorten(path: str, others: tuple[str, ...]) -> str:
    """Makes the shortest pattern of a path's last components that matches none of the others."""
    parts = path.split("/")
    words = [r"\d+" if x.isdigit() else re.escape(x) for x in parts]
    for at in range(len(parts) - 2, -1, -1):
        pattern = "/".join(words[at:])
        if (at == 0 or not parts[at].isdigit()) and _is_clear(pattern, others):
            return pattern
    return f"^{re.escape(path)}"


@functools.lru_cache(4096)
def _is_clear(pattern: str, others: tuple[str, ...]) -> bool:
    found = compile_pattern(pattern)
    return not any(map(found.search, others))

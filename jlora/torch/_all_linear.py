"""The pattern of what PEFT adapts as all-linear."""

import functools
import re

from .._errors import InputError
from .._rules import compile_pattern
from ._names import Structured


def all_linear(apply: Structured) -> str:
    r"""Makes the pattern of the weights that PEFT adapts for `target_modules="all-linear"`.

    These are the linear modules of the model and GPT-2's `Conv1D`, without the output head. In
    models with experts that PEFT renames, such as Qwen 3, Mixtral and DeepSeek V3, they are the
    attention, the experts and their router, but not dense layers and shared experts.

    Weights that PEFT cannot adapt are left out: those that several modules share, and those that
    the model reads without calling their module. The latter are known once `apply` has been called
    or traced, as by `jlora.transform(apply).sites(params, …)`. Then modules that no call used are
    left out too, and so are those that no output depends on, such as the pooler of an image encoder
    whose tokens are used. Before, of all these only weights in `torch.nn.MultiheadAttention` are.

    Args:
        apply: the function that `jlora.torch.extract` returned.

    Returns:
        A pattern for `jlora.LoRA` and the like.

    Raises:
        ValueError: if the model has no such weight.

    Source: PEFT 0.21.

    Examples:
        >>> import jlora, torch  # doctest: +SKIP
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())  # doctest: +SKIP
        >>> params, apply = jlora.torch.extract(net.eval())  # doctest: +SKIP
        >>> jlora.torch.all_linear(apply)  # doctest: +SKIP
        '\\d+/weight'
    """
    structure = apply.structure
    linear = [x for x in structure.linear if x not in structure.tied]
    own = [x for x in linear if not apply.reads or (apply.reads.get(x) and x in apply.used)]
    if not own:
        raise InputError("apply", "is of a model without linear modules that PEFT adapts.")
    others = tuple(_path(name) for name in structure.order if name not in own)
    return "|".join(dict.fromkeys(_shorten(_path(name), others) for name in own))


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

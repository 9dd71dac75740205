"""Combines several adapters into one, without their model."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .._adapters import AdapterLeaf, Decomposed, LowRank, Replaced, is_node, weight_shape
from .._errors import InputError, Problem
from .._tree import adapter_leaves
from .._types import PyTree, short
from ._contents import Contents
from ._file import shorten, show
from .adapter._config import DEFAULTS
from .adapter._patterns import Clock
from .adapter._roles import resolve

SELECTION = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "ensure_weight_tying",
)
BASES = ("base_model_name_or_path", "revision")  # from the first adapter that has them
KEPT = ("auto_mapping", "fan_in_fan_out", "lora_dropout", "task_type")  # if all have the same
SHAPES = 1000  # a program is compiled for each; real adapters have ten
REMEDY = (
    "Only adapters of one model can be combined. If the model is needed, load the adapters onto it "
    "with jlora.peft.load, and combine them with jlora.arithmetic."
)


def combine(contents: Sequence[Contents], merge: Callable[[list[PyTree]], PyTree]) -> Contents:
    r"""Combines several adapters with a function, without their model.

    `merge` gets each adapter as a dict from module to `LowRank`, with the scale that PEFT applies
    (rsLoRA's too). The result selects the modules of all adapters.

    Args:
        contents: the adapters, as `read` returns them.
        merge: a function that takes a list of adapters and returns one, with the modules of all;
            for example a function of `jlora.arithmetic`.

    Returns:
        What `merge` returned, with a configuration for it; to `write`.

    Raises:
        ValueError: if there is no adapter; if the adapters are for different models; if one cannot
            be combined without its model (DoRA, leaves in full, rows of embeddings, several
            parameters of one module); if `merge` returns other modules. All problems are listed.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import arithmetic, peft
        >>> params = {"model": {"q_proj": {"kernel": jnp.ones((4, 3))}}}
        >>> names = [peft.Name(r"(.*)/kernel", r"\1", "io")]
        >>> f = lambda p, x: x @ p["model"]["q_proj"]["kernel"]
        >>> lora = jlora.transform(f, jlora.LoRA("q_proj", rank=2))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in "ab":
        ...         peft.save(f"{folder}/{name}", base, adapter, names)
        ...     both = [peft.read(f"{folder}/{name}") for name in "ab"]
        ...     made = peft.combine(both, lambda trees: arithmetic.add(trees, [0.7, 0.3]))
        ...     fields = peft.write(f"{folder}/c", made)
        >>> fields["r"]
        4
    """
    if not contents:
        raise InputError("`contents` must have at least one adapter; got none.")
    if wrong := [*_find_contradictions(contents), *_find_unsupported(contents)]:
        why = "`contents`: the adapters cannot be combined."
        raise InputError(why, problems=wrong, remedy=REMEDY)
    made = merge([dict(x.leaves) for x in contents])
    found = {"/".join(path): x for path, x in adapter_leaves(made).items()}
    known = {name: leaf for x in contents for name, leaf in x.leaves.items()}
    keys = dict.fromkeys((*known, *found))
    if odd := [key for key in keys if not _fits(found.get(key), known.get(key))]:
        raise InputError(
            "`merge` must return one LowRank for each module of the adapters, of the shape of its "
            "weight, and no other.",
            problems=[Problem(key, _describe(found.get(key))) for key in odd],
        )
    tied = {key: head for x in contents for key, head in x.tied.items()}
    frozen = {name: x for own in contents for name, x in own.frozen.items()}
    return Contents(found, _config([{**DEFAULTS, **x.config} for x in contents]), tied, frozen)


# --------------------------------------------------------------------------------- what is refused


def _find_contradictions(contents: Sequence[Contents]) -> list[Problem]:
    """Finds signs that the adapters are for different models."""
    wrong = []
    for field in BASES:
        given = ((i, x.config.get(field)) for i, x in enumerate(contents))
        named = {i: value for i, value in given if value is not None}
        if any(value != next(iter(named.values())) for value in named.values()):
            listed = ", ".join(f"{shorten(value)} in {_nth(i)}" for i, value in named.items())
            remedy = "if this is one model, give it one name in all files"
            wrong.append(Problem(field, listed, remedy))
    first: dict[str, tuple[int, np.ndarray]] = {}
    for i, own in enumerate(contents):
        for key, x in own.frozen.items():
            j, y = first.setdefault(key, (i, x))
            if not np.array_equal(x, y):
                wrong.append(Problem(key, f"its frozen values differ in {_nth(j)} and {_nth(i)}"))
    return wrong


def _nth(i: int) -> str:
    return f"`contents[{i}]`"


def _find_unsupported(contents: Sequence[Contents]) -> list[Problem]:
    """Finds what cannot be combined without the model."""
    wrong = [
        Problem(_nth(i), f"{', '.join(map(show, names[:9]))}{', …' * (len(names) > 9)}: {why}")
        for i, own in enumerate(contents)
        for why, names in _group_unsupported(own).items()
    ]
    heads = {(key, own.tied.get(key)) for own in contents for key in own.leaves}
    wrong += [
        Problem(key, f"only one adapter has the same A and B for {show(head)}, its tied head")
        for key, head in heads
        if head is not None and {(key, None), (head, None)} & heads
    ]
    nodes = (x for own in contents for x in own.leaves.values() if isinstance(x, LowRank))
    shapes = {(x.a.shape, x.b.shape) for x in nodes}
    if len(shapes) > SHAPES:
        why = f"{len(shapes)} pairs of shapes of A and B; expected at most {SHAPES}"
        wrong.append(Problem("`contents`", why))
    return wrong


def _group_unsupported(own: Contents) -> dict[str, list[str]]:
    """Groups the leaves that cannot be combined by the reason."""
    experts = {name.rpartition(".")[0] for name, x in own.leaves.items() if _is_stacked(x)}
    roles = resolve(own.config, experts, Clock())
    found = dict[str, list[str]]()
    for name, x in own.leaves.items():
        module = name.rpartition(".")[0]
        if isinstance(x, Replaced):
            why = "its rows are replaced, so that the change depends on the base"
        elif isinstance(x, Decomposed):
            why = "DoRA, whose changes cannot be added"
        elif not isinstance(x, LowRank):
            why = "trained in full, so that its change depends on the base"
        elif _is_stacked(x) and len(roles[module].parameters) > 1:
            why = "has several adapted parameters, which the file does not distinguish"
            name = module
        else:
            continue
        if name not in found.setdefault(why, []):
            found[why].append(name)
    return found


def _is_stacked(x: object) -> bool:
    return isinstance(x, LowRank) and bool(x.layout.stack)


def _describe(node: AdapterLeaf | None) -> str:
    if not is_node(node):
        return "missing" if node is None else f"got {short(node)}"
    return f"got a {type(node).__name__} for a weight of shape {weight_shape(node)}"


def _fits(node: AdapterLeaf | None, known: object) -> bool:
    if type(node) is not LowRank or not isinstance(known, LowRank):
        return False
    return weight_shape(node) == weight_shape(known) and node.layout[:3] == known.layout[:3]


# ------------------------------------------------------------------------------- the configuration


def _config(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Makes a configuration; if no selection is that of all, `write` lists the modules."""
    kept = {key: each[0][key] for key in KEPT if all(x[key] == each[0][key] for x in each)}
    for key in BASES:
        kept[key] = next((fields[key] for fields in each if fields[key] is not None), None)
    rows = [{key: _or_none(fields[key]) for key in SELECTION} for fields in each]
    targets = [row.pop("target_modules") for row in rows]
    common = {key: each[0][key] for key in SELECTION}
    if all(row == rows[0] for row in rows):
        if all(target == targets[0] for target in targets):
            return kept | common
        is_narrowed = any(
            x is not None for key, x in rows[0].items() if key != "ensure_weight_tying"
        )
        if all(isinstance(target, list) for target in targets) and not is_narrowed:
            joined = list(dict.fromkeys(itertools.chain(*targets)))
            return kept | common | {"target_modules": joined}
    return kept


def _or_none(value: object) -> Any:
    """Maps each value that means "none" to PEFT to None; 0 is the number of a layer."""
    return None if value is False or value in ([], "") else value

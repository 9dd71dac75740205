"""Combines several PEFT adapters into one, without their model."""

import itertools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from .._adapters import AdapterLeaf, LowRank, is_node, weight_shape
from .._errors import InputError, Problem
from .._tree import adapter_leaves
from .._types import PyTree, short
from ._file import shorten, show
from ._problems import Problems
from .adapter._alone import Alone, as_leaf, read_alone, write_alone
from .adapter._config import DEFAULTS
from .adapter._contents import Part
from .adapter._describe import find_scales, set_scales
from .names._torch_layout import split_factors
from .names._weights import explain_narrowing

Fields = dict[str, Any]
Where = str | os.PathLike[str]

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


def combine(
    paths: Sequence[Where],
    out: Where,
    merge: Callable[[list[PyTree]], PyTree],
    *,
    ignore: Collection[str] = (),
) -> dict[str, LowRank]:
    r"""Combines several PEFT adapters with a function, and writes the result as one adapter.

    The model is not needed. `merge` gets each adapter as a dict from module to `LowRank`, as `read`
    returns it, with the scale that PEFT applies (rsLoRA's too). The new adapter selects the modules
    of all adapters. Its ranks and scales (alpha / r) are in `rank_pattern` and `alpha_pattern`.

    Args:
        paths: the folders of the adapters.
        out: a folder that does not exist yet, or an empty one. It appears complete or not at
            all.
        merge: a function that takes a list of adapters and returns one, with the modules of all;
            for example a function of `jlora.arithmetic`.
        ignore: as in `load`, for all adapters.

    Returns:
        The adapter that `merge` returned.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        FileNotFoundError: if a folder or a file is missing.
        ValueError: if files are damaged; if the adapters are for different models; if one cannot be
            combined without its model (DoRA, leaves in full, rows of embeddings, several parameters
            of one module); if `merge` returns other modules, or values that are not finite. All
            problems are listed.

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
        ...     both = [f"{folder}/a", f"{folder}/b"]
        ...     made = peft.combine(both, f"{folder}/c", lambda x: arithmetic.add(x, [0.7, 0.3]))
        ...     peft.read_config(f"{folder}/c")["r"]
        4
    """
    each = [read_alone(path, f"paths[{i}]", ignore=ignore) for i, path in enumerate(paths)]
    names = [os.fspath(path) for path in paths]
    wrong = [*_find_contradictions(names, each), *_find_unsupported(names, each)]
    if wrong:
        why = "`paths`: the adapters cannot be combined."
        raise InputError(why, problems=wrong, remedy=REMEDY)
    made = merge([alone.nodes for alone in each])
    parts = _parts(made, {part.key: part for alone in each for part in alone.contents.parts})
    problems = Problems("`merge` returned an invalid adapter")
    write_alone(out, _fields(each, parts), parts, each, problems, "paths")
    return made


# --------------------------------------------------------------------------------- what is refused


def _find_contradictions(names: Sequence[str], each: Sequence[Alone]) -> list[Problem]:
    """Finds signs that the adapters are for different models."""
    wrong = []
    for field in BASES:
        values = [(x.adapter.fields.get(field), name) for x, name in zip(each, names, strict=True)]
        values = [pair for pair in values if pair[0] is not None]
        if any(value != values[0][0] for value, _ in values):
            listed = ", ".join(f"{shorten(value)} in {name}" for value, name in values)
            remedy = "if this is one model, give it one name in all files"
            wrong.append(Problem(field, listed, remedy))
    first: dict[str, tuple[str, np.ndarray]] = {}
    for alone, name in zip(each, names, strict=True):
        for key, x in alone.contents.frozen.items():
            other, y = first.setdefault(key, (name, x))
            if not np.array_equal(x, y):
                wrong.append(Problem(key, f"its frozen values differ in {other} and {name}"))
    return wrong


def _find_unsupported(names: Sequence[str], each: Sequence[Alone]) -> list[Problem]:
    """Finds what cannot be combined without the model."""
    wrong = []
    for (adapter, own, _), name in zip(each, names, strict=True):
        for why, found in (
            ("trained in full, so that its change depends on the base", [*own.full]),
            (
                "its rows are replaced, so that the change depends on the base",
                [x.module for x in own.tokens.values()],
            ),
            (
                "DoRA, whose changes cannot be added",
                [x.key for x in own.parts if x.m is not None],
            ),
            (
                "has several adapted parameters, which the file does not distinguish",
                [m for m in adapter.modules if len(adapter.roles[m].parameters) > 1],
            ),
            (
                "float64 needs jax_enable_x64",
                [x.key for x in own.parts if any(explain_narrowing(y.dtype) for y in x.arrays)],
            ),
        ):
            listed = ", ".join(map(show, found[:9])) + ", …" * (len(found) > 9)
            wrong += [Problem(name, f"{listed}: {why}")] if found else []
    heads = {(x.key, alone.tied.get(x.key)) for alone in each for x in alone.contents.parts}
    wrong += [
        Problem(key, f"only one adapter has the same A and B for {show(head)}, its tied head")
        for key, head in heads
        if head is not None and {(key, None), (head, None)} & heads
    ]
    shapes = {(part.a.shape, part.b.shape) for alone in each for part in alone.contents.parts}
    if len(shapes) > SHAPES:
        why = f"{len(shapes)} pairs of shapes of A and B; expected at most {SHAPES}"
        wrong.append(Problem("paths", why))
    return wrong


def _parts(made: PyTree, known: Mapping[str, Part]) -> list[Part]:
    """Returns A and B of the result in PEFT's layout."""
    found = {"/".join(path): x for path, x in adapter_leaves(made).items()}
    keys = dict.fromkeys((*known, *found))
    if odd := [key for key in keys if not _fits(found.get(key), known.get(key))]:
        raise InputError(
            "`merge` must return one LowRank for each module of the adapters, of the shape of its "
            "weight, and no other.",
            problems=[Problem(key, _describe(found.get(key))) for key in odd],
        )
    return [
        known[key]._replace(a=a, b=b, scale=node.scale)
        for key, node in found.items()
        for a, b in split_factors(as_leaf(known[key]), node)
    ]


def _describe(node: AdapterLeaf | None) -> str:
    if not is_node(node):
        return "missing" if node is None else f"got {short(node)}"
    return f"got a {type(node).__name__} for a weight of shape {weight_shape(node)}"


def _fits(node: AdapterLeaf | None, part: Part | None) -> bool:
    if part is None or type(node) is not LowRank:
        return False
    leaf = as_leaf(part)
    return weight_shape(node) == leaf.shape and node.layout[:3] == leaf.layout[:3]


# ------------------------------------------------------------------------------- the configuration


def _fields(each: Sequence[Alone], parts: Sequence[Part]) -> Fields:
    """Makes a configuration that selects `parts` and their tied heads, with ranks and scales."""
    given = [DEFAULTS | alone.adapter.fields for alone in each]
    tied = {key: head for alone in each for key, head in alone.tied.items()}
    kept = {key: given[0][key] for key in KEPT if all(x[key] == given[0][key] for x in given)}
    for key in BASES:
        kept[key] = next((fields[key] for fields in given if fields[key] is not None), None)
    fields = DEFAULTS | kept | _selection(given, parts, tied)
    return set_scales(fields, find_scales(parts, tied))


def _selection(
    each: Sequence[Fields], parts: Sequence[Part], tied: Mapping[str, str]
) -> dict[str, Any]:
    """Makes the fields that select the modules of all adapters and no others."""
    rows = [{key: _or_none(fields[key]) for key in SELECTION} for fields in each]
    targets = [row.pop("target_modules") for row in rows]
    common = {key: each[0][key] for key in SELECTION}
    if all(row == rows[0] for row in rows):
        if all(target == targets[0] for target in targets):
            return common
        is_narrowed = any(
            x is not None for key, x in rows[0].items() if key != "ensure_weight_tying"
        )
        if all(isinstance(target, list) for target in targets) and not is_narrowed:
            return common | {"target_modules": list(dict.fromkeys(itertools.chain(*targets)))}
    keys = {kind: [x.key for x in parts if (x.kind == "experts") == kind] for kind in (True, False)}
    return {
        "target_modules": [*keys[False], *tied.values()],
        "target_parameters": keys[True] or None,
    }


def _or_none(value: object) -> Any:
    """Maps each value that means "none" to PEFT to None; 0 is the number of a layer."""
    return None if value is False or value in ([], "") else value

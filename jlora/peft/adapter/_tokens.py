"""Rows of embeddings that PEFT trains, and the heads tied to these embeddings."""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np

from ..._errors import Problem
from .._file import PREFIX, TENSORS, show
from .._problems import Problems
from ..names._kinds import ROWS
from ._config import PARAMETERS
from ._parts import RowNumbers, Tokens

WRAPPED = ".token_adapter"
INDICES = "trainable_token_indices"


def find_rows(
    fields: Mapping[str, Any], modules: Iterable[str], problems: Problems
) -> tuple[dict[str, RowNumbers], list[str]]:
    """Finds the rows of each module with values, and the listed names without values.

    A name without values may be a head that is tied to an embedding with the same rows. Any other
    is a problem.
    """
    listed = fields.get(INDICES)
    modules = list(modules)
    is_one = not isinstance(listed, dict)  # of the model's input embedding
    listed = {"": listed} if is_one and listed else listed or {}
    listed = {key: tuple(rows) for key, rows in listed.items()}
    if len(modules) > (1 if is_one else PARAMETERS):
        few = "one embedding" if is_one else f"at most {PARAMETERS}"
        problems.add(INDICES, f"expected rows of {few}; there are values for {len(modules)}")
        return {}, []
    found = dict[str, RowNumbers]()
    for module in modules:
        # As in PEFT: the ends of names are compared, also within a component.
        each = {rows for key, rows in listed.items() if module.endswith(key)}
        if len(each) == 1:
            found[module] = each.pop()
        else:
            why = f"{INDICES} lists {'other rows too' if each else 'none of its rows'}"
            problems.add(f"{PREFIX}{module}{ROWS.keys[0]}", f"unexpected; {why}")
    alone = [key for key in listed if not any(module.endswith(key) for module in modules)]
    heads = [key for key in alone if listed[key] in found.values()]
    problems.found += [_without_values(key) for key in alone if key not in heads]
    return found, heads


def _without_values(key: str) -> Problem:
    return Problem(INDICES, f"selects {show(key) or 'rows'}, but {TENSORS} has no values for it")


def list_misfits(tokens: Tokens, shape: tuple[int, ...]) -> list[Problem]:
    """Explains why rows do not fit an embedding of `shape` in PyTorch."""
    found = list[Problem]()
    wanted = (len(tokens.rows), *shape[1:])
    if tokens.v.shape != wanted:
        key = getattr(tokens.v, "key", tokens.module)
        found.append(Problem(key, f"expected shape {wanted}, got {tokens.v.shape}"))
    if (last := max(tokens.rows)) >= shape[0]:
        why = f"{INDICES} lists row {last}, but there are {shape[0]} rows"
        found.append(Problem(tokens.module, why, "Resize the vocabulary as in training."))
    return found


def list_lone_heads(heads: Iterable[str], modules: Iterable[str]) -> list[Problem]:
    """Lists problems with `heads` that are modules with a weight of their own."""
    modules = list(modules)
    return [_without_values(k) for k in heads if any(module.endswith(k) for module in modules)]


def find_table(name: str, tokens: Mapping[str, Tokens], tables: Container[str]) -> Tokens | None:
    """Finds the rows of the embedding, one of the `tables`, to which `name` may be tied."""
    others = (x for other, x in tokens.items() if other != name and other in tables)
    return next((x for x in others if x.rows == tokens[name].rows), None)


def list_unequal(
    pairs: Iterable[tuple[Any, Any, bool]], values: Mapping[str, np.ndarray]
) -> list[Problem]:
    """Lists heads whose values are not those of the embedding, or their transpose."""
    return [
        Problem(
            head.key,
            f"expected the {'transpose' if is_transposed else 'values'} of {show(table.key)}, got "
            "other values",
        )
        for head, table, is_transposed in pairs
        if not np.array_equal(
            values[head.key], values[table.key].T if is_transposed else values[table.key]
        )
    ]

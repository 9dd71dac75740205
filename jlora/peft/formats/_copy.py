"""Copies the files beside the weights of a checkpoint: configurations, tokenizers, code."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._checkpoint import QUANTIZATION, Checkpoint, walk_objects


def copy_others(checkpoint: Checkpoint, folder: Path) -> None:
    """Copies the files that are kept beside the weights; their configuration is then of floats."""
    for name in checkpoint.kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.source.folder / name, folder / name)
    if checkpoint.quantization:
        config = json.loads(json.dumps(checkpoint.config))
        for part in walk_objects(config):
            part.pop(QUANTIZATION, None)
        write_json(folder / "config.json", config)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object of JSON."""
    path.write_bytes(json.dumps(value, indent=2).encode())

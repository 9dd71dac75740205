"""MiniLM with fewer than its six layers, for tests that hold for any number of them."""

import contextlib
import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from unittest import mock

import data
import pytest
from safetensors.numpy import load_file, save_file

# For fixtures: one or two layers every day, all of them in the long run.
ALL = pytest.param(6, marks=pytest.mark.slow)
ONE, LAYERS = [1, ALL], [2, ALL]


@contextlib.contextmanager
def minilm(folder: pathlib.Path, layers: int) -> Iterator[None]:
    """Writes that many of the layers to `folder`, which `data.minilm` then gives."""
    whole = data.minilm()
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    shutil.copy(whole / "tokenizer.json", folder)
    later = rf"layer\.[{layers}-9]\."
    tensors = load_file(whole / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if not re.search(later, name)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with mock.patch.object(data, "minilm", return_value=folder):
        yield

"""MiniLM without four of its six layers, for tests of examples that take what they are given."""

import contextlib
import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from unittest import mock

import data
from safetensors.numpy import load_file, save_file

LAYERS = 2


@contextlib.contextmanager
def minilm(folder: pathlib.Path) -> Iterator[None]:
    """Writes it to `folder`, which `data.minilm` then gives."""
    whole = data.minilm()
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    shutil.copy(whole / "tokenizer.json", folder)
    tensors = load_file(whole / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if not re.search(r"layer\.[2-5]\.", name)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with mock.patch.object(data, "minilm", return_value=folder):
        yield

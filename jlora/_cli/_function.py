"""Attributes of modules and files that the user names."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any


def attribute(text: str, what: str) -> Any:
    """What `module:NAME` or `path/file.py:NAME`, which the user gave as `what`, means."""
    source, colon, name = text.rpartition(":")
    if not colon or not source:
        raise ValueError(f"{what}: expected module:NAME or file.py:NAME; got {text!r}.")
    found = imported(source, what)
    if not hasattr(found, name):
        raise ValueError(f"{what}: {source} has no {name}.")
    return getattr(found, name)


def imported(source: str, what: str) -> Any:
    """The module of that name, or that file as one."""
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        name = f"jlora_user_{Path(source).stem}"
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as e:
        raise ValueError(f"{what}: {source} cannot be imported ({type(e).__name__}: {e}).") from e

"""Name tables by what the user types."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ..peft import _tables
from ..peft._names import Name

TABLES = {
    key.lower().replace("_", "-"): table
    for key, table in vars(_tables).items()
    if key.isupper() and not key.startswith("_")
}


def table(text: str | None) -> tuple[Name, ...]:
    """The table that `--names` means: one of jlora's, `module:ATTRIBUTE` or `file.py:ATTRIBUTE`."""
    if text is None:
        raise ValueError(f"--names is needed to match PyTorch's modules to paths: {_choice()}.")
    if text.lower() in TABLES:
        return TABLES[text.lower()]
    source, colon, attribute = text.rpartition(":")
    if not colon or not source:
        raise ValueError(f"--names: there is no table {text!r}; expected {_choice()}.")
    found = getattr(_module(source), attribute, None)
    if not isinstance(found, list | tuple) or not all(isinstance(row, Name) for row in found):
        raise ValueError(
            f"--names: {attribute} of {source} must be a list of jlora.peft.Name rows; "
            f"got {type(found).__name__}."
        )
    return tuple(found)


def _choice() -> str:
    return f"one of {', '.join(TABLES)}, module:ATTRIBUTE or file.py:ATTRIBUTE"


def _module(source: str) -> Any:
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        name = f"jlora_names_{Path(source).stem}"
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as e:
        raise ValueError(f"--names: {source} cannot be imported ({type(e).__name__}: {e}).") from e

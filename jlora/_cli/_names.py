"""Name tables by what the user types."""

from ..peft import _tables
from ..peft._names import Name
from ._function import imported

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
    found = getattr(imported(source, "--names"), attribute, None)
    if not isinstance(found, list | tuple) or not all(isinstance(row, Name) for row in found):
        raise ValueError(
            f"--names: {attribute} of {source} must be a list of jlora.peft.Name rows; "
            f"got {type(found).__name__}."
        )
    return tuple(found)


def _choice() -> str:
    return f"one of {', '.join(TABLES)}, module:ATTRIBUTE or file.py:ATTRIBUTE"

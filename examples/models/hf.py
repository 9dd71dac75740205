"""Hugging Face's folders: `config.json`, and tensors in one safetensors file or in shards."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jlora import peft

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
# In some files, in no computation of ours: kept as they are so that a file survives the round trip.
UNUSED = r".*\.(position_ids|inv_freq|attn\.(masked_)?bias)"

Config = TypeVar("Config")


def read_config(
    folder: str | Path, kind: type[Config], fields: Mapping[str, str], known: Mapping[str, Any]
) -> Config:
    """A dataclass from `config.json`; what it says of rotary positions counts as its own.

    Args:
        folder: where it is.
        kind: the dataclass.
        fields: Hugging Face's name of each of its fields; one that is absent, or null, keeps its
            default.
        known: what other fields must be, or be absent; a tuple lists several values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it asks for what the model does not compute.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"`{path}` is not there: give the folder of a checkpoint")
    found = json.loads(path.read_text())
    for name in ("rope_scaling", "rope_parameters"):  # the second is that of transformers 5
        found |= found.pop(name, None) or {}
    found = {k: v for k, v in found.items() if v is not None}
    for name, value in known.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if name in found and found[name] not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"`{path}`: expected {name} {expected}, got {found[name]!r}")
    given = {ours: found[theirs] for ours, theirs in fields.items() if theirs in found}
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    if lost := sorted(fields[name] for name in required & fields.keys() - given.keys()):
        raise ValueError(f"`{path}` lacks {', '.join(lost)}")
    return kind(**given)


def read_index(folder: str | Path) -> dict[str, str]:
    """The file of each tensor of a folder.

    Raises:
        FileNotFoundError: if there are none in safetensors files.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        return json.loads((folder / INDEX).read_text())["weight_map"]
    if not (folder / ONE).exists():
        raise FileNotFoundError(
            f"{folder} has neither {ONE} nor {INDEX}. Put the checkpoint there; from another "
            "format, `transformers` writes it by save_pretrained(..., safe_serialization=True)."
        )
    with safe_open(folder / ONE, "np") as file:
        return dict.fromkeys(file.keys(), ONE)


def read_tensors(folder: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a folder by name."""
    files = sorted(set(read_index(folder).values()))
    return {name: x for file in files for name, x in load_file(Path(folder, file)).items()}


def write_tensors(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file as `transformers` does."""
    save_file(dict(tensors), path, metadata={"format": "pt"})


def to_variables(
    tensors: Mapping[str, np.ndarray],
    like: Any,
    names: Sequence[peft.Name],
    *,
    unused: str = UNUSED,
    copies: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The variables of a model; the collection ``unused`` keeps what it does not compute with.

    Args:
        tensors: of the checkpoint.
        like: the variables of the model, arrays or shapes.
        names: its table of names.
        unused: a regular expression for the names of tensors to keep as they are.
        copies: names under which some files hold another tensor once more, as the tied head. They
            are left out, as `transformers` does when it writes.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen; the message lists them all. Or a
            copy has other values.
    """
    copies = {name: of for name, of in (copies or {}).items() if {name, of} <= set(tensors)}
    for name, of in copies.items():
        if not np.array_equal(tensors[name], tensors[of]):
            raise ValueError(f"{name} must be the same as {of}, to which it is tied")
    rest = {name: jnp.asarray(x) for name, x in tensors.items() if re.fullmatch(unused, name)}
    own = {name: x for name, x in tensors.items() if name not in {*rest, *copies}}
    variables = {"params": peft.from_tensors(own, like["params"], names)}
    return {**variables, "unused": rest} if rest else variables


def to_tensors(variables: Mapping[str, Any], names: Sequence[peft.Name]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint: what `to_variables` turns into `variables`."""
    tensors = peft.to_tensors(variables["params"], names)
    for name, x in variables.get("unused", {}).items():
        # Index buffers are int64 in these files, but int32 in JAX.
        tensors[name] = np.asarray(x, np.int64 if x.dtype == jnp.int32 else x.dtype)
    return tensors


def rows(
    modules: Mapping[str, str],
    leaves: Mapping[str, tuple[str, str]],
    stack: str = "",
    prefix: str = "",
    **options: Any,
) -> tuple[peft.Name, ...]:
    r"""Rows of a name table, for stacked blocks and for numbered ones.

    Args:
        modules: regular expressions for our modules to Hugging Face's, with ``{}`` for the number
            of the block, and another one for each `l` of `leaves`.
        leaves: the axes and the name there of each of our leaves, as ``{"bias": ("o", "bias")}``.
        stack: the name of the stacked blocks; numbered ones are called ``stack_0`` or ``stack/0``.
        prefix: of Hugging Face's modules.
        **options: of every row.

    Example:
        >>> table = rows({r"h/(\w+)": r"h.{}.\1"}, {"kernel": ("io", "weight")}, stack="h")
        >>> for row in table:
        ...     print(row.path, row.module, row.axes)
        h/(\w+)/kernel h.{}.\1 lio
        h[_/](\d+)/(\w+)/kernel h.\1.\2 io
    """
    table = []
    for ours, theirs in modules.items():
        theirs, stacked = prefix + theirs, "{}" in theirs
        numbered = re.sub(r"\\(\d)", lambda m: rf"\{int(m[1]) + 1}", theirs).replace("{}", r"\1", 1)
        for leaf, (axes, parameter) in leaves.items():
            path = f"{ours}/{leaf}"
            table.append(peft.Name(path, theirs, "l" * stacked + axes, parameter, **options))
            if stacked:
                path = re.sub(rf"\b{stack}/", rf"{stack}[_/](\\d+)/", path, count=1)
                table.append(peft.Name(path, numbered, axes, parameter, **options))
    return tuple(table)

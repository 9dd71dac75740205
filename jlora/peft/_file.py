"""Reads untrusted JSON and safetensors files within bounds.

The whole header of a safetensors file is checked before any data is read. A file can therefore make
the reader allocate at most as many bytes as the file has, and only for tensors of expected shapes.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp
import numpy as np

from .._errors import blame, shorten
from ._recognized import TENSORS
from ._source import Source, open_file

PREFIX = "base_model.model."  # of the keys in it
LIMIT = 24 * 2**20  # bytes of JSON, which take forty times the memory


def read_json(source: Source, name: str, limit: int) -> dict[str, Any]:
    """Reads the object in a JSON file of at most `limit` bytes."""
    with open_file(source, name) as (file, size):
        if size > limit:
            raise source.error(f"{name} has {size} bytes; expected at most {limit}.", name)
        with blame(source.argument, name):
            return parse(file.read(size))


def parse_text(
    argument: str, where: str, texts: Mapping[str, str], key: str, limit: int
) -> dict[str, Any]:
    """Parses the object in one of the `texts` of a header; empty if there is none."""
    with blame(argument, where, f"{key} in the header of "):
        text = texts.get(key, "{}")
        if len(text) > limit:
            raise ValueError(f"has {len(text)} characters; expected at most {limit}")
        return parse(text.encode())


def parse(data: bytes) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        ValueError: for other JSON, duplicate keys, and numbers that are not finite.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_make_object, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object; got {type(value).__name__}")
    return value


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shorten(key)} is duplicated")
        found[key] = value
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


# --------------------------------------------------------------------------------- safetensors

# Characters and dots of a name, whose endings are looked up; real names have a tenth.
NAME_LIMIT, DEPTH_LIMIT = 1000, 100
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
# Dtypes of A and B that are read as float32, in which they are exact.
SHORT = {"F8_E4M3": np.dtype(jnp.float8_e4m3fn), "F8_E5M2": np.dtype(jnp.float8_e5m2)}
FLOATS = DTYPES | SHORT
# of a BatchNorm
COUNT = ".num_batches_tracked"
COUNTS = {"I64": np.dtype(np.int64)}
INTEGERS = {
    f"{kind[0].upper()}{bits}": np.dtype(f"{kind}{bits}")
    for kind in ("int", "uint")
    for bits in (8, 16, 32, 64)
}
# The bytes of these and of other dtypes, to check the offsets of tensors.
SIZES = {name: x.itemsize for name, x in (FLOATS | INTEGERS).items()} | {"C64": 8}
SIZES |= dict.fromkeys(("BOOL", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1)
FORMAT = {"format": "pt"}  # without which `transformers` reads no file


class TensorInfo(NamedTuple):
    """A tensor of a file, before its values are read.

    Attributes:
        key: its name in the file.
        dtype: its dtype, as safetensors calls it.
        shape: its shape.
        start: the offset of its first byte from the end of the header.
        stop: the offset after its last byte.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0

    def reshape(self, shape: tuple[int, ...]) -> "TensorInfo":
        """Returns the same tensor, which is read with another shape."""
        return self._replace(shape=shape)


class FileHeader(NamedTuple):
    """The header of a file.

    Attributes:
        entries: the tensors by name.
        start: the bytes before the data of the tensors.
        metadata: its texts.
    """

    entries: dict[str, TensorInfo]
    start: bytes
    metadata: Mapping[str, str] = {}


def read_header(source: Source, name: str = TENSORS) -> FileHeader:
    """Reads the header of a file of `source`; `ValueError` if the file is damaged."""
    with open_file(source, name) as (file, size), blame(source.argument, name):
        start = file.read(8)
        count = int.from_bytes(start, "little")
        if not 2 <= count <= min(size - 8, LIMIT):
            raise ValueError(
                f"has {size} bytes, but claims a header of {count}: it is truncated, or not a "
                "safetensors file. Save it again"
            )
        with blame(source.argument, name, "the header of "):
            raw = parse(text := file.read(count))
        entries = _parse_entries(raw)
        _check_extents(entries, size - 8 - count)
    return FileHeader(entries, start + text, raw.get("__metadata__", {}))


def _parse_entries(raw: dict[str, Any]) -> dict[str, TensorInfo]:
    """Returns the tensors of a header by name."""
    metadata = raw.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError(f"must have an object of strings as __metadata__; got {shorten(metadata)}")
    tensors = {key: x for key, x in raw.items() if key != "__metadata__"}
    entries = {}
    for key, fields in tensors.items():
        if why := explain_name(key):
            raise ValueError(f"has a tensor named {shorten(key)}; {why}")
        entry = _parse_tensor(key, fields)
        if entry is None:
            raise ValueError(f"has an invalid entry for {shorten(key)}: {shorten(fields)}")
        entries[key] = entry
    return entries


def explain_name(key: str) -> str:
    """Explains why a tensor cannot have a name, if it cannot."""
    is_short = len(key) <= NAME_LIMIT and key.count(".") <= DEPTH_LIMIT
    if is_short and key.isprintable():
        return ""
    return f"expected at most {NAME_LIMIT} printable characters, with at most {DEPTH_LIMIT} dots"


def make_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> FileHeader:
    """Makes the header of a file as the safetensors library does."""
    metadata = {**FORMAT, **metadata}
    entries, fields, at = dict[str, TensorInfo](), dict[str, Any](), 0
    fields["__metadata__"] = metadata
    for x in sorted(tensors, key=lambda x: (-SIZES[x.dtype], x.dtype == "F16", x.key)):
        start = at
        at += math.prod(x.shape) * SIZES[x.dtype]
        entries[x.key] = x._replace(start=start, stop=at)
        fields[x.key] = {"dtype": x.dtype, "shape": x.shape, "data_offsets": [start, at]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return FileHeader(entries, len(text).to_bytes(8, "little") + text, metadata)


def _parse_tensor(key: str, fields: object) -> TensorInfo | None:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape, offsets = (fields[k] for k in ("dtype", "shape", "data_offsets"))
    known = isinstance(dtype, str) and dtype in SIZES
    if not known or not _are_naturals(shape) or not _are_naturals(offsets) or len(offsets) != 2:
        return None
    if len(shape) > 16 or math.prod(shape) * SIZES[dtype] != offsets[1] - offsets[0]:
        return None
    return TensorInfo(key, dtype, tuple(shape), *offsets)


def _are_naturals(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_extents(entries: dict[str, TensorInfo], size: int) -> None:
    """Raises unless the tensors fill the data without gap or overlap."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][3:]):
        if entry.start != end:
            raise ValueError(
                f"is damaged: {shorten(name)} starts at byte {entry.start} of the data; expected "
                f"byte {end}. Save it again"
            )
        end = entry.stop
    if end != size:
        raise ValueError(
            f"has {size} bytes of data; its header describes {end}. The file is truncated or "
            "damaged; save it again"
        )


def read_tensors(
    source: Source, header: FileHeader, tensors: Iterable[TensorInfo], name: str = TENSORS
) -> dict[str, np.ndarray]:
    """Reads tensors of an adapter by their names; those of 8 bits become float32."""
    found = {}
    dtypes = FLOATS | COUNTS
    with open_file(source, name) as (file, _):
        for x in tensors:
            file.seek(len(header.start) + x.start)
            data = np.frombuffer(file.read(x.stop - x.start), dtypes[x.dtype]).reshape(x.shape)
            found[x.key] = data.astype(np.float32) if x.dtype in SHORT else data
    return found

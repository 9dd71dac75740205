"""bitsandbytes, as `transformers` writes it: NF4, FP4, and 8 bits by row."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..._quantized import DYNAMIC, FP4, NF4, Int8, Quantized
from .._file import brief, parse
from ._format import Format, register
from ._stored import Stored, codes_of, scales_of
from ._tensors import Tensors, Unreadable

STATE = "quant_state.bitsandbytes__"
# Heads that may share the weight of an embedding, and then have no tensor of their own.
HEADS = ("cls", "embed_out", "lm_head")
SCHEMES: dict[str, Any] = {"nf4": NF4, "fp4": FP4}
DTYPES = ("float32", "bfloat16", "float16")
GROUP = 256
LIMIT = 10_000  # bytes of a state


def read(
    tensors: Tensors, config: dict[str, Any], module: str, parameter: str, shape: tuple[int, ...]
) -> Stored | None:
    """Of 4 bits if it has a state, of 8 if it has row maxima."""
    del config
    key = f"{module}.{parameter}"
    states = [kind for kind in SCHEMES if f"{key}.{STATE}{kind}" in tensors]
    if len(states) > 1:
        raise Unreadable(f"{key}: has the states of {' and '.join(states)}")
    if states:
        return _four_bits(tensors, key, states[0], shape)
    if key in tensors and tensors.dtype(key) == "I8":
        return _eight_bits(tensors, module, key, shape)
    if f"{key}.absmax" in tensors or (key in tensors and tensors.dtype(key) == "U8"):
        raise Unreadable(f"{key}: is of 4 bits, but has no {key}.{STATE}nf4 or fp4")
    return None


def _eight_bits(tensors: Tensors, module: str, key: str, shape: tuple[int, ...]) -> Stored:
    form = f"{module}.weight_format"
    if form in tensors and (got := int(tensors.read(form, ("U8",), ()).item())) != 0:
        raise Unreadable(f"{form}: expected 0, rows as they are; got {got}")
    codes = tensors.read(key, ("I8",), shape)
    return Stored(Int8(), codes, _finite(tensors, f"{module}.SCB", shape[:1]))


def _four_bits(tensors: Tensors, key: str, kind: str, shape: tuple[int, ...]) -> Stored:
    state = _state(tensors, key, kind, shape)
    size, block = int(np.prod(shape)), state["blocksize"]
    packed = tensors.bytes(key)
    if packed.size != -(-size // 2):
        raise Unreadable(f"{key}: expected {-(-size // 2)} bytes for {shape}, got {packed.size}")
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[:size].reshape(shape)
    scheme = SCHEMES[kind](block=block, double=False)
    table = tensors.read(f"{key}.quant_map", ("F32",), (16,))
    if not np.array_equal(table, scheme.table):
        raise Unreadable(f"{key}.quant_map: is not the table of {kind}")
    blocks = -(-size // block)
    if "nested_blocksize" not in state:
        absmax = _finite(tensors, f"{key}.absmax", (blocks,))
        return Stored(scheme, codes, absmax, dtype=state["dtype"])
    absmax = tensors.read(f"{key}.absmax", ("U8",), (blocks,))
    group, offset = state["nested_blocksize"], np.float32(state["nested_offset"])
    of_groups = _finite(tensors, f"{key}.nested_absmax", (-(-blocks // group),))
    numbers = tensors.read(f"{key}.nested_quant_map", ("F32",), (256,))
    if group == GROUP and np.array_equal(numbers, DYNAMIC):
        scheme = SCHEMES[kind](block=block, double=True)
        return Stored(scheme, codes, absmax, nested=(of_groups, offset), dtype=state["dtype"])
    if not np.isfinite(numbers).all():
        raise Unreadable(f"{key}.nested_quant_map: has values that are not finite")
    each = np.repeat(of_groups, group)[:blocks]
    return Stored(scheme, codes, numbers[absmax] * each + offset, dtype=state["dtype"])


def _finite(tensors: Tensors, name: str, shape: tuple[int, ...]) -> np.ndarray:
    x = tensors.read(name, ("F32",), shape)
    if not np.isfinite(x).all():
        raise Unreadable(f"{name}: has values that are not finite")
    return x


def _parsed(tensors: Tensors, name: str) -> dict[str, Any]:
    data = tensors.bytes(name)
    if data.size > LIMIT:
        raise Unreadable(f"{name}: expected at most {LIMIT} bytes, got {data.size}")
    try:
        return parse(data.tobytes(), name)
    except ValueError as e:
        raise Unreadable(str(e)) from None


def _state(tensors: Tensors, key: str, kind: str, shape: tuple[int, ...]) -> dict[str, Any]:
    name = f"{key}.{STATE}{kind}"
    state = _parsed(tensors, name)
    legal = {
        "quant_type": lambda x: x == kind,
        "blocksize": lambda x: type(x) is int and x in (32, 64, 128, 256, 512, 1024, 2048, 4096),
        "dtype": lambda x: x in DTYPES,
        "shape": lambda x: x == list(shape),
    }
    if "nested_blocksize" in state or "nested_offset" in state:
        legal["nested_blocksize"] = lambda x: type(x) is int and 1 <= x <= 4096
        legal["nested_dtype"] = lambda x: x == "float32"
        legal["nested_offset"] = lambda x: type(x) in (int, float) and abs(x) < 1e38
    for field, is_legal in legal.items():
        if not is_legal(state.get(field)):
            raise Unreadable(f"{name}: `{field}` is {brief(state.get(field))}")
    return state


def find(tensors: Tensors, config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Parameters with a state of 4 bits, which says their shape, and those with row maxima."""
    del config
    for name in tensors:
        key, _, kind = name.partition(f".{STATE}")
        module, _, parameter = key.rpartition(".")
        if kind in SCHEMES:
            yield module, parameter, _shape(tensors, name)
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            yield name.removesuffix(".SCB"), "weight", tensors.matrix(weight)


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    found = _parsed(tensors, name).get("shape")
    if not isinstance(found, list) or len(found) != 2 or not all(map(_is_side, found)):
        raise Unreadable(f"{name}: `shape` is {brief(found)}")
    return tuple(found)


def _is_side(n: Any) -> bool:
    return type(n) is int and 0 < n < 2**40


register(Format("bitsandbytes", find, read))


# ------------------------------------------------------------------------------------ the way back


def write(leaf: Quantized, modules: list[str], parameter: str) -> dict[str, np.ndarray]:
    """The tensors of a stack of modules, each (rows, columns)."""
    rows, columns = _matrix(leaf)
    scheme: Any = leaf.scheme
    found: dict[str, np.ndarray] = {}
    count = len(modules)
    codes, scale = (x.reshape(count, -1) for x in (codes_of(leaf), scales_of(leaf)))
    for i, module in enumerate(modules):
        key = f"{module}.{parameter}"
        if isinstance(scheme, Int8):
            found |= {
                key: codes[i].reshape(rows, columns),
                f"{module}.SCB": scale[i],
                f"{module}.weight_format": np.zeros((), np.uint8),
            }
            continue
        kind = next(k for k, x in SCHEMES.items() if type(scheme) is x)
        zero = np.argmin(np.abs(scheme.table))  # what an odd number of codes is filled with
        whole = np.append(codes[i], [zero] * (codes[i].size % 2)).astype(np.uint8)
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": scheme.block,
            "dtype": str(leaf.dtype),
            "shape": [rows, columns],
        }
        found |= {
            key: (whole[::2] << 4 | whole[1::2]).reshape(-1, 1),
            f"{key}.absmax": scale[i],
            f"{key}.quant_map": np.asarray(scheme.table),
        }
        if leaf.nested is not None:
            of_groups, offset = (np.asarray(x).reshape(count, -1)[i] for x in leaf.nested)
            state |= {
                "nested_blocksize": GROUP,
                "nested_dtype": "float32",
                "nested_offset": offset.item(),
            }
            found |= {f"{key}.nested_absmax": of_groups, f"{key}.nested_quant_map": DYNAMIC}
        found[f"{key}.{STATE}{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return found


def configuration(scheme: Any, dtype: Any, floats: Iterable[str]) -> dict[str, Any]:
    """What `config.json` says of a model in `scheme`, of which the modules `floats` are not."""
    said: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "llm_int8_skip_modules": sorted({*floats, *HEADS}),  # of 4 bits too, in spite of its name
    }
    if isinstance(scheme, Int8):
        return said | {"load_in_8bit": True, "load_in_4bit": False}
    kind = next(k for k, found in SCHEMES.items() if type(scheme) is found)
    return said | {
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": scheme.double,
        "bnb_4bit_compute_dtype": str(dtype),
        "bnb_4bit_quant_storage": "uint8",
    }


def _matrix(leaf: Quantized) -> tuple[int, int]:
    """Rows and columns of a matrix of the file."""
    form = leaf.form
    columns = form.shape[form.axis]
    return int(np.prod(form.matrix)) // columns, columns

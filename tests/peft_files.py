"""PEFT's folders for tests: written, copied from a fixture, damaged, and compared."""

import json
import pathlib
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft_models as models
from safetensors.numpy import save_file

from jlora import peft

Folder = pathlib.Path
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ENDS = (".lora_A.weight", ".lora_B.weight")


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def raw(tree: Any) -> list[bytes]:
    """The bytes of every leaf."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def assert_equal(actual: Any, expected: Any) -> None:
    """Structure, static fields, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)
    assert raw(actual) == raw(expected)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Leaf by leaf, relative to the largest entry."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def write(folder: Folder, tensors: Mapping[str, Any], **fields: Any) -> Folder:
    """A folder with tensors by their names without `PREFIX`, and a configuration."""
    folder.mkdir(exist_ok=True)
    found = {PREFIX + key: np.asarray(x, order="C") for key, x in tensors.items()}
    save_file(found, folder / TENSORS, metadata={"format": "pt"})
    usual = {"peft_type": "LORA", "target_modules": ["q"], "r": 1, "lora_alpha": 1}
    (folder / CONFIG).write_text(json.dumps(usual | fields, indent=2, sort_keys=True))
    return folder


def pair(module: str, rank: int = 1, inputs: int = 1, outputs: int = 1) -> dict[str, np.ndarray]:
    """A and B of ones."""
    shapes = zip(ENDS, ((rank, inputs), (outputs, rank)), strict=True)
    return {module + end: np.ones(shape, np.float32) for end, shape in shapes}


class Files:
    """A copy of a fixture to be damaged."""

    def __init__(self, folder: Folder, name: str = "qv") -> None:
        """Copies the fixture `name` into `folder`."""
        self.case, self.folder = models.case(name), folder / name
        self.folder.mkdir()
        for file in (CONFIG, TENSORS):
            shutil.copy(self.case.folder / file, self.folder / file)

    def load(self) -> Any:
        """The adapter."""
        return peft.load(self.folder, self.case.base, self.case.names)

    def config(self, **fields: Any) -> None:
        """Replaces fields of the configuration."""
        path = self.folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    @property
    def split(self) -> tuple[dict[str, Any], bytes]:
        """The header and the data."""
        whole = (self.folder / TENSORS).read_bytes()
        [n] = struct.unpack("<Q", whole[:8])
        return json.loads(whole[8 : 8 + n]), whole[8 + n :]

    def header(self, header: dict[str, Any] | str, data: bytes) -> None:
        """Writes another header."""
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
        (self.folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)

    def tensors(self, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
        """Changes the tensors."""
        tensors = {k: np.array(x) for k, x in models.read(self.folder / TENSORS).items()}
        change(tensors)
        save_file(tensors, self.folder / TENSORS, metadata={"format": "pt"})


# ----------------------------------------------------------------------- damages

Damage = Callable[[Files], Any]


def change(edit: Callable[[dict[str, np.ndarray]], Any]) -> Damage:
    """Other tensors."""
    return lambda f: f.tensors(edit)


def put(key: str, x: Any) -> Damage:
    """Another tensor in the place of one, or beside it."""
    return change(lambda t: t.update({key: np.asarray(x)}))


def drop(*keys: str) -> Damage:
    """Without some tensors."""
    return change(lambda t: [t.pop(key) for key in keys])


def copy(start: str, *others: str) -> Damage:
    """The tensors of one module for others too."""
    return change(
        lambda t: t.update(
            {k.replace(start, o): x for k, x in t.items() if k.startswith(start) for o in others}
        )
    )


def say(**fields: Any) -> Damage:
    """Other fields of the configuration."""
    return lambda f: f.config(**fields)


def all_of(*damages: Damage) -> Damage:
    """One after the other."""
    return lambda f: [damage(f) for damage in damages]


JUNK = [None, True, 0, -1, 1e300, 2**70, "", "x" * 10_000, [], ["a"], {}, {"a": {"b": []}}, [[[]]]]


def mutate(files: Files, draw: random.Random) -> None:
    """One random damage to one of the two files."""
    path = files.folder / draw.choice([CONFIG, TENSORS])
    data, (header, rest) = bytearray(path.read_bytes()), files.split
    kind = draw.choice(["flip", "cut", "insert", "field", "entry", "value", "key", "deep", "link"])
    if kind == "flip":
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        start = draw.randrange(len(data))
        del data[start : start + draw.randint(1, len(data))]
    elif kind == "insert":
        at = draw.randrange(len(data))
        data[at:at] = draw.randbytes(draw.randint(1, 64))
    if kind in ("flip", "cut", "insert"):
        path.write_bytes(data)
    elif kind == "field":
        config = json.loads((files.folder / CONFIG).read_text())
        files.config(**{draw.choice(sorted(config)): draw.choice(JUNK)})
    elif kind == "entry":
        entry = header[draw.choice([k for k in header if k != "__metadata__"])]
        what = draw.choice(["dtype", "shape", "data_offsets"])
        wild = [-1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1.5, "4", None]
        odd = [draw.choice(wild) for _ in range(draw.randint(0, 4))]
        entry[what] = draw.choice([odd, "BF16", "F64", "I8", draw.choice(JUNK)])
        files.header(header, rest)
    elif kind == "value":
        rest, at = bytearray(rest), draw.randrange(len(rest) // 4) * 4
        rest[at : at + 4] = struct.pack("<f", draw.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45]))
        files.header(header, bytes(rest))
    elif kind == "key":
        old = draw.choice(sorted(header))
        new = draw.choice(["../" + old, "/etc/x", old + "\0", draw.choice(sorted(header)), "", "."])
        text = json.dumps(header).replace(json.dumps(old), json.dumps(new), 1)
        files.header(text, rest)
    elif kind == "deep":
        path.write_bytes(draw.choice([b"[", b'{"a":']) * draw.choice([10, 1000, 10**6]))
    elif kind == "link":
        path.unlink()
        path.symlink_to(draw.choice(["/dev/zero", "/etc/passwd", path.name, "../nowhere"]))

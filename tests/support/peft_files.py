"""PEFT's folders for tests: written, copied from a fixture, damaged, and compared."""

import contextlib
import json
import pathlib
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import peft_models as models
import processes
from safetensors.numpy import save_file
from small import assert_close as assert_close
from small import normal as normal
from small import raw as raw

import jlora
from jlora import peft
from jlora.checkpoint._meta import digest
from jlora.peft import Name
from jlora.peft.adapter._config import DEFAULTS
from jlora.types import Layout, LowRank

Folder = pathlib.Path
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ENDS = (".lora_A.weight", ".lora_B.weight")


def node(
    of: Name | Layout, shape: tuple[int, ...], rank: int = 2, scale: float = 1.5, cls: Any = LowRank
) -> Any:
    """Random arrays for a leaf."""
    layout = of if isinstance(of, Layout) else of.layout
    shapes = cls.shapes(layout, shape, {"rank": rank})
    arrays = (normal(1 + i, *shapes[x]) for i, x in enumerate("abm") if x in shapes)
    return cls(*arrays, scale, layout)


def assert_equal(actual: Any, expected: Any) -> None:
    """Structure, static fields, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)
    assert raw(actual) == raw(expected)


SECONDS = 10


def cpu_seconds() -> float:
    """What this process and its children have used: the load of the machine does not count."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def config_of(folder: Folder) -> dict[str, Any]:
    """The fields of an adapter."""
    return json.loads((folder / CONFIG).read_text())


@contextlib.contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """Raises for what takes more; whatever else it raises, too."""
    start = cpu_seconds()
    try:
        yield
    finally:
        assert cpu_seconds() - start < seconds


MEASURED = """
import pathlib, re, sys, time
from jlora import peft
# Not `ru_maxrss`, which starts with what the process had that started this one.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
def rewrite(folder):
    if (folder / "adapter").exists():
        peft.export_merged(folder / "base", folder / "adapter", folder / "out")
    else:
        peft.dequantize_checkpoint(folder / "base", folder / "out")
for first in sys.argv[1:]:
    rewrite(pathlib.Path(first))
before, start = peak(), time.process_time()
try:
    rewrite(pathlib.Path())
except ValueError:
    pass
print(time.process_time() - start, (peak() - before) * 1024)
"""


def measure(folder: Folder, *first: Folder) -> tuple[float, float]:
    """The seconds and the memory that a process takes to merge `adapter` into `base` there.

    Without an adapter it dequantizes. It rewrites those in `first` before, and takes what JAX needs
    then.
    """
    done = processes.run("-c", MEASURED, *first, cwd=folder, check=True)
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory


def come_back(folder: Folder, base: Any, adapter: Any, names: Any) -> Any:
    """The adapter after `save` and `load`, whose W' must be the same."""
    peft.save(folder, base, adapter, names)
    again = peft.load(folder, base, names)
    assert_close(jlora.merge(base, again), jlora.merge(base, adapter), 1e-6)
    return again


def assert_same_files(folder: Folder, other: Folder) -> None:
    """An adapter's files have the same bytes."""
    for file in (CONFIG, TENSORS):
        assert (folder / file).read_bytes() == (other / file).read_bytes()


def bytes_of(folder: Folder) -> dict[str, bytes]:
    """Every file."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def write(folder: Folder, tensors: Mapping[str, Any], **fields: Any) -> Folder:
    """A folder with tensors by their names without `PREFIX`, and a configuration."""
    folder.mkdir(exist_ok=True)
    found = {PREFIX + key: np.asarray(x, order="C") for key, x in tensors.items()}
    save_file(found, folder / TENSORS, metadata={"format": "pt"})
    usual = {"peft_type": "LORA", "target_modules": ["q"], "r": 1, "lora_alpha": 1}
    fields = fields if "peft_type" in fields else usual | fields
    (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True))
    return folder


def pair(module: str, rank: int = 1, inputs: int = 1, outputs: int = 1) -> dict[str, np.ndarray]:
    """A and B of ones."""
    shapes = zip(ENDS, ((rank, inputs), (outputs, rank)), strict=True)
    return {module + end: np.ones(shape, np.float32) for end, shape in shapes}


def edit_metadata(checkpoint: Folder, change: Callable[[Any], Any]) -> None:
    """Other metadata of a checkpoint of Orbax, and the hash that fits it."""
    path = checkpoint / "jlora" / "metadata"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields | {"sha256": digest(fields)}))


class Files:
    """A copy of a fixture to be damaged."""

    def __init__(self, folder: Folder, name: str = "qv", case: Any = None) -> None:
        """Copies the fixture `name`, or the files of another case, into `folder`."""
        self.case, self.folder = case or models.case(name), folder / name
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


WILD: list[Any] = [
    None, True, 0, -1, 1.5, 1e300, 2**70, 10**400, "", "q", "x" * 10_000, "../x", "/etc/x", "[",
    "(", "(a|a)*", "\0", [], ["q"], [[[]]], {}, {"q": 2}, {"a": {"b": []}}, [None], [1, 2],
]  # fmt: skip
DEEP = ["[" * 10**5, '{"a":' * 10**5, '{"r": NaN}', '{"r": 1e999}', '{"r": -Infinity}', "", "\xff"]
KINDS = "flip cut insert field field field nested missing long entry value key text link"


def mutate(files: Files, draw: random.Random) -> None:
    """One random damage to one of the two files."""
    path = files.folder / draw.choice([CONFIG, TENSORS])
    data, (header, rest) = bytearray(path.read_bytes()), files.split
    config = json.loads((files.folder / CONFIG).read_text())
    field, kind = draw.choice([*config, *DEFAULTS]), draw.choice(KINDS.split())
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
        files.config(**{field: draw.choice(WILD)})
    elif kind == "nested":
        files.config(**{field: {str(draw.choice(WILD)): draw.choice(WILD) for _ in range(3)}})
    elif kind == "long":
        files.config(**{field: [f"{i}q" for i in range(draw.choice([100, 10_000, 20_000]))]})
    elif kind == "missing":
        del config[draw.choice(list(config))]
        (files.folder / CONFIG).write_text(json.dumps(config))
    elif kind == "entry":
        entry = header[draw.choice([k for k in header if k != "__metadata__"])]
        what = draw.choice(["dtype", "shape", "data_offsets"])
        wild = [-1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1.5, "4", None]
        odd = [draw.choice(wild) for _ in range(draw.randint(0, 4))]
        entry[what] = draw.choice([odd, "BF16", "F64", "I8", draw.choice(WILD)])
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
    elif kind == "text":
        path.write_bytes(draw.choice(DEEP).encode("latin-1", "replace"))
    elif kind == "link":
        path.unlink()
        path.symlink_to(draw.choice(["/dev/zero", "/etc/passwd", path.name, "../nowhere"]))

"""A Hugging Face checkpoint: the file of each tensor, and the other files."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .._errors import Problem, shorten, show
from .._folders import to_path
from ._file import LIMIT, FileHeader, TensorInfo, read_header, read_json
from ._recognized import (
    CONFIG,
    IMAGE,
    MODELS,
    ORBAX,
    PICKLES,
    TENSORS,
    WEIGHTS,
    find_image,
    recognize,
)
from ._source import Source, explain_no_folder, open_file, resolve
from ._submodels import copy_config, walk_objects

QUANTIZATION = "quantization_config"  # of `config.json`
PIECE = 4 * 2**20  # bytes
# Weights in other formats, which would stay unmerged, and pickles, which may hold weights or code.
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|pkl|pickle|ckpt|h5|keras|msgpack|npz|npy|ot|onnx|onnx_data"
    r"|tflite|gguf|ggml|mlmodel|mlpackage|pb|nemo|dduf|index\.json|data-\d+-of-\d+)$",
    re.IGNORECASE,
)


# Opens a tensor: the next bytes of the file are its values.
Opener = Callable[[], contextlib.AbstractContextManager[BinaryIO]]


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose headers and index were checked.

    Attributes:
        source: its folder.
        headers: the header of each safetensors file.
        where: the file of each tensor.
        kept: the other files to copy, as paths in the folder.
        left_out: the files and folders that are not copied.
        config: the configuration of the model; empty without a `config.json`.
        texts: the JSON of other files that is not that on disk.
        openers: how to open the tensors whose values are not where `headers` says.
        names: the names of such a checkpoint's one file, and of an index of several files.
    """

    source: Source
    headers: dict[str, FileHeader]
    where: dict[str, str]
    kept: list[str]
    left_out: list[str]
    config: Mapping[str, Any]
    texts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    openers: Mapping[str, Opener] = dataclasses.field(default_factory=dict)
    names: tuple[str, str] = MODELS[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors."""
        return {name: self.entry(name).shape for name in self.where}

    @property
    def quantization(self) -> dict[str, Any]:
        """The `quantization_config`, at any level; empty for weights in floats."""
        found = (part.get(QUANTIZATION) for part in walk_objects(self.config))
        return next((x for x in found if isinstance(x, dict)), {})

    def entry(self, name: str) -> TensorInfo:
        """Returns the tensor `name`."""
        return self.headers[self.where[name]].entries[name]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Yields a file whose next bytes are the values of a tensor."""
        if name in self.openers:
            with self.openers[name]() as data:
                yield data
            return
        file = self.where[name]
        with open_file(self.source, file) as (data, _), explain_shorter(self.source, name):
            data.seek(len(self.headers[file].start) + self.entry(name).start)
            yield data

    def pieces(self, name: str, size: int = PIECE) -> Iterator[bytes]:
        """Reads the bytes of a tensor in pieces of at most `size`."""
        entry = self.entry(name)
        with self.open(name) as data:
            yield from read_pieces(data, entry.stop - entry.start, size)

    @property
    def config_of_floats(self) -> dict[str, Any]:
        """A copy of the configuration without `quantization_config`."""
        config = copy_config(self.config)
        for part in walk_objects(config):
            part.pop(QUANTIZATION, None)
        return config

    def copy_others(self, folder: Path) -> None:
        """Copies the other files of the checkpoint, and writes those that change."""
        for name in self.kept:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open_file(self.source, name) as (data, _), open(folder / name, "wb") as copy:
                shutil.copyfileobj(data, copy)
        for name, value in self.texts.items():
            (folder / name).write_bytes(json.dumps(value, indent=2).encode())


def open_checkpoint(
    path: str | os.PathLike[str],
    argument: str = "path",
    *,
    follow_links: bool | None = None,
    copied: bool = False,
) -> Checkpoint:
    """Reads the headers, the index and the configuration in a folder.

    Args:
        path: the folder.
        argument: the user's argument with the folder, for errors.
        follow_links: whether its files may be links to anywhere; see `Source`.
        copied: whether its other files will be copied, so that none of them may be missing.

    Raises:
        FileNotFoundError: if the folder or a shard is missing.
        ValueError: if the folder has no safetensors checkpoint, or a damaged one.
    """
    source = Source(to_path(path, argument), argument, follow_links)
    files, mapped, names = _files(source)
    headers = {file: read_header(source, file) for file in files}
    where: dict[str, str] = {}
    wrong = []
    for file, header in headers.items():
        twice = (name for name in header.entries if name in where)
        wrong += [Problem(name, f"in {where[name]} and in {file}") for name in twice]
        where |= dict.fromkeys(header.entries, file)
    if mapped is not None:
        wrong += [
            Problem(name, f"in {mapped.get(name)} by the index, in {where.get(name)} by the files")
            for name in dict.fromkeys([*mapped, *where])
            if mapped.get(name) != where.get(name)
        ]
    if wrong:
        raise source.error(f"{source.folder} contradicts itself.", problems=wrong)
    kept, left_out, odd = _others(source, {*files, names[1]} if mapped else set(files))
    if odd := [name for name in odd if copied or name == "config.json"]:
        why = f"{source.folder} has entries that are not files, but have names of files."
        remedy = "Replace them with the files, or remove them."
        raise source.error(why, None, [_describe(source, name) for name in odd], remedy)
    for name in kept if not follow_links else ():
        resolve(source, source.folder / name)
    if mapped is not None:
        kept.append(names[1])
    config = read_json(source, "config.json", LIMIT) if "config.json" in kept else {}
    return Checkpoint(source, headers, where, kept, left_out, config, names=names)


def holds(path: str | os.PathLike[str]) -> set[str]:
    """Finds out what a folder contains, by the names of its files. No file is opened.

    Args:
        path: the folder.

    Returns:
        A subset of `"adapter"` (PEFT's files, or the one of diffusers), `"model"` (a Hugging Face
        model), `"weights"` (the model's safetensors), `"orbax"` (a checkpoint of Orbax) and
        `"steps"` (those of a `CheckpointManager`). A single file of safetensors is an adapter.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is another file.
    """
    path = to_path(path)
    if path.is_file() and find_image(path):
        return {"adapter"}
    if not path.is_dir():
        raise explain_no_folder("path", path)
    names = set(os.listdir(path))
    found = {
        "adapter": names & {CONFIG, TENSORS, IMAGE, *PICKLES[:2]},
        "weights": names & {*WEIGHTS},
        "model": "config.json" in names or any(n.endswith(".safetensors") for n in names),
        "orbax": names & {*ORBAX},
        "steps": any(map(str.isdigit, names)),
    }
    return {what for what, there in found.items() if there}


def read_pieces(data: BinaryIO, count: int, size: int = PIECE) -> Iterator[bytes]:
    """Reads the next `count` bytes of a file in pieces of at most `size`."""
    for start in range(0, count, size):
        yield read_exactly(data, min(size, count - start))


def read_exactly(data: BinaryIO, size: int) -> bytes:
    """Reads the next `size` bytes of a file; raises `EOFError` if the file became shorter."""
    found = data.read(size)
    if len(found) != size:
        raise EOFError
    return found


@contextlib.contextmanager
def explain_shorter(source: Source, name: str) -> Iterator[None]:
    """Turns an `EOFError` into an error about `name`, a tensor or a file."""
    try:
        yield
    except EOFError:
        why = f"{show(name)}: its file changed while it was read; start again."
        raise source.error(why, name) from None


def _files(source: Source) -> tuple[list[str], dict[str, str] | None, tuple[str, str]]:
    """Returns the safetensors files, the index or None, and the names of file and index."""
    there = {name for name in WEIGHTS if (source.folder / name).exists()}
    one, index = next((pair for pair in MODELS if not there.isdisjoint(pair)), MODELS[0])
    if odd := there - {one, index}:
        both = f"{', '.join(sorted({one, index} & there))}, and {', '.join(sorted(odd))}"
        raise source.error(f"{source.folder} has two checkpoints: {both}. Remove one.")
    if not there and source.folder.is_dir():
        kind = recognize(source.folder, WEIGHTS) or (
            "Save the model as safetensors, in transformers with "
            "save_pretrained(..., safe_serialization=True)."
        )
        raise source.error(f"{source.folder} has neither {one} nor {index}. {kind}")
    # Where both are, transformers reads the one file, and diffusers those of the index.
    is_one = one in there and (index not in there or one == MODELS[0][0])
    if is_one or not there:
        return [one], None, (one, index)
    mapped = read_json(source, index, LIMIT).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise source.error(f"{index} has no `weight_map`; got {shorten(mapped)}.", index)
    for file in mapped.values():
        # With a name that leads out of the folder, the copy would be written there too.
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.\-]*\.safetensors", file):
            why = f"names {shorten(file)}; expected a safetensors file in the same folder."
            raise source.error(f"{index} {why}", index)
    return sorted(set(mapped.values())), mapped, (one, index)


def _describe(source: Source, name: str) -> Problem:
    path = source.folder / name
    what = "a broken link" if path.is_symlink() and not path.exists() else "not a regular file"
    return Problem(name, f"is {'a folder' if path.is_dir() else what}")


def _others(source: Source, read: set[str]) -> tuple[list[str], list[str], list[str]]:
    """Lists the other paths: files to copy, paths to leave out, and paths that are no files."""
    kept, left_out, odd = [], [], []
    for path in _walk(source):
        name = path.relative_to(source.folder).as_posix()
        if name in read:
            continue
        # With an adapter_config.json, transformers would apply the adapter a second time.
        is_folder = path.is_dir() and not _has_name_of_file(source, path)
        if is_folder or _WEIGHTS.search(path.name) or name in (CONFIG, TENSORS):
            left_out.append(name)
        else:
            (kept if path.is_file() else odd).append(name)
    return sorted(kept), sorted(left_out), sorted(odd)


def _has_name_of_file(source: Source, path: Path) -> bool:
    """Whether a path is named like a file that a model needs with its weights."""
    return path.parent == source.folder and path.suffix in (".json", ".jinja", ".model", ".txt")


def _walk(source: Source) -> Iterator[Path]:
    """Yields the files of a folder and its folders, and what is not copied, as a whole."""
    left = [source.folder]
    while left:
        for path in left.pop().iterdir():
            is_whole = path.is_symlink() or path.name in (".git", ".cache")
            if is_whole or not path.is_dir() or _has_name_of_file(source, path):
                yield path
            else:
                left.append(path)

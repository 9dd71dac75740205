"""Files that lie, at random: an answer that is right, or an error in our words.

A case costs at most ten seconds and a gigabyte; nothing is written but the result, and that whole.
"""

import functools
import json
import math
import os
import random
import resource
import shutil
from collections.abc import Callable
from typing import Any

import click.testing
import jax
import jax.numpy as jnp
import numpy as np
import peft_models as models
import pytest
from nodes import PLAIN
from nodes import draw as draw_node
from peft_files import DEEP, WILD, Files, Folder, bounded, edit_metadata, mutate
from safetensors.numpy import save_file

import jlora
from jlora import arithmetic, checkpoint, peft
from jlora._cli._app import cli
from tests.peft.merge.test_peft_merged import INDEX, fixture, read

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def campaign(
    count: int, root: Folder, lie: Callable[..., Any], answer: Callable[..., Any], words: Any
) -> None:
    """Folders with a lie in each: some are answered, right in spite of it."""
    right = 0
    for seed in range(count):
        draw, folder = random.Random(seed), root / str(seed)
        folder.mkdir()
        given, out = lie(draw, folder), folder / "out"
        before = {p: p.lstat().st_size for p in folder.rglob("*")}
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with bounded():
                answer(given, out)
            right += 1
        except (ValueError, FileNotFoundError) as e:
            assert str(e).startswith(words), (seed, e)
            assert not out.exists(), seed
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20  # KiB
        after = {p: p.lstat().st_size for p in folder.rglob("*") if out not in (p, *p.parents)}
        assert after == before, seed
        shutil.rmtree(folder)
    assert 0 < right < count


def assert_finite(arrays: Any) -> None:
    assert all(np.isfinite(np.float64(x)).all() for x in jax.tree.leaves(arrays))


# ------------------------------------------------------------------------------ adapters of PEFT


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The checkpoints of fixtures, the first also in three shards, and what lies outside of it."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("qv", "tied", "experts"):
        fixture(name, folder / name)
    fixture("qv", folder / "shards", 3)
    return folder


def load(bases: Folder, files: Files, _: Folder) -> None:
    found, case = files.load(), files.case
    whole = peft.load(case.folder, case.base, case.names)
    assert [x.shape for x in jax.tree.leaves(found)] == [x.shape for x in jax.tree.leaves(whole)]
    assert_finite(found)


def read_alone(bases: Folder, files: Files, _: Folder) -> None:
    assert_finite(peft.read(files.folder).leaves)


def check(bases: Folder, files: Files, _: Folder) -> None:
    for engine in peft.ENGINES:
        assert all(x.remedy for x in peft.check(files.folder, engine).findings)


def combine(bases: Folder, files: Files, out: Folder) -> None:
    each = [peft.read(x) for x in (files.folder, files.case.folder)]
    peft.write(out, peft.Contents(arithmetic.add([x.leaves for x in each])))
    assert_finite(peft.read(out).leaves)


def merge(bases: Folder, files: Files, out: Folder) -> None:
    base = bases / files.folder.name / "base"
    peft.export_merged(base, files.folder, out)
    merged = read(out)
    assert {k: x.shape for k, x in merged.items()} == {k: x.shape for k, x in read(base).items()}
    assert_finite(merged)


WAYS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "load": (load, ("qv", "tied"), ("`path`: ",)),
    "read": (read_alone, ("tied", "gpt2_tied", "experts", "bias_all", "conv"), ("`path`: ",)),
    "check": (check, ("qv", "tied"), ("`path`: ",)),
    "merge": (merge, ("qv", "tied", "experts"), ("`adapter`",)),
    "combine": (
        combine,
        ("tied", "gpt2_tied", "patterns", "layers"),
        ("`path`: ", "`contents`", "`adapters` "),
    ),
}
MANY = pytest.param(10_000, marks=pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:adapter_config.json of the adapter. .*")
@pytest.mark.parametrize("count", [30, MANY])
@pytest.mark.parametrize("way", WAYS)
def test_adapters(way: str, count: int, tmp_path: Folder, bases: Folder) -> None:
    answer, names, words = WAYS[way]

    def lie(draw: random.Random, folder: Folder) -> Files:
        mutate(files := Files(folder, draw.choice(names)), draw)
        return files

    campaign(count, tmp_path, lie, functools.partial(answer, bases), words)


# ------------------------------------------------------------------------- indices of checkpoints


def lie_in_index(draw: random.Random, folder: Folder) -> None:
    path = folder / "base" / INDEX
    index = json.loads(path.read_text())
    where = index["weight_map"]
    name, other = draw.sample(sorted(where), 2)
    kinds = "file swap drop add link gone cut text twice folder metadata"
    kind = draw.choice(kinds.split())
    outside, shard = folder / "outside.safetensors", path.parent / draw.choice(SHARDS)
    if kind == "file":
        where[name] = draw.choice([*WILD, f"../{outside.name}", str(outside), f"./{SHARDS[0]}"])
    elif kind == "swap":
        where[name], where[other] = where[other], where[name]
    elif kind == "drop":
        del where[name]
    elif kind == "add":
        where[draw.choice(["x.weight", "", "../x", name + "\0"])] = draw.choice(SHARDS)
    elif kind == "metadata":
        index[draw.choice(["metadata", "weight_map", "x"])] = draw.choice(WILD)
    text = draw.choice(DEEP) if kind == "text" else json.dumps(index)
    path.write_bytes(text.encode("latin-1", "replace"))
    if kind == "twice":
        shutil.copy(path.parent / SHARDS[0], path.parent / SHARDS[1])
    elif kind == "cut":
        os.truncate(shard, draw.randrange(shard.stat().st_size))
    elif kind in ("link", "gone", "folder"):
        shard.unlink()
        if kind == "link":
            shard.symlink_to(draw.choice([outside, "/dev/zero", "/etc/passwd", shard, "nowhere"]))
        elif kind == "folder":
            shard.mkdir()


@pytest.mark.parametrize("count", [40, MANY])
def test_indices(count: int, tmp_path: Folder, bases: Folder) -> None:
    """By the command, which says of each in its words why it ends."""
    adapter = models.case("qv").folder
    peft.export_merged(bases / "shards" / "base", adapter, tmp_path / "whole")
    expected = read(tmp_path / "whole")

    def lie(draw: random.Random, folder: Folder) -> Folder:
        shutil.copytree(bases / "shards" / "base", folder / "base")
        save_file({"x.weight": np.ones((4, 6), np.float32)}, folder / "outside.safetensors")
        lie_in_index(draw, folder)
        return folder / "base"

    def answer(base: Folder, out: Folder) -> None:
        args = ["merge", *map(str, (base, adapter, out))]
        result = click.testing.CliRunner().invoke(cli, args)
        if result.exit_code:
            assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result
            assert "Traceback" not in result.output
            raise ValueError(result.stderr)
        found = read(out)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(x, expected[key]) for key, x in found.items())

    campaign(count, tmp_path, lie, answer, ("jlora: ",))


# ------------------------------------------------------------------------------------------ Orbax


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Any, Any]:
    """An adapter in Orbax, with its base."""
    folder = tmp_path_factory.mktemp("orbax")
    base = {"up": {"kernel": jnp.ones((600, 8))}, "head": jnp.ones((3, 4))}
    adapter = {"up": {"kernel": draw_node(2, (600, 8), PLAIN, 2)}, "head": jnp.ones((3, 4))}
    rules = (jlora.LoRA("up", rank=2), jlora.Full("head"))
    checkpoint.save(folder / "a", adapter, rules, base=base, step=3)
    return folder / "a", base, adapter


def lie_in_orbax(draw: random.Random, folder: Folder) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "flip", "cut", "gone", "link", "field", "field", "swap", "text"])
    if kind == "flip" and data:
        for _ in range(draw.choice([1, 1, 3])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[: draw.randrange(len(data) + 1)])
    elif kind == "gone":
        path.unlink()
    elif kind == "link":
        path.unlink()
        target = draw.choice(["/etc/passwd", "/dev/zero", path.name, "nowhere", files[0], None])
        path.symlink_to(target) if target else os.mkfifo(path)
    elif kind == "swap":
        path.write_bytes(draw.choice(files).read_bytes())
    elif kind == "text":
        path.write_bytes(draw.choice(DEEP).encode("latin-1", "replace"))
    elif kind == "field":
        edit_metadata(folder, functools.partial(change_somewhere, draw))


def change_somewhere(draw: random.Random, at: Any) -> None:
    """Another value anywhere within."""
    key = draw.choice(sorted(at) if isinstance(at, dict) else range(len(at)))
    if isinstance(at[key], dict | list) and at[key] and draw.random() >= 0.2:
        change_somewhere(draw, at[key])
    else:
        at[key] = draw.choice(WILD)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("count", [20, MANY])
def test_orbax(count: int, tmp_path: Folder, saved: Any) -> None:
    whole, base, adapter = saved

    def lie(draw: random.Random, folder: Folder) -> Folder:
        lie_in_orbax(draw, shutil.copytree(whole, folder / "a"))
        return folder / "a"

    def answer(folder: Folder, _: Folder) -> None:
        found = checkpoint.restore(folder, base=base)
        checkpoint.read(folder)
        assert math.isfinite(found["up"]["kernel"].scale)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(adapter), strict=True):
            np.testing.assert_array_equal(x, y)

    campaign(count, tmp_path, lie, answer, ("`path`: ", "`base`"))

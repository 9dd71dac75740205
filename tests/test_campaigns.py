"""Files that lie, at random: an answer that is right, or an error in our words.

A case costs at most ten seconds and a gigabyte; nothing is written but the result, and that whole.
"""

import contextlib
import json
import math
import os
import pathlib
import random
import resource
import shutil
import time
from collections.abc import Iterator
from typing import Any

import click.testing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import checkpoint, peft
from jlora._cli._app import cli
from jlora.checkpoint._meta import digest
from jlora.peft.adapter._config import DEFAULTS

Folder = pathlib.Path
PREFIX = "base_model.model."
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
WILD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 1e300, 2**70, 10**400, "", "q", "x" * 10_000, "../x", "/etc/x",
    [], ["q"], [[]], {}, {"a": 1}, {"q": 2}, [None], [1, 2], "[", "(", "a{0,9}" * 9, "(a|a)*", "\0",
]  # fmt: skip
DEEP = ["[" * 10**5, '{"a":' * 10**5, '{"r": NaN}', '{"r": 1e999}', '{"r": -Infinity}', "", "\xff"]


def write_adapter(folder: Folder) -> None:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    tensors = {}
    for i in range(3):
        tensors[f"{PREFIX}h.{i}.q.lora_A.weight"] = draw.standard_normal((2, 6), np.float32)
        tensors[f"{PREFIX}h.{i}.q.lora_B.weight"] = draw.standard_normal((4, 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_model(folder: Folder) -> None:
    folder.mkdir(parents=True)
    draw, index = np.random.default_rng(1), {}
    for i, file in enumerate(SHARDS):
        tensors = {f"h.{i}.{m}.weight": draw.standard_normal((4, 6), np.float32) for m in "qk"}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "x"}))


def merged(folder: Folder) -> dict[str, bytes]:
    return {
        n: x.tobytes()
        for f in sorted(folder.glob("*.safetensors"))
        for n, x in load_file(f).items()
    }


@contextlib.contextmanager
def watched(folder: Folder, out: Folder) -> Iterator[None]:
    """Within time and memory, and writes nothing but `out`."""
    before = {p: p.lstat().st_size for p in folder.rglob("*")}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20  # KiB
    after = {p: p.lstat().st_size for p in folder.rglob("*") if out not in (p, *p.parents)}
    assert after == before


def rewrite(draw: random.Random, path: Folder, kind: str, fields: Any) -> None:
    """Writes JSON, or what is none."""
    text = draw.choice(DEEP) if kind == "text" else json.dumps(fields)
    path.write_bytes(text.encode("latin-1", "replace"))


def lie_in_config(draw: random.Random, folder: Folder) -> None:
    path = folder / "a" / "adapter_config.json"
    fields = json.loads(path.read_text())
    kind = draw.choice(["field", "field", "field", "nested", "text", "missing", "long"])
    known = draw.choice([*fields, *DEFAULTS])
    if kind == "field":
        fields[known] = draw.choice(WILD)
    elif kind == "nested":
        fields[known] = {str(draw.choice(WILD)): draw.choice(WILD) for _ in range(3)}
    elif kind == "missing":
        del fields[draw.choice(list(fields))]
    elif kind == "long":
        fields[known] = [f"{i}q" for i in range(draw.choice([100, 10_000, 20_000]))]
    rewrite(draw, path, kind, fields)


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
    rewrite(draw, path, kind, index)
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


def merge_or_refuse(folder: Folder, expected: dict[str, bytes], exact: bool) -> bool:
    """Whether it was merged: then as it should be, or of finite numbers."""
    out = folder / "out"
    result = click.testing.CliRunner().invoke(
        cli, ["merge", str(folder / "base"), str(folder / "a"), str(out)]
    )
    if result.exit_code:
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.stderr.startswith("jlora: "), result.stderr
        assert "Traceback" not in result.output
        assert not out.exists()
        return False
    found = merged(out)
    assert found.keys() == expected.keys()
    if exact:
        assert found == expected
    assert all(np.isfinite(np.frombuffer(x, np.float32)).all() for x in found.values())
    return True


# ------------------------------------------------------------------------------------------ Orbax


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Any, Any]:
    """An adapter in Orbax, with its base."""
    folder = tmp_path_factory.mktemp("orbax")
    base = {"up": {"kernel": jnp.ones((600, 8))}, "head": jnp.ones((3, 4))}
    layout = jlora.types.Layout((), (0,), (1,))
    draw = np.random.default_rng(2)
    a, b = (jnp.asarray(draw.standard_normal(s), jnp.float32) for s in ((600, 2), (2, 8)))
    node = jlora.types.LowRank(a, b, 1.0, layout)
    adapter = {"up": {"kernel": node}, "head": jnp.ones((3, 4))}
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
        edit_metadata(draw, folder / "jlora" / "metadata")


def edit_metadata(draw: random.Random, path: Folder) -> None:
    """Another value somewhere, and the hash that fits it."""
    fields = json.loads(path.read_text())
    at: Any = fields
    while True:
        key = draw.choice(sorted(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], dict | list) or not at[key] or draw.random() < 0.2:
            break
        at = at[key]
    at[key] = draw.choice(WILD)
    path.write_text(json.dumps(fields | {"sha256": digest(fields)}))


def restore_or_refuse(folder: Folder, base: Any, adapter: Any) -> bool:
    try:
        found = checkpoint.restore(folder, base=base)
        checkpoint.read(folder)
    except (ValueError, FileNotFoundError) as e:
        assert str(e).startswith(("`path`: ", "`base`")), e
        return False
    assert math.isfinite(found["up"]["kernel"].scale)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(x, y)
    return True


@pytest.mark.parametrize("size", [1e300, -1, 2**70, True, "2", None])
def test_a_shape_that_is_none(size: Any, saved: Any, tmp_path: Folder) -> None:
    folder = shutil.copytree(saved[0], tmp_path / "a")
    path = folder / "jlora" / "metadata"
    fields = json.loads(path.read_text())
    next(iter(fields["adapter"][0]["arrays"].values()))[0][0] = size
    path.write_text(json.dumps(fields | {"sha256": digest(fields)}))
    with pytest.raises(ValueError, match=r"`path`: the metadata of .* are damaged .*a shape, got"):
        checkpoint.restore(folder)


# ------------------------------------------------------------------------------------- campaigns


def campaign(count: int, whole: Folder, root: Folder, lie: Any, answer: Any) -> None:
    """Copies of a folder with a lie in each: some are answered, right in spite of it."""
    right = 0
    for seed in range(count):
        folder = shutil.copytree(whole, root / str(seed))
        lie(random.Random(seed), folder)
        with watched(folder, folder / "out"):
            right += answer(folder)
        shutil.rmtree(folder)
    assert 0 < right < count


def counts(daily: int) -> Any:
    return pytest.mark.parametrize("count", [daily, pytest.param(10_000, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, dict[str, bytes]]:
    """An adapter in PEFT's form and a checkpoint of its model, and what they are merged."""
    folder = tmp_path_factory.mktemp("peft")
    write_model(folder / "base")
    write_adapter(folder / "a")
    peft.export_merged(folder / "base", folder / "a", folder / "out")
    expected = merged(folder / "out")
    shutil.rmtree(folder / "out")
    save_file({"x.weight": np.ones((4, 6), np.float32)}, folder / "outside.safetensors")
    return folder, expected


@pytest.mark.filterwarnings("ignore:adapter_config.json of the adapter. .*matches no adapted")
@counts(40)
@pytest.mark.parametrize("lie", [lie_in_config, lie_in_index])
def test_merging(lie: Any, count: int, tmp_path: Folder, whole: Any) -> None:
    folder, expected = whole
    answer = lambda copy: merge_or_refuse(copy, expected, lie is lie_in_index)  # noqa: E731
    campaign(count, folder, tmp_path, lie, answer)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@counts(30)
def test_orbax(count: int, tmp_path: Folder, saved: Any) -> None:
    folder, base, adapter = saved
    answer = lambda copy: restore_or_refuse(copy, base, adapter)  # noqa: E731
    campaign(count, folder, tmp_path, lie_in_orbax, answer)

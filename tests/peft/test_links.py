"""Links in the folders of adapters and bases: those into the Hub's cache alone are followed."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from messages import refused
from peft_files import CONFIG, TENSORS, pair, write
from safetensors.numpy import load_file, save_file
from small import some

from jlora import peft
from jlora._cli._app import cli

Folder = pathlib.Path
NAMES = [peft.Name("q/kernel", "q", "io")]
LIKE = {"q": {"kernel": jax.ShapeDtypeStruct((8, 8), np.float32)}}


def folders(root: Folder) -> tuple[Folder, Folder]:
    """A base of one weight, and an adapter for it."""
    root.mkdir(exist_ok=True)
    base = root / "base"
    base.mkdir()
    save_file({"q.weight": np.ones((8, 8), np.float32)}, base / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (base / name).write_text('{"model_type": "llama"}')
    return base, write(root / "adapter", pair("q", 2, 8, 8), r=2)


def in_cache(folder: Folder, below: str = "snapshots/0a1b", model: str = "") -> Folder:
    """The folder as the Hub's client downloads it."""
    home = folder.parent / (model or f"models--me--{folder.name}")
    (home / below).mkdir(parents=True)
    (home / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(home / "blobs" / str(i))
        up = os.path.relpath(home / "blobs" / str(i), home / below)
        (home / below / path.name).symlink_to(up)
    return home / below


def save_with_name(base: Folder, adapter: Folder, out: Folder) -> None:
    given = peft.load(adapter, LIKE, NAMES)
    peft.save(out, LIKE, given, NAMES, base_model=base)


def run(*words: str) -> Callable[[Folder, Folder, Folder], None]:
    """A command with the folders `base`, `adapter` and `out` for these words."""

    def call(base: Folder, adapter: Folder, out: Folder) -> None:
        paths = {"base": base, "adapter": adapter, "out": out}
        found = CliRunner().invoke(cli, [str(paths.get(x, x)) for x in words])
        if found.exit_code:
            raise ValueError(found.output)

    return call


# What reads the adapter, and what reads the base.
ADAPTERS: dict[str, Callable[[Folder, Folder, Folder], Any]] = {
    "load": lambda base, adapter, out: peft.load(adapter, LIKE, NAMES),
    "read": lambda base, adapter, out: peft.read(adapter),
    "export_merged": lambda base, adapter, out: peft.export_merged(base, adapter, out),
    "write": lambda base, adapter, out: peft.write(out, peft.read(adapter), "vllm"),
    "check": lambda base, adapter, out: peft.check(adapter, "vllm"),
    "jlora merge": run("merge", "base", "adapter", "out"),
    "jlora inspect": run("inspect", "adapter"),
    "jlora check": run("check", "adapter", "--for", "vllm"),
    "jlora diff": run("diff", "adapter", "adapter"),
    "jlora combine": run("combine", "adapter", "adapter", "out"),
    "jlora convert": run("convert", "adapter", "out", "--profile", "vllm"),
}
BASES: dict[str, Callable[[Folder, Folder, Folder], Any]] = {
    "export_merged": ADAPTERS["export_merged"],
    "load_base": lambda base, adapter, out: peft.load_base(base, NAMES, like=LIKE),
    "save_base": lambda base, adapter, out: peft.save_base(
        out, peft.load_base(base, NAMES, like=LIKE), NAMES, config=base
    ),
    "save": save_with_name,
    "check of a base": lambda base, adapter, out: peft.check(adapter, "vllm", base=base),
    "jlora merge": ADAPTERS["jlora merge"],
    "jlora check --base": run("check", "adapter", "--for", "vllm", "--base", "base"),
}


@pytest.mark.parametrize("name", [*(BASES | ADAPTERS)])
def test_the_cache_of_the_hub(name: str, tmp_path: Folder) -> None:
    """Read as the files themselves; what is written has no links."""
    base, adapter = map(in_cache, folders(tmp_path))
    (BASES | ADAPTERS)[name](base, adapter, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_what_is_merged_from_the_cache(tmp_path: Folder) -> None:
    base, adapter = folders(tmp_path / "plain")
    peft.export_merged(base, adapter, tmp_path / "expected")
    base, adapter = map(in_cache, folders(tmp_path / "cached"))
    peft.export_merged(base, adapter, tmp_path / "out")
    assert (load_file(tmp_path / "out" / "model.safetensors")["q.weight"] == 2).all()
    for path in (tmp_path / "expected").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


# The forms of the cache that are read.
CACHES: dict[str, Callable[[Folder], Folder]] = {
    "a subfolder": lambda a: in_cache(a, "snapshots/0a1b/checkpoints/last"),
    "a relative path": lambda a: Folder(os.path.relpath(in_cache(a))),
    "a link to the snapshot": lambda a: link(a.parent / "mine", in_cache(a)),
    "a linked cache": lambda a: link(a.parent / "hub", in_cache(a).parents[2]).joinpath(
        "models--me--adapter/snapshots/0a1b"
    ),
    "a folder of links": lambda a: in_cache(a, "../mine"),
    "of two models": lambda a: link_config(
        in_cache(a), in_cache(write(a.parent / "b", pair("q"), r=2)) / CONFIG
    ),
    "links of links": lambda a: add(in_cache(a), "../../blobs/more", CONFIG),
    "within the folder": lambda a: add(a, "other.json", CONFIG),
}


def link(path: Folder, to: Any) -> Folder:
    path.symlink_to(to)
    return path


def add(folder: Folder, to: str, file: str) -> Folder:
    """A link to `to`, which gets what the file had."""
    (folder / file).rename(folder / "moved")
    data = (folder / "moved").read_bytes()
    target = folder / to
    if (folder / "moved").is_symlink():
        target.symlink_to(os.path.relpath((folder / "moved").resolve(), target.parent))
    else:
        target.write_bytes(data)
    (folder / "moved").unlink()
    (folder / file).symlink_to(to)
    return folder


@pytest.mark.parametrize("case", CACHES)
def test_forms_of_the_cache(case: str, tmp_path: Folder) -> None:
    adapter = CACHES[case](folders(tmp_path)[1])
    assert (adapter / CONFIG).is_symlink()
    assert peft.read(adapter).leaves.keys() == {"q"}


def secret(root: Folder) -> Folder:
    """A file elsewhere that would be a sound configuration."""
    path = root / "secret"
    path.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q"], "r": 2}))
    return path


def link_config(adapter: Folder, to: Any) -> Folder:
    (adapter / CONFIG).unlink()
    (adapter / CONFIG).symlink_to(to)
    return adapter


def linked_blobs(adapter: Folder) -> Folder:
    """`blobs` itself leads out of the model's folder."""
    folder = in_cache(adapter)
    blobs = folder.parents[1] / "blobs"
    blobs.rename(adapter.parent / "elsewhere")
    blobs.symlink_to(adapter.parent / "elsewhere")
    return folder


def linked_model(adapter: Folder) -> Folder:
    """The model's folder is a link to one that has another name."""
    folder = in_cache(adapter)
    home = folder.parents[1]
    home.rename(adapter.parent / "plain")
    home.symlink_to("plain")
    return folder


def far(adapter: Folder) -> str:
    """A link within the cache to one that leads out of it."""
    link(adapter.parent / f"models--me--{adapter.name}" / "far", secret(adapter.parent))
    return "../../far"


# The shapes that look like the cache and lead out of it.
HOSTILE: dict[str, Callable[[Folder], Folder]] = {
    "out of a plain folder": lambda a: link_config(a, secret(a.parent)),
    "absolute, out of the cache": lambda a: link_config(in_cache(a), secret(a.parent)),
    "dots, out of the cache": lambda a: link_config(
        in_cache(a), f"../../blobs/../../{secret(a.parent).name}"
    ),
    "over a link in the cache": lambda a: link_config(in_cache(a), far(a)),
    "no name of a model": lambda a: in_cache(a, model="adapters--me"),
    "no blob": lambda a: link_config(in_cache(a), secret(a.parent / f"models--me--{a.name}")),
    "linked blobs": linked_blobs,
    "linked model": linked_model,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_links_that_lead_out(case: str, tmp_path: Folder) -> None:
    """Refused with the file, where it leads, and the remedy, which `--follow-links` is not."""
    adapter = HOSTILE[case](folders(tmp_path)[1])
    message = rf"^`path`: .*{CONFIG} is a link out of the folder, to .* with links followed \(cp"
    with pytest.raises(ValueError, match=message) as e:
        peft.read(adapter)
    assert str(e.value).endswith("(cp -rL).")
    for name in ADAPTERS:
        with refused(ValueError, "", "is a link out of the folder"):
            ADAPTERS[name](tmp_path / "base", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", some(["export_merged", "save_base", "save", "jlora merge"]))
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_links_out_of_a_base(name: str, file: str, tmp_path: Folder) -> None:
    """Not copied; `follow_links` is advised where it exists."""
    if (name, file) == ("save", "tokenizer.json"):
        return  # which it does not read
    base, adapter = folders(tmp_path)
    (base / file).unlink()
    (base / file).symlink_to(secret(tmp_path))
    with pytest.raises(ValueError, match=rf"{file} is a link out of the folder") as e:
        BASES[name](base, adapter, tmp_path / "out")
    advice = {"export_merged": ", or `follow_links=True`.", "jlora merge": ", or --follow-links."}
    assert str(e.value).strip().endswith(advice.get(name, "(cp -rL)."))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_a_download_that_was_cut_off(file: str, tmp_path: Folder) -> None:
    """A blob is missing."""
    adapter = in_cache(folders(tmp_path)[1])
    (adapter / file).resolve().unlink()
    with pytest.raises(FileNotFoundError, match=rf"`path`: .*{file} is a broken link, to \.\./"):
        peft.read(adapter)


def test_a_file_becomes_a_link(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check and the opening: the link is not followed."""
    adapter, open_ = folders(tmp_path)[1], os.open

    def swapped(path: Any, *args: Any, **kwargs: Any) -> int:
        if Folder(path).name == CONFIG:
            link_config(adapter, secret(tmp_path))
        return open_(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(OSError, match=CONFIG):
        peft.read(adapter)

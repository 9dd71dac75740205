"""Links in the folders of adapters and bases: those into the Hub's cache alone are followed."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from messages import refused
from peft_calls import ADAPTERS, BASES, folders
from peft_files import CONFIG, TENSORS, Folder, bytes_of, pair, write

from jlora import peft


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


@pytest.mark.parametrize("name", [*(BASES | ADAPTERS)])
def test_the_cache_of_the_hub(name: str, tmp_path: Folder) -> None:
    """Read as the files themselves; what is written has no links."""
    call, out = (BASES | ADAPTERS)[name], tmp_path / "out"
    call(*folders(tmp_path / "plain"), tmp_path / "expected")
    call(*map(in_cache, folders(tmp_path / "cached")), out)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    if "params" not in name:  # what Orbax writes is never the same
        assert bytes_of(out) == bytes_of(tmp_path / "expected")


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


ADVICE = {"export_merged": ", or `follow_links=True`.", "jlora merge": ", or --follow-links."}


@pytest.mark.parametrize("name", ["export_merged", "save_base", "save", "jlora merge"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_out_of_a_base(name: str, file: str, tmp_path: Folder) -> None:
    """Not copied unless that is asked for, which is advised where it can be."""
    if name == "save" and file != "config.json":
        return  # which it does not read
    base, adapter = folders(tmp_path)
    peft.export_merged(base, adapter, tmp_path / "whole")
    (base / file).rename(tmp_path / "secret")
    (base / file).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=rf"{file} is a link out of the folder") as e:
        BASES[name](base, adapter, tmp_path / "out")
    assert str(e.value).strip().endswith(ADVICE.get(name, "(cp -rL)."))
    assert not (tmp_path / "out").exists()
    if name == "export_merged":
        peft.export_merged(base, adapter, tmp_path / "out", follow_links=True)
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


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

"""Folders, files and keys that are not as PEFT saves them: the error says what they are."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import refused
from peft_calls import FUNCTIONS, LIKE, NAMES, folders
from peft_files import CONFIG, ENDS, PREFIX, TENSORS, Folder, pair, write
from safetensors.numpy import save_file

from jlora import checkpoint, peft
from jlora.types import Layout, LowRank
from tests.peft.test_links import in_cache

ONE = np.ones((2, 2), np.float32)


def holding(path: Folder, *keys: str) -> Folder:
    """The folder of a new safetensors file of these keys."""
    path.parent.mkdir(exist_ok=True)
    save_file(dict.fromkeys(keys, ONE), path)
    return path.parent


def mlx(root: Folder) -> Folder:
    folder = holding(root / "x" / "adapters.safetensors", "model.layers.0.q_proj.lora_a")
    fields = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
    (folder / CONFIG).write_text(json.dumps(fields))
    return folder


def touch(path: Folder) -> Folder:
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path.parent


def around(root: Folder, below: str, *names: str) -> Folder:
    """A folder with copies of the adapter in it."""
    for name in names:
        shutil.copytree(root / "adapter", root / "x" / below / name)
    return root / "x"


def orbax(root: Folder) -> Folder:
    checkpoint.save(root / "x", peft.load(root / "adapter", LIKE, NAMES), ())
    return root / "x"


MLX = "It is an adapter of MLX."
ONE_OF = "It is a folder with adapters in it."
# What is given for an adapter, what the error says of it, and what to do.
GIVEN: dict[str, tuple[Callable[[Folder], Folder], str, str]] = {
    "file": (lambda root: root / "adapter" / TENSORS, "is a file, not a folder", "Give the folder"),
    "MLX": (mlx, MLX, "mlx_lm.fuse"),
    "older MLX": (lambda root: touch(root / "x" / "adapters.npz"), MLX, "mlx_lm.fuse"),
    "kohya": (
        lambda root: holding(root / "x" / "a.safetensors", "lora_unet_down_0.lora_down.weight"),
        *(f"has no {CONFIG}. If it has a file of image LoRA", "give that file itself."),
    ),
    "steps": (
        lambda root: around(root, ".", "checkpoint-2", "checkpoint-10"),
        *(ONE_OF, "Give one of them: checkpoint-10, checkpoint-2."),
    ),
    "runs": (lambda root: around(root, "run", "last"), ONE_OF, "Give one of them: run/last."),
    "many": (
        lambda root: around(root, ".", *map(str, range(12))), ONE_OF, "10, 11, 2, 3, 4, 5, 6, …"
    ),
    "a model's folder of the cache": (
        lambda root: in_cache(root / "adapter").parents[1], ONE_OF, "of them: snapshots/0a1b."
    ),
    "model": (lambda root: root / "base", "It is a model.", "Give the folder of an adapter."),
    "Orbax": (orbax, "It is a checkpoint of Orbax.", "Use jlora.checkpoint, or write an adapter"),
    "empty": (lambda root: root / "empty", f"has no {CONFIG}.", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", GIVEN)
def test_what_is_given_for_an_adapter(case: str, tmp_path: Folder) -> None:
    """Every function says the same."""
    base, _ = folders(tmp_path)
    (tmp_path / "empty").mkdir()
    make, *facts = GIVEN[case]
    given = make(tmp_path)
    for call in FUNCTIONS.values():
        with refused((ValueError, FileNotFoundError), "", *facts):
            call(base, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_given_for_a_base(tmp_path: Folder) -> None:
    base, adapter = folders(tmp_path)
    for given, message in (
        (base / "model.safetensors", "is a file, not a folder. Give the"),
        (adapter, "It is an adapter. Give the folder of its base model."),
        (tmp_path, "It is a folder with models in it. Give one of them: base."),
    ):
        with refused(ValueError, "path", given, message):
            peft.export_merged(given, adapter, tmp_path / "out")
        with refused(ValueError, "path", given, message):
            peft.load_base(given, LIKE, NAMES)
    with refused(ValueError, "path", adapter / CONFIG, "but it is a file"):
        checkpoint.restore(adapter / CONFIG)


def test_a_search_is_bounded(tmp_path: Folder) -> None:
    """Of folders in a circle, and of what is deeper, nothing is said."""
    (tmp_path / "x" / "a" / "b").mkdir(parents=True)
    (tmp_path / "x" / "up").symlink_to(tmp_path)
    shutil.move(write(tmp_path / "adapter", pair("q")), tmp_path / "x" / "a" / "b" / "c")
    with refused(FileNotFoundError, "path", tmp_path / "x", f"has no {CONFIG}."):
        peft.read(tmp_path / "x")


# ---------------------------------------------------------------------------------------- keys


def renamed(change: Callable[[str], str]) -> dict[str, Any]:
    return {change(PREFIX + key): x for key, x in pair("layers.0.q", 2, 8, 8).items()}


# Keys of other ways to save, and what the error says of them.
KEYS: dict[str, tuple[Callable[[str], str], str]] = {
    "state_dict": (
        lambda key: key.replace(".weight", ".default.weight"),
        "has the name of an adapter in it, as in model.state_dict(). ",
    ),
    "FSDP": (lambda key: key.replace(".0.", ".0._fsdp_wrapped_module."), "in a wrapper: of FSDP"),
    "compiled": (lambda key: key.replace(".0.", ".0._orig_mod."), "in a wrapper: of FSDP, torch."),
    "distributed": (lambda key: f"module.{key}", "in a wrapper: of FSDP"),
    "kohya": (
        lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        "is of image LoRA. Give the file itself, under another name than",
    ),
    "MLX": (
        lambda key: key.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"),
        "is MLX's. Merge it into its model with mlx_lm.fuse.",
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_have_a_cause(case: str, tmp_path: Folder) -> None:
    """It is said before all problems, of which there is one for each key."""
    change, message = KEYS[case]
    base, adapter = folders(tmp_path)
    save_file({"layers.0.q.weight": np.ones((8, 8), np.float32)}, base / "model.safetensors")
    save_file(renamed(change), adapter / TENSORS)
    names = [peft.Name(r"(.*)/kernel", r"\1", "io")]
    params = {"layers": {"0": {"q": {"kernel": jnp.ones((8, 8))}}}}
    with refused(ValueError, "path", "nothing was loaded. The key ", message):
        peft.load(adapter, params, names)
    with refused(ValueError, "adapter", "nothing was written. The key ", message):
        peft.export_merged(base, adapter, tmp_path / "out")


def test_a_compiled_model_as_a_whole(tmp_path: Folder) -> None:
    """Its first component may differ, as any may."""
    base, adapter = folders(tmp_path)
    merged = []
    for first in ("", "_orig_mod."):
        tensors = {PREFIX + first + key: x for key, x in pair("q", 2, 8, 8).items()}
        save_file(tensors, adapter / TENSORS)
        peft.export_merged(base, adapter, out := tmp_path / f"out{first}")
        merged.append((out / "model.safetensors").read_bytes())
    assert merged[0] == merged[1] != (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("shapes", [((2, 0), (8, 2)), ((2, 8), (0, 2)), ((0,), (0,))])
def test_tensors_of_no_size(shapes: Any, tmp_path: Folder) -> None:
    """What DeepSpeed leaves, and the same in a tree."""
    base, adapter = folders(tmp_path)
    own = {PREFIX + "q" + end: np.ones(s, np.float32) for end, s in zip(ENDS, shapes, strict=True)}
    save_file(own, adapter / TENSORS)
    for name in ("read", "load", "export_merged"):
        with refused(ValueError, "", ".weight has no values, as DeepSpeed's ZeRO-3 saves"):
            FUNCTIONS[name](base, adapter, tmp_path / "out")


def test_a_leaf_of_no_size(tmp_path: Folder) -> None:
    base, _ = folders(tmp_path)
    shape = (8, 0)
    save_file({"q.weight": np.ones(shape[::-1], np.float32)}, base / "model.safetensors")
    node = LowRank(np.ones((8, 2)), np.ones((2, 0)), 1.0, Layout((), (0,), (1,)))
    like = {"q": {"kernel": jax.ShapeDtypeStruct(shape, np.float32)}}
    for call in (
        lambda: peft.save(tmp_path / "a", like, {"q": {"kernel": node}}, NAMES),
        lambda: peft.export_merged(base, {"q": {"kernel": node}}, tmp_path / "out", names=NAMES),
    ):
        with refused(ValueError, "adapter", "q/kernel", "without values, of shape (2, 0)"):
            call()
    assert not (tmp_path / "a").exists() and not (tmp_path / "out").exists()

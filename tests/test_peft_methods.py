"""PEFT's files of DoRA, of rows of embeddings and of MiSS: they say what the adapter means."""

from typing import Any

import jax
import numpy as np
import pytest
from peft_files import (
    PREFIX,
    Folder,
    assert_close,
    assert_equal,
    assert_same_files,
    come_back,
    node,
    normal,
    write,
)
from safetensors.numpy import load_file

import jlora
from jlora import peft
from jlora.peft import Name
from jlora.types import Decomposed, Layout, LowRank, Replaced

MAGNITUDE, NEW, HALF = ".lora_magnitude_vector", (6, 1, 3), lambda shape: 0.5
STACK, TURNED = (Name("w", r"w.{}", "lio", transposed=x) for x in (False, True))
SLOTS = Layout((0,), (1,), (2,), (3, (2, 0, 1), 2))
MODULES, OF_V = Name("w", ("k", "v"), "soio"), Layout((), (2,), (0, 1, 3), (2, (1,), 0))
MULTIPLE = Name("w", "w", "io", times=HALF)


def form(name: Name, shape: tuple[int, ...], layout: Layout | None = None) -> Any:
    """Base, random adapter of DoRA and table."""
    return {"w": normal(0, *shape)}, {"w": node(layout or name, shape, cls=Decomposed)}, [name]


def rows(axes: str, shape: tuple[int, ...]) -> Any:
    """Those of a table that lies in any way, and is a multiple of PyTorch's."""
    name = Name("w", "w", axes, times=HALF, interleaved=True)
    (v,) = Replaced.shapes(name.layout, shape, {"rows": 3}).values()
    return {"w": normal(0, *shape)}, {"w": Replaced(normal(1, *v), NEW, name.layout)}, [name]


FORMS: dict[str, Any] = {
    "of a stack": form(STACK, (3, 8, 6)),
    "of weights that are turned": form(TURNED, (3, 8, 6)),
    "of all slots, in any order": form(STACK, (3, 8, 6), SLOTS),
    "of a module that is a slot": form(
        MODULES, (2, 3, 8, 3), Layout((), (2,), (0, 1, 3), (2, (1,), 0))
    ),
    "of a multiple": form(MULTIPLE, (6, 8)),
    "rows": rows("vo", (7, 4)),
    "rows that are columns": rows("ov", (4, 7)),
    "rows of heads": rows("voo", (7, 2, 2)),
    "rows inside": rows("ovo", (2, 7, 2)),
}


@pytest.mark.parametrize("name", FORMS)
def test_w_is_the_same(name: str, tmp_path: Folder) -> None:
    """Magnitudes are norms, and rows the rows, of PyTorch's W'; a merged checkpoint has that W'."""
    base, adapter, names = FORMS[name]
    again = come_back(tmp_path / "a", base, adapter, names)
    if "any order" not in name:
        assert_equal(again, adapter)
    merged = peft.to_tensors(jlora.merge(base, adapter), names)
    for key, x in peft.tensors(base, adapter, names).items():
        module, _, end = key.removeprefix(PREFIX).partition(".")
        weight = merged.get(f"{module}.weight", merged.get(f"{module}.{end[:1]}.weight"))
        if key.endswith(MAGNITUDE):
            assert_close(abs(x), np.linalg.norm(weight, axis=int(names != [TURNED])))
        elif "token" in key:
            assert_close(x, weight[list(NEW)])
    peft.save_base(tmp_path / "base", base, names)
    peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "files")
    peft.export_merged(tmp_path / "base", adapter, tmp_path / "tree", names=names)
    files, tree = (load_file(tmp_path / x / "model.safetensors") for x in ("files", "tree"))
    assert files.keys() == tree.keys() == merged.keys()
    for key, x in merged.items():
        assert_close(tree[key], x)
        assert "any order" in name or np.array_equal(files[key], tree[key])


def test_parts_have_magnitudes_in_one_vector(tmp_path: Folder) -> None:
    names = [Name(x, "up", "io", part=(i, 2)) for i, x in enumerate(("gate", "up"))]
    base = {"gate": normal(8, 8, 6), "up": normal(9, 8, 6)}
    adapter = {x: node(names[0], (8, 6), cls=Decomposed) for x in base}
    adapter["up"] = adapter["up"]._replace(m=2 * adapter["up"].m, b=-adapter["up"].b)
    again = come_back(tmp_path / "a", base, adapter, names)
    assert_close([x.m for x in again.values()], [x.m for x in adapter.values()], 1e-6)


def test_a_mixed_adapter_is_merged(tmp_path: Folder) -> None:
    """PEFT has DoRA at all sites or at none; a checkpoint has both."""
    base, adapter, names = form(STACK, (3, 8, 6))
    base, names = base | {"v": normal(5, 8, 6)}, [*names, low := Name("v", "v", "io")]
    peft.save_base(tmp_path / "base", base, names)
    both = adapter | {"v": node(low, (8, 6))}
    peft.export_merged(tmp_path / "base", both, tmp_path / "out", names=names)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_close(found, peft.to_tensors(jlora.merge(base, both), names))


def test_dropout_of_a_file_is_told(tmp_path: Folder) -> None:
    """It is of training alone; the configuration keeps it."""
    base, adapter, names = form(STACK, (3, 8, 6))
    peft.save(tmp_path / "a", base, adapter, names, config={"lora_dropout": 0.1})
    with pytest.warns(UserWarning, match="lora_dropout: 0.1 is ignored"):
        again = peft.load(tmp_path / "a", base, names)
    config = peft.read_config(tmp_path / "a")
    peft.save(tmp_path / "b", base, again, names, config=config)
    assert_same_files(tmp_path / "a", tmp_path / "b")


# ------------------------------------------------------------------------------------------ MiSS

MISS = {"peft_type": "MISS", "r": 3, "target_modules": ["up"], "init_weights": True, "mini_r": 1}
NAMES = [Name(r"(\w+)/kernel", r"\1", "io"), Name(r"(\w+)/bias", r"\1", "o", "bias")]
BASE = {
    "up": {"kernel": np.asarray(normal(0, 8, 12))},
    "down": {"kernel": np.asarray(normal(1, 12, 8))},
}
BLOCK = np.asarray(normal(2, 3, 12))


def written(folder: Folder, fields: dict[str, Any], **tensors: np.ndarray) -> Folder:
    """An adapter of MiSS, and tensors beside it."""
    return write(folder, {"up.miss_block": BLOCK} | tensors, **fields)


def miss(rank: int, at: str) -> LowRank:
    """What `initializers.miss` starts, with a B."""
    inputs, outputs = BASE[at]["kernel"].shape
    a = np.eye(rank, dtype=np.float32)[np.arange(inputs) % rank]
    return LowRank(a, np.asarray(normal(3, rank, outputs)), 2.0, NAMES[0].layout, frozen=("a",))


def both(ranks: tuple[int, int] = (3, 3)) -> Any:
    return {at: {"kernel": miss(rank, at)} for at, rank in zip(BASE, ranks, strict=True)}


@pytest.mark.parametrize(
    "fields", [MISS, MISS | {"target_modules": None}, {"peft_type": "MISS", "r": 3}]
)
def test_miss_is_the_formula(fields: Any, tmp_path: Folder) -> None:
    """The rows of the block, again and again; A is not trained. Modules are those of the file."""
    adapter = peft.load(written(tmp_path / "a", fields), BASE, NAMES)
    found = adapter["up"]["kernel"]
    expected = np.stack([BLOCK[i % 3] for i in range(8)])
    np.testing.assert_array_equal(found.scale * np.asarray(found.a @ found.b), expected)
    assert (list(adapter), found.frozen) == (["up"], ("a",))


def test_miss_is_written_as_it_was_read(tmp_path: Folder) -> None:
    """Byte for byte, with what is trained beside it; or as LoRA."""
    fields = {
        "auto_mapping": None, "base_model_name_or_path": "base", "bias": "MiSS_only",
        "exclude_modules": None, "inference_mode": True, "init_weights": True,
        "layers_pattern": None, "layers_to_transform": None, "mini_r": 1, "miss_dropout": 0.25,
        "modules_to_save": ["down"], "peft_type": "MISS", "peft_version": "0.19.0", "r": 3,
        "revision": None, "target_modules": ["up"], "task_type": "SEQ_CLS",
    }  # fmt: skip
    base = BASE | {"up": BASE["up"] | {"bias": np.ones(12, np.float32)}}
    beside = {"up.base_layer.bias": BLOCK[0], "down.weight": np.ones((8, 12), np.float32)}
    adapter = peft.load(written(tmp_path / "own", fields, **beside), base, NAMES)
    assert adapter["up"]["kernel"].dropout == 0.25
    config = peft.read_config(tmp_path / "own")
    peft.save(tmp_path / "again", base, adapter, NAMES, config=config)
    assert_same_files(tmp_path / "again", tmp_path / "own")
    peft.save(tmp_path / "plain", base, adapter, NAMES)
    assert peft.read_config(tmp_path / "plain")["peft_type"] == "LORA"


def test_miss_of_any_scale_is_written(tmp_path: Folder) -> None:
    """The scale is in the block, as PEFT has none."""
    adapter = both()
    peft.save(tmp_path / "own", BASE, adapter, NAMES, config={"peft_type": "MISS"})
    assert peft.read_config(tmp_path / "own")["r"] == 3
    loaded = peft.load(tmp_path / "own", BASE, NAMES)
    for name in BASE:
        own, other = adapter[name]["kernel"], loaded[name]["kernel"]
        assert (other.scale, other.frozen) == (1, ("a",))
        np.testing.assert_array_equal(other.b, 2 * own.b)


@pytest.mark.parametrize("config", [None, {"peft_type": "MISS"}])
def test_float64_is_written_as_it_is(config: Any, tmp_path: Folder) -> None:
    """Only JAX needs to be told of 64 bits."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), both())
    wide["up"]["bias"], base = np.full(12, 1 / 3), BASE | {"up": BASE["up"] | {"bias": np.ones(12)}}
    found = peft.tensors(base, wide, NAMES, config=config)
    assert {x.dtype.name for x in found.values()} == {"float64"}
    peft.save(tmp_path / "own", base, wide, NAMES, config=config)
    with pytest.raises(ValueError, match=r"up.*: dtype F64 needs jax_enable_x64"):
        peft.load(tmp_path / "own", base, NAMES)
    with jax.enable_x64(True):
        again = peft.load(tmp_path / "own", base, NAMES)
    np.testing.assert_array_equal(again["up"]["bias"], wide["up"]["bias"])


def test_miss_needs_its_base(tmp_path: Folder) -> None:
    with pytest.raises(
        ValueError, match=r"got 'MISS'; load it onto its base with jlora\.peft\.load"
    ):
        peft.read(written(tmp_path / "a", MISS))

"""PEFT's files of DoRA and of rows of embeddings: they say what the adapter means."""

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
    config_of,
    node,
    normal,
)
from safetensors.numpy import load_file

import jlora
from jlora import peft
from jlora.peft import Name
from jlora.types import Decomposed, Layout, LowRank, Replaced
from tests.peft import test_peft_values as values

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
    "of a module that is a slot": form(MODULES, (2, 3, 8, 3), OF_V),
    "of a multiple": form(MULTIPLE, (6, 8)),
    "rows": rows("vo", (7, 4)),
    "rows that are columns": rows("ov", (4, 7)),
    "rows of heads": rows("voo", (7, 2, 2)),
    "rows inside": rows("ovo", (2, 7, 2)),
    "A and B of other values, in a stack": (*values.adapted("scanned"), values.TABLE),
    "A and B of other values": (*values.adapted("one"), values.TABLE),
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
    config = config_of(tmp_path / "a")
    peft.save(tmp_path / "b", base, again, names, config=config)
    assert_same_files(tmp_path / "a", tmp_path / "b")


# ---------------------------------------------------------------------- methods that are not LoRA

NAMES = [Name(r"(\w+)/kernel", r"\1", "io"), Name(r"(\w+)/bias", r"\1", "o", "bias")]
BASE = {
    "up": {"kernel": np.asarray(normal(0, 8, 12))},
    "down": {"kernel": np.asarray(normal(1, 12, 8))},
}


def miss(rank: int, at: str) -> LowRank:
    """What `initializers.miss` starts, with a B."""
    inputs, outputs = BASE[at]["kernel"].shape
    a = np.eye(rank, dtype=np.float32)[np.arange(inputs) % rank]
    return LowRank(a, np.asarray(normal(3, rank, outputs)), 2.0, NAMES[0].layout, frozen=("a",))


def both() -> Any:
    return {at: {"kernel": miss(3, at)} for at in BASE}


def test_miss_is_saved_as_lora(tmp_path: Folder) -> None:
    """With A, which the file cannot mark as frozen."""
    peft.save(tmp_path / "a", BASE, both(), NAMES)
    assert config_of(tmp_path / "a")["peft_type"] == "LORA"
    for at, found in peft.load(tmp_path / "a", BASE, NAMES).items():
        own = both()[at]["kernel"]
        assert found["kernel"].frozen == ()
        np.testing.assert_array_equal(found["kernel"].a, own.a)


def test_float64_is_written_as_it_is(tmp_path: Folder) -> None:
    """Only JAX needs to be told of 64 bits."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), both())
    wide["up"]["bias"], base = np.full(12, 1 / 3), BASE | {"up": BASE["up"] | {"bias": np.ones(12)}}
    found = peft.tensors(base, wide, NAMES)
    assert {x.dtype.name for x in found.values()} == {"float64"}
    peft.save(tmp_path / "own", base, wide, NAMES)
    with jax.enable_x64(True):
        again = peft.load(tmp_path / "own", base, NAMES)
    np.testing.assert_array_equal(again["up"]["bias"], wide["up"]["bias"])

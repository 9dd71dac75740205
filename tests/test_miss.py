"""MiSS in PEFT's files: loaded as LoRA whose A is frozen, and written again. Other methods."""

import json
import re
from typing import Any

import jax
import numpy as np
import pytest
from peft_files import CONFIG, PREFIX, Folder, write

import jlora
from jlora import peft

MISS = {"peft_type": "MISS", "r": 3, "target_modules": ["up"], "init_weights": True, "mini_r": 1}
Tensors = dict[str, np.ndarray]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def miss() -> Tensors:
    return {"up.miss_block": normal(3, 12)}


def written(folder: Folder, fields: dict[str, Any], tensors: Tensors) -> Folder:
    """The adapter's folder."""
    write(folder / "own", tensors)
    (folder / "own" / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True))
    return folder / "own"


NAMES = [peft.Name(r"(\w+)/kernel", r"\1", "io"), peft.Name(r"(\w+)/bias", r"\1", "o", "bias")]
BASE = {"up": {"kernel": normal(12, 8).T}, "down": {"kernel": normal(8, 12).T}}


def test_is_the_formula(tmp_path: Folder) -> None:
    """The rows of the block, again and again; A is not trained."""
    adapter = peft.load(written(tmp_path, MISS, tensors := miss()), BASE, NAMES)
    node = adapter["up"]["kernel"]
    expected = np.stack([tensors["up.miss_block"][i % 3] for i in range(8)], 1)
    np.testing.assert_array_equal(node.scale * np.asarray(node.a @ node.b).T, expected)
    assert (list(adapter), node.frozen) == (["up"], ("a",))


REFUSED: dict[str, tuple[dict[str, Any], Tensors, str]] = {
    "what is selected and missing": (
        {"target_modules": ["up", "down"]}, miss(),
        r"down\.weight: selected by adapter_config\.json, but",
    ),
    "another form": ({"init_weights": "bat"}, miss(), "init_weights: 'bat' is another method"),
    "another rank": (
        {"r": 4}, miss(), r"up: miss_block \(3, 12\) does not fit 8 inputs at the rank 4"
    ),
    "no rank": ({"r": None}, miss(), "r: expected an integer of at least 1, got None"),
    "a feature": ({"use_dora": True}, miss(), "use_dora: True is a feature that"),
    "a convolution": ({}, {"up.miss_block": normal(3, 12, 1)}, r"miss_block \(3, 12, 1\) does not"),
    "another base": (
        {}, {"left.miss_block": normal(3, 12)}, "left: is no matrix of the base, which MiSS needs"
    ),
    "integers": (
        {}, {"up.miss_block": np.ones((3, 12), np.int32)},
        "up.miss_block: expected a floating-point dtype, got I32",
    ),
    "a strange tensor": ({}, miss() | {"up.more": normal(3)}, "up.more: unexpected"),
    "no block": (
        {}, {"up.lora_A.weight": normal(3, 8), "up.lora_B.weight": normal(12, 3)},
        r"2 problems:\n  .*up\.lora_A\.weight: unexpected in an adapter of MiSS\n  .*up\.lora_B",
    ),
    "a factor beside a block": (
        {}, miss() | {"down.lora_A.weight": normal(3, 12), "down.lora_B.weight": normal(8, 3)},
        r"down\.lora_A\.weight: unexpected in an adapter of MiSS",
    ),
    "a magnitude": (
        {}, miss() | {"up.lora_magnitude_vector": normal(12)},
        r"up\.lora_magnitude_vector: unexpected in an adapter of MiSS",
    ),
    "no change": (
        {"modules_to_save": ["down"]}, {"down.weight": normal(8, 12)}, "no module has a change"
    ),
    "no numbers": (
        {}, {"up.miss_block": np.full((3, 12), np.nan, "f")},
        r"up\.lora_B\.weight: 36 of 36 values are not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_a_and_b_is_named(name: str, tmp_path: Folder) -> None:
    fields, tensors, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        peft.load(written(tmp_path, MISS | fields, tensors), BASE, NAMES)


@pytest.mark.parametrize("fields", [MISS | {"target_modules": None}, {"peft_type": "MISS", "r": 3}])
def test_without_targets_its_modules_are_those_of_the_file(
    fields: dict[str, Any], tmp_path: Folder
) -> None:
    assert list(peft.load(written(tmp_path, fields, miss()), BASE, NAMES)) == ["up"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("MISS", r"got 'MISS'; load it onto its base by jlora\.peft\.load"),
        ("ADALORA", "got 'ADALORA'; write it as LoRA in PEFT, by peft.save_as_lora, or where"),
        (None, r"expected 'LORA', got .*; the file names no method"),
        (["LORA"], r"expected 'LORA', got .*; the file names no method"),
    ],
)
def test_other_methods_have_a_remedy(method: Any, message: str, tmp_path: Folder) -> None:
    """PEFT's own function is named for those that are not read; MiSS needs its base."""
    folder = written(tmp_path, MISS | {"peft_type": method}, miss())
    with pytest.raises(ValueError, match=message):
        peft.read(folder)
    if method != "MISS":
        with pytest.raises(ValueError, match=message):
            peft.load(folder, BASE, NAMES)


def files(folder: Folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_miss_is_written_as_it_was_read(tmp_path: Folder) -> None:
    """Byte for byte, with what is trained beside it; or as LoRA."""
    fields = {
        "auto_mapping": None, "base_model_name_or_path": "base", "bias": "MiSS_only",
        "exclude_modules": None, "inference_mode": True, "init_weights": True,
        "layers_pattern": None, "layers_to_transform": None, "mini_r": 1, "miss_dropout": 0.25,
        "modules_to_save": ["down"], "peft_type": "MISS", "peft_version": "0.19.0", "r": 3,
        "revision": None, "target_modules": ["up"], "task_type": "SEQ_CLS",
    }  # fmt: skip
    base = {**BASE, "up": {**BASE["up"], "bias": normal(12)}}
    tensors = miss() | {"up.base_layer.bias": normal(12), "down.weight": normal(8, 12)}
    own = written(tmp_path, fields, tensors)
    adapter = peft.load(own, base, NAMES)
    assert adapter["up"]["kernel"].dropout == 0.25
    config = peft.read_config(own)
    peft.save(tmp_path / "again", base, adapter, NAMES, config=config)
    assert files(tmp_path / "again") == files(own)
    stored = peft.tensors(base, adapter, NAMES, config=config)
    assert stored.keys() == {PREFIX + key for key in tensors}
    peft.save(tmp_path / "plain", base, adapter, NAMES)
    assert peft.read_config(tmp_path / "plain")["peft_type"] == "LORA"


def started(*rules: Any, base: Any = BASE) -> Any:
    """An adapter of two layers, its B's not zero."""

    def model(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["up"]["kernel"] @ params["down"]["kernel"]

    _, found = jlora.transform(model, *rules).init(jax.random.key(0), base, np.ones((1, 8), "f"))
    return jax.tree.map(lambda x, label: x + 1 if label == "b" else x, found, jlora.labels(found))


MISS_RULE = jlora.LoRA(rank=3, alpha=6, init=jlora.initializers.miss)


def test_miss_of_any_scale_is_written(tmp_path: Folder) -> None:
    """The scale is in the block, as PEFT has none."""
    adapter = started(MISS_RULE)
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
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), started(MISS_RULE))
    wide["up"]["bias"], base = np.full(12, 1 / 3), BASE | {"up": BASE["up"] | {"bias": np.ones(12)}}
    found = peft.tensors(base, wide, NAMES, config=config)
    assert {x.dtype.name for x in found.values()} == {"float64"}
    peft.save(tmp_path / "own", base, wide, NAMES, config=config)
    with pytest.raises(ValueError, match=r"up.*: dtype F64 needs jax_enable_x64"):
        peft.load(tmp_path / "own", base, NAMES)
    with jax.enable_x64(True):
        assert_bits = np.testing.assert_array_equal
        assert_bits(peft.load(tmp_path / "own", base, NAMES)["up"]["bias"], wide["up"]["bias"])


NOT_WRITTEN = {
    "lora": (
        [jlora.LoRA(rank=3)], {"peft_type": "MISS"},
        "`adapter` cannot be written as MISS, which `config` asks for:\n"
        "  down: its A does not repeat the identity, as that of initializers.miss does\n"
        "  up: its A does not repeat the identity, as that of initializers.miss does\n"
        "Without that peft_type it is written as LoRA.",
    ),
    "two ranks": (
        [MISS_RULE, jlora.LoRA("down", rank=2, init=jlora.initializers.miss)][::-1],
        {"peft_type": "MISS"},
        "its sites have the ranks [2, 3], where MiSS has one for all",
    ),
    "dora": ([jlora.DoRA(rank=3)], {"peft_type": "MISS"}, "up: is of DoRA"),
    "bat": (
        [MISS_RULE], {"peft_type": "MISS", "init_weights": "bat"},
        "init_weights: 'bat' is another method, whose change is no s·A·B",
    ),
    "a feature": (
        [MISS_RULE], {"peft_type": "MISS", "use_dora": True},
        "`config` cannot be written:\n  use_dora: True is a feature that jlora does not support",
    ),
    "vera": (
        [MISS_RULE], {"peft_type": "VERA"},
        "`config` cannot be written:\n  peft_type: expected 'LORA', got 'VERA'; "
        "leave peft_type out, or give 'MISS'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_WRITTEN)
def test_what_is_no_miss_is_not_written(name: str, tmp_path: Folder) -> None:
    rules, config, message = NOT_WRITTEN[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        peft.save(tmp_path / "own", BASE, started(*rules), NAMES, config=config)
    assert not (tmp_path / "own").exists()


def test_miss_is_of_linear_modules_and_not_for_vllm() -> None:
    adapter, config = started(MISS_RULE), {"peft_type": "MISS"}
    expected = "`profile` 'vllm' is of LoRA, and `config` asks for MISS. Leave peft_type out of it."
    with pytest.raises(ValueError, match=expected):
        peft.tensors(BASE, adapter, NAMES, config=config, profile="vllm")
    names = [peft.Name(r"(\w+)/kernel", r"\1", "io", transposed=True)]
    with pytest.raises(ValueError, match="fan_in_fan_out: true, of weights that are stored as"):
        peft.tensors(BASE, adapter, names, config=config)
    table = {"embed": {"embedding": np.ones((4, 8), np.float32)}}
    rows = jlora.types.Replaced(
        np.ones((2, 8), np.float32), (1, 2), jlora.types.Layout((), (0,), (1,))
    )
    names = [*NAMES, peft.Name(r"(\w+)/embedding", r"\1", "vo")]
    with pytest.raises(ValueError, match="trainable_token_indices: rows of an embedding, which"):
        peft.tensors(BASE | table, adapter | {"embed": {"embedding": rows}}, names, config=config)
    names = [peft.Name(r"(\w+)/kernel", r"\1", "vo")]
    with pytest.raises(ValueError, match="up: of kind embedding, not linear"):
        peft.tensors(BASE, adapter, names, config=config)

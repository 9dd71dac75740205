"""`peft.to_lora` on files made by hand: ΔW is that of the formula; what has no A and B is named."""

import json
import pathlib
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import peft
from jlora.peft import _to_lora

PREFIX = "base_model.model."
ADALORA = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 3, "target_modules": ["up"]}
VERA = {"peft_type": "VERA", "r": 2, "target_modules": ["up"], "save_projection": True}
MISS = {"peft_type": "MISS", "r": 3, "target_modules": ["up"], "init_weights": True, "mini_r": 1}
LOKR = {"peft_type": "LOKR", "r": 2, "alpha": 3, "target_modules": ["up"]}
Tensors = dict[str, np.ndarray]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def adalora() -> Tensors:
    return {"up.lora_A": normal(3, 8), "up.lora_B": normal(12, 3), "up.lora_E": normal(3, 1)}


def vera() -> Tensors:
    vectors = {"up.vera_lambda_b": normal(12), "up.vera_lambda_d": normal(2)}
    return {"vera_A": normal(2, 9), "vera_B": normal(13, 2)} | vectors


def lokr() -> Tensors:
    return {"up.lokr_w1": normal(3, 2), "up.lokr_w2_a": normal(4, 1), "up.lokr_w2_b": normal(1, 4)}


def of_adalora(x: Tensors) -> np.ndarray:
    return 3 / (4 + 1e-5) * x["up.lora_B"] @ np.diag(x["up.lora_E"][:, 0]) @ x["up.lora_A"]


def of_vera(x: Tensors) -> np.ndarray:
    d, b = np.diag(x["up.vera_lambda_d"]), np.diag(x["up.vera_lambda_b"])
    return b @ x["vera_B"][:12] @ d @ x["vera_A"][:, :8]


def of_lokr(x: Tensors) -> np.ndarray:
    return 3 / 2 * np.kron(x["up.lokr_w1"], x["up.lokr_w2_a"] @ x["up.lokr_w2_b"])


def miss() -> Tensors:
    return {"up.miss_block": normal(3, 12)}


def of_miss(x: Tensors) -> np.ndarray:
    return np.stack([x["up.miss_block"][i % 3] for i in range(8)], 1)


METHODS: dict[
    str, tuple[dict[str, Any], Callable[[], Tensors], Callable[[Tensors], np.ndarray]]
] = {
    "adalora": (ADALORA, adalora, of_adalora),
    "vera": (VERA, vera, of_vera),
    "lokr": (LOKR, lokr, of_lokr),
    "miss": (MISS, miss, of_miss),
}
every_method = pytest.mark.parametrize("name", METHODS)


def written(folder: pathlib.Path, fields: dict[str, Any], tensors: Tensors) -> pathlib.Path:
    """The adapter's folder; beside it that of its base model."""
    own, base = folder / "own", folder / "base"
    for each in (own, base):
        each.mkdir()
    (own / "adapter_config.json").write_text(json.dumps(fields))
    shared = ("vera_A", "vera_B")
    keys = {key: ("base_model." if key in shared else PREFIX) + key for key in tensors}
    save_file({keys[k]: x for k, x in tensors.items()}, own / "adapter_model.safetensors")
    save_file({"up.weight": normal(12, 8)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    return own


@every_method
def test_is_the_formula(name: str, tmp_path: pathlib.Path) -> None:
    """A and B of PyTorch's layout, and the scale that PEFT applies."""
    fields, make, formula = METHODS[name]
    tensors = make()
    peft.to_lora(written(tmp_path, fields, tensors), tmp_path / "lora", tmp_path / "base")
    node = peft.read(tmp_path / "lora")["up"]
    found = node.scale * np.asarray(node.a @ node.b).T  # as PyTorch's weight
    np.testing.assert_allclose(found, formula(tensors), rtol=1e-5, atol=1e-5)
    config = peft.read_config(tmp_path / "lora")
    assert (config["peft_type"], config["target_modules"]) == ("LORA", ["up"])


def test_what_is_trained_beside_comes_along(tmp_path: pathlib.Path) -> None:
    fields = ADALORA | {"modules_to_save": ["head"], "task_type": "SEQ_CLS", "revision": "main"}
    tensors = adalora() | {"head.weight": normal(2, 12)}
    peft.to_lora(written(tmp_path, fields, tensors), tmp_path / "lora")
    found = load_file(tmp_path / "lora/adapter_model.safetensors")
    np.testing.assert_array_equal(found[f"{PREFIX}head.weight"], tensors["head.weight"])
    config = peft.read_config(tmp_path / "lora")
    assert (config["task_type"], config["revision"]) == ("SEQ_CLS", "main")


def test_modules_without_a_rank_are_left_out(tmp_path: pathlib.Path) -> None:
    """AdaLoRA may take all of a module away; all of all modules is no adapter."""
    empty = {"down.lora_A": normal(0, 8), "down.lora_B": normal(12, 0), "down.lora_E": normal(0, 1)}
    peft.to_lora(written(tmp_path, ADALORA, adalora() | empty), tmp_path / "lora")
    assert list(peft.read(tmp_path / "lora")) == ["up"]
    (other := tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="no module has a change"):
        peft.to_lora(written(other, ADALORA, empty), tmp_path / "none")


def test_other_loaders_say_what_to_do(tmp_path: pathlib.Path) -> None:
    folder = written(tmp_path, ADALORA, adalora())
    with pytest.raises(
        ValueError, match=r"got 'ADALORA'; write it as LoRA first, by jlora\.peft\.to_"
    ):
        peft.read(folder)


# -------------------------------------------------------------------------------- what is refused

REFUSED = {
    "of_another_method": (
        {"peft_type": "LOHA"}, adalora(),
        "peft_type of adapter_config.json must be one of ADALORA, LOKR, MISS, VERA; got 'LOHA'",
    ),
    "a_list_as_method": ({"peft_type": [1]}, adalora(), r"ADALORA, LOKR, MISS, VERA; got \[1\]"),
    "a_feature": (ADALORA | {"use_dora": True}, adalora(), "use_dora: True is a feature that"),
    "no_rank": (
        {"peft_type": "ADALORA", "target_modules": ["up"]}, adalora(),
        "init_r: expected an integer of at least 1, got None",
    ),
    "alpha_of_text": (
        ADALORA | {"lora_alpha": "3"}, adalora(), "lora_alpha: expected a finite number, got '3'"
    ),
    "without_e": (
        ADALORA, {k: x for k, x in adalora().items() if k[-1] != "E"}, "up: lora_E is missing"
    ),
    "of_two_ranks": (
        ADALORA, adalora() | {"up.lora_B": normal(12, 2)},
        r"up: lora_A \(3, 8\), lora_B \(12, 2\), lora_E \(3, 1\) do not fit at the rank 4",
    ),
    "above_its_rank": (ADALORA | {"init_r": 2}, adalora(), "do not fit at the rank 2"),
    "of_a_convolution": (
        ADALORA, adalora() | {"up.lora_A": normal(3, 8, 1)},
        r"up: lora_A has shape \(3, 8, 1\); expected a matrix, as of a linear module",
    ),
    "not_finite": (ADALORA, adalora() | {"up.lora_E": normal(3, 1) * np.nan}, "not finite"),
    "strange_tensor": (ADALORA, adalora() | {"up.more": normal(3)}, "up.more: unexpected"),
    "integers": (
        ADALORA, adalora() | {"up.lora_E": np.ones((3, 1), np.int32)},
        "expected a floating-point dtype, got I32",
    ),
    "without_projections": (
        VERA, {k: x for k, x in vera().items() if k != "vera_B"},
        "base_model.vera_B: missing; without it .* Save the adapter with save_projection=True",
    ),
    "of_another_base": (
        VERA, {k.replace("up.", "left."): x for k, x in vera().items()},
        "left: not among the matrices of the base model, such as the folder `checkpoint`",
    ),
    "too_small_projections": (
        VERA, vera() | {"vera_A": normal(2, 7)},
        r"vera_A \(2, 7\) and vera_B \(13, 2\) do not fit 8 inputs, 12 outputs, rank 2",
    ),
    "lambda_lost": (
        VERA, {k: x for k, x in vera().items() if "lambda_b" not in k}, "must be vectors; got"
    ),
    "of_full_rank": (
        LOKR, {"up.lokr_w1": normal(3, 2), "up.lokr_w2": normal(4, 4)},
        "up: its ΔW may have rank 8, of 8 inputs and 12 outputs; merge it into the model in PEFT",
    ),
    "whole_and_not": (
        LOKR, lokr() | {"up.lokr_w2": normal(4, 4)}, "lokr_w2 is there both whole and as a product"
    ),
    "half_a_product": (
        LOKR, {k: x for k, x in lokr().items() if k[-1] != "b"}, "up: lokr_w2_b is missing"
    ),
    "that_do_not_fit": (
        LOKR, lokr() | {"up.lokr_w2_b": normal(2, 4)},
        r"lokr_w2_a \(4, 1\) and lokr_w2_b \(2, 4\) do not fit",
    ),
    "of_a_kernel": (LOKR, lokr() | {"up.lokr_t2": normal(1, 1, 3, 3)}, "lokr_t2 is of a convolu"),
    "another_form": (
        MISS | {"init_weights": "bat"}, miss(), "up: init_weights 'bat' is another method"
    ),
    "of_another_rank": (
        MISS | {"r": 4}, miss(), r"miss_block \(3, 12\) does not fit 8 inputs at the rank 4"
    ),
    "a_pattern_that_is_none": (
        LOKR | {"rank_pattern": {"(": 2}}, lokr(), r"rank_pattern: '\('"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_a_and_b_is_named(name: str, tmp_path: pathlib.Path) -> None:
    """And nothing is written."""
    fields, tensors, message = REFUSED[name]
    own = written(tmp_path, fields, tensors)
    with pytest.raises(ValueError, match=message):
        peft.to_lora(own, tmp_path / "lora", tmp_path / "base")
    assert not (tmp_path / "lora").exists()


def test_vera_needs_the_sizes_of_its_base(tmp_path: pathlib.Path) -> None:
    own = written(tmp_path, VERA, vera())
    with pytest.raises(
        ValueError, match="the base model, such as the folder `checkpoint`, which says how many"
    ):
        peft.to_lora(own, tmp_path / "lora")


def test_a_small_file_takes_little_memory(tmp_path: pathlib.Path) -> None:
    """A Kronecker product of two long vectors would be 10¹⁰ numbers."""
    long = 100_000
    tensors = {
        "up.lokr_w1_a": np.ones((long, 1), np.float32),
        "up.lokr_w1_b": np.ones((1, long), np.float32),
        "up.lokr_w2_a": np.ones((long, 1), np.float32),
        "up.lokr_w2_b": np.ones((1, long), np.float32),
    }
    own = written(tmp_path, LOKR, tensors)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"A and B would take 74\.5 GiB; at most 4 are written"):
        peft.to_lora(own, tmp_path / "lora")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


# ------------------------------------------------------------------- loaded, and MiSS written again

NAMES = [peft.Name(r"(\w+)/kernel", r"\1", "io"), peft.Name(r"(\w+)/bias", r"\1", "o", "bias")]
BASE = {"up": {"kernel": normal(12, 8).T}, "down": {"kernel": normal(8, 12).T}}


@every_method
def test_load_takes_them(name: str, tmp_path: pathlib.Path) -> None:
    """As LoRA, onto a tree that says how many inputs there are; the A of MiSS stays."""
    fields, make, formula = METHODS[name]
    own = written(tmp_path, fields, tensors := make())
    adapter = peft.load(own, BASE, NAMES)
    node = adapter["up"]["kernel"]
    found = node.scale * np.asarray(node.a @ node.b).T
    np.testing.assert_allclose(found, formula(tensors), rtol=1e-5, atol=1e-5)
    assert (list(adapter), node.frozen) == (["up"], ("a",) if name == "miss" else ())
    peft.to_lora(own, tmp_path / "lora", tmp_path / "base")
    plain = peft.load(tmp_path / "lora", BASE, NAMES)["up"]["kernel"]
    np.testing.assert_array_equal(plain.a, node.a)
    np.testing.assert_array_equal(plain.b, node.b)
    assert plain.scale == node.scale


@every_method
def test_load_misses_what_is_selected(name: str, tmp_path: pathlib.Path) -> None:
    fields, make, _ = METHODS[name]
    own = written(tmp_path, fields | {"target_modules": ["up", "down"]}, make())
    with pytest.raises(ValueError, match=r"down\.weight: selected by adapter_config\.json, but"):
        peft.load(own, BASE, NAMES)


def test_load_reads_no_values_that_are_not_finite(tmp_path: pathlib.Path) -> None:
    own = written(tmp_path, MISS, {"up.miss_block": np.full((3, 12), np.nan, "f")})
    with pytest.raises(ValueError, match=r"up\.lora_B\.weight: 36 of 36 values are not finite"):
        peft.load(own, BASE, NAMES)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_miss_is_written_as_it_was_read(tmp_path: pathlib.Path) -> None:
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
    (own / "adapter_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True))
    save_file(
        {PREFIX + key: x for key, x in tensors.items()},
        own / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
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


def test_miss_of_any_scale_is_written(tmp_path: pathlib.Path) -> None:
    """The scale is in the block, as PEFT has none."""
    adapter = started(MISS_RULE)
    peft.save(tmp_path / "own", BASE, adapter, NAMES, config={"peft_type": "MISS"})
    assert peft.read_config(tmp_path / "own")["r"] == 3
    loaded = peft.load(tmp_path / "own", BASE, NAMES)
    for name in BASE:
        own, other = adapter[name]["kernel"], loaded[name]["kernel"]
        assert (other.scale, other.frozen) == (1, ("a",))
        np.testing.assert_array_equal(other.b, 2 * own.b)


def test_what_is_large_is_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is for files, which may say anything."""
    monkeypatch.setattr(_to_lora, "LARGEST", 100)
    peft.save(tmp_path / "own", BASE, started(MISS_RULE), NAMES, config={"peft_type": "MISS"})
    with pytest.raises(
        ValueError, match=r"`path`: the adapter in (?s:.*) A and B would take 0\.0 GiB"
    ):
        peft.load(tmp_path / "own", BASE, NAMES)


@pytest.mark.parametrize("config", [None, {"peft_type": "MISS"}])
def test_float64_is_written_as_it_is(config: Any, tmp_path: pathlib.Path) -> None:
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
        "down: init_weights 'bat' is another method, whose change is no s·A·B",
    ),
    "a feature": (
        [MISS_RULE], {"peft_type": "MISS", "use_dora": True},
        "`config` cannot be written:\n  use_dora: True is a feature that jlora does not support",
    ),
    "vera": (
        [MISS_RULE], {"peft_type": "VERA"},
        "`config` cannot be written:\n  peft_type: VERA is read and not written",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_WRITTEN)
def test_what_is_no_miss_is_not_written(name: str, tmp_path: pathlib.Path) -> None:
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

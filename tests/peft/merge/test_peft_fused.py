"""Checkpoints that fuse what the model has apart, and the other way round.

The law: a base that fuses modules is merged as one that has them apart, to the bit; all other rows
stay.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from messages import refused
from peft_files import Folder
from small import every

from tests.peft.merge.test_peft_merged import low_rank, merge, ones

COLUMNS, LAYERS = 6, 2
DRAW = np.random.default_rng(0)


class Fusion(NamedTuple):
    """How a family stores modules.

    Attributes:
        kind: its `model_type`.
        parts: the modules, in the order of their rows.
        fused: the module in the checkpoint that has the rows of all.
    """

    kind: str
    parts: list[str]
    fused: str


QKV = ["q_proj", "k_proj", "v_proj"]


def under(place: str, parts: list[str]) -> list[str]:
    return [f"{place}.{part}" for part in parts]


FUSIONS = {
    "nomic": Fusion(
        "nomic_bert", under("layers.#.self_attn", QKV), "encoder.layers.#.attn.Wqkv"
    ),
    "jina-v3": Fusion(
        "jina_embeddings_v3",
        under("roberta.layers.#.self_attn", QKV),
        "roberta.encoder.layers.#.mixer.Wqkv",
    ),
    "gte": Fusion(
        "gte", under("layers.#.self_attn", QKV), "new.encoder.layer.#.attention.qkv_proj"
    ),
    "gte-mlp": Fusion(
        "gte",
        under("layers.#.mlp", ["up_proj", "gate_proj"]),
        "encoder.layer.#.mlp.up_gate_proj",
    ),
    "hrm": Fusion(
        "hrm_text",
        under("model.H_module.layers.#.self_attn", ["gate_proj", *QKV]),
        "model.H_module.layers.#.attn.gqkv_proj",
    ),
    "dinov2": Fusion(
        "dinov2",
        under("encoder.layer.#.mlp", ["gate_proj", "up_proj"]),
        "encoder.layer.#.mlp.weights_in",
    ),
}  # fmt: skip


class Kind(NamedTuple):
    """What an adapter has of each module, beside A and B unless it is full; the base's dtype."""

    tensors: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    fields: Mapping[str, Any] = MappingProxyType({})
    is_full: bool = False
    dtype: Any = np.float32


ROWS = 8
KINDS = {
    "lora": Kind(),
    "bfloat16": Kind(dtype=ml_dtypes.bfloat16),
    "float64": Kind(dtype=np.float64),
    "dora": Kind({".lora_magnitude_vector": (ROWS,)}, {"use_dora": True}),
    "biases": Kind({".bias": (ROWS,)}, {"bias": "lora_only"}),
    "bias of b": Kind({".lora_B.bias": (ROWS,)}, {"lora_bias": True}),
    "saved": Kind({".weight": (ROWS, COLUMNS), ".bias": (ROWS,)}, is_full=True),
    "8 bits": Kind(dtype=np.int8),
}


def random(*shape: int) -> np.ndarray:
    return DRAW.standard_normal(shape, np.float32)


def give(modules: list[str], kind: Kind) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of an adapter of `modules`, and its fields; the ranks differ."""
    given, ranks = dict[str, Any](), dict[str, int]()
    for i, module in enumerate(modules):
        if not kind.is_full:
            ranks[module] = 1 + i % 3
            given[module] = low_rank((ROWS, COLUMNS), ranks[module], i)
        given |= {module + end: random(*shape) for end, shape in kind.tensors.items()}
    saved = {"modules_to_save": modules} if kind.is_full else {"rank_pattern": ranks}
    return given, {"lora_alpha": 3, **saved, **kind.fields}


def weights_of(module: str, kind: Kind) -> dict[str, np.ndarray]:
    w = random(ROWS, COLUMNS)
    if kind.dtype == np.int8:
        scales = {f"{module}.SCB": np.abs(random(ROWS))}
        return {
            f"{module}.weight": (40 * w).astype(np.int8),
            f"{module}.bias": random(ROWS),
        } | scales
    return {f"{module}.weight": w.astype(kind.dtype), f"{module}.bias": random(ROWS)}


# The parts that are adapted: all, or only one of them.
WHICH = {
    "all": slice(None),
    "the first": slice(1),
    "the second": slice(1, 2),
    "the last": slice(-1, None),
}
DAILY = [(family, "lora", "all") for family in FUSIONS]
DAILY += [("gte", kind, "the second") for kind in KINDS]
DAILY += [("hrm", "bfloat16", which) for which in WHICH]


@pytest.mark.parametrize(("family", "kind", "which"), every(FUSIONS, KINDS, WHICH, daily=DAILY))
def test_as_if_they_were_apart(family: str, kind: str, which: str, tmp_path: Folder) -> None:
    fusion, of = FUSIONS[family], KINDS[kind]
    apart, fused, modules = {}, {}, []
    for i in map(str, range(LAYERS)):
        parts = [part.replace("#", i) for part in fusion.parts]
        each = [weights_of(part, of) for part in parts]
        for own in each:
            apart |= own
        for ends in zip(*each, strict=True):
            end = ends[0].rpartition(".")[2]
            values = [own[name] for own, name in zip(each, ends, strict=True)]
            fused[f"{fusion.fused.replace('#', i)}.{end}"] = np.concatenate(values)
        modules += parts[WHICH[which]]
    given, fields = give(modules, of)
    config: dict[str, Any] = {"model_type": fusion.kind, "dtype": "float32"}
    if kind == "8 bits":
        config |= {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    expected = merge(tmp_path, apart, given, config, **fields)
    merged = merge(tmp_path, fused, given, config, **fields)
    assert merged.keys() == {name for name in fused if not name.endswith("SCB")}
    for name, x in merged.items():
        module, _, end = name.rpartition(".")
        i = next(filter(str.isdecimal, name.split(".")))
        if module != fusion.fused.replace("#", i):
            np.testing.assert_array_equal(x, fused[name], err_msg=name)
            continue
        values = [expected[f"{part.replace('#', i)}.{end}"] for part in fusion.parts]
        np.testing.assert_array_equal(x, np.concatenate(values), err_msg=name)
        assert x.dtype == values[0].dtype
        is_changed = end == "weight" or ".bias" in of.tensors or ".lora_B.bias" in of.tensors
        assert kind == "8 bits" or (x != fused[name]).any() == is_changed


GTE = {"model_type": "gte"}


def test_rows_between_are_copied_in_blocks(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"encoder.layer.0.attention.qkv_proj.weight": random(3 * 150, 70)}
    given = {"layers.0.self_attn.v_proj": low_rank((150, 70), 2)}
    whole = merge(tmp_path, weights, given, GTE)
    monkeypatch.setattr("jlora.peft.merge._blocks.BLOCK", 64 * 70)
    [(name, x)] = merge(tmp_path, weights, given, GTE).items()
    np.testing.assert_array_equal(x[:300], weights[name][:300])
    np.testing.assert_allclose(x, whole[name], rtol=1e-6, atol=1e-6)


MINIMAX = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "model_type": "minimax_m3_vl",
}


@pytest.mark.parametrize("use_dora", [False, True])
def test_apart_in_the_checkpoint(use_dora: bool, tmp_path: Folder) -> None:
    """The adapter has one module for both, as in MiniMax M3; or each, as stored."""
    place = "language_model.model.layers.0.block_sparse_moe.shared_experts"
    home = "model.language_model.layers.0.mlp.shared_experts"
    weights = {f"{place}.{x}_proj.weight": random(ROWS, COLUMNS) for x in ("gate", "up", "down")}
    given: dict[str, Any] = {f"{home}.gate_up_proj": low_rank((2 * ROWS, COLUMNS), 2)}
    if use_dora:
        given[f"{home}.gate_up_proj.lora_magnitude_vector"] = random(2 * ROWS)
    gate, up, down = weights.values()
    both = {f"{home}.gate_up_proj.weight": np.concatenate([gate, up])}
    merged = merge(tmp_path, weights, given, MINIMAX, use_dora=use_dora)
    [expected] = merge(tmp_path, both, given, use_dora=use_dora).values()
    assert merged.keys() == weights.keys()
    pair = [merged[f"{place}.{x}_proj.weight"] for x in ("gate", "up")]
    np.testing.assert_array_equal(np.concatenate(pair), expected)
    np.testing.assert_array_equal(merged[f"{place}.down_proj.weight"], down)
    saved = {f"{home}.gate_up_proj.weight": random(2 * ROWS, COLUMNS)}
    merged = merge(tmp_path, weights, saved, MINIMAX, modules_to_save=["gate_up_proj"])
    pair = [merged[f"{place}.{x}_proj.weight"] for x in ("gate", "up")]
    np.testing.assert_array_equal(np.concatenate(pair), *saved.values())
    merged = merge(tmp_path, weights, {f"{place}.up_proj": low_rank((ROWS, COLUMNS), 2)}, MINIMAX)
    changed = [name for name, x in weights.items() if (merged[name] != x).any()]
    assert changed == [f"{place}.up_proj.weight"]


def test_the_fused_module_itself(tmp_path: Folder) -> None:
    """Code of the Hub may have the checkpoint's modules."""
    name = "encoder.layers.0.attn.Wqkv"
    weights = {f"{name}.weight": ones(12, 6)}
    a, b = low_rank((12, 6), 2)
    merged = merge(tmp_path, weights, {name: (a, b)}, {"model_type": "nomic_bert"}, lora_alpha=2)
    np.testing.assert_allclose(merged[f"{name}.weight"], 1 + b @ a, rtol=1e-5, atol=1e-5)


Q = "layers.0.self_attn.q_proj"
FUSED = "encoder.layer.0.attention.qkv_proj.weight"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "rows of three": ({FUSED: ones(13, 6)}, {Q: low_rank((4, 6), 2)}, {}, "not in the checkpoint"),
    "another size": (
        {FUSED: ones(12, 6)}, {Q: low_rank((3, 6), 2)}, {}, "a linear weight of shape (4, 6)"
    ),
    "in full, of another size": (
        {FUSED: ones(12, 6)},
        {f"{Q}.weight": ones(3, 6)},
        {"modules_to_save": ["q_proj"]},
        "expected F32 of shape (4, 6), got (3, 6)",
    ),
    "rows of tokens": (
        {FUSED: ones(12, 6)},
        {f"{Q}.token_adapter.trainable_tokens_delta": ones(1, 6)},
        {"trainable_token_indices": {"q_proj": [1]}},
        "is not an embedding in the checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Folder) -> None:
    weights, given, fields, got = REFUSED[case]
    with refused(ValueError, "adapter", got):
        merge(tmp_path, weights, given, GTE, **fields)
    assert not [*tmp_path.glob("*/out")]

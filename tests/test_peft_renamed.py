"""Checkpoints whose names differ from the model's by one replacement, which no list has.

The laws: all modules of an adapter find their tensors, or nothing is written; a place that is only
likely is none.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from messages import refused
from peft_files import Folder
from test_peft_merged import low_rank, merge, ones

from jlora.peft.merge._replace import find_places

Q, K, BIAS = (4, 6), (2, 6), (4,)
TEXT = {"model.language_model.layers.#.q": ("language_model.model.blocks.#.q", Q)}
ENCODER = {"model.encoder.text_model.layers.#.q": ("model.encoder.layers.#.q", Q)}
DECODER = {"model.decoder.layers.#.q": ("model.decoder.layers.#.q", Q)}
TOWERS = {f"{x}_model.encoder.layers.#.q": (f"{x}_model.encoder.layer.#.q", Q) for x in ("a", "b")}
# The modules of an adapter, with their tensors and shapes, in two layers; the other tensors.
FOUND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "first component": ({"model.layers.#.mixer.q": ("backbone.layers.#.mixer.q", Q)}, {}),
    "and another module": (
        {f"model.h.#.{x}": (f"backbone.h.#.{x}", shape) for x, shape in (("q", Q), ("k", K))}
        | {"score": ("score", K)},
        {"lm_head.weight": Q},
    ),
    "two components by two": (TEXT, {"vision_tower.blocks.#.fc.weight": Q}),
    "removed": (ENCODER, {}),
    "removed beside what is there": (ENCODER | DECODER, {}),
    "added": ({"bert.layers.#.q": ("bert.encoder.layers.#.q", Q)}, {"bert.pooler.weight": Q}),
    "within": ({"h.#.self_attn.q": ("h.#.attn.q", Q)}, {"h.#.mlp.q.weight": K}),
    "in two places": (TOWERS, {}),
    "beside a tower of other shapes": (TEXT, {"vision_tower.blocks.#.q.weight": K}),
    "beside a tower of one layer": (TEXT, {"vision_tower.blocks.0.q.weight": Q}),
    "without a layer": (
        {"head.q": ("projection.q", Q), "head.k": ("projection.k", K)}, {"q.k.weight": K}
    ),
}  # fmt: skip
# Those that are refused, with a part of the error.
ABSENT = "not in the checkpoint"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "two towers": (
        TEXT,
        {"vision_tower.blocks.#.q.weight": Q},
        "or 'model.language_model.layers' by 'vision_tower.blocks'. Rename",
    ),
    "one module of two": (TEXT | {"model.language_model.layers.#.k": ("llm.#.k", K)}, {}, ABSENT),
    "the last name": ({"model.h.#.q": ("model.h.#.wq", Q)}, {}, ABSENT),
    "two replacements": ({"model.h.#.attn.q": ("backbone.h.#.mixer.q", Q)}, {}, ABSENT),
    "another tower, as its own has other names": (
        {"model.text.layers.#.q": ("text.#.qkv", (12, 6))},
        {"vision.layers.#.q.weight": Q},
        ABSENT,
    ),
    "a tower of images, as its own has other names": (
        {"model.text.layers.#.q": ("llm.#.qkv", (12, 6))}, {"visual.layers.#.q.weight": Q}, ABSENT
    ),
    "a tower that is adapted": (
        {"m.text.h.#.q": ("m.llm.#.qkv", (12, 6)), "m.vision.h.#.k": ("m.vision.h.#.k", K)},
        {"m.vision.h.#.q.weight": Q},
        ABSENT,
    ),
    "a name that the checkpoint has elsewhere": (
        {"m.attn.h.#.q": ("m.h.#.qkv", (12, 6))},
        {"m.mlp.h.#.q.weight": Q, "m.h.#.attn.weight": Q},
        ABSENT,
    ),
    "sides that are swapped": (
        {"model.h.#.fc1": ("tower.h.#.fc0", Q)}, {"tower.h.#.fc1.weight": Q[::-1]}, ABSENT
    ),
    "another shape": ({"model.h.#.q": ("tower.h.#.v", Q)}, {"tower.h.#.q.weight": K}, ABSENT),
    "a single module": ({"head.q": ("projection.q", Q)}, {}, ABSENT),
    "a tensor for two modules": (
        {"m.a.h.#.q": ("m.h.#.qkv", (12, 6)), "m.b.h.#.q": ("m.c.h.#.q", Q)},
        {"m.d.h.#.q.weight": K},
        ABSENT,
    ),
}  # fmt: skip


def layers(name: str, count: int = 2) -> list[str]:
    return [name.replace("#", str(i)) for i in range(count)] if "#" in name else [name]


def files_of(
    modules: Mapping[str, Any], others: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, np.ndarray]]:
    """The weights of a checkpoint, A and B of an adapter, and the weights that it changes."""
    weights, given, expected = {}, {}, {}
    for i, (name, (home, shape)) in enumerate(modules.items()):
        a, b = low_rank(Q if shape[0] > 10 else shape, 2, i)
        for module, tensor in zip(layers(name), layers(f"{home}.weight"), strict=True):
            weights[tensor] = i + ones(*shape)
            given[module] = a, b
            if shape[0] < 10:
                expected[tensor] = weights[tensor] + b @ a
    rest = {tensor: ones(*shape) for name, shape in others.items() for tensor in layers(name)}
    return weights | rest, given, expected


@pytest.mark.parametrize("case", FOUND)
def test_one_replacement(case: str, tmp_path: Folder) -> None:
    """The tensors of all modules change, and no others."""
    weights, given, expected = files_of(*FOUND[case])
    merged = merge(tmp_path, weights, given, lora_alpha=2)
    for name, w in weights.items():
        x = expected.get(name, w)
        np.testing.assert_allclose(merged[name], x, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", REFUSED)
def test_no_place_or_several(case: str, tmp_path: Folder) -> None:
    *files, got = REFUSED[case]
    weights, given, _ = files_of(*files)
    with refused(ValueError, "adapter", got):
        merge(tmp_path, weights, given)
    assert not [*tmp_path.glob("*/out")]


def test_parameters_in_full(tmp_path: Folder) -> None:
    """Biases and norms are replaced where the weights are; without a place, nothing is."""
    weights = {"backbone.h.0.q.weight": ones(*Q), "backbone.h.0.q.bias": ones(4)}
    weights |= {"backbone.norm.weight": ones(6), "backbone.norm.bias": ones(6)}
    given: dict[str, Any] = {"model.h.0.q": low_rank(Q, 2), "model.h.0.q.bias": 2 * ones(4)}
    given |= {"model.norm.weight": 3 * ones(6), "model.norm.bias": 4 * ones(6)}
    fields: dict[str, Any] = {"bias": "all", "modules_to_save": ["norm"]}
    merged = merge(tmp_path, weights, given, **fields)
    expected = {"h.0.q.bias": 2, "norm.weight": 3, "norm.bias": 4}
    assert {name: merged[f"backbone.{name}"][0] for name in expected} == expected
    del weights["backbone.norm.bias"]
    with refused(ValueError, "adapter", "model.norm.bias", ABSENT):
        merge(tmp_path, weights, given, **fields)


def test_experts(tmp_path: Folder) -> None:
    """Those of a layer are one parameter in the model, here without a gate."""
    shapes = {"up_proj": (5, 8), "down_proj": (8, 5)}
    weights = {
        f"backbone.layers.1.mixer.experts.{e}.{part}.weight": ones(*shape)
        for e, (part, shape) in itertools.product(range(3), shapes.items())
    }
    a, b = low_rank(shapes["up_proj"], 6)
    fields = {"target_modules": [], "target_parameters": ["experts.up_proj"], "lora_alpha": 2}
    merged = merge(tmp_path, weights, {"model.layers.1.mixer.experts": (a, b)}, **fields)
    for name, x in merged.items():
        e = int(name.split(".")[5])
        change = b[:, e::3] @ a[2 * e : 2 * e + 2] if "up_proj" in name else 0
        np.testing.assert_allclose(x, 1 + change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("numbers", [(0, 1, 2), (0, 2, 4), (1, 2, 3)])
def test_some_layers(numbers: tuple[int, ...], tmp_path: Folder) -> None:
    """If numbers are left out, as if two layers were one of the model, all must be adapted."""
    weights = {f"backbone.h.{i}.q.weight": ones(*Q) for i in numbers}
    given = {f"model.h.{i}.q": low_rank(Q, 2, i) for i in numbers}
    assert all((x != 1).any() for x in merge(tmp_path, weights, given).values())
    first = {f"model.h.{numbers[0]}.q": low_rank(Q, 2)}
    fields = {"target_modules": ["q"], "layers_to_transform": [numbers[0]]}
    if numbers == (0, 1, 2):
        merged = merge(tmp_path, weights, first, **fields)
        assert [(merged[name] != 1).any() for name in weights] == [True, False, False]
    else:
        with refused(ValueError, "adapter", ABSENT):
            merge(tmp_path, weights, first, **fields)


def test_a_layer_that_the_adapter_lacks(tmp_path: Folder) -> None:
    """Names are those of the model also where they decide what is missing."""
    weights = {f"backbone.h.{i}.q.weight": ones(*Q) for i in range(3)}
    given = {f"model.h.{i}.q": low_rank(Q, 2, i) for i in range(2)}
    for targets in (["q"], r"model\.h\.\d+\.q"):
        with refused(ValueError, "adapter", "model.h.2.q.weight", "but missing"):
            merge(tmp_path, weights, given, target_modules=targets)


def test_names_that_are_there_stay(tmp_path: Folder) -> None:
    """The checkpoint's own names win over any replacement."""
    weights = {f"{x}.h.0.q.weight": ones(*Q) for x in ("model", "backbone")}
    merged = merge(tmp_path, weights, {"model.h.0.q": low_rank(Q, 2)})
    assert (merged["backbone.h.0.q.weight"] == 1).all()


def test_the_true_place_is_always_among_those_that_are_found() -> None:
    """So that one that is found alone is no wrong one. Of random names, some renamed."""
    draw, alone, several = np.random.default_rng(0), 0, 0
    words = ["a", "b", "c", "0", "1"]
    for _ in range(2000):
        names = {(*draw.choice(words, draw.integers(1, 5)), "q", "weight") for _ in range(6)}
        first = sorted(names)[draw.integers(len(names))]
        start, stop = sorted(draw.integers(0, len(first) - 1, 2))
        if any(map(str.isdecimal, first[start:stop])):
            continue
        added = ("x", "y")[: draw.integers(0 if first[start:stop] else 1, 3)]
        there = [x for x in names if x[:stop] == first[:stop]]
        renamed = {(*x[:start], *added, *x[stop:]): x for x in there}
        if any(x[: start + 1] in {y[: start + 1] for y in names} for x in renamed):
            continue  # a name without the components is there too
        truth = {".".join(x): ".".join(y) for x, y in renamed.items()}
        shapes = {".".join(x): (1, 1) for x in names}
        places = find_places(list(truth), shapes, lambda *_: True)
        assert truth in [place.images for place in places]
        alone, several = alone + (len(places) == 1), several + (len(places) > 1)
    assert alone > 100 and several > 100

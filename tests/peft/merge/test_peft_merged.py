"""Merged checkpoints without PyTorch: what PEFT merged, the formula, and every refusal.

The laws: a merged checkpoint is the old one with W + s·B·A in the place of W and nothing else
changed; whatever keeps it from being that is listed, and leaves nothing behind.
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft_models as models
import pytest
from messages import refused
from peft_files import ENDS, PREFIX, TENSORS, Folder, bounded, bytes_of, measure, node, write
from safetensors.numpy import load_file, save_file
from small import assert_close, every, some

from jlora import peft
from jlora.peft import Name
from jlora.peft.merge._blocks import _adder
from jlora.types import LowRank

Tensors = Mapping[str, np.ndarray]
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
METADATA = {"format": "mlx"}
TIE = "tie_word_embeddings"
SAVE = "Save the base model as it was adapted"
LOST = f"selected by adapter_config.json, but missing in {TENSORS}"


def checkpoint(
    folder: Folder, tensors: Tensors, shards: int = 1, stem: str = "model", **config: Any
) -> Folder:
    """A checkpoint as `transformers` writes it, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / f"{stem}.safetensors", metadata=METADATA)
    else:
        files = [f"{stem}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        where = {name: files[i % shards] for i, name in enumerate(names)}
        for file in files:
            part = {name: tensors[name] for name in names if where[name] == file}
            save_file(part, folder / file, metadata=METADATA)
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Folder) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: x for file in files for name, x in models.read(file).items()}


def base_of(case: models.Case) -> dict[str, np.ndarray]:
    """PyTorch's parameters before merging."""
    return {k[5:]: x for k, x in case.torch.items() if k.startswith("base.")}


def fixture(name: str, folder: Folder, shards: int = 1) -> tuple[models.Case, Folder]:
    """The base of a fixture as a checkpoint."""
    case = models.case(name)
    about = json.loads((case.folder / "model.json").read_text())
    name = about["architecture"]
    kinds = ("llama", "gpt2", "bert", "roberta", "vit")
    kind = next((x for x in kinds if name.lower().startswith(x)), "none")
    config = about["config"] | {"architectures": [name], "model_type": kind}
    return case, checkpoint(folder / "base", base_of(case), shards, **config)


# ----------------------------------------------------------------------- what PEFT itself merged


# One of each kind of tensors and of names.
DAILY = ("bf16", "bias_all", "dora_conv", "embeddings", "experts", "gpt2_tied", "tied", "tokens")


@pytest.mark.parametrize("shards", some([1, 3], 1))
@pytest.mark.parametrize("name", some(models.CASES, *DAILY))
def test_merged_is_peft_s(name: str, shards: int, tmp_path: Folder) -> None:
    """From PEFT's files or from a tree: PEFT's values, in the old names, dtypes and files."""
    case, base = fixture(name, tmp_path, shards)
    before = bytes_of(base)
    peft.export_merged(base, case.folder, tmp_path / "files")
    adapter = peft.load(case.folder, case.base, case.names)
    peft.export_merged(base, adapter, tmp_path / "tree", names=case.names)
    assert bytes_of(tmp_path / "tree") == bytes_of(tmp_path / "files")
    assert bytes_of(base) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "files", "tree"]

    old, expected, merged = base_of(case), case.merged(), read(tmp_path / "files")
    shared = {"tied": "model.embed_tokens.weight", "gpt2_tied": "transformer.wte.weight"}.get(name)
    if shared:  # PEFT adds ΔW to it once for each module
        expected[shared] = (expected[shared] + old[shared]) / 2
    assert merged.keys() == old.keys()
    for key, x in merged.items():
        assert (x.dtype, x.shape) == (old[key].dtype, old[key].shape)
        assert (x.tobytes() == old[key].tobytes()) == (f"merged.{key}" not in case.torch), key
        # These sides are below PyTorch's fused multiply-adds. Bits: test_peft_interop.py.
        y = np.asarray(expected[key], np.float64)
        bound = 0 if name == "bf16" else 4 * np.finfo(np.float32).eps * np.abs(y).max()
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=bound, err_msg=key)


# ----------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("rank", [1, 17, 192])
@pytest.mark.parametrize("sides", [(5, 8), (65, 67), (300, 501)])
def test_products_are_fused_multiply_adds(sides: tuple[int, int], rank: int) -> None:
    """In the order of the rank, whatever the shape: so does PyTorch for layers of real size."""
    draw = np.random.default_rng(rank)
    a = draw.standard_normal((rank, sides[1]), np.float32)
    b = draw.standard_normal((sides[0], rank), np.float32)
    expected = np.zeros(sides, np.float32)
    for k in range(rank):  # a product of two float32 is exact in float64
        expected = (np.float64(b[:, k : k + 1]) * a[k] + expected).astype(np.float32)
    zeros = np.zeros(sides, np.float32)
    different = _adder(a, 1, sides[0])(zeros, b, zeros.dtype) != expected
    assert different.mean() < 1e-4  # the sum in float64 above is rounded twice


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_sums_are_rounded_after_products(dtype: Any) -> None:
    """W + s·B·A as NumPy has it of B·A, to the bit: no multiplication is fused into the addition.

    Subnormal numbers of W, which XLA takes for 0, are kept where ΔW is 0.
    """
    (a, b), draw, scale = low_rank((70, 90), 3), np.random.default_rng(1), np.float32(1.37)
    b[7] = 0
    w, zeros = draw.standard_normal((70, 90)).astype(dtype), np.zeros((70, 90), np.float32)
    w[7] *= ml_dtypes.finfo(dtype).smallest_normal / 4
    w[7, 0] = -0.0
    add = _adder(a, float(scale), 70)
    change = _adder(a, 1, 70)(zeros, b, zeros.dtype) * scale
    wide = w.astype(np.promote_types(dtype, np.float32)) + change
    for to in {np.dtype(dtype), wide.dtype}:
        assert add(w, b, to).astype(to).tobytes() == wide.astype(to).tobytes()


def test_without_the_cpu_of_jax(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other devices sum in other orders: nothing is merged, and the remedy is named."""
    base, given = simple(tmp_path)

    def local_devices(backend: str) -> Any:
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", local_devices)
    with pytest.raises(ValueError, match=r"`JAX_PLATFORMS` must have the CPU.*\n?.*,cpu'\."):
        peft.export_merged(base, given, tmp_path / "out")


def low_rank(shape: tuple[int, int], rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A and B for a weight (outputs, inputs)."""
    draw = np.random.default_rng(seed)
    a = draw.standard_normal((rank, shape[1]), np.float32)
    return a, draw.standard_normal((shape[0], rank), np.float32)


def adapter(folder: Folder, modules: Mapping[str, Any], **fields: Any) -> Folder:
    """PEFT's files with (A, B) for each of `modules`, or an array for a parameter in full."""
    tensors, targets = {}, []
    for module, x in modules.items():
        if isinstance(x, np.ndarray):
            tensors[module] = x
        else:
            targets.append(module)
            tensors |= {module + end: y for end, y in zip(ENDS, x, strict=True)}
    write(folder, tensors, **{"target_modules": targets, "r": 2, "lora_alpha": 3} | fields)
    return folder


def merge(
    folder: Folder,
    weights: Tensors,
    given: Mapping[str, Any],
    config: Any = (),
    options: Mapping[str, Any] = {},
    **fields: Any,
) -> dict[str, np.ndarray]:
    """The tensors of a new checkpoint of `weights` into which a new adapter is merged."""
    place = folder / str(len([*folder.iterdir()]))
    base = checkpoint(place / "base", weights, **dict(config))
    peft.export_merged(base, adapter(place / "a", given, **fields), place / "out", **options)
    return read(place / "out")


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4096, 6144), (128_256, 200)])
def test_memory_is_bounded(shape: tuple[int, int], tmp_path: Folder) -> None:
    """A weight of 100 MB takes less than half of that beyond one of a block, as blocks are held.

    Measured are 9 to 26 MB, and before that 60 that JAX takes for its CPU and to compile.
    """
    rows, columns = shape
    for folder, sizes in (("first", (2**19 // columns + 1, columns)), (".", shape)):
        checkpoint(tmp_path / folder / "base", {"q.weight": ones(*sizes)})
        adapter(tmp_path / folder / "adapter", {"q": low_rank(sizes, 2)})
    _, memory = measure(tmp_path, tmp_path / "first")
    assert memory < rows * columns * 4 / 2


@pytest.mark.slow
def test_memory_of_quantized_weights(tmp_path: Folder) -> None:
    """One matrix at a time is dequantized: less than three in float32 are held."""
    shape, grid, weights = (4096, 8192), (32, 64), dict[str, np.ndarray]()
    for i in range(3):
        weights[f"h.{i}.q.weight"] = np.ones(shape, ml_dtypes.float8_e4m3fn)
        weights[f"h.{i}.q.weight_scale_inv"] = np.ones(grid, np.float32)
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    checkpoint(tmp_path / "base", weights, quantization_config=fp8)
    adapter(tmp_path / "adapter", {f"h.{i}.q": low_rank(shape, 2) for i in range(3)})
    _, memory = measure(tmp_path)
    assert memory < 3 * 4 * shape[0] * shape[1]


# ----------------------------------------------------------------------- names and orientation


# Names of weights, and the modules of an adapter that call them otherwise.
FIRST_PARTS = {
    "of weights": (["bert.q", "bert.k", "cls"], ["q"]),
    "of the adapter": (["q", "k"], ["bert.q"]),
    "of some weights": (["bert.q", "head"], ["q", "head"]),
}


@pytest.mark.parametrize("missing", FIRST_PARTS)
def test_the_first_part_may_be_missing(missing: str, tmp_path: Folder) -> None:
    """An adapter of a model with a head on the model without, and the other way round."""
    names, modules = FIRST_PARTS[missing]
    weights = {f"{name}.weight": ones(4, 6) for name in names}
    given = {module: low_rank((4, 6), 2, i) for i, module in enumerate(modules)}
    merged = merge(tmp_path, weights, given)
    changed = {name for name, x in merged.items() if (x != weights[name]).any()}
    assert changed == {x for x in weights if x.endswith(("q.weight", "head.weight"))}


def test_old_names_of_norms(tmp_path: Folder) -> None:
    """Checkpoints of old have gamma and beta, which `transformers` renames as it loads."""
    weights = {"q.weight": ones(4, 6), "LayerNorm.gamma": ones(4), "LayerNorm.beta": ones(4)}
    given = {"q": low_rank((4, 6), 2), "LayerNorm.weight": 2 * ones(4)}
    given["LayerNorm.bias"] = 3 * ones(4)
    merged = merge(tmp_path, weights, given, modules_to_save=["LayerNorm"])
    assert (merged["LayerNorm.gamma"] == 2).all() and (merged["LayerNorm.beta"] == 3).all()


def experts_apart(style: str, count: int, hidden: int, inner: int) -> dict[str, np.ndarray]:
    """The experts of a layer as checkpoints have them, one by one."""
    module, gate, up, down = {
        "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
        "qwen": ("mlp", "gate_proj", "up_proj", "down_proj"),
    }[style]
    draw = np.random.default_rng(5)
    shapes = {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
    return {
        f"model.layers.0.{module}.experts.{e}.{part}.weight": draw.standard_normal(
            shape, np.float32
        )
        for e in range(count)
        for part, shape in shapes.items()
    }


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("inner", [5, 4])
@pytest.mark.parametrize("style", ["mixtral", "qwen"])
def test_experts_that_are_stored_one_by_one(
    style: str, inner: int, swapped: bool, tmp_path: Folder
) -> None:
    """`transformers` 5 adapts all of a layer as one parameter, in either orientation.

    That of a square one is told by the other.
    """
    count, hidden, r = 3, 8, 2
    weights = experts_apart(style, count, hidden, inner)
    draw = np.random.default_rng(6)
    ab = {}
    for name, (rows, columns) in {"up": (2 * inner, hidden), "down": (hidden, inner)}.items():
        o, i = (columns, rows) if swapped else (rows, columns)
        shapes = (r * count, i), (o, r * count)
        ab[name] = tuple(draw.standard_normal(shape, np.float32) for shape in shapes)
    given = {
        "model.layers.0.mlp.experts.base_layer": ab["up"],
        "model.layers.0.mlp.experts": ab["down"],
    }
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    fields = {"target_modules": [], "target_parameters": targets, "r": r, "lora_alpha": r}
    merged = merge(tmp_path, weights, given, config={"model_type": style}, **fields)
    for e in range(count):
        up, down = (b[:, e::count] @ a[e * r : (e + 1) * r] for a, b in ab.values())
        up, down = (up.T, down.T) if swapped else (up, down)
        names = [n for n in weights if f"experts.{e}." in n]
        for name, delta in zip(names, (up[:inner], up[inner:], down), strict=True):
            weights[name] = weights[name] + delta
    assert_close(merged, weights)


def test_experts_that_are_no_parameter(tmp_path: Folder) -> None:
    """Those of a layer without all of its experts."""
    weights = experts_apart("qwen", 3, 8, 5)
    del weights["model.layers.0.mlp.experts.1.up_proj.weight"]
    given = {"model.layers.0.mlp.experts": low_rank((10, 8), 6)}
    fields = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    with refused(ValueError, "adapter", "model.layers.0.mlp.experts.gate_up_proj, which is not in"):
        merge(tmp_path, weights, given, **fields)


def test_the_user_s_names(tmp_path: Folder) -> None:
    """Where no table has them; what helps is said."""
    weights = {f"backbone.h.{i}.q.weight": ones(4, 6) for i in range(2)}
    given = {f"model.h.{i}.mixer.q": low_rank((4, 6), 2, i) for i in range(2)}
    with refused(ValueError, "adapter", "model.h.0.mixer.q.weight", "or give `renamed`"):
        merge(tmp_path, weights, given)
    pairs = [("^backbone", "model"), (r"(h\.\d+)", r"\1.mixer")]
    merged = merge(tmp_path, weights, given, options={"renamed": pairs})
    assert all((x != 1).any() for x in merged.values())
    with refused(ValueError, "renamed", "two tensors the same name, model.h.q.weight"):
        merge(tmp_path, weights, given, options={"renamed": [(r"backbone\.h\.\d", "model.h")]})


def test_what_helps_where_a_module_is_not_there(tmp_path: Folder) -> None:
    """The model's own head and names; for a head that may be tied, a weight of its own."""
    weights = {"m.qkv.weight": ones(4, 6), "m.embed_tokens.weight": TABLE}
    for module, advice in {
        "m.v": f"{SAVE}, with its head, and in `transformers` 5",
        "m.lm_head": "It may share the weight of the input embedding. Use the adapter unmerged, or",
    }.items():
        with refused(ValueError, "adapter", f"{module}.weight", "not in the checkpoint", advice):
            merge(tmp_path, weights, {module: low_rank((11, 4), 2)})


def test_a_bias_of_b(tmp_path: Folder) -> None:
    """`lora_bias` adds to the module's own bias; where there is none, it is refused."""
    weights = {"m.q.weight": ones(4, 6), "m.q.bias": ones(4)}
    a, b = low_rank((4, 6), 2)
    given = {"m.q": (a, b), "m.q.lora_B.bias": 2 * ones(4)}
    merged = merge(tmp_path, weights, given, lora_bias=True)
    np.testing.assert_array_equal(merged["m.q.bias"], ones(4) + 1.5 * 2 * ones(4))
    np.testing.assert_allclose(merged["m.q.weight"], 1 + 1.5 * b @ a, rtol=1e-5, atol=1e-6)
    with refused(ValueError, "adapter", "m.q.bias", "of dtype I32"):
        merge(tmp_path, weights | {"m.q.bias": np.ones(4, np.int32)}, given, lora_bias=True)
    with refused(ValueError, "adapter", PREFIX + "m.k.lora_B.bias", "of a module that has no"):
        merge(tmp_path, weights, given | {"m.k.lora_B.bias": ones(4)}, lora_bias=True)
    added = PREFIX + "m.q.lora_B.bias"
    whole = given | {"m.q.bias": ones(4)}
    with refused(ValueError, "adapter", added, "added to a bias that the adapter also"):
        merge(tmp_path, weights, whole, lora_bias=True, bias="all")
    del weights["m.q.bias"]
    with refused(ValueError, "adapter", added, "has shape (4,), but"):
        merge(tmp_path, weights, given, lora_bias=True)
    with refused(ValueError, "path", added, "lora_bias is supported only when merging"):
        peft.read(tmp_path / "0" / "a")


# What `transformers` writes.
RENAMED: dict[str, Any] = json.loads((models.FIXTURES / "renamed.json").read_text())
LLAVA = "LlavaForConditionalGeneration"
config, rows = RENAMED[LLAVA]
kind, same = RENAMED["Qwen2VLForConditionalGeneration"]
RENAMED["qwen2-vl-unnamed"] = {"model_type": kind["model_type"]}, same
RENAMED["llava-read"] = (
    config,
    {  # from the hub, whose names of the tower it keeps
        name: [home.replace("vision_tower.", "vision_tower.vision_model."), shape]
        for name, (home, shape) in rows.items()
    },
)


# Which of the modules are adapted: all, or those of a pattern.
WHICH = ["", "language_model|layer|blocks", "q_proj|query|o_proj|q_a"]
DAILY_NAMES = [(family, "") for family in RENAMED] + [(LLAVA, which) for which in WHICH]


@pytest.mark.parametrize(("family", "which"), every(RENAMED, WHICH, daily=DAILY_NAMES))
def test_names_of_today(family: str, which: str, tmp_path: Folder) -> None:
    """What `transformers` 5 saves under other names than its modules have in memory."""
    draw, weights, expected = np.random.default_rng(8), {}, {}
    given, modules, parameters = {}, [], []
    config, rows = RENAMED[family]
    for i, (name, (home, shape)) in enumerate(rows.items()):
        weights[home] = draw.standard_normal(shape, np.float32)
        may_be_tied = re.search(r"(lm_head|decoder)\.weight$", name)
        if may_be_tied or not re.search(which, name):
            continue
        (*stack, rows, columns), module = shape, name.removesuffix(".weight")
        count = math.prod(stack)
        a, b = low_rank((rows, columns), 2 * count, i)
        each = [b[:, e::count] @ a[2 * e : 2 * e + 2] for e in range(count)]
        expected[home] = weights[home] + np.stack(each).reshape(shape)
        if stack:
            parameters.append(name)
            module = name.rpartition(".")[0] + ".base_layer" * ("gate_up" in name)
        else:
            modules.append(module)
        given[module] = a, b
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": modules}
    fields["target_parameters"] = parameters or None
    merged = merge(tmp_path, weights, given, config, **fields)
    assert expected
    assert_close(merged, weights | expected)


def test_a_mask_is_no_bias(tmp_path: Folder) -> None:
    """GPT-2 as on the hub has masks, `attn.bias`, which are not in an adapter of all biases."""
    weights = {"h.0.attn.c_attn.weight": ones(4, 6), "h.0.attn.c_attn.bias": ones(6)}
    weights |= {"h.0.attn.bias": ones(1, 1, 8, 8), "ln_f.bias": ones(4)}
    given: dict[str, Any] = {"transformer.h.0.attn.c_attn": low_rank((6, 4), 2)}
    given |= {"transformer.h.0.attn.c_attn.bias": 2 * ones(6), "transformer.ln_f.bias": 3 * ones(4)}
    merged = merge(tmp_path, weights, given, bias="all", fan_in_fan_out=True)
    assert (merged["h.0.attn.bias"] == 1).all() and (merged["ln_f.bias"] == 3).all()
    del given["transformer.h.0.attn.c_attn.bias"]
    with refused(ValueError, "adapter", "transformer.h.0.attn.c_attn.bias", "but missing"):
        merge(tmp_path, weights, given, bias="all", fan_in_fan_out=True)


def test_what_the_adapted_model_lacked(tmp_path: Folder) -> None:
    """An old head, a pooler, a decoder stay as they are, with a warning; layers are whole."""
    layers = [f"bert.encoder.layer.{i}.{part}" for i in range(2) for part in ("dense", "out.dense")]
    old = ["bert.pooler.dense", "cls.transform.dense", "bert.decoder.layer.0.dense"]
    weights = {f"{module}.{x}": ones(4, 4)[0 if x == "bias" else ...] for module in layers + old
               for x in ("weight", "bias")}  # fmt: skip
    given = {module: low_rank((4, 4), 2) for module in layers}
    given |= {f"{module}.bias": 2 * ones(4) for module in layers}
    fields: dict[str, Any] = {"target_modules": ["dense"], "bias": "all"}
    with pytest.warns(UserWarning, match="bert.pooler.dense.*which the adapter lacks"):
        merged = merge(tmp_path, weights, given, **fields)
    for name, x in weights.items():
        assert (merged[name] == x).all() == (name.rpartition(".")[0] in old), name
    for lost in (layers[0], f"{layers[3]}.bias"):
        rest = {name: x for name, x in given.items() if name != lost}
        with refused(ValueError, "adapter", f"{lost}.weight".replace("bias.weight", "bias"), LOST):
            merge(tmp_path, weights, rest, **fields)


@pytest.mark.parametrize("shape", [(8, 8), (4, 6), (6, 4)])
@pytest.mark.parametrize(
    ("kind", "flag", "transposed"),
    [
        ("gpt2", True, True),
        ("gpt2", False, True),  # as PEFT writes if a linear module comes last
        ("llama", True, False),  # as bitsandbytes' layers leave it in the file
        ("llama", False, False),
        ("unknown", False, False),
        ("unknown", True, None),  # it may have a `Conv1D`, which the sides of A and B tell
    ],
)
def test_orientation(
    kind: str, flag: bool, transposed: bool | None, shape: tuple[int, int], tmp_path: Folder
) -> None:
    """The model tells it; A and B of the transpose fit a `Conv1D` only."""
    name, config, (a, b) = "c_fc.weight", {"model_type": kind}, low_rank(shape, 2)
    weights = {name: ones(*min(shape, shape[::-1]))}
    is_swapped = transposed if shape == (8, 8) else shape == (6, 4)
    run = functools.partial(merge, tmp_path, weights, {"c_fc": (a, b)}, config)
    if is_swapped is None or transposed not in (None, is_swapped):
        why = "is square" if is_swapped is None else f"of shape (4, 6), but A {a.shape}"
        with refused(ValueError, "adapter", name, why):
            run(fan_in_fan_out=flag)
        return
    change = 1.5 * (b @ a)
    expected = 1 + (change.T if is_swapped else change)
    np.testing.assert_allclose(run(fan_in_fan_out=flag)[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", ["sibling", "nothing"])
def test_square_experts(known: str, tmp_path: Folder) -> None:
    """Whether A belongs to their last axis, the module's others tell, but no bias."""
    e, d, r = 2, 4, 3
    weights = {"m.down": 0 * ones(e, d, d), "m.up": 0 * ones(e, d, 6), "m.up_bias": ones(e, 6)}
    a, b = low_rank((d, d), e * r)
    given: dict[str, Any] = {"m": (a, b)}
    fields = {"target_modules": [], "target_parameters": ["m.down"], "r": r, "lora_alpha": r}
    if known == "nothing":
        with refused(ValueError, "adapter", "m.down", "is square, and may be stored"):
            merge(tmp_path, weights, given, **fields)
        return
    given = {"m.base_layer": low_rank((6, d), e * r), "m": (a, b)}
    merged = merge(tmp_path, weights, given, **fields | {"target_parameters": ["m.down", "m.up"]})
    each = [(b[:, i::e] @ a[i * r : (i + 1) * r]).T for i in range(e)]
    np.testing.assert_allclose(merged["m.down"], each, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------- shared weights


TABLE = np.random.default_rng(5).standard_normal((11, 4), np.float32)
TIED = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 11}
UNTIED: dict[str, Any] = TIED | {"tie_word_embeddings": False}
SILENT: dict[str, Any] = {"vocab_size": 11}
BODY = {"model.layers.0.q.weight": ones(4, 6), "model.norm.weight": ones(4)}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED_TEXT = {"text_config": {"tie_word_embeddings": True}}


def product(rows: int, columns: int) -> np.ndarray:
    """ΔW of A and B."""
    a, b = low_rank((rows, columns), 2)
    return 1.5 * b @ a


def bare(weights: Tensors) -> dict[str, np.ndarray]:
    """Without the prefix of a model with a head."""
    return {name.removeprefix("model."): x for name, x in weights.items()}


def of_bert(name: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [f"Bert{name}"], "model_type": "bert", **fields}


def tied(twice: bool) -> dict[str, np.ndarray]:
    """The weights of a model whose embedding is its head, stored once or twice."""
    return BODY | {EMBEDDING: TABLE} | ({HEAD: TABLE} if twice else {})


def change(embedding: float = 1.0, head: float = 1.0, table: str = EMBEDDING) -> dict[str, Any]:
    """PEFT's adapter of an embedding, and its transpose on the head, each times a number."""
    a, b = low_rank((4, 11), 2)  # (2, vocabulary), (dimension, 2)
    module = table.removesuffix(".weight")
    of_table = {f"{module}.lora_embedding_A": embedding * a, f"{module}.lora_embedding_B": b}
    return (of_table if embedding else {}) | ({"lm_head": (b.T, head * a.T)} if head else {})


def grow(
    folder: Folder,
    weights: Tensors,
    given: Mapping[str, Any],
    config: Mapping[str, Any],
    shards: int = 1,
    **fields: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the configuration of a merged checkpoint that may be larger than its base.

    Every tensor is where its index says. Files are byte for byte those of the library, and keep
    their metadata, which may describe codes.
    """
    base = checkpoint(folder / "base", weights, shards, **config)
    given = {"model.layers.0.q": low_rank((4, 6), 2), **given}
    end = ".lora_embedding_A"
    named = (n for n, x in given.items() if n.endswith(end) or isinstance(x, tuple))
    modules = [name.removesuffix(end) for name in named]
    fields = {"target_modules": modules} | fields
    peft.export_merged(base, adapter(folder / "a", given, **fields), folder / "out")
    expected = {"format": "pt"} if "quantization_config" in config else METADATA
    for file in (folder / "out").glob("*.safetensors"):
        save_file(load_file(file), folder / "again", metadata=expected)
        assert file.read_bytes() == (folder / "again").read_bytes()
    if shards > 1:
        index = json.loads((folder / "out" / INDEX).read_text())
        where = {
            name: file.name
            for file in (folder / "out").glob("*.safetensors")
            for name in load_file(file)
        }
        assert index["weight_map"] == where
        sizes = (x.nbytes for x in read(folder / "out").values())
        is_same = index == json.loads((base / INDEX).read_text())
        assert is_same or index["metadata"]["total_size"] == sum(sizes)
    return read(folder / "out"), json.loads((folder / "out" / "config.json").read_text())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("sides", [(1, 0), (0, 2), (1, 2), (1, 1)])
def test_each_side_of_a_shared_weight(
    sides: tuple[float, float], twice: bool, shards: int, tmp_path: Folder
) -> None:
    """It stays shared if both are changed equally; else the head of a decoder gets its own."""
    before, is_shared = TIED | TIED_TEXT, sides == (1, 1)
    merged, config = grow(tmp_path, tied(twice), change(*sides), before, shards)
    names = (EMBEDDING, HEAD)[: 1 if is_shared and not twice else 2]
    tables = {x: TABLE + n * product(4, 11).T for x, n in zip(names, sides, strict=False)}
    assert_close(merged, ADAPTED | tables)
    assert config == (before if is_shared else UNTIED | {"text_config": {TIE: False}})


@pytest.mark.parametrize("vocabulary", [{}, {"vocab_size": 11}])
def test_a_head_of_a_model_of_diffusers(vocabulary: dict[str, int], tmp_path: Folder) -> None:
    """Its name is that of a head of `transformers`; without a vocabulary nothing is tied."""
    name, config = "proj_out", {"_class_name": "A", "_diffusers_version": "0.42.1"}
    weights, given = BODY | {f"{name}.weight": TABLE}, {name: low_rank((11, 4), 2)}
    if vocabulary:
        with refused(ValueError, "adapter", "may read this weight twice"):
            grow(tmp_path, weights, given, config | vocabulary)
    else:
        merged, _ = grow(tmp_path, weights, given, config)
        assert not np.allclose(merged[f"{name}.weight"], TABLE)


ROWS = np.full((2, 4), 5, np.float32)
OF_ROWS = {"model.embed_tokens.token_adapter.trainable_tokens_delta": ROWS}
LISTED: dict[str, Any] = {"trainable_token_indices": {"embed_tokens": [3, 1]}}


def test_rows_of_a_shared_weight(tmp_path: Folder) -> None:
    """PEFT gives them to a tied head too; beside A and B of the head they have no one weight."""
    for i, twice in enumerate((False, True)):
        merged, _ = grow(tmp_path / str(i), tied(twice), OF_ROWS, TIED, **LISTED)
        for name in merged.keys() - BODY.keys():
            np.testing.assert_array_equal(merged[name][[3, 1]], ROWS)
    merged, _ = grow(tmp_path / "own", tied(True), OF_ROWS, UNTIED, **LISTED)
    np.testing.assert_array_equal(merged[HEAD], TABLE)
    with refused(ValueError, "adapter", HEAD, "has new rows in the adapter, which also changes"):
        grow(tmp_path / "both", tied(False), OF_ROWS | change(0, 1), TIED, **LISTED)


def test_a_shared_weight_of_a_tree(tmp_path: Folder) -> None:
    """A tree has one leaf for it, and the copy of the checkpoint follows; or it has a head."""
    a, b = (jnp.asarray(x) for x in low_rank((4, 11), 2))
    node = lambda a, b: LowRank(a, b, 1.5, peft.TABLES["llama"][0].layout)  # noqa: E731
    change = TABLE + product(4, 11).T
    trees: dict[str, Any] = {
        "table": {"model": {"embed_tokens": {"embedding": node(a.T, b.T)}}},
        "head": {"lm_head": {"kernel": node(b, a)}},
    }
    for i, (which, twice, config, expected) in enumerate([
        ("table", True, TIED, (change, change)), ("table", False, TIED, (change,)),
        ("table", True, UNTIED, (change, TABLE)),
        ("head", False, TIED, (TABLE, change)), ("head", True, TIED, (TABLE, change)),
    ]):  # fmt: skip
        place = tmp_path / str(i)
        base = checkpoint(place, tied(twice), **config)
        peft.export_merged(base, trees[which], place / "out", names=peft.TABLES["llama"])
        tables = dict(zip((EMBEDDING, HEAD), expected, strict=False))
        assert_close(read(place / "out"), BODY | tables)


def of_class(name: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [name], "vocab_size": 11, **fields}


@pytest.mark.parametrize(
    ("name", "table", "head"),
    [
        ("LlamaForCausalLM", "model.embed_tokens", "lm_head"),
        ("LlavaForConditionalGeneration", "model.language_model.embed_tokens", "lm_head"),
        ("LlavaForConditionalGeneration", "language_model.model.embed_tokens",
         "language_model.lm_head"),
        ("OPTForCausalLM", "model.decoder.embed_tokens", "lm_head"),
        ("GPT2LMHeadModel", "transformer.wte", "lm_head"),
        ("GPTNeoXForCausalLM", "gpt_neox.embed_in", "embed_out"),
        ("MambaForCausalLM", "backbone.embeddings", "lm_head"),
        ("BertForMaskedLM", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ],
)  # fmt: skip
def test_where_the_head_is(name: str, table: str, head: str, tmp_path: Folder) -> None:
    """As the class declares it, if the adapter does not name it; its bias is stored too."""
    weights = {f"{table.rpartition('.')[0]}.h.0.fc.weight": ones(4, 4), f"{table}.weight": TABLE}
    bias = {"cls.predictions.bias": ones(11)} if "BertForMaskedLM" in name else {}
    config = of_class(name, **{TIE: True})
    merged, config = grow(tmp_path, BODY | weights | bias, change(1, 0, table), config)
    biases = {f"{head}.bias", *bias} if bias else {*bias}
    assert merged.keys() == {*BODY, *weights, *biases, f"{head}.weight"}
    np.testing.assert_array_equal(merged[f"{head}.weight"], TABLE)
    assert config[TIE] is False


LAYER = ones(4, 4)
OF_T5 = {"shared.weight": TABLE, "encoder.block.0.q.weight": LAYER}
OF_BART = {"model.shared.weight": TABLE, "model.encoder.layers.0.q.weight": LAYER}
OF_DECODER = {"decoder.transformer.wte.weight": TABLE, "decoder.transformer.h.0.weight": LAYER}
OF_GPT2 = {"decoder": {"model_type": "gpt2"}}
# Weights of models that may read an embedding twice, and what the configuration may say of it.
READ_TWICE: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "a table of two": (OF_T5, [of_class("T5ForConditionalGeneration", **{TIE: False})]),
    "several ties": (
        OF_BART,
        [of_class("BartForConditionalGeneration"),
         of_class("BartForConditionalGeneration", **{TIE: True})],
    ),
    "an unknown class": (
        tied(False),
        [SILENT, SILENT | {TIE: True}, of_class("Own", **{TIE: False}, part={"model_type": "x"})],
    ),
    "an unknown class, stored twice": (tied(True), [SILENT, SILENT | {TIE: True}]),
    "another submodel": (OF_DECODER, [of_class("VisionEncoderDecoderModel", **OF_GPT2)]),
}  # fmt: skip
TWICE = "the model may read this weight twice, as its input embedding and as its output head"


@pytest.mark.parametrize("way", ["A and B", "in full", "rows"])
@pytest.mark.parametrize("case", READ_TWICE)
def test_what_a_model_may_read_twice(case: str, way: str, tmp_path: Folder) -> None:
    """Whatever its class, and whatever the configuration says or not."""
    weights, configs = READ_TWICE[case]
    table = next(name for name, x in weights.items() if x is TABLE)
    module = table.removesuffix(".weight")
    last = module.rpartition(".")[2]
    given, fields = {
        "A and B": (change(1, 0, table), {"target_modules": ["q", last]}),
        "in full": ({table: 2 * TABLE}, {"modules_to_save": [last]}),
        "rows": (
            {f"{module}.token_adapter.trainable_tokens_delta": ROWS},
            {"trainable_token_indices": {last: [3, 1]}},
        ),
    }[way]
    for i, config in enumerate(configs):
        with refused(ValueError, "adapter", table, TWICE):
            grow(tmp_path / str(i), BODY | weights, given, config, **fields)
        assert not (tmp_path / str(i) / "out").exists()


def test_a_head_that_is_no_embedding(tmp_path: Folder) -> None:
    """Of a model for CTC, or beside another table; stored alone it may be the embedding too."""
    weights = BODY | {HEAD: TABLE}
    with refused(ValueError, "adapter", HEAD, TWICE):
        grow(tmp_path / "alone", weights, change(0, 1), SILENT)
    of_bark = {"input_embeds_layer.weight": 2 * TABLE}
    of_ctc, of_two = of_class("Wav2Vec2ForCTC"), of_class("BarkSemanticModel")
    for others, config in ({}, of_ctc), (of_bark, of_two):
        folder = tmp_path / str(len(others))
        merged, _ = grow(folder, weights | others, change(0, 1), config)
        assert merged.keys() == weights.keys() | others.keys()
        assert not np.array_equal(merged[HEAD], TABLE)


THINKER = of_class("Qwen2_5OmniThinkerForConditionalGeneration", model_type="qwen2_5_omni_thinker")
# Of a folder with the names of today, in which the head alone has the name of a folder as usual.
IN_MEMORY = "model.language_model.embed_tokens.weight"


@pytest.mark.parametrize(("table", "config"), [(EMBEDDING, TIED), (IN_MEMORY, THINKER)])
def test_a_tied_weight_with_two_values(table: str, config: Any, tmp_path: Folder) -> None:
    """One version of `transformers` takes the first, another both."""
    weights = BODY | {table: TABLE, HEAD: 2 * TABLE}
    for i, sides in enumerate([(1, 0), (0, 1), (1, 1)]):
        with refused(ValueError, "adapter", f"Correct {TIE} there", "but their values differ"):
            grow(tmp_path / str(i), weights, change(*sides, table), config | {TIE: True})


OF_BERT = {"embeddings.word_embeddings.weight": TABLE, "encoder.layer.0.q.weight": ones(4, 6)}
OF_OPT = {"model.decoder.embed_tokens.weight": TABLE, "model.decoder.layers.0.q.weight": LAYER}
# Weights of models that read their embedding once, and what the configuration may say.
READ_ONCE: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "no head": (bare(tied(False)), [of_class("LlamaModel", **{TIE: True}), of_class("LlamaModel")]),
    "no head, in a part": (OF_BERT, [of_class("BertModel", **{TIE: True})]),
    "a classifier": (
        tied(False) | {"score.weight": ones(3, 4)},
        [of_class("LlamaForSequenceClassification", **{TIE: True})],
    ),
    "a head of its own": (
        tied(False) | {HEAD: 2 * TABLE}, [UNTIED, of_class("LlamaForCausalLM")]
    ),
    "a head of its own, where the default is another": (
        OF_OPT | {HEAD: 2 * TABLE}, [of_class("OPTForCausalLM"), UNTIED]
    ),
    "a head that began as it": (tied(True), [UNTIED]),
    "an unknown class that denies it": (tied(True), [of_class("Own", **{TIE: False})]),
}  # fmt: skip


@pytest.mark.parametrize("case", READ_ONCE)
def test_what_a_model_reads_once(case: str, tmp_path: Folder) -> None:
    """Nothing else changes."""
    weights, configs = READ_ONCE[case]
    table = next(name for name, x in weights.items() if x is TABLE)
    last = table.removesuffix(".weight").rpartition(".")[2]
    for i, config in enumerate(configs):
        place = tmp_path / str(i)
        base = checkpoint(place / "base", weights, **config)
        given = adapter(place / "a", change(1, 0, table), target_modules=[last])
        peft.export_merged(base, given, place / "out")
        assert_close(read(place / "out"), weights | {table: TABLE + product(4, 11).T})
        assert json.loads((place / "out" / "config.json").read_text()) == config


# ----------------------------------------------------------------------- what the base lacks


NEW = np.random.default_rng(6).standard_normal((13, 4), np.float32)
TABLES = {"model.embed_tokens.weight": TABLE, "lm_head.weight": 2 * TABLE, "lm_head.bias": ones(11)}
GROWN = {"model.embed_tokens.weight": NEW, "lm_head.weight": 3 * NEW, "lm_head.bias": ones(13)}
BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
TYING = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
COPIES = GROWN | {
    re.sub(r"(\w+)$", rf"{copy}.\1", name): x + more
    for name, x in GROWN.items()
    for copy, more in (("original_module", 1), ("modules_to_save", 0))
}
# A resized embedding that A and B are added to, and its copy in the head.
RESIZED = {
    f"model.embed_tokens.lora_embedding_{x}": y
    for x, y in zip("AB", low_rank((4, 13), 2), strict=True)
}
RESIZED |= {"model.embed_tokens.base_layer.weight": NEW, HEAD: NEW}
CODES = {"model.layers.0.q.weight": np.full((4, 6), 127, np.int8)}
CODES |= {"model.layers.0.q.SCB": ones(4)}
QUANTIZED = {"quantization_config": {"quant_method": "bitsandbytes"}}
CLASSIFIER = {"classifier.weight": 5 * ones(3, 4), "classifier.bias": ones(3)}
LAYERS = {"classifier.dense.weight": ones(4, 4), "classifier.dense.bias": ones(4)}
LAYERS |= {"classifier.out_proj.weight": ones(3, 4), "classifier.out_proj.bias": ones(3)}
SCORE, CLS, POOLER = {"score.weight": ones(3, 4)}, {"cls.bias": ones(7)}, {"pooler.bias": ones(7)}
LABELS = {
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
}
CLASSIFIES: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
MAPPED = {"base_model_class": "BertForTokenClassification", "parent_library": "transformers"}


def sized(before: dict[str, Any], after: dict[str, Any]) -> tuple[Any, ...]:
    """A row of new tokens that a configuration counts somewhere."""
    rest = {"architectures": ["A"], TIE: False}
    return BODY | TABLES, GROWN, rest | before, {}, GROWN, rest | after


ADAPTED = BODY | {"model.layers.0.q.weight": 1 + product(4, 6)}
CHANGED = {EMBEDDING: TABLE + product(4, 11).T}
WHOLE, OTHER = {EMBEDDING: 2 * TABLE, HEAD: 2 * TABLE}, {HEAD: 3 * TABLE}
OF_13, ROBERTA = {"vocab_size": 13}, {"model_type": "roberta"}
LLAMA = TIED | {"model_type": "llama"}
# Weights and configuration of a base, what the adapter has beside A and B of a layer, with its
# fields, and what there is beside that layer after all, with its configuration.
GROWTHS: dict[str, tuple[Any, ...]] = {
    "tokens": (BODY | TABLES, GROWN, UNTIED, {}, GROWN, UNTIED | OF_13),
    "tokens, with copies": (BODY | TABLES, COPIES, UNTIED, BOTH, GROWN, UNTIED | OF_13),
    "tokens, of codes": (
        BODY | TABLES | CODES, GROWN, UNTIED | QUANTIZED | {"dtype": "float32"}, {},
        GROWN, UNTIED | OF_13 | {"dtype": "float32"}
    ),
    "tokens, beside A and B": (
        tied(False), RESIZED, TIED, {},
        {EMBEDDING: NEW + product(4, 13).T, HEAD: NEW}, UNTIED | OF_13
    ),
    "in a part": sized({"text_config": {"vocab_size": 11}}, {"text_config": OF_13}),
    "in a part with a default": sized({"text_config": {}}, {"text_config": OF_13}),
    "uncounted": sized({}, OF_13),
    "counted twice": sized(
        {"vocab_size": 11, "a": {"vocab_size": 7}}, OF_13 | {"a": {"vocab_size": 7}}
    ),
    "tied": (tied(False), WHOLE, TIED, BOTH, {EMBEDDING: 2 * TABLE}, TIED),
    "tied by PEFT": (tied(False), WHOLE, TIED, TYING, {EMBEDDING: 2 * TABLE}, TIED),
    "untied": (tied(False), WHOLE | OTHER, TIED, BOTH, WHOLE | OTHER, UNTIED),
    "a head in full": (
        tied(False), OTHER, TIED, {"modules_to_save": ["lm_head"]},
        {EMBEDDING: TABLE} | OTHER, UNTIED
    ),
    "a classifier": (
        BODY | CLS, CLASSIFIER, of_bert("ForMaskedLM", a=1), CLASSIFIES,
        CLS | CLASSIFIER, of_bert("ForSequenceClassification", a=1, **LABELS)
    ),
    "a classifier, without prefix": (
        bare(BODY) | POOLER, CLASSIFIER, of_bert("Model", a=1), CLASSIFIES,
        {"model.pooler.bias": ones(7)} | CLASSIFIER,
        of_bert("ForSequenceClassification", a=1, **LABELS)
    ),
    "a classifier of two layers": (
        BODY, LAYERS, ROBERTA, CLASSIFIES,
        LAYERS, ROBERTA | LABELS | {"architectures": ["RobertaForSequenceClassification"]}
    ),
    "a classifier on a decoder": (
        tied(False), SCORE | change(1, 0), LLAMA, CLASSIFIES,
        SCORE | CHANGED, LLAMA | LABELS | {"architectures": ["LlamaForSequenceClassification"]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("case", GROWTHS)
def test_what_the_base_lacks(case: str, shards: int, tmp_path: Folder) -> None:
    """It is added, under the prefix of a model with a head; the configuration tells it."""
    weights, given, config, fields, expected, after = GROWTHS[case]
    merged, found = grow(tmp_path, weights, given, config, shards, **fields)
    assert_close(merged, ADAPTED | expected)
    assert found == after


@pytest.mark.parametrize("lost", [*GROWN, "final_logits_bias"])
def test_new_tokens_of_some_tables(lost: str, tmp_path: Folder) -> None:
    """Tables of different sizes are no model; BART's bias of the logits is not stored by PEFT."""
    given = {name: x for name, x in GROWN.items() if name != lost}
    with refused(ValueError, "adapter", lost, "is for 11 tokens"):
        grow(tmp_path, BODY | {"final_logits_bias": ones(1, 11)} | TABLES, given, UNTIED)
    assert not (tmp_path / "out").exists()


NAMED = {"id2label": {"0": "a", "1": "b", "2": "c"}}
COUNTED = {"num_labels": 2}
WILD = {"base_model_class": "AForB" * 10**5 + "!"}
LACKS = "not in the checkpoint"
# Fields of the adapter and of the base, and the configuration, or why it is not known.
CLASSES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any] | str]] = [
    ({"task_type": "TOKEN_CLS"}, {}, of_bert("ForTokenClassification", **LABELS)),
    ({"auto_mapping": MAPPED}, {}, of_bert("ForTokenClassification", **LABELS)),
    ({}, NAMED, of_bert("ForSequenceClassification", **NAMED)),
    ({}, COUNTED, of_bert("ForSequenceClassification", **{"num_labels": 3} | LABELS)),
    ({}, {"model_type": "gemma3_text"}, LACKS),  # its head has another name
    ({"task_type": None}, {}, LACKS),
    ({"task_type": None, "auto_mapping": {"base_model_class": "os; x"}}, {}, LACKS),
    ({"task_type": None, "auto_mapping": WILD}, {}, LACKS),
    ({}, {"model_type": "own"}, "model_type 'own'"),
]


@pytest.mark.parametrize(("fields", "config", "expected"), CLASSES)
def test_the_class_of_a_head(fields: Any, config: Any, expected: Any, tmp_path: Folder) -> None:
    """From the task or PEFT's mapping; nothing is added to a model of unknown class."""
    config = of_bert("Model", **config)
    if isinstance(expected, str):
        with bounded(), refused(ValueError, "adapter", "classifier.weight", expected, SAVE):
            grow(tmp_path, BODY, CLASSIFIER, config, **CLASSIFIES | fields)
        return
    assert grow(tmp_path, BODY, CLASSIFIER, config, **CLASSIFIES | fields)[1] == expected


def test_what_is_missing_inside_of_a_model(tmp_path: Folder) -> None:
    """It may have another name there, and is no head."""
    config, norm = of_bert("Model"), {"model.layer_norm.weight": ones(4)}
    saved = ["classifier", "layer_norm"]
    with refused(ValueError, "adapter", "model.layer_norm.weight", "not in the checkpoint", SAVE):
        grow(tmp_path, BODY, CLASSIFIER | norm, config, **CLASSIFIES | {"modules_to_save": saved})


# ----------------------------------------------------------------------- files beside the weights


def simple(folder: Folder) -> tuple[Folder, Folder]:
    """A checkpoint of one adapted and one other weight, and the adapter."""
    base = checkpoint(folder / "base", {"q.weight": ones(4, 6), "k.weight": ones(4, 6)})
    return base, adapter(folder / "a", {"q": low_rank((4, 6), 2)})


def test_other_files(tmp_path: Folder) -> None:
    """All that is no weight is copied; what would be stale, or run code, is left out and named.

    The new folder may lie in the old one.
    """
    base, given = simple(tmp_path)
    kept = ["generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "m.py"]
    kept += ["1_Pooling/config.json", "README.md"]
    left_out = ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "adapter.npz"]
    left_out += ["flax_model.msgpack", "model.fp16.safetensors", "onnx/model.onnx", "rng_state.pth"]
    left_out += [".git/config", "adapter_config.json", "consolidated.00.pth", "m.gguf"]
    kept += ["m.json.py/more"]
    for name in [*kept, *left_out]:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    found = peft.export_merged(base, given, base / "merged")
    assert found == sorted(name.replace(".git/config", ".git") for name in left_out)
    after = bytes_of(base / "merged")
    assert set(after) == {*kept, ONE, "config.json"}
    assert all(after[name] == name.encode() for name in kept)


# What is in the place of a file, and what that is called.
ODD: dict[str, tuple[Callable[[Folder], Any], str]] = {
    "link": (lambda path: path.symlink_to("nowhere"), "a broken link"),
    "loop": (lambda path: path.symlink_to(path.name), "a broken link"),
    "pipe": (lambda path: os.mkfifo(path), "not a regular file"),
    "folder": (lambda path: (path / "more").mkdir(parents=True), "a folder"),
}
PLACES = [(kind, "config.json") for kind in ODD]
PLACES += [("link", "tokenizer.json"), ("pipe", "m.py"), ("folder", "tokenizer.model")]


@pytest.mark.skipif(os.name != "posix", reason="makes pipes")
@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_what_is_in_the_place_of_a_file(kind: str, name: str, tmp_path: Folder) -> None:
    """The output is never without a file that the source should have; nothing waits for a pipe."""
    base, given = simple(tmp_path)
    (base / name).unlink(missing_ok=True)
    make, what = ODD[kind]
    make(base / name)
    ways = [
        lambda out: peft.export_merged(base, given, out),
        lambda out: peft.export_merged(base, given, out, follow_links=True),
        lambda out: peft.dequantize_checkpoint(base, out),
    ]
    if name == "config.json":  # it says what the weights are
        ways.append(lambda _: peft.load_base(base, {}, [Name(".*", "m", "io")]))
    for way in ways:
        with refused(ValueError, "", name, f"is {what}"):
            way(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_becomes_shorter(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    base, given = simple(tmp_path)
    file = base / "model.safetensors"
    shorten = lambda *_: os.truncate(file, file.stat().st_size - 1) or ()  # noqa: E731
    monkeypatch.setattr("jlora.peft.merge._export.list_changed", shorten)
    with refused(ValueError, "path", "its file changed while it was read", "start again"):
        peft.export_merged(base, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------- refusals


MODULES = [f"m.layers.{i}.{part}" for i in (0, 1) for part in "qk"]
WEIGHTS = {f"{m}.weight": ones(4, 6) for m in MODULES} | {f"{m}.bias": ones(4) for m in MODULES}
GIVEN = {m: low_rank((4, 6), 2) for m in MODULES if m[-1] == "q"}
Q = MODULES[0]
NO_WEIGHTS, NO_GIVEN = dict.fromkeys(WEIGHTS), dict.fromkeys(GIVEN)
K_IN_FULL = {x: np.ones(3, np.float32) for x in WEIGHTS if ".k." in x}
EXPERTS = {"e.up": np.ones((2, 4, 6)), "e.down": np.ones((2, 6, 4))}
OF_EXPERTS = {"e": low_rank((4, 6), 4), "e.base_layer": low_rank((4, 6), 4)}


def export(
    folder: Folder,
    weights: Mapping[str, Any] = {},
    given: Mapping[str, Any] = {},
    shards: int = 1,
    after: Callable[[Folder], Any] = lambda base: None,
    **fields: Any,
) -> dict[str, np.ndarray]:
    """Merges an adapter of `q` in two layers, with changes to it, to weights and to their files."""
    has = lambda x: {name: y for name, y in x.items() if y is not None}  # noqa: E731
    base = checkpoint(folder / "base", has(WEIGHTS | dict(weights)), shards)
    fields = {"target_modules": ["q"]} | fields
    source = adapter(folder / "a", has(GIVEN | dict(given)), **fields)
    after(base)
    peft.export_merged(base, source, folder / "out")
    return read(folder / "out")


def index(change: Callable[[dict[str, str]], Any]) -> dict[str, Any]:
    """Changes the index of a checkpoint in two shards."""

    def after(base: Folder) -> None:
        index = json.loads((base / INDEX).read_text())
        change(index["weight_map"])
        (base / INDEX).write_text(json.dumps(index))

    return {"shards": 2, "after": after}


# What is changed; the argument, the place, what was got there, the remedy.
DAMAGES: dict[str, tuple[Any, ...]] = {
    "no-layer": ({"given": {Q: None}}, "adapter", f"{Q}.weight", LOST),
    "other-names": (
        {"given": NO_GIVEN | {"m.o." + k.replace(".q", ".o.q"): x for k, x in GIVEN.items()}},
        *("adapter", "m.o.m.layers.0.o.q.weight", "not in the checkpoint", SAVE),
    ),
    "one-weight-twice": (
        {"weights": NO_WEIGHTS | {"bert.q.weight": ones(4, 6)}}
        | {"given": NO_GIVEN | {"q": GIVEN[Q], "bert.q": GIVEN[Q]}},
        *("adapter", "bert.q.weight", "changed twice by the adapter"),
    ),
    "no-tensor": (
        {"weights": {f"{Q}.weight": None}}, "adapter", f"{Q}.weight", "not in the checkpoint", SAVE
    ),
    "shape": (
        {"given": {Q: low_rank((5, 6), 2)}}, "adapter", f"{Q}.weight", "A (2, 6) and B (5, 2) make"
    ),
    "vector": (
        {"given": {Q: (ones(6), ones(4, 2))}}, "adapter", PREFIX + Q, "got shapes ((6,), (4, 2))"
    ),
    "scale": ({"lora_alpha": 1e300}, "adapter", f"{Q}.weight", "24 values are not finite"),
    "quantized": (
        {"weights": {f"{Q}.weight": np.ones((4, 6), np.uint8)}},
        *("adapter", f"{Q}.weight", "of dtype U8", "Dequantize the checkpoint"),
    ),
    "misshapen-bias": (
        {"given": K_IN_FULL, "modules_to_save": ["k"]}, "adapter", "m.layers.0.k.bias", "got (3,)"
    ),
    "embedding": (
        {"given": {f"{Q}.base_layer.weight": 2 * ones(4, 6)}},
        *("adapter", f"{Q}.weight", "with this adapter merged already"),
    ),
    "experts": (
        {"weights": EXPERTS, "given": OF_EXPERTS, "target_parameters": list(EXPERTS)},
        *("adapter", f"{PREFIX}e", "e.down (2, 6, 4), e.up (2, 4, 6)", "jlora.peft.load"),
    ),
    "prefixes": (
        {"weights": NO_WEIGHTS | {p + k: x for k, x in WEIGHTS.items() for p in ("a.", "b.")}},
        *("adapter", "", "several prefixes, 'a.', 'b.'"),
    ),
    "pickle": (
        {"after": lambda base: (base / ONE).rename(base / "m.bin")},
        *("path", "", f"has neither {ONE} nor {INDEX}", "Save the model as safetensors"),
    ),
    "cut": ({"after": lambda base: os.truncate(base / ONE, 1200)}, "path", ONE),
    "index-without-map": (
        {"shards": 2, "after": lambda base: (base / INDEX).write_text('{"weight_map": []}')},
        *("path", INDEX, "`weight_map`; got []"),
    ),
    "index-leads-out": (
        index(lambda where: where.update(x="../x.safetensors")),
        *("path", INDEX, "names '../x.safetensors'"),
    ),
    "index-lacks": (
        index(lambda where: where.pop(f"{Q}.weight")),
        *("path", f"{Q}.weight", "in None by the index, in model-0000"),
    ),
    "index-invents": (
        index(lambda where: where.update(x=where[f"{Q}.weight"])),
        *("path", "x", "safetensors by the index, in None by the files"),
    ),
    "no-shard": (
        index(lambda where: where.update(x="more.safetensors")),
        *("path", "", "has no more.safetensors"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_refusals(damage: str, tmp_path: Folder) -> None:
    """Each by name, and nothing is written."""
    change, *facts = DAMAGES[damage]
    with refused(FileNotFoundError if damage == "no-shard" else ValueError, *facts):
        export(tmp_path, **change)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_one_file_beside_an_index(stem: str, tmp_path: Folder) -> None:
    """With transformers the one file is read, with diffusers the index; others are left out."""
    base = checkpoint(tmp_path / "base", {"q.weight": ones(4, 6)})
    save_file({"q.weight": 5 * ones(4, 6)}, base / "shard.safetensors", metadata=METADATA)
    (base / ONE).rename(base / f"{stem}.safetensors")
    index = f"{stem}.safetensors.index.json"
    (base / index).write_text('{"weight_map": {"q.weight": "shard.safetensors"}}')
    given = adapter(tmp_path / "adapter", {"q": (ones(2, 6), ones(4, 2))})
    each = {f"{stem}.safetensors"}, {"shard.safetensors", index}
    there, left_out = each if stem == "model" else each[::-1]
    assert {*peft.export_merged(base, given, tmp_path / "out")} == left_out
    assert {x.name for x in (tmp_path / "out").iterdir()} == {"config.json", *there}
    [w] = read(tmp_path / "out").values()
    assert (w == (4 if stem == "model" else 8)).all()
    like = {"q": jax.ShapeDtypeStruct((4, 6), jnp.float32)}
    loaded = peft.load_base(base, like, [Name("q", "q", "oi")])
    assert (loaded["q"] == w - 3).all()


def test_arguments(tmp_path: Folder) -> None:
    """A tree needs names, files have them; what is neither is refused."""
    (base, given), none, llama = simple(tmp_path), tmp_path / "none", peft.TABLES["llama"]
    row, turned = (Name("(.*)/kernel", r"\1", "io", transposed=x) for x in (False, True))
    tree = {"q": {"kernel": node(row, (6, 4))}}
    broken = jax.tree.map(lambda x: x * np.nan, tree)
    for error, source, what, names, *facts in (
        (ValueError, base, given, llama, "names", "is for an adapter tree"),
        (ValueError, base, tree, None, "names", "got None"),
        (TypeError, base, {}, llama, "adapter", "must be a nested dict"),
        (FileNotFoundError, none, given, None, "path", none, "there is no folder"),
        (FileNotFoundError, base, none, None, "adapter", none, "there is no folder"),
        (ValueError, base, tree, [turned], "adapter", "q.weight", "expected a linear weight of sh"),
        (ValueError, base, tree, [Name("v", "v", "io")], "adapter", "q/kernel", "no row of `names"),
        (ValueError, base, broken, [row], "adapter", "q/kernel", "has values that are not finite"),
    ):
        with refused(error, *facts):
            peft.export_merged(source, what, tmp_path / "out", names=names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]

"""Image LoRA's files, of diffusers and kohya: keys, values, configurations, and what is refused."""

import functools
import json
import random
import shutil
import struct
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import refused
from peft_files import DEEP, WILD, Folder, assert_equal, bounded, node
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small import as_jax

import jlora
from jlora import checkpoint, peft
from jlora.types import Decomposed, LowRank
from tests.cli.test_cli import fails, run
from tests.peft.merge.test_peft_merged import checkpoint as write_checkpoint
from tests.peft.test_campaigns import MANY as MANY_LIES
from tests.peft.test_campaigns import campaign

FILE = "pytorch_lora_weights.safetensors"
SHAPES = {
    "conv_in": (4, 3, 3, 3),
    "mid_block.attn.to_q": (6, 5),
    "mid_block.attn.to_out.0": (5, 6),
    "up_blocks.1.conv": (4, 4, 1, 1),
}
BASE = {name: {"weight": jnp.zeros(shape)} for name, shape in SHAPES.items()}
NAMES = [
    peft.Name(rf"{name}/weight".replace(".", r"\."), name, "oi" + "k" * (len(shape) - 2))
    for name, shape in SHAPES.items()
]
ROWS = {row.module: row for row in NAMES}
KOHYA = {name: "lora_unet_" + name.replace(".", "_") for name in SHAPES}
each_dialect = pytest.mark.parametrize("dialect", ["diffusers", "kohya"])


def make(
    settings: Mapping[str, tuple[int, float]], cls: Any = LowRank, dtype: Any = jnp.float32
) -> Any:
    """An adapter of modules by rank and scale."""
    nodes = {
        name: node(ROWS[name], SHAPES[name], rank, scale, cls)
        for name, (rank, scale) in settings.items()
    }
    return {k: {"weight": jax.tree.map(lambda x: as_jax(x, dtype), v)} for k, v in nodes.items()}


LINEAR = {"mid_block.attn.to_q": (2, 1.0), "mid_block.attn.to_out.0": (2, 1.0)}
ADAPTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (make(LINEAR), {}),
    "alpha": (make(dict.fromkeys(LINEAR, (2, 0.75))), {}),
    "convolutions": (make({"conv_in": (3, 1.0), "up_blocks.1.conv": (3, 1.0)}), {}),
    "every module": (make(dict.fromkeys(SHAPES, (2, 2.0))), {}),
    "ranks": (make({name: (1 + i, 1.0) for i, name in enumerate(SHAPES)}), {}),
    "alphas": (make({name: (2, 1 + i / 3) for i, name in enumerate(SHAPES)}), {}),
    "rsLoRA": (
        make({x: (1 + i, 3 / (1 + i) ** 0.5) for i, x in enumerate(SHAPES)}),
        {"use_rslora": True},
    ),
    "bfloat16": (make(LINEAR, dtype=jnp.bfloat16), {}),
    "float16": (make(LINEAR, dtype=jnp.float16), {}),
    "DoRA": (make(dict.fromkeys(SHAPES, (2, 1.0)), Decomposed), {}),
}
# kohya's files of these warn that diffusers computes something else.
quiet = pytest.mark.filterwarnings("ignore:diffusers ")


@quiet
@pytest.mark.parametrize("form", ["folder", "file"])
@each_dialect
@pytest.mark.parametrize("case", ADAPTERS)
def test_come_back(case: str, dialect: str, form: str, tmp_path: Folder) -> None:
    """To the bit, by `load`, and by `read` and `write`, whose file has the same bytes."""
    adapter, config = ADAPTERS[case]
    end = ".safetensors" if form == "file" else ""
    first, second = (tmp_path / f"{x}{end}" for x in "ab")
    given = {"dialect": dialect, "prefix": "unet"}
    peft.save(first, BASE, adapter, NAMES, config=config, **given)
    again = peft.load(first, BASE, NAMES)
    assert_equal(again, adapter)
    peft.write(second, peft.read(first), **given)
    files = [x if form == "file" else x / FILE for x in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(x.name for x in tmp_path.iterdir()) == [first.name, second.name]


def test_keys_of_diffusers(tmp_path: Folder) -> None:
    """PEFT's, after the prefix, and the configuration of `LoraConfig` in the header."""
    adapter, _ = ADAPTERS["ranks"]
    peft.save(tmp_path / "a", BASE, adapter, NAMES, dialect="diffusers", prefix="unet")
    found = load_file(tmp_path / "a" / FILE)
    assert {k: x.shape for k, x in found.items()} == {
        "unet.conv_in.lora_A.weight": (1, 3, 3, 3),
        "unet.conv_in.lora_B.weight": (4, 1, 1, 1),
        "unet.mid_block.attn.to_q.lora_A.weight": (2, 5),
        "unet.mid_block.attn.to_q.lora_B.weight": (6, 2),
        "unet.mid_block.attn.to_out.0.lora_A.weight": (3, 6),
        "unet.mid_block.attn.to_out.0.lora_B.weight": (5, 3),
        "unet.up_blocks.1.conv.lora_A.weight": (4, 4, 1, 1),
        "unet.up_blocks.1.conv.lora_B.weight": (4, 4, 1, 1),
    }
    with safe_open(tmp_path / "a" / FILE, "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    fields = json.loads(metadata["lora_adapter_metadata"])
    for name in ("unet.rank_pattern", "unet.alpha_pattern"):
        assert sorted(fields.pop(name).values()) == [2, 3, 4]
    assert len(fields.pop("unet.target_modules")) == 4
    assert fields == {"unet.peft_type": "LORA", "unet.r": 1, "unet.lora_alpha": 1}


def test_no_prefix(tmp_path: Folder) -> None:
    """As `save_lora_adapter` writes."""
    adapter, _ = ADAPTERS["linear"]
    peft.save(tmp_path / "a", BASE, adapter, NAMES, dialect="diffusers", prefix="")
    ends = ("lora_A.weight", "lora_B.weight")
    assert load_file(tmp_path / "a" / FILE).keys() == {f"{x}.{y}" for x in LINEAR for y in ends}
    assert_equal(peft.load(tmp_path / "a", BASE, NAMES), adapter)


@quiet
@pytest.mark.parametrize(("case", "dtype"), [("alphas", np.float64), ("DoRA", np.float32)])
def test_keys_of_kohya(case: str, dtype: Any, tmp_path: Folder) -> None:
    """A scalar is of float32 if it then is exact; a magnitude for each output."""
    adapter, _ = ADAPTERS[case]
    peft.save(tmp_path / "a.safetensors", BASE, adapter, NAMES, dialect="kohya")
    found = load_file(tmp_path / "a.safetensors")
    ends = ["alpha", "lora_down.weight", "lora_up.weight"] + ["dora_scale"] * (case == "DoRA")
    assert found.keys() == {f"{x}.{end}" for x in KOHYA.values() for end in ends}
    for i, (name, key) in enumerate(KOHYA.items()):
        scale = 1 + i / 3 if case == "alphas" else 1.0
        assert found[f"{key}.alpha"] / 2 == scale and found[f"{key}.alpha"].shape == ()
        x = adapter[name]["weight"]
        down, up = found[f"{key}.lora_down.weight"], found[f"{key}.lora_up.weight"]
        rest = (1,) * (len(SHAPES[name]) - 2)
        assert down.shape == (2, *SHAPES[name][1:]) and up.shape == (SHAPES[name][0], 2, *rest)
        if case == "DoRA":
            m = found[f"{key}.dora_scale"]
            assert m.shape == (SHAPES[name][0], 1, *rest)
            np.testing.assert_array_equal(m.reshape(-1), x.m.reshape(-1))
    assert found["lora_unet_mid_block_attn_to_q.alpha"].dtype == dtype


# ------------------------------------------------------------------------ files of others


def put(path: Folder, tensors: Mapping[str, Any], metadata: Any = None) -> Folder:
    """A file with tensors, and with texts or fields in its header."""
    path.parent.mkdir(exist_ok=True)
    texts = metadata if isinstance(metadata, str) or metadata is None else json.dumps(metadata)
    texts = {} if texts is None else {"lora_adapter_metadata": texts}
    save_file({k: np.asarray(x, order="C") for k, x in tensors.items()}, path, texts)
    return path


def pair(start: str, rank: int = 2, module: str = "mid_block.attn.to_q") -> dict[str, np.ndarray]:
    """A and B of ones, in the dialect that the start of the key shows."""
    outputs, inputs = SHAPES[module]
    ends = ("lora_down", "lora_up") if start.startswith("lora_") else ("lora_A", "lora_B")
    shapes = zip(ends, ((rank, inputs), (outputs, rank)), strict=True)
    return {f"{start}.{end}.weight": np.ones(shape, np.float32) for end, shape in shapes}


Q, MANGLED = "unet.mid_block.attn.to_q", "lora_unet_mid_block_attn_to_q"
TEXT = pair("text_encoder.layers.0.q") | pair(Q, 3)


def spelled(start: str, ends: str, alpha: float | None = None) -> dict[str, np.ndarray]:
    """A and B of rank 2 of a module that is spelled in some way, with other ends of their keys."""
    pairs = zip(ends.split(), pair(Q).values(), strict=True)
    found = {f"{start}.{end}": x for end, x in pairs}
    return found if alpha is None else found | {f"{start}.alpha": np.asarray(alpha, np.float32)}


DOWN, KEPT = "lora_down.weight lora_up.weight", "lora_A.default.weight lora_B.default.weight"
OLD = "lora.down.weight lora.up.weight"
READ: dict[str, tuple[dict[str, Any], Any, float, int]] = {
    "lightx2v": (spelled("mid_block.attn.to_q", DOWN, 1), None, 0.5, 2),
    "ComfyUI": (spelled("diffusion_model.mid_block.attn.to_q", DOWN, 1), None, 0.5, 2),
    "DiffSynth-Studio": (spelled("mid_block.attn.to_q", KEPT), None, 1.0, 2),
    "diffusers before 0.24": (spelled(Q, OLD), None, 1.0, 2),
    "of a text encoder": (spelled(Q, OLD.replace("lora", "lora_linear_layer")), None, 1.0, 2),
    "OneTrainer": (spelled("lora_transformer_mid_block_attn_to_q", DOWN, 1), None, 0.5, 2),
    "LyCORIS": (spelled("lycoris_mid_block_attn_to_q", DOWN, 4), None, 2.0, 2),
    "mangled as PEFT": (
        spelled("lycoris_mid_block_attn_to_q", "lora_A.weight lora_B.weight"),
        None,
        1,
        2,
    ),
    "DoRA of lightx2v": (
        spelled("mid_block.attn.to_q", DOWN)
        | {"mid_block.attn.to_q.dora_scale": np.ones((6, 1), np.float32)},
        *(None, 1.0, 2),
    ),
    "no metadata": (pair(Q), None, 1.0, 2),
    "no prefix": (pair("mid_block.attn.to_q"), None, 1.0, 2),
    "no prefix, by its metadata": (pair("mid_block.attn.to_q"), {"r": 2, "lora_alpha": 3}, 1.5, 2),
    "metadata": (pair(Q), {"unet.r": 2, "unet.lora_alpha": 1}, 0.5, 2),
    "metadata of another prefix": (pair("dit.mid_block.attn.to_q"), {"dit.r": 2}, 4.0, 2),
    "alpha": (pair(Q) | {f"{Q}.alpha": np.float32(6)}, None, 3.0, 2),
    "kohya": (pair(MANGLED, 3), None, 1.0, 3),
    "kohya with alpha": (pair(MANGLED) | {f"{MANGLED}.alpha": np.float16(1)}, None, 0.5, 2),
    "alpha of integers": (pair(MANGLED) | {f"{MANGLED}.alpha": np.array([4])}, None, 2.0, 2),
}


@pytest.mark.parametrize("case", READ)
def test_files_of_others(case: str, tmp_path: Folder) -> None:
    tensors, metadata, scale, rank = READ[case]
    if metadata is not None:
        start = next(iter(metadata)).rpartition(".")[0]
        metadata |= {f"{start}.target_modules" if start else "target_modules": ["to_q"]}
    found = peft.load(put(tmp_path / "x.safetensors", tensors, metadata), BASE, NAMES)
    [[name, leaf]] = found.items()
    assert name == "mid_block.attn.to_q" and leaf["weight"].scale == scale
    assert leaf["weight"].b.shape == (rank, 6)


@quiet
@each_dialect
@pytest.mark.parametrize("case", ["every module", "DoRA"])
def test_axes_of_length_1(case: str, dialect: str, tmp_path: Folder) -> None:
    """A matrix is a convolution of 1×1, in the file or the model; loaded and merged alike."""
    adapter, path = ADAPTERS[case][0], tmp_path / "a.safetensors"
    peft.save(path, BASE, adapter, NAMES, dialect=dialect, prefix="unet")
    base = tmp_path / "base"
    checkpoint_of(base)
    peft.export_merged(base, path, tmp_path / "as it is")
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    for key, x in tensors.items():
        if "to_q" in key and "alpha" not in key:
            tensors[key] = x.reshape(1, -1, 1, 1) if x.ndim == 1 else x[:, :, None, None]
        if "up_blocks_1" in key.replace(".", "_") and "alpha" not in key:
            tensors[key] = x.reshape(-1) if "magnitude" in key else x[:, :, 0, 0]
    save_file(tensors, path, metadata)
    assert_equal(peft.load(path, BASE, NAMES), adapter)
    peft.export_merged(base, path, tmp_path / "other")
    each = [tmp_path / x / f"{STEM}.safetensors" for x in ("as it is", "other")]
    assert each[0].read_bytes() == each[1].read_bytes()


@pytest.mark.parametrize(
    ("tensors", "metadata", "prefixes"),
    [
        (TEXT, None, ("text_encoder", "unet")),
        (
            TEXT,
            {f"{x}.r": r for x, r in (("text_encoder", 2), ("unet", 3))},
            ("text_encoder", "unet"),
        ),
        (pair("lora_te1_layers_0_q") | pair(MANGLED, 3), None, ("te1", "unet")),
    ],
    ids=["text_encoder", "metadata", "te1"],
)
def test_several_models(tensors: Any, metadata: Any, prefixes: Any, tmp_path: Folder) -> None:
    """One is chosen by `prefix`, never by chance; a command names its option."""
    path = put(tmp_path / "a" / FILE, tensors, metadata)
    for given in (path, path.parent):
        with refused(ValueError, "path", path, *prefixes, case=prefixes[0]):
            peft.load(given, BASE, NAMES)
        with refused(ValueError, "prefix", "transformer", *prefixes, case=prefixes[0]):
            peft.load(given, BASE, NAMES, prefix="transformer")
        found = peft.load(given, BASE, NAMES, prefix="unet")
        assert found["mid_block.attn.to_q"]["weight"].b.shape == (3, 6)
    [text] = peft.read(path, prefix=prefixes[0]).leaves
    assert text == ("layers.0.q" if prefixes[0] == "text_encoder" else "lora_te1_layers_0_q")
    for command, said in (
        (["inspect", path], "image adapter: 1 sites"),
        (["diff", path, path], "1 of 1 common sites are equal"),
    ):
        assert "Give --prefix, one of" in fails(*command)
        assert said in run(*command, "--prefix", "unet").stdout


CLIP = {"encoder.layers.0.q_proj": "text_model.encoder.layers.0.q_proj", "head": "head"}


@pytest.mark.parametrize(("dialect", "prefix"), [("diffusers", "text_encoder"), ("kohya", "te1")])
def test_a_text_encoder_of_transformers_5(dialect: str, prefix: str, tmp_path: Folder) -> None:
    """It has no `text_model`, which all files have; the names of other modules stay."""
    names = [peft.Name(f"{x}/weight", x, "oi") for x in CLIP]
    base = {x: {"weight": jnp.zeros((6, 5))} for x in CLIP}
    adapter = {row.module: {"weight": node(row, (6, 5))} for row in names}
    path = tmp_path / "a.safetensors"
    peft.save(path, base, adapter, names, dialect=dialect, prefix=prefix)
    start = "lora_te1_" if dialect == "kohya" else "text_encoder."
    keys = {x.replace(".", "_") if dialect == "kohya" else x for x in CLIP.values()}
    assert {k.split(".lora_")[0].split(".alpha")[0] for k in load_file(path)} == {
        start + key for key in keys
    }
    assert_equal(peft.load(path, base, names), adapter)
    peft.save_base(tmp_path / "base", base, names)
    peft.export_merged(tmp_path / "base", path, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, x in jlora.merge(base, adapter).items():
        np.testing.assert_allclose(merged[f"{name}.weight"], x["weight"], 1e-6, 1e-6)


def test_a_module_under_two_names(tmp_path: Folder) -> None:
    names = [peft.Name("q/weight", "encoder.layers.0.q", "oi")]
    starts = "text_encoder.encoder.layers.0.q", "text_encoder.text_model.encoder.layers.0.q"
    path = put(tmp_path / "x.safetensors", pair(starts[0]) | pair(starts[1]))
    with refused(ValueError, "path", f"{starts[1]}.lora_A.weight", "duplicate"):
        peft.load(path, {"q": {"weight": jnp.zeros((6, 5))}}, names)


def test_a_prefix_that_no_header_has(tmp_path: Folder) -> None:
    """It is a part of names unless it is given."""
    path = put(tmp_path / "x.safetensors", pair("dit.mid_block.attn.to_q") | pair("dit.conv", 3))
    assert {*peft.read(path).leaves} == {"dit.mid_block.attn.to_q", "dit.conv"}
    assert {*peft.read(path, prefix="dit").leaves} == {"mid_block.attn.to_q", "conv"}


# ---------------------------------------------------------------------------- bad input


def without(tensors: dict[str, Any], end: str) -> dict[str, Any]:
    return {k: x for k, x in tensors.items() if not k.endswith(end)}


ONE = np.ones((1, 1), np.float32)
SCALES = {f"{MANGLED}.dora_scale": np.ones((1, 5), np.float32)}
# By case: tensors, metadata, and the place and words of a problem.
BAD: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "unknown key": (pair(Q) | {"unet.x.lora_C.weight": ONE}, None, ("unet.x.lora_C.weight",)),
    "PEFT's key in full": (pair(Q) | {"unet.norm.weight": ONE}, None, ("unet.norm.weight",)),
    "no difference": (
        {"model.diffusion_model.x.weight": ONE}, None, ("model.diffusion_model.x.weight",)
    ),
    "LoHa": ({f"{MANGLED}.hada_w1_a": ONE}, None, (f"{MANGLED}.hada_w1_a", "LoHa")),
    "LoKr": ({f"{MANGLED}.lokr_w1": ONE}, None, (f"{MANGLED}.lokr_w1", "LoKr")),
    "LoCon": (
        pair(MANGLED) | {f"{MANGLED}.lora_mid.weight": ONE},
        None,
        (f"{MANGLED}.lora_mid.weight", "LoCon"),
    ),
    "diff": ({f"{MANGLED}.diff": ONE}, None, (f"{MANGLED}.diff", "difference")),
    "diff_b": (pair(MANGLED) | {f"{MANGLED}.diff_b": ONE}, None, (f"{MANGLED}.diff_b",)),
    "OFT": ({f"{MANGLED}.oft_blocks": ONE}, None, (f"{MANGLED}.oft_blocks", "OFT, or BOFT")),
    "OFT of PEFT": ({f"{Q}.oft_R.weight": ONE}, None, (f"{Q}.oft_R.weight", "OFT")),
    "BOFT of PEFT": ({f"{Q}.boft_R": ONE}, None, (f"{Q}.boft_R", "is BOFT")),
    "GLoRA": ({f"{MANGLED}.b2.weight": ONE}, None, (f"{MANGLED}.b2.weight", "GLoRA")),
    "IA3": ({f"{MANGLED}.on_input": ONE[0, 0]}, None, (f"{MANGLED}.on_input", "IA3")),
    "IA3 of PEFT": ({f"{Q}.ia3_l": ONE}, None, (f"{Q}.ia3_l", "IA3")),
    "norms": ({f"{MANGLED}.w_norm": ONE}, None, (f"{MANGLED}.w_norm", "difference")),
    "mixed": (pair(MANGLED) | pair(Q), None, (f"{Q}.lora_A.weight", "mixes")),
    "mixed ends": (pair(Q) | spelled(Q, DOWN), None, (f"{Q}.lora_up.weight", "mixes")),
    "no B": (
        without(pair(Q), "B.weight"),
        None,
        (f"{Q}.lora_B.weight", f"missing, though {Q}.lora_A.weight"),
    ),
    "no A": (
        without(pair(MANGLED), "down.weight"), None, (f"{MANGLED}.lora_down.weight", "missing")
    ),
    "alpha alone": (
        pair(MANGLED) | {"lora_unet_conv_in.alpha": np.float32(1)},
        None,
        ("lora_unet_conv_in.alpha", "has no A and B"),
    ),
    "several alphas": (
        pair(MANGLED) | {f"{MANGLED}.alpha": np.ones(2, np.float32)},
        None,
        (f"{MANGLED}.alpha", "expected one number"),
    ),
    "infinite alpha": (
        pair(MANGLED) | {f"{MANGLED}.alpha": np.float32("inf")},
        None,
        ("lora_alpha", "expected a finite number"),
    ),
    "alpha beside metadata": (
        pair(Q) | {f"{Q}.alpha": np.float32(1)},
        {"unet.r": 2, "unet.target_modules": ["to_q"]},
        (f"{Q}.alpha", "lora_adapter_metadata"),
    ),
    "a magnitude for each input": (
        pair(MANGLED) | SCALES, None, (f"{MANGLED}.dora_scale", "(6,)", "(1, 5)")
    ),
    "unknown module": (pair("unet.x.to_q"), None, ("unet.x.to_q",)),
    "unknown mangled module": (pair("lora_unet_x_to_q"), None, ("lora_unet_x_to_q",)),
    "wrong shape": (pair(Q, 2, "mid_block.attn.to_out.0"), None, (f"{Q}.lora_A.weight", "(2, 6)")),
    "not finite": (
        {k: x * np.nan for k, x in pair(MANGLED).items()},
        None,
        (f"{MANGLED}.lora_up.weight", "not finite"),
    ),
    "integers": (
        {k: x.astype(np.int64) for k, x in pair(Q).items()}, None, (f"{Q}.lora_A.weight", "I64")
    ),
    "scalars": ({k: np.float32(1) for k in pair(Q)}, None, (Q, "matrices")),
    "empty": ({}, {"unet.r": 2}, ()),
    "another rank": (pair(Q), {"unet.r": 3, "unet.target_modules": ["to_q"]}, ()),
    "unknown field": (
        pair(Q), {"unet.r": 2, "unet.target_modules": ["to_q"], "unet.x": 3}, ("x", "is not known")
    ),
    "another method": (pair(Q), {"unet.peft_type": "LOHA"}, ("peft_type", "'LOHA'")),
    "metadata of no key": (
        pair("conv_in.to_q"), {"unet.r": 2, "unet.lora_alpha": 16}, ("'unet'", "no key begins")
    ),
    "other modules": (pair(Q), {"unet.r": 2, "unet.target_modules": ["to_k"]}, ()),
    "no JSON": (pair(Q), "{", ()),
    "huge": (pair(Q), json.dumps({"unet.r": 2, "x": "x" * (5 * 2**20)}), ()),
    "many values": (pair(Q), {"unet.rank_pattern": {str(i): 1 for i in range(110_000)}}, ()),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str, tmp_path: Folder) -> None:
    """With the key of the file, in bounded time; a command says the same."""
    tensors, metadata, facts = BAD[case]
    path = put(tmp_path / "x.safetensors", tensors, metadata)
    with refused(ValueError, "path", *facts, case=case), bounded(4):
        peft.load(path, BASE, NAMES)


MANY: dict[str, tuple[dict[str, Any], Any, str]] = {
    "prefixes": (
        {f"{'a.' * 40}{i}.q.lora_A.weight": ONE for i in range(5_000)},
        {f"{'a.' * 40}{i}.r": 1 for i in range(20_000)},
        "has adapters of several models",
    ),
    "modules": (
        {f"lora_unet_{i}.{end}": ONE for i in range(10_000) for end in ("lora_up.weight", "alpha")},
        None,
        "no module of the model has this name",
    ),
    "ranks": (
        {f"{Q}{i}.lora_{x}.weight": np.ones((i, i), "f") for i in range(1, 150) for x in "AB"},
        None,
        "matches no leaf",
    ),
}


@pytest.mark.parametrize("case", MANY)
def test_many(case: str, tmp_path: Folder) -> None:
    """In bounded time, with a short text."""
    tensors, metadata, text = MANY[case]
    path = put(tmp_path / "x.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=text) as caught, bounded(4):
        peft.load(path, BASE, NAMES)
    assert len(str(caught.value)) < 40_000


def test_names_that_are_mangled_alike(tmp_path: Folder) -> None:
    """They are refused if the file has them, and only then; also when one is written."""
    names = [peft.Name("a", "conv_in.a_b", "oi"), peft.Name("b", "conv_in.a.b", "oi")]
    base = {"a": jnp.zeros((6, 5)), "b": jnp.zeros((6, 5))}
    path = put(tmp_path / "x.safetensors", pair("lora_unet_conv_in_a_b"))
    with refused(ValueError, "path", "lora_unet_conv_in_a_b", "conv_in.a.b or conv_in.a_b"):
        peft.load(path, base, names)
    adapter = {x.path: node(x, (6, 5)) for x in names}
    with refused(ValueError, "dialect", "conv_in.a.b", "lora_unet_conv_in_a_b"):
        peft.save(tmp_path / "a", base, adapter, names, dialect="kohya")
    peft.save(tmp_path / "b", base, adapter, names, dialect="diffusers", prefix="unet")
    assert_equal(peft.load(tmp_path / "b", base, names), adapter)
    assert not (tmp_path / "a").exists()


ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown": ("dialect", {"dialect": "comfy"}),
    "no prefix": ("prefix", {"dialect": "diffusers"}),
    "a prefix of PEFT": ("prefix", {"prefix": "unet"}),
    "a prefix with _": ("prefix", {"dialect": "kohya", "prefix": "text_encoder"}),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str, tmp_path: Folder) -> None:
    argument, given = ARGUMENTS[case]
    with refused(ValueError, argument, *map(repr, given.values()), case=case):
        peft.save(tmp_path / "a", BASE, ADAPTERS["linear"][0], NAMES, **given)
    assert not (tmp_path / "a").exists()


# Of kohya's dialect: the prefix, modules of the model, and what is said of an adapter of the first.
KOHYA_OF: dict[str, tuple[str | None, str, str]] = {
    "a UNet": (None, "mid_block.to_q up_blocks.0.conv conv_norm_out", ""),
    "SDXL": ("unet", "add_embedding.linear_1", "1 of 1 modules of a UNet, such as add_embedding"),
    "Qwen-Image": ("unet", "transformer_blocks.0.attn.to_q txt_in", ""),
    "Qwen-Image without its prefix": (None, "transformer_blocks.0.attn.to_q txt_in", "None for a"),
    "Qwen-Image with another": ("transformer", "transformer_blocks.0.ff txt_in", "'transformer' f"),
    "Flux": ("transformer", "single_transformer_blocks.0.attn.to_q x_embedder", ""),
    "Flux's MLP": ("transformer", "single_transformer_blocks.0.proj_mlp", "modules of Flux, such"),
    "Flux with another": (
        "unet",
        "single_transformer_blocks.0.attn.to_q",
        "got 'unet' for a model",
    ),
    "SD 3": ("transformer", "transformer_blocks.0.attn.to_q pos_embed.proj", "modules of SD 3, su"),
    "Wan": ("transformer", "blocks.0.attn1.to_q", "with blocks.0.attn1.to_q"),
    "a text encoder": ("te1", "text_model.encoder.layers.0.q_proj", ""),
}


@pytest.mark.parametrize("case", KOHYA_OF)
def test_what_reads_kohya(case: str, tmp_path: Folder) -> None:
    """What no tool reads under a prefix is refused, and what diffusers does not read is said."""
    prefix, modules, said = KOHYA_OF[case]
    names = [peft.Name(f"{x}/weight", x, "oi") for x in modules.split()]
    base = {row.module: {"weight": jnp.zeros((6, 5))} for row in names}
    adapter = {names[0].module: {"weight": node(names[0], (6, 5))}}
    save = functools.partial(peft.save, tmp_path / "a", base, adapter, names, dialect="kohya")
    if said.startswith(("1 of", "modules")):
        with pytest.warns(UserWarning, match=f"diffusers does not read .*{said}"):
            save(prefix=prefix)
    elif said:
        with refused(ValueError, "prefix", said, "'diffusers'", case=case):
            save(prefix=prefix)
        assert not (tmp_path / "a").exists()
        return
    else:
        save(prefix=prefix)
    assert_equal(peft.load(tmp_path / "a", base, names), adapter)


@each_dialect
def test_what_has_no_form(dialect: str, tmp_path: Folder) -> None:
    """Leaves in full and embeddings."""
    modules = zip("abc", ("time_embedding", "conv_out", "conv_in"), ("vo", "oi", "oi"), strict=True)
    names = [peft.Name(*row) for row in modules]
    base = dict.fromkeys("abc", jnp.zeros((6, 5)))
    adapter = {"a": node(names[0], (6, 5)), "b": node(names[1], (6, 5)), "c": jnp.ones((6, 5))}
    with refused(ValueError, "dialect", "conv_in.weight", "trained in full", case=dialect):
        peft.save(tmp_path / "a", base, adapter, names, dialect=dialect, prefix="unet")
    assert not (tmp_path / "a").exists()


def test_two_adapters_in_a_folder(tmp_path: Folder) -> None:
    peft.save(tmp_path / "a", BASE, ADAPTERS["linear"][0], NAMES)
    put(tmp_path / "a" / FILE, pair(Q))
    with refused(ValueError, "path", tmp_path / "a", FILE):
        peft.read(tmp_path / "a")
    assert [*peft.read(tmp_path / "a" / FILE).leaves] == ["mid_block.attn.to_q"]


def test_a_prefix_for_peft(tmp_path: Folder) -> None:
    peft.save(tmp_path / "a", BASE, ADAPTERS["linear"][0], NAMES)
    with refused(ValueError, "prefix", "'unet'", FILE):
        peft.load(tmp_path / "a", BASE, NAMES, prefix="unet")


def test_kohya_without_names(tmp_path: Folder) -> None:
    """Its names stay as they are, and only kohya's dialect can hold them."""
    path = put(tmp_path / "x.safetensors", pair(MANGLED))
    found = peft.read(path)
    assert [*found.leaves] == [MANGLED]
    peft.write(tmp_path / "k", found, dialect="kohya")
    assert load_file(tmp_path / "k" / FILE).keys() == {f"{MANGLED}.alpha", *pair(MANGLED)}
    for given in ({}, {"dialect": "diffusers", "prefix": "unet"}):
        with refused(ValueError, "contents", MANGLED, "jlora.peft.load"):
            peft.write(tmp_path / "a", found, **given)
    with refused(ValueError, "prefix", "'unet'", "'te1'"):
        peft.write(tmp_path / "a", found, dialect="kohya", prefix="te1")
    assert not (tmp_path / "a").exists()


def test_engines_serve_none(tmp_path: Folder) -> None:
    path = put(tmp_path / "a" / FILE, pair(Q))
    for given in (path, path.parent):
        with refused(ValueError, "path", path, "serves no image LoRA"):
            peft.check(given, "vllm")


# ------------------------------------------------------------------------------ merging


STEM = "diffusion_pytorch_model"


def checkpoint_of(folder: Folder, shards: int = 1) -> dict[str, np.ndarray]:
    """The base as diffusers writes it, with random values, which are returned."""
    draw = np.random.default_rng(0)
    tensors = {f"{k}.weight": draw.normal(size=x).astype(np.float32) for k, x in SHAPES.items()}
    write_checkpoint(folder, tensors, shards, STEM, _class_name="UNet2DConditionModel")
    return tensors


@each_dialect
@pytest.mark.parametrize("shards", [1, 2])
def test_merged(dialect: str, shards: int, tmp_path: Folder) -> None:
    """Into diffusers' files, of one shard or several, by the command."""
    tensors = checkpoint_of(tmp_path / "base", shards)
    adapter, _ = ADAPTERS["every module"]
    path = tmp_path / "x.safetensors"
    peft.save(path, BASE, adapter, NAMES, dialect=dialect, prefix="unet")
    run("merge", tmp_path / "base", path, tmp_path / "out")
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == sorted(
        x.name for x in (tmp_path / "base").iterdir()
    )
    files = (tmp_path / "out").glob("*.safetensors")
    found = {k: x for file in files for k, x in load_file(file).items()}
    params = {k: {"weight": jnp.asarray(tensors[f"{k}.weight"])} for k in SHAPES}
    for name, leaf in jlora.merge(params, adapter).items():
        np.testing.assert_allclose(found[f"{name}.weight"], leaf["weight"], 1e-5, 1e-5)
    loaded = peft.load_base(tmp_path / "out", BASE, NAMES)
    np.testing.assert_array_equal(loaded["conv_in"]["weight"], found["conv_in.weight"])


def test_two_checkpoints_in_a_folder(tmp_path: Folder) -> None:
    (tmp_path / "base").mkdir()
    for name in ("model", "diffusion_pytorch_model"):
        save_file({"q.weight": ONE}, tmp_path / "base" / f"{name}.safetensors")
    put(tmp_path / "x.safetensors", pair(Q))
    with refused(ValueError, "path", tmp_path / "base", "two checkpoints"):
        peft.export_merged(tmp_path / "base", tmp_path / "x.safetensors", tmp_path / "out")


def test_converted(tmp_path: Folder) -> None:
    """From PEFT and Orbax to diffusers, that to kohya, and both back, by the command."""
    adapter, _ = ADAPTERS["every module"]
    peft.save(tmp_path / "p", BASE, adapter, NAMES)
    checkpoint.save(tmp_path / "o", adapter, (), base=BASE)
    names = ("--names", f"{__file__}:NAMES")

    def convert(*args: str) -> None:
        run("convert", *(tmp_path / x if len(x) < 3 else x for x in args))

    convert("p", "d", "--dialect", "diffusers", "--prefix", "unet")
    convert("d", "k", "--dialect", "kohya", "--prefix", "unet")
    convert("d", "q", "--dialect", "peft")
    convert("o", "e", "--dialect", "diffusers", "--prefix", "unet", *names)
    for name in "dkqe":
        assert_equal(peft.load(tmp_path / name, BASE, NAMES), adapter)
    convert("k", "r", "--base", str(tmp_path / "o"), "--prefix", "unet", *names)
    assert_equal(checkpoint.restore(tmp_path / "r"), adapter)


# -------------------------------------------------------------------------------- fuzz


def damage(path: Folder, draw: random.Random) -> None:
    """One random damage to the header, its metadata, a key, or the data."""
    data = bytearray(path.read_bytes())
    [n] = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + n]), data[8 + n :]
    keys = [key for key in header if key != "__metadata__"]
    texts = header.setdefault("__metadata__", {})
    fields = json.loads(texts.get("lora_adapter_metadata", '{"unet.r": 2}'))
    kind = draw.choice(["flip", "cut", "field", "field", "text", "key", "key", "shape", "drop"])
    if kind == "field":
        fields[draw.choice([*fields, "unet.x", "x", "unet.rank_pattern"])] = draw.choice(WILD)
        texts["lora_adapter_metadata"] = json.dumps(fields)
    elif kind == "text":
        texts["lora_adapter_metadata"] = draw.choice(DEEP)
    elif kind == "key":
        odd = ["", ".", "lora_", "lora_unet_.alpha", "unet.", ".alpha", "\0", "unet.lora_A.weight"]
        old = draw.choice(keys)
        header[draw.choice([*odd, old + ".x", old.upper(), draw.choice(keys)])] = header.pop(old)
    elif kind == "shape":
        header[draw.choice(keys)]["shape"] = draw.choice([[], [1], [0], [2, 5, 1], [10], None])
    elif kind == "drop":
        del header[draw.choice(keys)]
    text = json.dumps(header).encode()
    whole = bytearray(struct.pack("<Q", len(text)) + text + rest)
    if kind == "flip":
        whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del whole[draw.randrange(len(whole)) :]
    path.write_bytes(whole)


@quiet
@pytest.mark.filterwarnings("ignore:the configuration of the adapter. ")
@pytest.mark.parametrize("count", [60, MANY_LIES])
@each_dialect
def test_damaged(dialect: str, count: int, tmp_path: Folder) -> None:
    peft.save(tmp_path / "a", BASE, ADAPTERS["alphas"][0], NAMES, dialect=dialect, prefix="unet")

    def lie(draw: random.Random, folder: Folder) -> Folder:
        path = Folder(shutil.copy(tmp_path / "a" / FILE, folder / "x.safetensors"))
        damage(path, draw)
        return path

    def answer(path: Folder, _: Folder) -> None:
        peft.read(path)
        peft.load(path, BASE, NAMES)

    campaign(count, tmp_path, lie, answer, "`path`")

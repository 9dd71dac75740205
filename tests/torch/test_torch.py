"""`jlora.torch` without PyTorch: names by use, on plain functions of PyTorch's parameters."""

import importlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import load_file
from small import array, raw, set_up, set_up_noisy

import jlora
from jlora import Full, LoRA, peft
from jlora._tree import leaves_by_path, name_of, nest

# Each leaf by its name in PyTorch: its value, and module, parameter, axes and kind of its row.
LEAVES: dict[str, tuple[jax.Array, str, str, str | None]] = {
    "model.embed.weight": (array(9, 4), "model.embed", "vo", "embedding"),
    "model.position.weight": (array(5, 4), "model.position", "ok", None),
    "model.cls_token": (array(1, 1, 4), "model", "okk", None),
    "model.scale": (jnp.float32(2), "model", "", None),
    "model.norm.weight": (array(4), "model.norm", "o", None),
    "layers.0.q_proj.weight": (array(6, 4), "layers.0.q_proj", "oi", "linear"),
    "layers.0.q_proj.bias": (array(6), "layers.0.q_proj", "o", None),
    "layers.0.c_attn.weight": (array(6, 4), "layers.0.c_attn", "io", "linear"),
    "layers.0.experts.gate_up_proj": (array(3, 8, 4), "layers.0.experts", "eoi", "experts"),
    "layers.0.experts.down_proj": (array(3, 8, 4), "layers.0.experts", "eio", "experts"),
    "conv1.weight": (array(5, 4, 3), "conv1", "oik", "conv"),
    "conv2.weight": (array(5, 4, 3, 2), "conv2", "oikk", "conv"),
    "conv3.weight": (array(5, 4, 3, 2, 2), "conv3", "oikkk", "conv"),
    "up.weight": (array(4, 5, 3), "up", "okk", None),
}
PARAMS = nest({tuple(name.split(".")): x for name, (x, *_) in LEAVES.items()})


def model(params: Any, ids: jax.Array) -> list[jax.Array]:
    """Uses each leaf as PyTorch's modules do."""
    own, layer = params["model"], params["layers"]["0"]
    h = own["embed"]["weight"][ids] + own["position"]["weight"][: ids.shape[1]] * own["scale"]
    h = h * own["norm"]["weight"] + own["cls_token"]
    q = h @ layer["q_proj"]["weight"].T + layer["q_proj"]["bias"]
    h = q @ layer["c_attn"]["weight"]
    each = jnp.broadcast_to(h.reshape(-1, 4), (3, h.size // 4, 4))
    up = jnp.einsum("eni,eoi->eno", each, layer["experts"]["gate_up_proj"])
    h = jnp.einsum("eni,eio->eno", up, layer["experts"]["down_proj"]).sum(0).reshape(h.shape)
    outputs = [convolve(h, params[f"conv{n}"]["weight"]) for n in (1, 2, 3)]
    x = jnp.moveaxis(h, 1, 2)
    kernel = params["up"]["weight"]
    return [
        *outputs,
        lax.conv_transpose(x, kernel, (2,), "VALID", dimension_numbers=("NCH", "IOH", "NCH")),
    ]


def convolve(h: jax.Array, kernel: jax.Array) -> jax.Array:
    x = jnp.moveaxis(h, 1, 2)
    x = x.reshape(*x.shape, *[1] * (kernel.ndim - 3)).repeat(3, -1)
    return lax.conv(x, kernel, [1] * (kernel.ndim - 2), "SAME")


IDS = jnp.array([[1, 2, 3], [4, 8, 0]])
NAMES = jlora.torch.names(jlora.transform(model).sites(PARAMS, IDS))


def test_rows() -> None:
    """A row for each leaf, whose kind is that of its use."""
    rows = {f"{row.module}.{row.parameter}": row for row in NAMES}
    assert rows.keys() == LEAVES.keys()
    for name, (_, module, axes, kind) in LEAVES.items():
        row = rows[name]
        assert (row.module, row.axes, row.kind) == (module, axes, kind), name
        assert row.transposed == axes.endswith("io")


def test_checkpoint(tmp_path: pathlib.Path) -> None:
    """The tensors are the leaves themselves, under PyTorch's names."""
    tensors = peft.to_tensors(PARAMS, NAMES)
    assert {name: x.tobytes() for name, x in tensors.items()} == {
        name: np.asarray(x).tobytes() for name, (x, *_) in LEAVES.items()
    }
    assert all(tensors[name].shape == x.shape for name, (x, *_) in LEAVES.items())
    peft.save_base(tmp_path / "base", PARAMS, NAMES)
    assert raw(peft.load_base(tmp_path / "base", PARAMS, NAMES)) == raw(PARAMS)


def test_names_that_a_checkpoint_has(tmp_path: pathlib.Path) -> None:
    """Those of `transformers`, by the configuration; of experts, also one by one."""
    place = "model.layers.0"
    gate_up, down, gate = array(2, 6, 4), array(2, 4, 3), array(2, 4)
    tree = {"mlp": {"gate": gate, "gate_up": gate_up, "down": down}, "scale": array(3)}
    names = [
        peft.Name("mlp/gate", f"{place}.mlp.gate", "oi"),
        peft.Name("mlp/gate_up", f"{place}.mlp.experts", "eoi", "gate_up_proj"),
        peft.Name("mlp/down", f"{place}.mlp.experts", "eoi", "down_proj"),
        peft.Name("scale", "", "o", "scale"),
    ]
    stored = {
        "gate": gate,
        "scale": tree["scale"],
        "w1": dict(zip("01", gate_up[:, :3], strict=True)),
        "w3": dict(zip("01", gate_up[:, 3:], strict=True)),
        "w2": dict(zip("01", down, strict=True)),
    }
    own = [
        peft.Name("gate", f"{place}.block_sparse_moe.gate", "oi"),
        peft.Name(r"(w\d)/(\d)", rf"{place}.block_sparse_moe.experts.\2.\1", "oi"),
        names[-1],
    ]
    config = {"model_type": "mixtral"}
    peft.save_base(tmp_path / "theirs", stored, own, config=config)
    assert raw(peft.load_base(tmp_path / "theirs", tree, names)) == raw(tree)
    peft.save_base(tmp_path / "ours", tree, names, config=config)
    assert "scale" in load_file(tmp_path / "ours" / "model.safetensors")
    assert raw(peft.load_base(tmp_path / "ours", tree, names)) == raw(tree)
    peft.save_base(tmp_path / "odd", stored, own)
    with pytest.raises(ValueError, match=r"(?s)mlp.gate.weight: missing.*experts.1.w2.weight: un"):
        peft.load_base(tmp_path / "odd", tree, names)
    pairs = [("block_sparse_moe.experts", "none"), ("block_sparse_moe", "mlp")]
    with pytest.raises(ValueError, match=r"gate_up_proj: missing") as e:
        peft.load_base(tmp_path / "odd", tree, names, renamed=pairs)
    assert "mlp.gate.weight" not in str(e.value)


def test_adapter(tmp_path: pathlib.Path) -> None:
    """PEFT's keys and shapes; back bit for bit."""
    every = "|".join(row.path for row in NAMES if row.kind)
    rules = LoRA(every, rank=2), Full("norm/weight")
    _, base, adapter = set_up_noisy(model, rules, PARAMS, IDS)
    peft.save(tmp_path / "adapter", base, adapter, NAMES)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {key.removeprefix("base_model.model."): x.shape for key, x in found.items()}
    assert shapes == {
        "model.embed.lora_embedding_A": (2, 9),
        "model.embed.lora_embedding_B": (4, 2),
        "model.norm.weight": (4,),
        "layers.0.q_proj.lora_A.weight": (2, 4),
        "layers.0.q_proj.lora_B.weight": (6, 2),
        "layers.0.c_attn.lora_A.weight": (2, 6),
        "layers.0.c_attn.lora_B.weight": (4, 2),
        "layers.0.experts.base_layer.lora_A.weight": (6, 4),
        "layers.0.experts.base_layer.lora_B.weight": (8, 6),
        "layers.0.experts.lora_A.weight": (6, 4),
        "layers.0.experts.lora_B.weight": (8, 6),
        "conv1.lora_A.weight": (2, 4, 3),
        "conv1.lora_B.weight": (5, 2, 1),
        "conv2.lora_A.weight": (2, 4, 3, 2),
        "conv2.lora_B.weight": (5, 2, 1, 1),
        "conv3.lora_A.weight": (2, 4, 3, 2, 2),
        "conv3.lora_B.weight": (5, 2, 1, 1, 1),
    }
    again = peft.load(tmp_path / "adapter", base, NAMES)
    paths = [[name_of(path) for path, _ in leaves_by_path(x)] for x in (again, adapter)]
    assert paths[0] == paths[1]
    assert raw(again) == raw(adapter)


def test_no_form_in_peft(tmp_path: pathlib.Path) -> None:
    """An adapter of what PEFT cannot adapt is not written as something else."""
    _, base, adapter = set_up(model, LoRA("up/weight", rank=1), PARAMS, IDS)
    with pytest.raises(ValueError, match=r"up/weight: PEFT has no form for an adapter of it"):
        peft.save(tmp_path / "adapter", base, adapter, NAMES)


def test_a_head_with_a_bias_of_its_own(tmp_path: pathlib.Path) -> None:
    """It shares the embedding's weight, and both get A and B."""
    params = {"embed_tokens": {"weight": array(9, 4)}, "lm_head": {"bias": array(9)}}

    def apply(params: Any, ids: jax.Array) -> jax.Array:
        table = params["embed_tokens"]["weight"]
        return table[ids] @ table.T + params["lm_head"]["bias"]

    names = [
        peft.Name("embed_tokens/weight", "embed_tokens", "vo", tied="lm_head"),
        peft.Name("lm_head/bias", "lm_head", "o", "bias"),
    ]
    _, base, adapter = set_up(apply, LoRA("embed_tokens/weight", rank=2), params, IDS)
    peft.save(tmp_path / "adapter", base, adapter, names)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.lora_A.weight" in found


def test_without_pytorch() -> None:
    """The error names the extra."""
    try:
        importlib.import_module("jlora.torch._apply")
    except ModuleNotFoundError:
        with pytest.raises(ImportError, match=r"pip install 'jlora\[torch\]'"):
            jlora.torch.extract(None)  # pyright: ignore[reportArgumentType]

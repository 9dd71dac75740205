"""Quantized checkpoints as `transformers` writes them: every weight to a bit, and back."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import llama

import jlora
from jlora import peft

os.environ["TORCHDYNAMO_DISABLE"] = "1"
torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

CONFIG = llama.Config(vocab=96, layers=2, dim=128, hidden=192, heads=4, kv_heads=2, tied=False)
KINDS = {
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "fp4-double": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=CONFIG.dim,
            intermediate_size=CONFIG.hidden,
            num_hidden_layers=CONFIG.layers,
            num_attention_heads=CONFIG.heads,
            num_key_value_heads=CONFIG.kv_heads,
            vocab_size=CONFIG.vocab,
            tie_word_embeddings=False,
        )
    )
    model.to(torch.bfloat16).save_pretrained(path / "float")
    return path


@functools.cache
def quantized(folder, kind):
    """PyTorch's model, and the folder that it was saved to."""
    bits = "load_in_8bit" if kind == "int8" else "load_in_4bit"
    config = BitsAndBytesConfig(**{bits: True}, **KINDS[kind])
    model = LlamaForCausalLM.from_pretrained(
        folder / "float", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    model.train()  # evaluation would pack the weights anew on some processors
    model.save_pretrained(folder / kind)
    return model, folder / kind


def values_of(module, kind):
    if kind == "int8":
        return functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    state = module.weight.quant_state
    return functional.dequantize_4bit(module.weight.data, state)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_to_a_bit(folder, kind, scan):
    model, path = quantized(folder, kind)
    like, names = llama.shapes(CONFIG, scan), llama.names(CONFIG)
    base = peft.load_base(path, like, names)
    found = jlora.summary(base).quantized
    assert len(found) == (7 if scan else 14)
    assert {type(e.scheme).__name__.lower() for e in found} == {kind.partition("-")[0]}
    tensors = peft.to_tensors(jlora.dequantize(base), names)
    modules = dict(model.named_modules())
    for name, x in tensors.items():
        module = modules[name.removesuffix(".weight")]
        packed = "proj" in name
        expected = values_of(module, kind) if packed else module.weight.detach()
        np.testing.assert_array_equal(np.float32(x), expected.float().numpy(), err_msg=name)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_conv1d(kind, tmp_path):
    """GPT-2's `Conv1D` is quantized as a linear module, and (inputs, outputs) again in floats."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "float")
    bits = "load_in_8bit" if kind == "int8" else "load_in_4bit"
    load = functools.partial(GPT2LMHeadModel.from_pretrained, dtype=torch.float32)
    config = BitsAndBytesConfig(**{bits: True}, **KINDS[kind])
    model = load(tmp_path / "float", quantization_config=config, device_map="cpu")
    model.train().save_pretrained(tmp_path / "codes")
    peft.dequantize_checkpoint(tmp_path / "codes", tmp_path / "dense")
    dense = dict(load(tmp_path / "dense").named_modules())
    names = [peft.Name(r"(\w+)", r"transformer.h.0.attn.\1", "io", transposed=True)]
    for name in ("c_attn", "c_proj"):
        full = f"transformer.h.0.attn.{name}"
        expected = values_of(model.get_submodule(full), kind).float().numpy().T
        np.testing.assert_allclose(dense[full].weight.detach().numpy(), expected, rtol=1e-6)
        tensors = load_file(tmp_path / "codes" / "model.safetensors")
        own = {key: x for key, x in tensors.items() if key.startswith(f"{full}.weight")}
        own |= {key: x for key, x in tensors.items() if key == f"{full}.SCB"}
        said = json.loads((tmp_path / "codes" / "config.json").read_text())
        folder = written(tmp_path / name, own, said["quantization_config"])
        like = {name: jax.ShapeDtypeStruct(expected.shape, jnp.float32)}
        leaf = peft.load_base(folder, like, names)[name]
        assert isinstance(leaf, jlora.Quantized)
        np.testing.assert_allclose(leaf.array(), expected, rtol=1e-6)


# ---------------------------------------------------------------------- the formats' own converters

NAMES = (
    peft.Name(r"(\w+)/kernel", r"\1", "io"),
    peft.Name(r"(\w+)/experts", r"\1", "eio", "w", transposed=True),
)


def written(folder, tensors, config):
    """A folder with PyTorch's tensors."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def draw(*shape, low=-8, high=8, dtype=torch.int8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def loaded(folder, shape):
    like = {"up": {"kernel": jax.ShapeDtypeStruct(shape[::-1], jnp.float32)}}
    leaf = peft.load_base(folder, like, NAMES)["up"]["kernel"]
    assert isinstance(leaf, jlora.Quantized)
    return np.float32(leaf.array()).T


# Format, type, bits, scales of which shape, and what the configuration says besides.
SCHEMES = {
    "W4A16": ("pack-quantized", "int", 4, (64, 4), {"strategy": "group", "group_size": 32}),
    "W8A16": ("pack-quantized", "int", 8, (64, 4), {"strategy": "group", "group_size": 32}),
    "W8A16, channel": ("pack-quantized", "int", 8, (64, 1), {"strategy": "channel"}),
    "W8A8": ("int-quantized", "int", 8, (64, 1), {"strategy": "channel"}),
    "W8A8, tensor": ("int-quantized", "int", 8, (1,), {"strategy": "tensor"}),
    "FP8, channel": ("float-quantized", "float", 8, (64, 1), {"strategy": "channel"}),
    "FP8, tensor": ("float-quantized", "float", 8, (1,), {"strategy": "tensor"}),
    "FP8, blocks": (
        "float-quantized",
        "float",
        8,
        (2, 4),
        {"strategy": "block", "block_structure": [32, 32]},
    ),
    "FP8, long blocks": (
        "float-quantized",
        "float",
        8,
        (2, 2),
        {"strategy": "block", "block_structure": [32, 64]},
    ),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors_by_its_compressors(scheme, symmetric, tmp_path):
    """Compressed and decompressed by the library, whatever its scheme."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    form, kind, bits, shape, said = SCHEMES[scheme]
    if not symmetric and kind == "float":
        pytest.skip("floats have no zero points")
    args = QuantizationArgs(num_bits=bits, type=kind, symmetric=symmetric, **said)
    made = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    generator = torch.Generator().manual_seed(0)
    state = {
        "weight": torch.randn(64, 128, generator=generator),
        "weight_scale": torch.rand(shape, generator=generator) / 50 + 0.01,
    }
    if not symmetric:
        state["weight_zero_point"] = draw(*shape)
    compressor = BaseCompressor.get_value_from_registry(form)
    small = compressor.compress(state, made)
    expected = compressor.decompress(dict(small), made)["weight"]
    groups = {"group_0": json.loads(made.model_dump_json())}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    folder = written(tmp_path / "base", {f"up.{k}": x for k, x in small.items()}, config)
    like = {"up": {"kernel": jax.ShapeDtypeStruct((128, 64), jnp.float32)}}
    base = peft.load_base(folder, like, NAMES)
    found = jlora.dequantize(base)["up"]["kernel"].T
    np.testing.assert_array_equal(found, expected.float().numpy())


def test_awq(tmp_path):
    """As compressed-tensors' converter of AutoAWQ's files reads the words."""
    from compressed_tensors.compressors import pack_quantized as helpers
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    (rows, columns), group = (64, 128), 32
    words = {"low": -(2**31), "high": 2**31, "dtype": torch.int32}
    scale = draw(columns // group, rows, low=1, high=60).to(torch.float16) / 512
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    tensors = {
        "up.qweight": draw(columns, rows // 8, **words),
        "up.qzeros": draw(columns // group, rows // 8, **words),
        "up.scales": scale,
    }
    folder = written(tmp_path / "base", tensors, config)
    theirs = AutoAWQConverter.from_autoawq_config(config).process(dict(tensors))
    codes = helpers.unpack_from_int32(theirs["up.weight_packed"], 4, torch.Size((rows, columns)))
    zeros = helpers.unpack_from_int32(
        theirs["up.weight_zero_point"], 4, torch.Size((rows, columns // group)), packed_dim=0
    )
    each = [x.float().repeat_interleave(group, 1) for x in (zeros, theirs["up.weight_scale"])]
    expected = (codes.float() - each[0]) * each[1]
    np.testing.assert_array_equal(loaded(folder, (rows, columns)), expected.numpy())


@pytest.mark.parametrize("shape", [(256, 128), (200, 320)])
def test_fp8_squares(shape, tmp_path):
    """As compressed-tensors' own converter dequantizes DeepSeek's files."""
    from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import (
        FP8BlockDequantizer,
    )

    codes = draw(*shape, low=-448, high=449, dtype=torch.float32).to(torch.float8_e4m3fn)
    grid = [-(-n // 128) for n in shape]
    scale = draw(*grid, low=1, high=1000, dtype=torch.float32) / 1e5
    tensors = {"up.weight": codes, "up.weight_scale_inv": scale}
    folder = written(
        tmp_path / "base", tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    theirs = FP8BlockDequantizer(targets=["up"], dtype=torch.float32).process(dict(tensors))
    np.testing.assert_array_equal(loaded(folder, shape), theirs["up.weight"].numpy())


def test_mxfp4_experts(tmp_path):
    """As `transformers` dequantizes gpt-oss."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = draw(3, 64, 4, 16, low=0, high=256, dtype=torch.uint8)
    scales = draw(3, 64, 4, low=110, high=130, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)  # (experts, inputs, outputs)
    tensors = {"up.w_blocks": blocks, "up.w_scales": scales}
    folder = written(tmp_path / "base", tensors, {"quant_method": "mxfp4"})
    like = {"up": {"experts": jax.ShapeDtypeStruct(tuple(expected.shape), jnp.bfloat16)}}
    leaf = peft.load_base(folder, like, NAMES)["up"]["experts"]
    assert isinstance(leaf, jlora.Quantized)
    np.testing.assert_array_equal(np.float32(leaf.array()), expected.float().numpy())

"""Merged checkpoints against `merge_and_unload`, and in `transformers`. Needs `interop`."""

import copy
import json
import pathlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from jlora import peft  # noqa: E402
from tests.peft.test_peft_interop import make  # noqa: E402

# Sides of at least 64, and of no round numbers: layers as they are, but small.
LARGE = {
    "vocab_size": 301,
    "hidden_size": 100,
    "n_embd": 100,
    "head_dim": 72,
    "num_hidden_layers": 1,
    "n_layer": 1,
    "intermediate_size": 201,
    "n_inner": 201,
    "max_position_embeddings": 70,
    "n_positions": 70,
    "image_size": 32,
    "patch_size": 16,
}
GPT_OSS = make.LLAMA | {"num_local_experts": 3, "layer_types": ["full_attention"]}
SIDES = {"hidden_size": 64, "intermediate_size": 64}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# Case: architecture, its configuration, the arguments of LoraConfig.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    name: (architecture, config | LARGE, options)
    for name, (architecture, config, options) in {
        "rank_192": ("LlamaForCausalLM", make.LLAMA, {"target_modules": ["up_proj"], "r": 192}),
        "square_conv1d": (
            "GPT2LMHeadModel",
            make.GPT2 | {"tie_word_embeddings": False},
            {"target_modules": ["attn.c_proj", "lm_head"]},
        ),
        **{name: make.CASES[name] for name in ("all_linear", "patterns", "rslora", "embeddings")},
        **{name: make.CASES[name] for name in ("gpt2", "gpt2_untied", "conv", "bias", "bias_all")},
        "modules_to_save_head": make.CASES["modules_to_save_head"],
    }.items()
}
CASES["experts"] = (
    "GptOssForCausalLM",
    GPT_OSS | LARGE | SIDES,
    {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
)
KINDS = [torch.float32, torch.bfloat16, torch.float16]


def pair(case: Any, folder: pathlib.Path, dtype: Any, exact: bool, shard: str = "1GB") -> Any:
    """The base as a checkpoint, the adapter in its files, and PEFT's merged parameters."""
    architecture, config, options = case
    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = cls(cls.config_class(**config)).to(dtype)
    fill(model.named_parameters(), 0, exact)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    options = {"r": 5, "lora_alpha": 7} | copy.deepcopy(options)
    adapted = hf_peft.get_peft_model(model, hf_peft.LoraConfig(**options))
    fill([(n, p) for n, p in adapted.named_parameters() if p.requires_grad], 1, exact)
    adapted.save_pretrained(folder / "adapter")
    return adapted.merge_and_unload().state_dict()


def fill(parameters: Any, seed: int, exact: bool) -> None:
    """Normal values, or eighths that are so small that every product and sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    for _, x in sorted(parameters, key=lambda item: item[0]):
        values = torch.randn(x.shape, generator=generator)
        values = (2 * values).round().clamp(-4, 4) / 8 if exact else 0.3 * values
        x.data.copy_(values.to(x.dtype))


def differing(merged: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The fraction of values that differ, where any does."""
    assert merged.keys() <= expected.keys()
    found = {k: (x != expected[k].to(x.dtype)).float().mean().item() for k, x in merged.items()}
    return {k: share for k, share in found.items() if share}


@pytest.mark.parametrize("name", CASES)
def test_bits_of_merge_and_unload(name: str, tmp_path: pathlib.Path) -> None:
    """In float32, for sides of at least 64 and ranks up to 192."""
    expected = pair(CASES[name], tmp_path, torch.float32, exact=False)
    peft.export_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert any(not torch.equal(x, base[k]) for k, x in merged.items())
    # PyTorch's sums are fused where the CPU has such an instruction, as all of AVX2 have.
    assert differing(merged, expected) == {}


ATTENTION = {"num_attention_heads": 2, "head_dim": 64, "hidden_size": 128}
QV = {"target_modules": ["q_proj", "v_proj"], "fan_in_fan_out": True}
# Square modules with and without biases; and with grouped queries.
OF_BITSANDBYTES = {
    "llama": ("LlamaForCausalLM", ATTENTION | {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", ATTENTION | {"num_key_value_heads": 2}),
    "grouped": ("LlamaForCausalLM", ATTENTION | {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("name", OF_BITSANDBYTES)
def test_fan_in_fan_out_of_linear_modules(name: str, tmp_path: pathlib.Path) -> None:
    """PEFT leaves it in the file of an adapter of bitsandbytes' modules, and ignores it."""
    architecture, config = OF_BITSANDBYTES[name]
    sizes = make.LLAMA | LARGE | config | {"tie_word_embeddings": False}
    expected = pair((architecture, sizes, QV), tmp_path, torch.float32, exact=False)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": True}))
    peft.export_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert differing(load_file(tmp_path / "out" / "model.safetensors"), expected) == {}


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bits_where_products_are_exact(name: str, dtype: Any, tmp_path: pathlib.Path) -> None:
    """Then every order of summing agrees: what is left is the scale, the sum and its rounding."""
    expected = pair(CASES[name], tmp_path, dtype, exact=True)
    peft.export_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    # PEFT rounds the ΔW of these to the weight's dtype before it adds.
    twice = ("embeddings.weight", "wte.weight", "experts.down_proj", "experts.gate_up_proj")
    found = differing(merged, expected)
    if dtype != torch.float32:
        found = {k: share for k, share in found.items() if not k.endswith(twice)}
    assert found == {}


@pytest.mark.parametrize("rank", [1, 8, 256, 320])
@pytest.mark.parametrize("sides", [(5, 8), (12, 8), (64, 1), (768, 640)])
def test_bound_where_bits_differ(sides: tuple[int, int], rank: int, tmp_path: pathlib.Path) -> None:
    """Of small sides, which PyTorch sums without fusing, and of high ranks, which it splits.

    Each of the two sums of r products is within r·2⁻²⁴ of the sum of their magnitudes.
    """
    draw = torch.Generator().manual_seed(rank)
    normal = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
    (out, inner), u = sides, 2.0**-24
    layer = torch.nn.Sequential(torch.nn.Linear(inner, out, bias=False))
    layer[0].weight.data = w = normal(out, inner)
    (tmp_path / "base").mkdir()
    save_file({"0.weight": w.clone()}, tmp_path / "base" / "model.safetensors")
    config = hf_peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    adapted = hf_peft.get_peft_model(layer, config)
    a, b = normal(rank, inner), normal(out, rank)
    adapted.base_model.model[0].lora_A.default.weight.data = a
    adapted.base_model.model[0].lora_B.default.weight.data = b
    adapted.save_pretrained(tmp_path / "adapter")
    peft.export_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["0.weight"].double()
    theirs = adapted.merge_and_unload()[0].weight.double()
    bound = 2 * rank * u * (b.abs().double() @ a.abs().double()) + 2 * u * theirs.abs()
    assert ((merged - theirs).abs() <= bound).all()

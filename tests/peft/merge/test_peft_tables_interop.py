"""Name tables of `transformers` for models with experts, on tiny checkpoints of the real classes.

Their experts are one parameter from `transformers` 5 on. Needs `interop`.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft as hf_peft
import peft_families as families
import torch
import transformers
from peft_files import assert_equal, assert_same_files, config_of

import jlora
from jlora import peft
from jlora._tree import nest

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="experts are modules there"
)

# Family: its table, and whether its experts are (experts, inputs, outputs) in PyTorch.
TABLES = {
    "Qwen2ForCausalLM": ("llama", False),
    "Qwen3MoeForCausalLM": ("llama", False),
    "Gemma2ForCausalLM": ("llama", False),
    "Gemma4ForCausalLM": ("llama", False),
    "Gemma4ForCausalLM-experts": ("llama", False),
    "GptOssForCausalLM": ("gpt-oss", True),
    "DeepseekV3ForCausalLM": ("llama", False),
    "Qwen3_5ForCausalLM": ("llama", False),
    "Qwen3_5MoeForCausalLM": ("llama", False),
    "Llama4ForCausalLM": ("llama4", True),
}
LINEAR = r".*(?:proj|proj_with_mqa|in_proj_\w+|per_layer_input_gate|per_layer_projection)"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("family", TABLES)
def test_as_peft_has_it(family: str, tmp_path: pathlib.Path) -> None:
    """Base, adapter and merged checkpoint, for gate and up as two leaves."""
    table, _ = TABLES[family]
    names, model = peft.TABLES[table], build(family, tmp_path / "base")
    values = nest(dict(leaves(model, family)))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)
    base = peft.load_base(tmp_path / "base", like, names)
    assert_equal(base, values)
    assert_equal(peft.from_tensors(peft.to_tensors(base, names), like, names), base)

    adapted = adapt(model, tmp_path / "a")
    adapter = peft.load(tmp_path / "a", base, names)
    config = config_of(tmp_path / "a")
    peft.save(tmp_path / "copy", base, adapter, names, config=config)
    assert_same_files(tmp_path / "copy", tmp_path / "a")

    adapted.merge_and_unload().save_pretrained(tmp_path / "theirs")
    peft.export_merged(tmp_path / "base", adapter, tmp_path / "tree", names=names)
    peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "ours")
    for own in ("tree", "ours"):
        found = families.compare(tmp_path, own)
        assert found.kind in ("bits", "rounding"), (own, found)
    again = peft.load_base(tmp_path / "tree", like, names)
    merged = jax.tree.leaves(jlora.merge(base, adapter))
    for x, y in zip(jax.tree.leaves(again), merged, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", TABLES)
def test_checked_for_engines(family: str, tmp_path: pathlib.Path) -> None:
    """An adapter of attention is served; its modules are those of the checkpoint."""
    model = build(family, tmp_path / "base")
    attention = r".*self_attn\.\w+_(?:proj|proj_with_mqa)"
    wanted = hf_peft.LoraConfig(r=8, target_modules=attention)
    hf_peft.get_peft_model(model, wanted).save_pretrained(tmp_path / "a")
    assert not peft.check(tmp_path / "a", "vllm", base=tmp_path / "base").findings


@pytest.mark.parametrize(
    "family", ["GptOssForCausalLM", "Llama4ForCausalLM", "Gemma4ForCausalLM-experts"]
)
def test_gate_and_up_as_one_leaf(family: str, tmp_path: pathlib.Path) -> None:
    """As the parameter is in the file; an adapter comes back in the same bytes."""
    names, model = peft.TABLES[TABLES[family][0]], build(family, tmp_path / "base")
    values = nest(dict(leaves(model, family, is_fused=True)))
    base = peft.load_base(tmp_path / "base", values, names)
    assert_equal(base, values)
    adapt(model, tmp_path / "a")
    adapter = peft.load(tmp_path / "a", base, names)
    config = config_of(tmp_path / "a")
    peft.save(tmp_path / "copy", base, adapter, names, config=config)
    assert_same_files(tmp_path / "copy", tmp_path / "a")


def build(family: str, folder: pathlib.Path) -> Any:
    """Writes a random checkpoint, and gives the model of it."""
    model = families.make_model(family)
    for x in model.parameters():
        torch.nn.init.normal_(x, std=0.1)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def adapt(model: Any, folder: pathlib.Path) -> Any:
    """Writes a random adapter of all linear modules and of the experts, if there are any."""
    has_experts = any("experts." in name for name, _ in model.named_parameters())
    options = {"target_modules": LINEAR, "target_parameters": EXPERTS if has_experts else None}
    return families.adapt(model, folder, r=4, lora_alpha=8, **options)


def leaves(
    model: Any, family: str, is_fused: bool = False
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """The leaves of a tree whose modules are called as in PyTorch."""
    is_tied = model.config.get_text_config().tie_word_embeddings
    for key, tensor in model.state_dict().items():
        path, x = tuple(key.split(".")), tensor.numpy()
        if is_tied and path[0] == "lm_head":
            continue
        if path[-1] == "weight":
            is_table = path[-2].startswith("embed_tokens")
            kind = "embedding" if is_table else "kernel" if x.ndim > 1 else "scale"
            yield (*path[:-1], kind), x if is_table else x.T
        elif path[-2] == "experts":
            x = x.swapaxes(1, 2) if x.ndim == 3 and not TABLES[family][1] else x
            if is_fused or not path[-1].startswith("gate_up"):
                yield path, x
                continue
            halves = (x[..., ::2], x[..., 1::2])
            halves = halves if family == "GptOssForCausalLM" else np.split(x, 2, -1)
            for part, half in zip(("gate", "up"), halves, strict=True):
                yield (*path[:-1], path[-1].replace("gate_up", part)), half
        else:
            yield path, x

"""Models of `transformers` by `jlora.torch`: outputs, sites, and PEFT's files in both directions.

All of `torch_models` in the long run; some each time that torchax is there.
"""

import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jlora.torch._apply")
pytest.importorskip("peft")

import peft as hf_peft
import torch
from peft.tuners.lora import LoraLayer
from peft_files import config_of
from safetensors.numpy import load_file, save_file
from small import randomize, raw, set_up_noisy
from torch_functions import Lambda
from torch_models import MODELS

import jlora
from jlora import LoRA, many, peft
from jlora._tree import leaves_by_path, name_of
from jlora.many._route import FORMS

EVERY = pytest.mark.parametrize("name", MODELS)
ALONE = re.compile("(gate|up|down)_proj/weight")  # beside experts PEFT takes them for these
WEIGHTS = (torch.nn.Linear, torch.nn.Embedding, torch.nn.modules.conv._ConvNd)


class Extracted(NamedTuple):
    """A model as parameters and a function of parameters and arrays, with its sites."""

    model: Any
    params: Any
    apply: Any
    call: Any
    sites: Any
    names: tuple[peft.Name, ...]


def extract(row: Any, **options: Any) -> Extracted:
    model = row.make()
    params, apply = jlora.torch.extract(model, **options)

    def call(params: Any, arrays: dict[str, Any]) -> dict[str, Any]:
        return numbers(apply(params, **arrays, **row.static))

    sites = jlora.transform(call).sites(params, row.arrays)
    return Extracted(model, params, apply, call, sites, jlora.torch.names(sites, apply))


extracted = functools.cache(lambda name: extract(MODELS[name]))


def numbers(outputs: Any) -> dict[str, Any]:
    """The outputs that are floating-point arrays, by name; of outputs in outputs, the leaves."""
    return {
        jax.tree_util.keystr(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(outputs)
        if jnp.issubdtype(x.dtype, jnp.floating)
    }


def run(model: Any, row: Any) -> dict[str, np.ndarray]:
    """What PyTorch computes, by the names that JAX has."""
    given = jax.tree.map(torch.as_tensor, row.arrays)
    with torch.no_grad():
        outputs = model(**given, **row.static)
    arrays = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.numpy(), outputs)
    return numbers(arrays)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        scale = max(np.abs(x).max(), 1e-3)
        np.testing.assert_allclose(actual[name] / scale, x / scale, 0, tolerance, err_msg=name)


@EVERY
def test_outputs(name: str) -> None:
    found = extracted(name)
    outputs = jax.jit(found.call)(found.params, MODELS[name].arrays)
    assert_close(outputs, run(found.model, MODELS[name]))


@EVERY
def test_weights_are_sites(name: str) -> None:
    """Of those that the call uses, and not as tokens of their own, at least 95%."""
    found = extracted(name)
    modules = found.model.named_modules()
    weights = {n for n, m in modules if isinstance(m, WEIGHTS) or type(m).__name__ == "Conv1D"}
    leaves = {".".join(s.parts[:-1]): s for s in found.sites.leaves if s.parts[-1] == "weight"}
    used = [leaves[n] for n in weights & leaves.keys() if leaves[n].used is not False]
    lost = [s.path for s in used if s.kind is None and not all(u.added for u in s.unsupported)]
    assert len(lost) <= 0.05 * len(used), lost


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "vit"])
def test_quantized(name: str) -> None:
    """A base in 4 bits computes what its values in floats do, adapted or not."""
    row, found = MODELS[name], extracted(name)
    codes = jlora.quantize(found.params, jlora.NF4(block=32), sites=found.sites)
    lora, base, adapter = set_up_noisy(found.call, LoRA(rank=2), codes, row.arrays)
    dense = jlora.dequantize(base)
    outputs = jax.jit(lora.apply)(base, adapter, row.arrays)
    assert_close(outputs, jax.jit(lora.apply)(dense, adapter, row.arrays))
    merged = jlora.merge(dense, adapter)
    assert_close(outputs, jax.jit(found.call)(merged, row.arrays), 1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
def test_many(name: str, form: str) -> None:
    """Each row of a batch is what its adapter gives alone; the base where it has none."""
    row, found = MODELS[name], extracted(name)
    ids = np.arange(2, 26).reshape(3, 8)
    lora = jlora.transform(lambda p, x: found.apply(p, x, **row.static).logits, LoRA(rank=2))
    base, adapter = lora.init(jax.random.key(0), found.params, ids[:1])
    first = randomize(adapter)
    second = jax.tree.map(lambda x: -x / 2, first)
    table = many.stack([first, second], base=base)
    outputs = jax.jit(many.route(lora.apply, form=form))(base, table, jnp.array([1, -1, 0]), ids)
    rows = zip((second, {}, first), ids, strict=True)
    expected = jnp.concatenate([lora.apply(base, own, x[None]) for own, x in rows])
    assert_close({"logits": outputs}, {"logits": expected})


@pytest.mark.parametrize("share", ["inputs", "outputs"])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_shared_factors_of_experts(name: str, share: Any) -> None:
    row, found = MODELS[name], extracted(name)
    rule = LoRA("gate_up_proj|down_proj", rank=2, share=share)
    lora, base, adapter = set_up_noisy(found.call, rule, found.params, row.arrays)
    merged = found.call(jlora.merge(base, adapter), row.arrays)
    assert_close(lora.apply(base, adapter, row.arrays), merged)
    assert np.abs(merged[".logits"] - found.call(base, row.arrays)[".logits"]).max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sketch(name: str) -> None:
    """The largest singular values of a gradient are those of NumPy."""
    row, found = MODELS[name], extracted(name)
    path = next(s.path for s in found.sites.leaves if s.kind == "dense")

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        return (found.apply(params, ids, **row.static).logits ** 2).mean()

    ids = row.arrays["input_ids"]
    told = jlora.sketch(loss, found.params, LoRA(path, rank=2), [ids], kind="gradient")
    gradient = dict(by_path(jax.grad(loss)(found.params, ids)))[path]
    expected = np.linalg.svd(gradient, compute_uv=False)
    values = np.ravel(told.sites[path].values)
    np.testing.assert_allclose(values[:2], expected[:2], rtol=1e-3)


def by_path(tree: Any) -> list[tuple[str, Any]]:
    return [(name_of(path), x) for path, x in leaves_by_path(tree)]


# Linear modules that PEFT adapts and no call calls, so that its A and B change nothing.
READ = {"siglip": "head/attention/out_proj", "wavlm": "attention/(q|k|v|out)_proj"}
UNUSED = {"esm": "contact_head/regression"}
PEFT_REFUSES = {"mamba2"}  # a layer of it, and all-linear with it


@EVERY
def test_all_linear(name: str) -> None:
    """The parameters that PEFT adapts as all-linear, which the model calls; all have a form."""
    row, found = MODELS[name], extracted(name)
    config = hf_peft.LoraConfig(target_modules="all-linear")
    if name in PEFT_REFUSES:
        with pytest.raises(ValueError, match="incompatible"):
            hf_peft.get_peft_model(row.make(), config)
        return
    shapes = {site.path: site.shape for site in found.sites.leaves}
    adapted = list_adapted(hf_peft.get_peft_model(row.make(), config))
    theirs = {x for x in adapted if 1 not in shapes[x]}  # such as gates
    called = {x for x in theirs if not re.search(f"{READ.get(name)}|{UNUSED.get(name)}", x)}
    rule = LoRA(jlora.torch.all_linear(found.apply, found.sites), rank=1)
    sites = jlora.transform(found.call, rule).sites(found.params, row.arrays)
    assert {site.path for site in sites if site.is_adapted} == called
    assert peft.check_sites(sites, jlora.torch.names(sites, found.apply)) == ()
    pattern = re.compile(f"(^|.*/)({jlora.torch.all_linear(found.apply)})")
    paths = {site.path for site in sites.leaves if pattern.fullmatch(site.path)}
    assert paths == {x for x in theirs if name == "wavlm" or not re.search(READ.get(name, "!"), x)}


def list_adapted(model: Any) -> Iterator[str]:
    """Lists the parameters that PEFT has adapted, as paths."""
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", "weight")
            yield f"{name.replace('.base_layer', '')}.{parameter}".replace(".", "/")


@EVERY
def test_folders(name: str, tmp_path: pathlib.Path) -> None:
    """A folder as `transformers` writes it, whose names may be others than the model's."""
    found = extracted(name)
    found.model.save_pretrained(tmp_path / "base")
    base = peft.load_base(tmp_path / "base", found.params, found.names)
    assert raw(base) == raw(found.params)


# Models, and what their folders on the Hub call otherwise than `transformers` writes it today.
OLDER = {
    "gpt2": (r"^transformer\.", ""),
    "llava": (r"^vision_tower\.", "vision_tower.vision_model."),
    "roberta": (r"LayerNorm\.weight$", "LayerNorm.gamma"),
}


@pytest.mark.parametrize("name", OLDER)
def test_older_folders(name: str, tmp_path: pathlib.Path) -> None:
    """`from_pretrained` reads them, and so does `load_base`."""
    found = extracted(name)
    found.model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    renamed = {re.sub(*OLDER[name], key): x for key, x in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, {"format": "pt"})
    _, told = type(found.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    base = peft.load_base(tmp_path, found.params, found.names)
    assert raw(base) == raw(found.params)


def save_theirs(name: str, parameters: list[str], folder: pathlib.Path) -> Any:
    """Saves an adapter of PEFT's on parameters, and returns its model."""
    config = hf_peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters)
    model = hf_peft.get_peft_model(MODELS[name].make(), config).eval()
    for key, x in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(x, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("llama", "0.self_attn.q_proj.weight"),
        ("qwen3-moe", "mlp.gate.weight"),
        ("gpt-oss", "mlp.router.weight"),
    ],
)
def test_a_matrix_as_a_parameter(name: str, parameter: str, tmp_path: pathlib.Path) -> None:
    """PEFT adapts weights of linear modules and routers as `target_parameters`."""
    model = save_theirs(name, [parameter], tmp_path)
    row, found = MODELS[name], extracted(name)
    adapter = peft.load(tmp_path, found.params, found.names)
    outputs = jlora.transform(found.call).apply(found.params, adapter, row.arrays)
    assert_close(outputs, run(model, row))


def test_a_transposed_matrix_as_a_parameter(tmp_path: pathlib.Path) -> None:
    save_theirs("gpt2", ["attn.c_attn.weight"], tmp_path)
    with pytest.raises(ValueError, match=r"target_parameters, but .* stored as \(inputs, outputs"):
        peft.load(tmp_path, extracted("gpt2").params, extracted("gpt2").names)


def test_pytorchs_own_attention(tmp_path: pathlib.Path) -> None:
    """Its weights are adapted and merged, and refused in PEFT's files in both directions.

    Queries, keys and values are one parameter.
    """
    x = np.random.default_rng(0).standard_normal((2, 5, 16), np.float32)
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    model = Lambda(lambda m, x: m.attn(x, x, x, need_weights=False)[0], attn=attention).eval()
    params, apply = jlora.torch.extract(model)
    rule = LoRA("in_proj_weight|out_proj/weight", rank=2)
    lora, base, adapter = set_up_noisy(apply, rule, params, x)
    merged = apply(jlora.merge(base, adapter), x)
    assert_close({"": lora.apply(base, adapter, x)}, {"": merged})
    names = jlora.torch.names(lora.sites(params, x), apply)
    with pytest.raises(ValueError, match=r"(?s)attn/in_proj_weight: PEFT.*attn/out_proj"):
        peft.save(tmp_path / "ours", base, adapter, names)
    config = hf_peft.LoraConfig(r=2, target_modules=["attn"])
    hf_peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"model\.attn: unexpected; it matches no leaf"):
        peft.load(tmp_path / "theirs", params, names)


def adapted_rows(name: str) -> list[peft.Name]:
    """The rows of the weights that PEFT can adapt."""
    refused = re.compile(MODELS[name].refused)
    rows = [x for x in extracted(name).names if x.kind and not x.refused]
    return [x for x in rows if not refused.search(x.path)]


@EVERY
def test_ours_in_pytorch(name: str, tmp_path: pathlib.Path) -> None:
    """PEFT computes with jlora's file what jlora does; so does `transformers` once it is merged."""
    row, found = MODELS[name], extracted(name)
    rule = LoRA("|".join(x.path for x in adapted_rows(name)), rank=2, alpha=3)
    lora, base, adapter = set_up_noisy(found.call, rule, found.params, row.arrays)
    expected = jax.jit(lora.apply)(base, adapter, row.arrays)
    peft.save(tmp_path / "adapter", base, adapter, found.names)
    model = hf_peft.PeftModel.from_pretrained(row.make(), tmp_path / "adapter").eval()
    assert_close(run(model, row), expected)
    found.model.save_pretrained(tmp_path / "base")
    peft.export_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged, told = type(found.model).from_pretrained(
        tmp_path / "merged", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told.values()), told
    assert_close(run(merged.eval(), row), expected)


@EVERY
def test_theirs_in_jax(name: str, tmp_path: pathlib.Path) -> None:
    """With PEFT's file we compute what PEFT does, and we write the same file."""
    row, found = MODELS[name], extracted(name)
    rows = [x for x in adapted_rows(name) if not x.tied]  # PEFT alone would change one of two
    has_experts = any(x.kind == "experts" for x in rows)
    alone = [x for x in rows if x.parameter != "weight" or (has_experts and ALONE.search(x.path))]
    config = hf_peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=[x.module for x in rows if x not in alone],
        target_parameters=[f"{x.module}.{x.parameter}" for x in alone] or None,
    )
    model = hf_peft.get_peft_model(row.make(), config).eval()
    torch.manual_seed(1)
    for key, x in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(x, std=0.2)
    has_tables = any(x.kind == "embedding" for x in rows)
    model.save_pretrained(
        tmp_path / "theirs", save_embedding_layers="auto" if has_tables else False
    )
    adapter = peft.load(tmp_path / "theirs", found.params, found.names)
    outputs = jax.jit(jlora.transform(found.call).apply)(found.params, adapter, row.arrays)
    assert_close(outputs, run(model, row))
    fields = config_of(tmp_path / "theirs")
    peft.save(tmp_path / "ours", found.params, adapter, found.names, config=fields)
    ours, theirs = (
        load_file(tmp_path / x / "adapter_model.safetensors") for x in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_gradients_in_pytorch(name: str, tmp_path: pathlib.Path) -> None:
    """Of images and texts, those of the adapter are what PEFT's backward pass computes."""
    row, found = MODELS[name], extracted(name)
    rule = LoRA(jlora.torch.all_linear(found.apply, found.sites), rank=2)
    lora, base, adapter = set_up_noisy(found.call, rule, found.params, row.arrays)
    peft.save(tmp_path / "ours", base, adapter, found.names)
    model = hf_peft.PeftModel.from_pretrained(row.make(), tmp_path / "ours", is_trainable=True)
    given = {key: torch.as_tensor(x) for key, x in row.arrays.items()}
    model.eval()(**given, **row.static).logits.square().sum().backward()
    for x in model.parameters():
        x.data = torch.zeros_like(x) if x.grad is None else x.grad
    model.save_pretrained(tmp_path / "gradients")
    expected = peft.load(tmp_path / "gradients", base, found.names)

    @jax.jit
    @jax.grad
    def gradient(adapter: Any) -> jax.Array:
        return (lora.apply(base, adapter, row.arrays)[".logits"] ** 2).sum()

    ours, theirs = (
        {"all": np.concatenate([np.ravel(x) for _, x in by_path(tree)])}
        for tree in (gradient(adapter), expected)
    )
    assert_close(ours, theirs, 1e-4)  # in 64 bits 1e-13

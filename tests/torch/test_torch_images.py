"""Image LoRA: diffusers computes with jlora's files what jlora does, and jlora with its files."""

import dataclasses
import functools
import json
import logging
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

pytest.importorskip("jlora.torch._apply")
pytest.importorskip("diffusers")

import peft as hf_peft
import torch
import torch_models
import transformers
from diffusers.loaders import lora_pipeline
from safetensors.numpy import load_file, save_file
from small import set_up_noisy
from torch_images import MODELS
from torch_models import MASKED, TEXT

import jlora
from jlora import DoRA, LoRA, peft
from tests.torch import test_torch_models
from tests.torch.test_torch_models import extract, run

EVERY = pytest.mark.parametrize("name", MODELS)
BOTH = [(name, "diffusers") for name in MODELS]
BOTH += [(name, "kohya") for name, row in MODELS.items() if row.kohya]
FILE = "pytorch_lora_weights.safetensors"
# Two ranks and alphas; in a UNet one of attention, and one of convolutions.
MIXED = {"unet": ("to_(q|k|out/0)", "conv1"), "transformer": ("to_(q|out/0)", "to_k")}


def mixed(*patterns: str) -> list[LoRA]:
    settings = [{"rank": 2, "alpha": 3}, {"rank": 3, "alpha": 1}]
    return [LoRA(f"{p}/weight", **x) for p, x in zip(patterns, settings, strict=True)]


extracted = functools.cache(lambda name: extract(MODELS[name]))


class Trained(NamedTuple):
    """A base and its adapter, and what they compute."""

    base: Any
    adapter: Any
    outputs: dict[str, Any]


def trained(name: str, rules: Sequence[Any]) -> Trained:
    row, found = MODELS[name], extracted(name)
    lora, base, adapter = set_up_noisy(found.call, rules, found.params, row.arrays)
    return Trained(base, adapter, jax.jit(lora.apply)(base, adapter, row.arrays))


def every_module(name: str, unread: str = "none") -> LoRA:
    rows = [x.path for x in extracted(name).names if x.kind in ("linear", "conv")]
    assert len(rows) > 20
    return LoRA("|".join(x for x in rows if not re.search(unread, x)), rank=2, alpha=3)


def load_in_diffusers(name: str, folder: pathlib.Path, caplog: Any) -> dict[str, np.ndarray]:
    """Computes with a file as a pipeline does; diffusers logs what it does not load."""
    row = MODELS[name]
    mixin = getattr(lora_pipeline, f"{row.pipeline}LoraLoaderMixin")
    found = mixin.lora_state_dict(folder, return_lora_metadata=True)
    state, alphas, metadata = found if len(found) == 3 else (found[0], None, found[1])
    model = row.make()
    caplog.clear()  # of what is said of magnitudes
    with caplog.at_level(logging.WARNING, "diffusers"):
        model.load_lora_adapter(state, prefix=row.prefix, network_alphas=alphas, metadata=metadata)
    assert not caplog.records
    loaded = {k for k, _ in model.named_parameters() if ".lora_A." in k}
    assert len(loaded) == len(
        {k for k in load_file(folder / FILE) if re.search("lora[_.](A|down)", k)}
    )
    return run(model, row)


assert_close = functools.partial(test_torch_models.assert_close, tolerance=2e-5)


def prefix_of(name: str, dialect: str) -> str:
    row = MODELS[name]
    return row.kohya[0] if dialect == "kohya" and row.kohya else row.prefix


@EVERY
def test_outputs(name: str) -> None:
    row, found = MODELS[name], extracted(name)
    assert_close(jax.jit(found.call)(found.params, row.arrays), run(found.model, row))


@pytest.mark.parametrize(
    ("name", "dialect", "which"),
    [
        *((*case, which) for case in BOTH for which in ("every module", "several ranks")),
        *((*case, "rsLoRA") for case in BOTH if case[0] in ("sd15", "qwen-image")),
    ],
)
def test_ours_in_diffusers(
    name: str, dialect: str, which: str, tmp_path: pathlib.Path, caplog: Any
) -> None:
    found = extracted(name)
    unread = MODELS[name].kohya if dialect == "kohya" else None
    every = [every_module(name, unread[1] if unread else "none")]
    rules = every if which == "every module" else mixed(*MIXED[MODELS[name].prefix])
    base, adapter, outputs = trained(name, rules)
    config = {"use_rslora": which == "rsLoRA"}
    given = {"dialect": dialect, "prefix": prefix_of(name, dialect), "config": config}
    peft.save(tmp_path / "adapter", base, adapter, found.names, **given)
    assert_close(load_in_diffusers(name, tmp_path / "adapter", caplog), outputs)


# What diffusers computes something else with, in kohya's dialect, by the rules.
MISREAD = {
    "magnitudes": [DoRA(r"(to_q|conv1)/weight", rank=2)],
    "several alphas of attention": mixed(*MIXED["transformer"]),
}


@pytest.mark.parametrize("case", MISREAD)
def test_what_diffusers_misreads(case: str, tmp_path: pathlib.Path, caplog: Any) -> None:
    """It is right in its own dialect; `save` warns of kohya's, until diffusers reads it."""
    found = extracted("sd15")
    base, adapter, outputs = trained("sd15", MISREAD[case])
    own = {"dialect": "diffusers", "prefix": "unet"}
    peft.save(tmp_path / "a", base, adapter, found.names, **own)
    assert_close(load_in_diffusers("sd15", tmp_path / "a", caplog), outputs)
    with pytest.warns(UserWarning, match="diffusers"):
        peft.save(tmp_path / "b", base, adapter, found.names, dialect="kohya")
    with pytest.raises(AssertionError, match="Not equal"):
        assert_close(load_in_diffusers("sd15", tmp_path / "b", caplog), outputs)


@pytest.mark.parametrize("prefix", ["unet", "transformer"])
@EVERY
def test_kohya_is_never_misread_silently(
    name: str, prefix: str, tmp_path: pathlib.Path, caplog: Any
) -> None:
    """Of all modules: diffusers reads the file, `save` says that it does not, or refuses."""
    found = extracted(name)
    base, adapter, outputs = trained(name, [every_module(name)])
    save = functools.partial(peft.save, tmp_path / "a", base, adapter, found.names)
    if (name, prefix) in {("sd15", "unet"), ("qwen-image", "unet")}:
        save(dialect="kohya", prefix=prefix)
        assert_close(load_in_diffusers(name, tmp_path / "a", caplog), outputs)
    elif (name, prefix) in {("sdxl", "unet"), ("flux", "transformer"), ("sd3", "transformer")}:
        with pytest.warns(UserWarning, match="diffusers does not read"):
            save(dialect="kohya", prefix=prefix)
    else:
        with pytest.raises(ValueError, match="`prefix` must be"):
            save(dialect="kohya", prefix=prefix)


@pytest.mark.parametrize(
    ("name", "config"),
    [(x, {"r": 4, "lora_alpha": 4}) for x in MODELS]
    + [("sd15", {"r": 2, "lora_alpha": 3, "use_dora": True, "rank_pattern": {"to_k": 3}})],
)
def test_theirs_in_jax(name: str, config: Any, tmp_path: pathlib.Path) -> None:
    """Of `save_lora_adapter`, of a pipeline, and as older versions wrote, without a header."""
    row, found = MODELS[name], extracted(name)
    modules = [x.module for x in found.names if x.kind in ("linear", "conv")]
    model = row.make()
    model.add_adapter(hf_peft.LoraConfig(target_modules=modules, **config))
    torch.manual_seed(1)
    for key, x in model.named_parameters():
        if "lora_" in key and "magnitude" not in key:
            torch.nn.init.normal_(x, std=0.1)
    expected = run(model, row)
    model.save_lora_adapter(tmp_path / "model")
    layers = hf_peft.get_peft_model_state_dict(model, adapter_name="default")
    mixin = getattr(lora_pipeline, f"{row.pipeline}LoraLoaderMixin")
    fields = model.peft_config["default"].to_dict()
    given = {"lora_layers": layers, "lora_adapter_metadata": fields}
    given = {f"{row.prefix}_{key}": x for key, x in given.items()}
    mixin.save_lora_weights(tmp_path / "pipeline", **given)
    (tmp_path / "old").mkdir()
    save_file(load_file(tmp_path / "pipeline" / FILE), tmp_path / "old" / FILE)
    lora = jlora.transform(found.call)
    for kind in ("model", "pipeline", "old")[: 2 if "rank_pattern" in config else 3]:
        adapter = peft.load(tmp_path / kind, found.params, found.names)
        assert_close(jax.jit(lora.apply)(found.params, adapter, row.arrays), expected)


# Files of other tools: the model, what begins its keys, the ends of A and B, and alpha or none.
OTHERS = {
    "lightx2v": ("qwen-image", "", "lora_down.weight", "lora_up.weight", 3),
    "ComfyUI": ("qwen-image", "diffusion_model.", "lora_down.weight", "lora_up.weight", 3),
    "DiffSynth-Studio": ("qwen-image", "", "lora_A.default.weight", "lora_B.default.weight", None),
    "older, of a UNet": ("sd15", "unet.", "lora.down.weight", "lora.up.weight", None),
    "older, of a transformer": ("sd3", "transformer.", "lora.down.weight", "lora.up.weight", None),
}


@pytest.mark.parametrize("case", OTHERS)
def test_keys_of_other_tools(case: str, tmp_path: pathlib.Path, caplog: Any) -> None:
    """Read here as in diffusers."""
    name, start, a, b, alpha = OTHERS[case]
    found = extracted(name)
    rule = dataclasses.replace(every_module(name), alpha=alpha or 2)
    base, adapter, outputs = trained(name, [rule])
    path, tensors = tmp_path / "a.safetensors", dict[str, np.ndarray]()
    peft.save(path, base, adapter, found.names, dialect="diffusers", prefix="")
    for key, x in load_file(path).items():
        tensors[start + key.replace("lora_A.weight", a).replace("lora_B.weight", b)] = x
        if alpha is not None:
            module = key.rpartition(".lora_")[0]
            tensors[f"{start}{module}.alpha"] = np.asarray(alpha, np.float32)
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b" / FILE)
    assert_close(load_in_diffusers(name, tmp_path / "b", caplog), outputs)
    again = peft.load(tmp_path / "b", found.params, found.names)
    lora = jlora.transform(found.call)
    assert_close(jax.jit(lora.apply)(base, again, MODELS[name].arrays), outputs)


@pytest.mark.parametrize(("dialect", "prefix"), [("diffusers", "text_encoder"), ("kohya", "te1")])
def test_a_text_encoder(dialect: str, prefix: str, tmp_path: pathlib.Path) -> None:
    """CLIP's, whose modules have other names in transformers 5 than in files."""
    row = torch_models.Model("CLIPTextModel", TEXT | {"eos_token_id": 2}, MASKED)
    model, params, _, call, _, names = extract(row)
    lora, base, adapter = set_up_noisy(call, LoRA(rank=2, alpha=3), params, row.arrays)
    outputs = lora.apply(base, adapter, row.arrays)
    peft.save(tmp_path / "a", base, adapter, names, dialect=dialect, prefix=prefix)
    again = peft.load(tmp_path / "a", base, names)
    assert_close(lora.apply(base, again, row.arrays), outputs)
    model.save_pretrained(tmp_path / "base")
    peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    mixin = lora_pipeline.StableDiffusionLoraLoaderMixin
    found = mixin.lora_state_dict(tmp_path / "a", return_lora_metadata=True)
    given = {"text_encoder": model, "prefix": "text_encoder", "metadata": found[2]}
    mixin.load_lora_into_text_encoder(found[0], found[1], **given)
    for loaded in (model, transformers.CLIPTextModel.from_pretrained(tmp_path / "merged")):
        assert_close(run(loaded, row), outputs)


@pytest.mark.parametrize(("shards", "dialect"), [("10GB", "diffusers"), ("20KB", "kohya")])
def test_merged(shards: str, dialect: str, tmp_path: pathlib.Path) -> None:
    """Into diffusers' own folder of a model, of one file or several."""
    found = extracted("sd15")
    base, adapter, outputs = trained("sd15", [every_module("sd15")])
    peft.save(tmp_path / "a", base, adapter, found.names, dialect=dialect, prefix="unet")
    found.model.save_pretrained(tmp_path / "base", max_shard_size=shards)
    assert (tmp_path / "base" / "diffusion_pytorch_model.safetensors").exists() == (
        shards == "10GB"
    )
    peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    merged, told = type(found.model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(told.values()), told
    assert_close(run(merged, MODELS["sd15"]), outputs)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["_class_name"]

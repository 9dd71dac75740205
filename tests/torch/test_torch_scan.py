"""Layers of PyTorch's models in one scan, and modules that are computed again: the same function.

By families of `transformers`; what no scan can hold is refused by name.
"""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jlora.torch._apply")
pytest.importorskip("peft")

import torch
from messages import refused
from safetensors.numpy import load_file
from small import randomize, raw, some
from torch import nn
from torch_functions import Lambda
from torch_models import MODELS, Model

import jlora
from jlora import LoRA, peft
from tests.torch.test_torch_models import assert_close, extract, run


class Scanned(NamedTuple):
    """A row of `MODELS` with more layers.

    Attributes:
        fields: fields of its configuration.
        layers: the list of layers.
        stack: where the scan starts, how many layers a step has, and how many steps there are.
    """

    fields: dict[str, Any]
    layers: str
    stack: tuple[int, int, int]


FOUR = {"num_hidden_layers": 4}
WINDOWS = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
SCANNED = {
    "llama": Scanned(FOUR, "model/layers", (0, 1, 4)),
    "qwen3-moe": Scanned(FOUR, "model/layers", (0, 1, 4)),
    "gpt-oss": Scanned(FOUR, "model/layers", (0, 2, 2)),
    "gemma3": Scanned(WINDOWS | {"num_hidden_layers": 6}, "model/layers", (0, 3, 2)),
    "deepseek-v3": Scanned(FOUR, "model/layers", (1, 1, 3)),  # its first layer has no experts
    "gpt2": Scanned({"n_layer": 4}, "transformer/h", (0, 1, 4)),
    "t5": Scanned({"num_layers": 4}, "encoder/block", (1, 1, 3)),  # which has a table of positions
    "bert": Scanned(FOUR, "bert/encoder/layer", (0, 1, 4)),
    "vit": Scanned(FOUR, "vit/layers", (0, 1, 4)),
    "dinov2": Scanned(FOUR, "dinov2/encoder/layer", (0, 1, 4)),
    "mamba2": Scanned(FOUR, "backbone/layers", (0, 1, 4)),
    "esm": Scanned(FOUR, "esm/encoder/layer", (0, 1, 4)),
}
DAILY = ("llama", "gemma3", "t5")
HOW: dict[str, Callable[[str], dict[str, Any]]] = {
    "scan": lambda layers: {"scan": [layers]},
    "remat": lambda layers: {"remat": {rf"{layers}/\d+": jlora.remat_policy}},
    "both": lambda layers: {"scan": [layers], "remat": {rf"{layers}/\d+": None}},
}


class Made(NamedTuple):
    """A model as a function, with an adapter on all that PEFT adapts."""

    row: Model
    model: nn.Module
    apply: Any
    lora: Any
    base: Any
    adapter: Any
    names: Any

    @property
    def step(self) -> Any:
        """The outputs, and the loss's gradient."""

        def loss(adapter: Any) -> tuple[Any, Any]:
            outputs = self.lora.apply(self.base, adapter, self.row.arrays)
            return sum((jnp.tanh(x) ** 2).mean() for x in outputs.values()), outputs

        return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def made(name: str, how: str = "") -> Made:
    row = MODELS[name]._replace(fields=MODELS[name].fields | SCANNED[name].fields)
    found = extract(row, **(HOW[how](SCANNED[name].layers) if how else {}))
    every = jlora.torch.all_linear(found.apply, found.sites)
    pattern = "in_proj/weight" if name == "mamba2" else every
    lora = jlora.transform(found.call, LoRA(pattern, rank=2, alpha=4))
    base, adapter = lora.init(jax.random.key(0), found.params, row.arrays)
    return Made(row, found.model, found.apply, lora, base, adapter, found.names)


def files(found: Made, adapter: Any, folder: pathlib.Path) -> tuple[dict[str, np.ndarray], Any]:
    """PEFT's files of an adapter: the tensors, and the configuration, whose lists have no order."""
    peft.save(folder, found.base, adapter, found.names)
    config = json.loads((folder / "adapter_config.json").read_text())
    named = {k: sorted(x) if isinstance(x, list) else x for k, x in config.items()}
    return load_file(folder / "adapter_model.safetensors"), named


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", some(SCANNED, *DAILY))
def test_it_is_the_same_function(name: str, how: str, tmp_path: pathlib.Path) -> None:
    """Outputs, gradients, files in both directions, and merges, of layers that run one by one."""
    one, other = made(name), made(name, how)
    if "scan" in HOW[how](""):
        assert other.apply.structure.stacks[0][1:] == SCANNED[name].stack
    first = jax.tree.map(lambda x: 0.3 * x, randomize(one.adapter))  # well conditioned
    tensors, config = files(one, first, tmp_path / "one")
    adapter = peft.load(tmp_path / "one", other.base, other.names)
    again, same_config = files(other, adapter, tmp_path / "other")
    assert raw(again) == raw(tensors) and same_config == config
    (_, outputs), gradient = other.step(adapter)
    (_, expected), slopes = one.step(first)
    assert_close(outputs, expected)
    theirs, _ = files(one, slopes, tmp_path / "slopes")
    assert_close(files(other, gradient, tmp_path / "gradient")[0], theirs, 1e-4)
    merged = other.lora.apply(jlora.merge(other.base, adapter), {}, other.row.arrays)
    assert_close(merged, expected, 1e-4)
    assert_close(other.lora.apply(other.base, {}, other.row.arrays), run(one.model, one.row))


@pytest.mark.parametrize("name", some(SCANNED, *DAILY))
def test_folders(name: str, tmp_path: pathlib.Path) -> None:
    """A folder as `transformers` writes it, onto stacks; and from shapes."""
    found = made(name, "scan")
    found.model.save_pretrained(tmp_path / "base")
    shapes = jax.eval_shape(lambda: found.base)
    assert raw(peft.load_base(tmp_path / "base", shapes, found.names)) == raw(found.base)
    with torch.device("meta"):
        empty = type(found.model)(found.model.config).eval()
    params, _ = jlora.torch.extract(empty, scan=[SCANNED[name].layers])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), found.base
    )


@pytest.mark.parametrize("name", some(["llama", "gpt-oss"], "llama"))
def test_quantized(name: str) -> None:
    """Codes are unpacked in the scan: as their values in floats."""
    found = made(name, "both")
    sites = found.lora.sites(found.base, found.row.arrays)
    codes = jlora.quantize(found.base, jlora.NF4(block=32), sites=sites)
    adapter = randomize(found.adapter)
    outputs = jax.jit(found.lora.apply)(codes, adapter, found.row.arrays)
    assert_close(outputs, found.lora.apply(jlora.dequantize(codes), adapter, found.row.arrays))


def test_memory_and_program() -> None:
    """With four times the layers: one scan, and the temporary memory of a step nearly the same."""
    found = {n: compile_step(n, HOW["both"]("model/layers")) for n in (4, 16)}
    few, many = (x.memory_analysis().temp_size_in_bytes for x in found.values())
    plain = compile_step(16, {}).memory_analysis().temp_size_in_bytes
    assert many < 1.5 * few and many < plain / 4, (few, many, plain)
    sizes = [len(x.as_text()) for x in found.values()]
    assert sizes[1] < 1.1 * sizes[0]


def compile_step(layers: int, options: dict[str, Any]) -> Any:
    row = MODELS["llama"]._replace(fields=MODELS["llama"].fields | {"num_hidden_layers": layers})
    params, apply = jlora.torch.extract(row.make(), **options)
    lora = jlora.transform(lambda p, x: apply(p, x, **row.static).logits, LoRA(rank=2))
    ids = np.zeros((8, 64), np.int32)
    base, adapter = lora.init(jax.random.key(0), params, ids)
    loss = jax.grad(lambda adapter, base: (lora.apply(base, adapter, ids) ** 2).mean())
    return jax.jit(loss).lower(adapter, base).compile()


# ------------------------------------------------------------------------- what no scan can hold


def multiply(m: Any, x: torch.Tensor, *others: Any) -> torch.Tensor:
    return torch.tanh(m.linear(x))


def layer(number: int, width: int = 4, function: Any = multiply, **own: Any) -> nn.Module:
    """A layer with a number, which it may use."""
    return Lambda(function, number=number, linear=nn.Linear(width, 4), **own)


def four(function: Any = multiply) -> list[nn.Module]:
    return [layer(i, function=function) for i in range(4)]


def net(run: Callable[[Any, torch.Tensor], Any], layers: Sequence[nn.Module]) -> Any:
    """Layers, called by a function of the layers and their input."""
    return Lambda(lambda m, x: run(m.layers, x), layers=nn.ModuleList(layers)).eval()


def chain(layers: Any, x: torch.Tensor, between: Any = lambda x: x) -> torch.Tensor:
    for layer in layers:
        x = between(layer(x))
    return x


def with_list(layers: Any, x: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    for layer in layers:
        x = layer(x, found)
    return x + sum(found)


def by_own(layers: Any, x: torch.Tensor) -> torch.Tensor:
    """Each layer gets its own part of an input: they are stacked."""
    given = torch.stack([x, 2 * x, 3 * x, 4 * x])
    for i, layer in enumerate(layers):
        x = layer(x, given[i])
    return x


def split(m: Any, x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Reads sizes, and multiplies parts by their numbers."""
    return torch.cat([i * part for i, part in enumerate(x.split(sizes.tolist()))])


def with_sizes(layers: Any, x: torch.Tensor, step: int = 0) -> torch.Tensor:
    """Each layer gets a tensor of PyTorch's own, equal for all if `step` is 0."""
    for i, layer in enumerate(layers):
        x = layer(x, torch.tensor([1 + i * step, 1 - i * step]))
    return x


def mask(m: Any, x: torch.Tensor) -> torch.Tensor:
    return multiply(m, x) * m.mask + m.shift


def draw_masks() -> dict[str, torch.Tensor]:
    """Draws a tensor for an attribute, and a buffer."""
    return {"mask": torch.randn(4), "shift": nn.Buffer(torch.randn(4), persistent=False)}


def by_table(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Calls a function that is a module, and no part of the layer's."""
    return multiply(m, m.table["f"](x))


RIGHT = {
    "functions as modules": (
        chain,
        [layer(i, 4, by_table, table={"f": nn.Sigmoid()}) for i in range(4)],
    ),
    "constants of their own": (chain, [layer(i, 4, mask, **draw_masks()) for i in range(4)]),
    "as they are": (chain, four()),
    "an input of their own": (by_own, four(lambda m, x, other: multiply(m, x) + other)),
    "sizes that it reads": (with_sizes, four(split)),
    "twice": (lambda layers, x: chain(layers, chain(layers, x)), four()),
    "some before and after": (
        chain,
        [layer(0, 8), *(layer(i) for i in (1, 2, 3)), nn.Linear(4, 3)],
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_a_scan_can_hold(case: str) -> None:
    torch.manual_seed(0)
    run_layers, layers = RIGHT[case]
    model = net(run_layers, layers)
    params, apply = jlora.torch.extract(model, scan=["layers"])
    x = np.ones((2, layers[0].linear.in_features), np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(x)).numpy()
    np.testing.assert_allclose(apply(params, x), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(apply)(params, x), expected, atol=1e-6)


def skip(layers: Any, x: torch.Tensor) -> torch.Tensor:
    return chain([layers[0], layers[2], layers[3]], x)


def collect(layers: Any, x: torch.Tensor) -> list[torch.Tensor]:
    return [x := layer(x) for layer in layers]


def twice_as_much(layers: Any, x: torch.Tensor) -> torch.Tensor:
    for i, layer in enumerate(layers):
        x = layer(x, float(i))
    return x


def read_outside(layers: Any, x: torch.Tensor) -> torch.Tensor:
    return chain(layers, x) * layers[0].linear.weight.sum()


EARLY = "what a layer in `scan` returns"


def frozen_at_first(layers: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = chain(layers[:2], x)
    return chain(layers[2:], x)


def name(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Multiplies the third layer by another number."""
    return multiply(m, x) * {"layer 2": 3.0}.get(f"layer {m.number}", 1.0)


def append(m: Any, x: torch.Tensor, found: list[Any]) -> torch.Tensor:
    found.append(x)
    return multiply(m, x)


def change(m: Any, x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    sizes.add_(1)
    return multiply(m, x)


DIFFERS, WRITES = "its number, which differs", "writes into its arguments"
REFUSED = {
    "between them": (lambda layers, x: chain(layers, x, torch.sin), four(), EARLY),
    "gradients of some": (frozen_at_first, four(), "other arguments"),
    "skipped": (skip, four(), "number 1 of the layers"),
    "stopped": (lambda layers, x: chain(layers[:3], x), four(), EARLY),
    "collected": (collect, four(), EARLY),
    "other arguments": (twice_as_much, four(), "other arguments"),
    "other sizes": (lambda layers, x: with_sizes(layers, x, 1), four(), "other arguments"),
    "a number": (chain, four(lambda m, x: multiply(m, x) * m.number), DIFFERS),
    "a name": (chain, four(name), DIFFERS),
    "in place": (chain, four(lambda m, x: x.add_(multiply(m, x))), WRITES),
    "a list": (with_list, four(append), WRITES),
    "sizes in place": (with_sizes, four(change), WRITES),
    "read outside": (read_outside, four(), "outside of its call"),
    "another width": (chain, [nn.Linear(4, 4), nn.Linear(4, 3)], "which has layers that differ"),
    "another function": (
        chain,
        [layer(i, 4, by_table, table={"f": f()}) for i, f in enumerate((nn.Sigmoid, nn.Tanh))],
        "which has layers that differ: table",
    ),
    "one layer": (chain, [layer(0)], "which has one layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_scan_cannot_hold(case: str) -> None:
    *model, said = REFUSED[case]
    with pytest.raises((NotImplementedError, ValueError), match=re.escape(said)):
        params, apply = jlora.torch.extract(net(*model), scan=["layers"])
        apply(params, np.ones((2, 4), np.float32))


@pytest.mark.parametrize("case", ["in place", "a list", "sizes in place"])
def test_what_cannot_be_computed_again(case: str) -> None:
    *model, said = REFUSED[case]
    params, apply = jlora.torch.extract(net(*model), remat={r"layers/\d": None})
    with pytest.raises(NotImplementedError, match=re.escape(said)):
        apply(params, np.ones((2, 4), np.float32))


@pytest.mark.parametrize(
    ("static", "said"),
    [
        ({"output_hidden_states": True}, "output['hidden_states']"),
        ({"output_attentions": True}, "output['attentions']"),
        ({"use_cache": True}, "a DynamicCache"),
    ],
)
def test_what_llama_collects_is_refused(static: dict[str, Any], said: str) -> None:
    found = made("llama", "scan")
    with refused(NotImplementedError, "", said):
        found.apply(found.base, found.row.arrays["input_ids"], **{"use_cache": False} | static)


def test_arguments() -> None:
    model = net(chain, four())
    with refused(ValueError, "scan", "'blocks'", "'layers'"):
        jlora.torch.extract(model, scan=["blocks"])
    with refused(ValueError, "remat", "'blocks'"):
        jlora.torch.extract(model, remat={"blocks": None})
    model.layers[2].linear = model.layers[1].linear
    with refused(ValueError, "scan", "layers that share layers.0.linear.weight"):
        jlora.torch.extract(model, scan=["layers"])


def test_checkpointing_of_pytorch_is_refused() -> None:
    model = MODELS["llama"].make()
    model.gradient_checkpointing_enable()
    with refused(ValueError, "model", "gradient checkpointing"):
        jlora.torch.extract(model)

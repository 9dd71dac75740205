"""Rows of a name table that say how the leaf's values differ from PyTorch's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import refused
from peft_files import (
    Folder,
    assert_same_files,
    config_of,
    node,
)
from small import some

from jlora import peft
from jlora.peft import Name, tables
from jlora.types import Layout
from tests.peft.formats import test_base_files as base_files

HEADS, SIZE, WIDTH = 3, 6, 8
SHAPES = {"scanned": (WIDTH, 2, HEADS, SIZE), "one": (WIDTH, HEADS, SIZE)}
PATHS = {
    "scanned": "decoder/layers/self_attention/query/kernel",
    "one": "decoder/layers_0/self_attention/query/kernel",
}
MODULES = {"scanned": ["model.layers.0", "model.layers.1"], "one": ["model.layers.0"]}
LAYOUTS = {"scanned": Layout((1,), (0,), (2, 3)), "one": Layout((), (0,), (1, 2))}
TABLE = tables.maxtext.LLAMA
EACH = pytest.mark.parametrize("form", SHAPES)


def tree(form: str, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """A path with slashes may also be one key, as `Variable.path` of Keras is."""
    return {PATHS[form]: jax.random.normal(jax.random.key(0), SHAPES[form]).astype(dtype)}


def as_in_pytorch(w: np.ndarray) -> np.ndarray:
    """(d, heads, head_dim) to (heads · head_dim, d): the pairs of each head apart, and times √."""
    w = w.astype(np.float32) * np.float32(SIZE**0.5)
    halves = np.concatenate([w[..., 0::2], w[..., 1::2]], -1)
    return halves.reshape(WIDTH, HEADS * SIZE).T


def adapted(form: str) -> tuple[Any, Any]:
    return tree(form), {PATHS[form]: node(LAYOUTS[form], SHAPES[form], 2, 2.5)}


@EACH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights(form: str, dtype: Any) -> None:
    params = tree(form, dtype)
    [w] = map(np.asarray, params.values())
    layers = [w] if form == "one" else [w[:, 0], w[:, 1]]
    tensors = peft.to_tensors(params, TABLE)
    assert list(tensors) == [f"{module}.self_attn.q_proj.weight" for module in MODULES[form]]
    rounding = float(jnp.finfo(dtype).eps)
    for x, layer in zip(tensors.values(), layers, strict=True):
        assert x.dtype == dtype
        expected = as_in_pytorch(layer)
        np.testing.assert_allclose(x.astype(np.float32), expected, rtol=2 * rounding)
    [again] = peft.from_tensors(tensors, params, TABLE).values()
    assert again.dtype == dtype
    wanted, got = w.astype(np.float32), np.asarray(again, np.float32)
    np.testing.assert_allclose(got, wanted, rtol=2 * rounding)


@EACH
@pytest.mark.parametrize("alpha", some([1, 5, 7, 12, 0.3], 7))
@pytest.mark.parametrize("rslora", [False, True])
def test_files_come_back(form: str, alpha: float, rslora: bool, tmp_path: Folder) -> None:
    """With a scale that is no power of two, byte for byte."""
    base, adapter = adapted(form)
    said = {"r": 2, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": ["q_proj"]}
    plain = [Name(row.path, row.module, row.axes) for row in TABLE]
    scale = alpha / (2**0.5 if rslora else 2)
    theirs = {PATHS[form]: adapter[PATHS[form]]._replace(scale=scale)}
    peft.save(tmp_path / "theirs", base, theirs, plain, config=said)
    config = config_of(tmp_path / "theirs")
    assert (config["lora_alpha"], config["alpha_pattern"]) == (alpha, {})
    ours = peft.load(tmp_path / "theirs", base, TABLE)
    peft.save(tmp_path / "ours", base, ours, TABLE, config=config)
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


def test_quantized(tmp_path: Folder) -> None:
    """Codes have an order and a scale of their own."""
    params = {PATHS["one"]: jnp.ones((base_files.COLUMNS, 2, base_files.ROWS // 2))}
    files = {f"{MODULES['one'][0]}.self_attn.q_proj": base_files.gptq()}
    with refused(ValueError, "", "is quantized, but `names` changes the values or their"):
        peft.load_base(base_files.write(tmp_path / "base", files), params, TABLE)

"""The models of `examples/models`: scanned, with a cache, counted.

That adapted is merged for each of them is a law, see `cases/models.py`; that they compute what
PyTorch does, beside padding too, and save what they load is in `test_models_interop.py`; their
meshes are in `models_on_devices.py`.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases._case import fill
from models import bert, deberta, gpt, hf, llama
from paper import counts
from small import assert_close, some

import jlora

ENCODER = (61, 16, 2, 4, 24, 20)
V2 = {"position_buckets": 4, "conv_kernel_size": 3}


class Small(NamedTuple):
    """A small model: its file, its class, its config, the classes of its head."""

    module: Any
    kind: Any
    config: Any
    classes: tuple[int, ...] = ()

    def model(self, **options: Any) -> nn.Module:
        """The model."""
        return self.kind(self.config, *self.classes, **options)

    def shapes(self, scan: bool) -> Any:
        """Its variables."""
        return self.module.shapes(self.config, *self.classes, scan=scan)

    @functools.cache  # noqa: B019 - a dozen of them, all in the table below
    def tensors(self) -> dict[str, np.ndarray]:
        """Random ones."""
        variables = fill(self.shapes(False), jnp.float32, 0.3)
        return hf.to_tensors(variables, self.module.names(self.config))

    @functools.cache  # noqa: B019
    def variables(self, scan: bool) -> dict[str, Any]:
        """The same whether scanned or not."""
        return hf.to_variables(self.tensors(), self.shapes(scan), self.module.names(self.config))

    def apply(self, scan: bool) -> Any:
        """The function of variables, ids and more."""
        return jax.jit(self.model(scan=scan).apply)

    def write(self, folder: pathlib.Path) -> None:
        """A folder as Hugging Face's."""
        known = {k: v[0] if isinstance(v, tuple) else v for k, v in self.module.KNOWN.items()}
        own = {theirs: getattr(self.config, ours) for ours, theirs in self.module.FIELDS.items()}
        (folder / "config.json").write_text(json.dumps({**known, **own}))
        hf.write_tensors(folder / "model.safetensors", self.tensors())


BERT = bert.Config(*ENCODER, 2, 1e-12)
ROBERTA = bert.Config(*ENCODER, 1, 1e-5, model_type="roberta", pad_token_id=1)
DEBERTA = deberta.Config(*ENCODER, 0, 1e-7, **V2)
GPT = gpt.Config(61, 16, 2, 16, 4, 24)
LLAMA = llama.Config(61, 2, 16, 24, 4, 2, rope_base=500.0)
replace = dataclasses.replace
SMALL = {
    "gpt": Small(gpt, gpt.GPT, GPT),
    "llama": Small(llama, llama.Llama, LLAMA),
    "llama_untied": Small(llama, llama.Llama, replace(LLAMA, tied=False)),
    "bert_cls": Small(bert, bert.Bert, replace(BERT, head="cls"), (3,)),
    "roberta_lm": Small(bert, bert.Bert, replace(ROBERTA, head="lm")),
    "deberta": Small(deberta, deberta.Deberta, replace(DEBERTA, bare=True)),
    "deberta_lm": Small(deberta, deberta.Deberta, replace(DEBERTA, head="lm", legacy=True)),
}
ONE_EACH = ("gpt", "llama_untied", "roberta_lm", "deberta")
IDS = np.random.default_rng(0).integers(2, 61, (3, 9)).astype(np.int32)
MASK = (np.arange(9) < np.array([[9], [5], [1]])).astype(np.int32)


# ---- one function, whichever way it is compiled ------------------------------------------------


@pytest.mark.parametrize("name", some(SMALL, "roberta_lm"))
def test_scanned_is_unscanned(name: str) -> None:
    small = SMALL[name]
    assert_close(*(small.apply(scan)(small.variables(scan), IDS, MASK) for scan in (True, False)))


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scan", some([True, False], True))
@pytest.mark.parametrize("name", some(["gpt", "llama"], "llama"))
def test_with_a_cache_token_by_token(name: str, scan: bool, side: str) -> None:
    """The logits of whole texts, of three lengths: prompts first, then each token."""
    small = SMALL[name]
    apply, variables = small.apply(scan), small.variables(scan)
    whole = apply(variables, IDS, np.ones_like(MASK))
    first = np.array([4, 4, 2])  # the tokens of each text that are its prompt
    start = np.arange(4) < first[:, None]
    start = start[:, ::-1] if side == "left" else start
    ids = np.full((3, 4), 7, np.int32)
    ids[start] = np.concatenate([row[:n] for row, n in zip(IDS, first, strict=True)])
    logits, held = apply(variables, ids, start, cache=small.config.cache(3, 9))
    assert held.lengths.tolist() == [4, 4, 2]
    for row, n in enumerate(first):
        assert_close(logits[row][start[row]], whole[row, :n], 1e-4)
    for _ in range(5):
        at = np.asarray(held.lengths)
        logits, held = apply(variables, IDS[np.arange(3), at][:, None], cache=held)
        assert_close(logits[:, 0], whole[np.arange(3), at], 1e-4)
    assert held.lengths.tolist() == [9, 9, 7]  # two rows are full
    assert np.isnan(apply(variables, IDS[:, :1], cache=held)[0]).any((1, 2)).tolist() == [1, 1, 0]
    # Without a cache: the same positions given, beside padding.
    positions = np.maximum(np.cumsum(start, axis=1) - 1, 0)
    given = apply(variables, ids, start, positions)
    assert_close(given[0][start[0]], whole[0, :4], 1e-4)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "most"), [("gpt", 16), ("roberta_lm", 18)])
def test_more_tokens_than_positions(name: str, most: int) -> None:
    """An error: reads beyond the table would be NaN."""
    small, ids = SMALL[name], jax.ShapeDtypeStruct((2, most + 1), jnp.int32)
    with pytest.raises(ValueError, match=f"at most {most}, the positions of the model"):
        jax.eval_shape(small.model(scan=True).apply, small.shapes(True), ids)


# Of a model, a field of its config.json, and a value that would change what it computes.
OTHERS = [
    ("gpt", "scale_attn_weights", False),
    ("bert_cls", "hidden_act", "relu"),
    ("deberta", "share_att_key", False),
    ("llama", "rope_type", "yarn"),
    ("llama", "attention_bias", True),
]


@pytest.mark.parametrize(("name", "field", "value"), OTHERS)
def test_config_of_another_model(name: str, field: str, value: Any, tmp_path: pathlib.Path) -> None:
    """What is not computed is an error."""
    SMALL[name].write(tmp_path)
    path = tmp_path / "config.json"
    given = {"rope_scaling": {field: value}} if "rope" in field else {field: value}
    path.write_text(json.dumps(json.loads(path.read_text()) | given))
    with pytest.raises(ValueError, match=f"expected {field} .*, got {value!r}"):
        SMALL[name].module.load(tmp_path)


# ---- counts -------------------------------------------------------------------------------------

TOTALS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt3-175b": 174_604_259_328,
    "llama2-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "smollm2-135m": 134_515_008,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
}


@pytest.mark.parametrize("name", some(TOTALS, "llama2-7b", "roberta-base"))
def test_sizes(name: str) -> None:
    """The parameters of the published models."""
    [module] = [module for module in (gpt, llama, bert) if name in module.SIZES]
    assert jlora.count(module.shapes(module.SIZES[name])) == TOTALS[name]


@pytest.mark.parametrize(
    "row", some(counts.rows(), counts.rows()[8]), ids=lambda row: f"{row.name}, {row.adapted}"
)
def test_counts_of_the_paper(row: counts.Row) -> None:
    """Trainable parameters exactly; those of the first row are in the table below."""
    assert counts.measure(row.model, row.rules)[1] == row.expected

"""The models of `examples/models`: scanned, rematerialized, padded, saved, counted.

That adapted is merged for each of them is a law, see `cases/models.py`; that they compute what
PyTorch does is in `test_models_interop.py`; their meshes are in `models_on_devices.py`.
"""

import dataclasses
import doctest
import functools
import json
import pathlib
from typing import Any, NamedTuple

import decoders
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from cases._case import fill
from models import bert, checkpoint, deberta, gpt, hf, llama, parts
from paper import counts

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

    def write(self, folder: pathlib.Path) -> None:
        """A folder as Hugging Face's."""
        (folder / "config.json").write_text(self.own_text())
        hf.write_tensors(folder / "model.safetensors", self.tensors())

    def own_text(self) -> str:
        """A config.json from what the module knows of it."""
        known = {k: v[0] if isinstance(v, tuple) else v for k, v in self.module.KNOWN.items()}
        own = {theirs: getattr(self.config, ours) for ours, theirs in self.module.FIELDS.items()}
        return json.dumps({**known, **own})


def decoder(name: str) -> Small:
    """Llama, or a decoder that has no files here."""
    return Small(checkpoint, llama.Llama, decoders.CONFIGS[name])


BERT = bert.Config(*ENCODER, 2, 1e-12)
ROBERTA = bert.Config(*ENCODER, 1, 1e-5, model_type="roberta", pad_token_id=1)
DEBERTA = deberta.Config(*ENCODER, 0, 1e-7, **V2)
GPT = gpt.Config(61, 16, 2, 16, 4, 24)
replace = dataclasses.replace
SMALL = {
    "gpt": Small(gpt, gpt.GPT, GPT),
    "gpt_bare": Small(gpt, gpt.GPT, replace(GPT, bare=True)),
    "llama": decoder("llama"),
    "llama_untied": decoder("llama_untied"),
    "bert": Small(bert, bert.Bert, replace(BERT, bare=True)),
    "bert_lm": Small(bert, bert.Bert, replace(BERT, head="lm")),
    "bert_cls": Small(bert, bert.Bert, replace(BERT, head="cls"), (3,)),
    "roberta_lm": Small(bert, bert.Bert, replace(ROBERTA, head="lm")),
    "roberta_cls": Small(bert, bert.Bert, replace(ROBERTA, head="cls"), (3,)),
    "deberta": Small(deberta, deberta.Deberta, replace(DEBERTA, bare=True)),
    "deberta_lm": Small(deberta, deberta.Deberta, replace(DEBERTA, head="lm", legacy=True)),
    "deberta_cls": Small(deberta, deberta.Deberta, replace(DEBERTA, head="cls"), (3,)),
}
ONE_EACH = ("gpt", "llama_untied", "roberta_lm", "deberta")
IDS = np.random.default_rng(0).integers(2, 61, (3, 9)).astype(np.int32)
MASK = (np.arange(9) < np.array([[9], [5], [1]])).astype(np.int32)


def slow(value: Any) -> Any:
    """A parameter for the long run."""
    return pytest.param(value, marks=pytest.mark.slow)


def daily(*names: str) -> list[Any]:
    """All small models, and these of them for every day."""
    return [name if name in names else slow(name) for name in SMALL]


SOME = daily(*ONE_EACH)  # one of each kind


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Relative to the largest value of each array."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-6))


# ---- one function, whichever way it is compiled ------------------------------------------------


@pytest.mark.parametrize("name", daily("deberta"))
def test_scanned_is_unscanned(name: str) -> None:
    """The same outputs, and the blocks' parameters stacked."""
    small = SMALL[name]
    outputs = [
        jax.jit(small.model(scan=scan).apply)(small.variables(scan), IDS, MASK)
        for scan in (True, False)
    ]
    assert_close(*outputs)
    assert len(jax.tree.leaves(small.shapes(True))) < len(jax.tree.leaves(small.shapes(False)))


@pytest.mark.parametrize("name", daily("llama_untied", "roberta_lm"))
def test_padding_does_not_leak(name: str) -> None:
    """Tokens under the mask change nothing, and neither does padding's length."""
    small = SMALL[name]
    padding = getattr(small.config, "pad_token_id", 0)
    apply, variables = jax.jit(small.model().apply), small.variables(small.model().scan)

    def seen(ids: Any, mask: Any) -> np.ndarray:
        y = np.asarray(apply(variables, ids, mask))
        return y if small.classes else y[mask > 0]

    # RoBERTa counts positions by the tokens that are not padding, wherever the mask is.
    padded = np.where(MASK, IDS, padding)
    expected = seen(padded, MASK)
    other = np.where(MASK, IDS, padding if "roberta" in name else 7)
    other[:, -1] = np.where(MASK[:, -1], IDS[:, -1], 9)
    assert_close(seen(other, MASK), expected, 1e-6)
    alone = seen(padded[1:2, :5], MASK[1:2, :5])
    assert_close(alone, expected[1:2] if small.classes else expected[9:14])
    assert np.abs(seen(np.where(IDS[0, 0] == IDS, 3, padded), MASK) - expected).max() > 1e-3


@pytest.mark.parametrize("name", ["gpt", slow("llama")])
def test_decoders_see_no_later_token(name: str) -> None:
    """The logits before a token do not depend on it; positions may be given."""
    small = SMALL[name]
    apply, variables = jax.jit(small.model().apply), small.variables(True)
    logits = apply(variables, IDS)
    changed = apply(variables, np.concatenate([IDS[:, :-1], 60 - IDS[:, -1:]], axis=1))
    np.testing.assert_array_equal(changed[:, :-1], logits[:, :-1])
    assert np.abs(changed[:, -1] - logits[:, -1]).max() > 1e-3
    # Padded on the left, with the positions that the tokens would have without padding.
    ids = np.concatenate([np.zeros((3, 2), np.int32), IDS], axis=1)
    mask = np.concatenate([np.zeros((3, 2), np.int32), np.ones_like(IDS)], axis=1)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    assert_close(apply(variables, ids, mask, positions)[:, 2:], logits)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, slow(False)])
@pytest.mark.parametrize("name", SOME)
def test_load_then_save_is_the_same_file(name: str, scan: bool, tmp_path: pathlib.Path) -> None:
    """Config with head, variables, bytes."""
    small = SMALL[name]
    small.write(tmp_path)
    config, variables = small.module.load(tmp_path, scan=scan)
    assert config == small.config
    assert jax.tree.structure(variables) == jax.tree.structure(small.shapes(scan))
    assert_close(variables, small.variables(scan), 0)
    small.module.save(tmp_path / "again", variables, config)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_tied_head_may_be_in_the_file(tmp_path: pathlib.Path) -> None:
    """As a copy of the embedding it is left out; with other values it is an error."""
    small = SMALL["gpt"]
    small.write(tmp_path)
    tensors = hf.read_tensors(tmp_path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    hf.write_tensors(tmp_path / "model.safetensors", tensors)
    assert_close(gpt.load(tmp_path)[1], small.variables(True), 0)
    tensors["lm_head.weight"] = 1 + tensors["transformer.wte.weight"]
    hf.write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError) as error:
        gpt.load(tmp_path)
    assert str(error.value) == (
        "lm_head.weight must be the same as transformer.wte.weight, to which it is tied"
    )


def test_padded_vocabulary(tmp_path: pathlib.Path) -> None:
    """Rows are added and cut off again; what is no token has the least logit."""
    SMALL["gpt"].write(tmp_path)
    config, variables = gpt.load(tmp_path, pad_vocab=16)
    assert variables["params"]["wte"]["embedding"].shape == (64, 16)
    logits = jax.jit(gpt.GPT(config).apply)(variables, IDS)
    expected = jax.jit(SMALL["gpt"].model().apply)(SMALL["gpt"].variables(True), IDS)
    assert_close(logits[..., :61], expected)
    assert (logits[..., 61:] == np.finfo(np.float32).min).all()
    gpt.save(tmp_path / "again", variables, config)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", [slow("bert_lm"), "roberta_lm", slow("deberta_lm")])
def test_new_head(name: str) -> None:
    """What was trained on words gets a head for classes in its place."""
    small = SMALL[name]
    config, variables = small.module.new_head(
        jax.random.key(0), small.config, small.variables(False), classes=5
    )
    like = small.module.shapes(config, 5)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, like)
    logits = jax.eval_shape(small.kind(config, 5).apply, variables, IDS, MASK)
    assert logits.shape == (3, 5)
    tensors = hf.to_tensors(variables, small.module.names(config))
    assert [name for name in tensors if "classifier" in name]
    assert not [name for name in tensors if "lm_" in name or "cls." in name]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (gpt, "GPT2Config"),
        (bert, "BertConfig"),
    ],
)
def test_defaults_are_those_of_config_json(module: Any, name: str) -> None:
    """A field that a checkpoint leaves out means what `transformers` takes it for."""
    theirs = getattr(transformers, name)().to_dict()
    ours = {
        module.FIELDS[field.name]: field.default
        for field in dataclasses.fields(module.Config)
        if field.name in module.FIELDS and field.default is not dataclasses.MISSING
    }
    shared = ours.keys() & theirs
    assert len(shared) >= 2
    assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("gpt", 16),
        pytest.param("bert", 20, marks=pytest.mark.slow),
        ("roberta_lm", 18),
    ],
)
def test_more_tokens_than_positions(name: str, most: int) -> None:
    """An error: reads beyond the table would be NaN."""
    small = SMALL[name]
    model, variables = small.model(), small.shapes(small.model().scan)
    ids = jax.ShapeDtypeStruct((2, most), jnp.int32)
    jax.eval_shape(model.apply, variables, ids)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((2, most + 1), jnp.int32))
    assert str(error.value) == (
        f"`ids` must be (B, L) with L at most {most}, the positions of the model; got "
        f"(2, {most + 1}). Cut the sequences."
    )


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("gpt", "model_type", "llama", "expected model_type 'gpt2', got 'llama'"),
        ("gpt", "scale_attn_weights", False, "expected scale_attn_weights True, got False"),
        ("bert", "hidden_act", "relu", "expected hidden_act 'gelu', got 'relu'"),
        ("deberta", "share_att_key", False, "expected share_att_key True, got False"),
        ("bert", "hidden_size", None, "lacks hidden_size"),
    ],
)
def test_config_of_another_model(
    name: str, field: str, value: Any, message: str, tmp_path: pathlib.Path
) -> None:
    """What is not computed is an error."""
    SMALL[name].write(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError) as error:
        SMALL[name].module.load(tmp_path)
    assert str(error.value).removeprefix(f"`{path}`").lstrip(": ") == message


def test_examples_in_docstrings() -> None:
    """Those of the shared files."""
    assert doctest.testmod(hf).failed == 0 < doctest.testmod(hf).attempted


# ---- axes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, slow(False)])
@pytest.mark.parametrize("name", ["gpt", "mixtral", "gemma3", slow("roberta_cls"), "deberta_lm"])
def test_every_axis_of_a_matrix_has_a_name(name: str, scan: bool) -> None:
    """And the rules know it."""
    small = decoder(name) if name in decoders.CONFIGS else SMALL[name]
    model = small.model(scan=scan)
    boxed = jax.eval_shape(model.init, jax.random.key(0), IDS)
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    known = {rule for rule, _ in parts.RULES} | {None}
    for leaf in leaves:
        assert len(leaf.names) == leaf.value.ndim and set(leaf.names) <= known
        assert leaf.value.ndim == 1 or any(leaf.names)
    assert any("layers" in leaf.names for leaf in leaves) == scan


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


OFTEN = "llama2-7b", "roberta-base"


@pytest.mark.parametrize("name", [name if name in OFTEN else slow(name) for name in TOTALS])
def test_sizes(name: str) -> None:
    """The parameters of the published models."""
    [module] = [module for module in (gpt, llama, bert, deberta) if name in module.SIZES]
    assert jlora.count(module.shapes(module.SIZES[name])) == TOTALS[name]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row.name}, {row.adapted}", marks=pytest.mark.slow if i != 8 else [])
        for i, row in enumerate(counts.rows())  # the first is that of the table below
    ],
)
def test_counts_of_the_paper(row: counts.Row) -> None:
    """Trainable parameters exactly."""
    assert counts.measure(row.model, row.rules)[1] == row.expected


def test_counts_print_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """In the figures that the README shows."""
    counts.main(table=counts.rows()[:1])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| RoBERTa-base | 124,697,433 | q, v, r = 8 | 294,912 | 590 kB | 249 MB "
        "| 1.18 MB of 499 MB | 2.36 MB of 998 MB |"
    ]

"""What every name table must do: the real PyTorch class beside another library's, on its files.

A test file lists its `CASES`, makes the fixture `made` of them, and imports the laws below.
"""

import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft as hf_peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import jlora
from jlora import peft
from jlora._tree import leaves_by_path
from jlora.peft import Name

TOLERANCE = 1e-4
VOCABULARY = 40
TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 13))
FILES = ("adapter_config.json", "adapter_model.safetensors")
each_adapter = pytest.mark.parametrize("which", ["all", "some"])


class Model(NamedTuple):
    """A library's model.

    Attributes:
        like: its parameters; only shapes and dtypes matter.
        apply: (parameters, tokens) to logits.
        load: what the library itself makes of a checkpoint's folder, if it can.
    """

    like: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    load: Callable[[pathlib.Path], Any] | None = None


class Case(NamedTuple):
    """A model of two libraries.

    Attributes:
        names: the table.
        config: the class of its configuration in `transformers`, and what it has of fields.
        build: from that configuration to the other library's model.
        rules: those that adapt what PEFT's "all-linear" does.
        some: modules that share a leaf with others, which PEFT adapts without those.
        files: the table of the checkpoint, if it is another.
        left: a module that PEFT adapts and the rules do not.
    """

    names: tuple[Name, ...]
    config: tuple[str, Mapping[str, Any]]
    build: Callable[[Any], Model]
    rules: tuple[jlora.LoRA, ...]
    some: tuple[str, ...] = ("q_proj", "v_proj", "up_proj")
    files: tuple[Name, ...] | None = None
    left: str = "none"


class Made(NamedTuple):
    """The files of a case.

    Attributes:
        case: the case.
        model: the other library's model.
        folder: of the checkpoint, `base`, and of PEFT's adapters.
        logits: PyTorch's, of the base and with each adapter.
        base: the parameters from the checkpoint, by the table.
    """

    case: Case
    model: Model
    folder: pathlib.Path
    logits: dict[str, np.ndarray]
    base: Any


def make(case: Case, folder: pathlib.Path) -> Made:
    """Writes what `transformers` and PEFT write of a random model."""
    kind, fields = case.config
    config = getattr(transformers, kind)(**SIZES | dict(fields))
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    _randomize(base)
    base.save_pretrained(folder / "base")
    logits = {"base": _logits(base)}
    for which, targets in {"all": "all-linear", "some": list(case.some)}.items():
        wanted = hf_peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
        adapted = hf_peft.get_peft_model(_pytorch(folder / "base"), wanted)
        for name, x in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(x, std=0.2)
        adapted.save_pretrained(folder / which)
        logits[which] = _logits(adapted)
    model = case.build(config)
    return Made(case, model, folder, logits, _load_base(case, model, folder / "base"))


# Of every configuration.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@torch.no_grad()
def _randomize(model: Any) -> None:
    """Weights of the size that keeps activations near 1, and norms and biases that differ."""
    for x in model.parameters():
        noise = torch.randn_like(x)
        x.copy_(x + 0.3 * noise if x.ndim == 1 else noise / x.shape[-1] ** 0.5)


@torch.no_grad()
def _logits(model: Any) -> np.ndarray:
    return model.eval()(torch.as_tensor(TOKENS)).logits.numpy()


def _pytorch(folder: pathlib.Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )


def _load_base(case: Case, model: Model, folder: pathlib.Path) -> Any:
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.like)
    return peft.load_base(folder, case.files or case.names, like=like)


def _ours(made: Made, adapter: Any) -> np.ndarray:
    """The logits of the other library's model with an adapter."""
    apply = jlora.transform(made.model.apply, jlora.LoRA()).apply
    return np.asarray(jax.jit(apply)(made.base, adapter, jnp.asarray(TOKENS)))


def _assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------ the laws


def test_base(made: Made) -> None:
    """The base by the table has PyTorch's logits, and the leaves that the library itself loads."""
    _assert_close(_ours(made, {}), made.logits["base"])
    if made.model.load is None:
        return
    theirs = dict(leaves_by_path(made.model.load(made.folder / "base")))
    ours = dict(leaves_by_path(made.base))
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        assert x.dtype == theirs[path].dtype
        np.testing.assert_array_equal(x, theirs[path], err_msg="/".join(path))


def test_base_comes_back(made: Made) -> None:
    """The tensors of the checkpoint are those of the base."""
    expected = load_file(made.folder / "base" / "model.safetensors")
    tensors = peft.to_tensors(made.base, made.case.files or made.case.names)
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(tensors[name], x, err_msg=name)


@each_adapter
def test_logits(which: str, made: Made) -> None:
    """PEFT's adapter means the same here."""
    adapter = peft.load(made.folder / which, made.base, made.case.names)
    assert np.abs(made.logits[which] - made.logits["base"]).max() > 0.1
    _assert_close(_ours(made, adapter), made.logits[which])


@each_adapter
def test_files_come_back(which: str, made: Made, tmp_path: pathlib.Path) -> None:
    """Byte for byte."""
    adapter = peft.load(made.folder / which, made.base, made.case.names)
    config = peft.read_config(made.folder / which)
    peft.save(tmp_path / "copy", made.base, adapter, made.case.names, config=config)
    for file in FILES:
        assert (tmp_path / "copy" / file).read_bytes() == (made.folder / which / file).read_bytes()


@each_adapter
def test_merged(which: str, made: Made, tmp_path: pathlib.Path) -> None:
    """The checkpoint with the adapter's tree in its weights, in PyTorch."""
    adapter = peft.load(made.folder / which, made.base, made.case.names)
    peft.export_merged(made.folder / "base", adapter, tmp_path / "merged", names=made.case.names)
    _assert_close(_logits(_pytorch(tmp_path / "merged")), made.logits[which])


def test_own_adapter(made: Made, tmp_path: pathlib.Path) -> None:
    """An adapter that was made here, in PEFT, whose configuration is found anew."""
    lora = jlora.transform(made.model.apply, *made.case.rules)
    _, adapter = lora.init(jax.random.key(0), made.base, jnp.asarray(TOKENS))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    adapter = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), adapter)
    peft.save(tmp_path / "own", made.base, adapter, made.case.names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = hf_peft.PeftModel.from_pretrained(_pytorch(made.folder / "base"), tmp_path / "own")
    assert not [w for w in caught if "adapter keys" in str(w.message)]
    _assert_close(_ours(made, adapter), _logits(theirs))
    ours, peft_s = (load_file(x / FILES[1]) for x in (tmp_path / "own", made.folder / "all"))
    assert ours.keys() == {key for key in peft_s if f".{made.case.left}." not in key}

"""What every name table must do: the real PyTorch class beside another library's, on its files.

A test file lists its `CASES`, makes the fixture `made` of them, and imports all of this. Where
PyTorch is not in the same environment, the variable PYTORCH_PYTHON names a Python that has it, with
`transformers` and PEFT.
"""

import atexit
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from peft_files import TENSORS, assert_same_files, config_of
from safetensors.numpy import load_file

import jlora
from jlora import peft
from jlora._tree import leaves_by_path
from jlora.peft import Name
from jlora.peft._checkpoint import open_checkpoint
from jlora.peft.names._leaves import NamedLeaf, find_leaves
from jlora.peft.places._find import find

if importlib.util.find_spec("torch") is None and "PYTORCH_PYTHON" not in os.environ:
    pytest.skip("PyTorch is neither here nor in PYTORCH_PYTHON", allow_module_level=True)

__all__ = [
    *("ALIKE", "GEMMA2", "GEMMA3", "GEMMA4", "GEMMA4_EXPERTS", "PARAMETERS", "PER_LAYER"),
    *("TIED", "TOKENS", "Case", "Made", "Model"),
    *("each_adapter", "made_of", "our_logits", "pytestmark", "test_base", "test_base_comes_back"),
    *("scaled", "sizes", "sizes_of_gemma2", "sizes_of_gemma4"),
    *("test_files_come_back", "test_found_by_value", "test_logits", "test_merged"),
    "test_own_adapter",
]
# What the libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY = 40
TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 13))
each_adapter = pytest.mark.parametrize("which", ["all", "some"])


class Model(NamedTuple):
    """A library's model.

    Attributes:
        like: its parameters; only shapes and dtypes matter.
        apply: (parameters, tokens) to logits.
        load: what the library itself makes of a checkpoint's folder, if it can.
        tolerance: how far its logits may be from PyTorch's, where it rounds on its own account.
    """

    like: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    load: Callable[[pathlib.Path], Any] | None = None
    tolerance: float = 1e-4


class Case(NamedTuple):
    """A model of two libraries.

    Attributes:
        names: the table.
        config: the class of its configuration in `transformers`, and what it has of fields.
        build: from that configuration to the other library's model.
        rules: those that adapt what PEFT's "all-linear" does.
        some: modules that share a leaf with others, which PEFT adapts without those.
        left: a module that PEFT adapts and the rules do not.
        experts: the parameters of experts that "all" adapts too.
        every: the modules that "all" adapts.
        constant: a norm whose weights are all 1.
        rounded: weights that the table divides, which come back rounded.
    """

    names: tuple[Name, ...]
    config: tuple[str, Mapping[str, Any]]
    build: Callable[[Any], Model]
    rules: tuple[jlora.LoRA, ...]
    some: tuple[str, ...] = ("q_proj", "v_proj", "up_proj")
    left: str = "none"
    experts: tuple[str, ...] = ()
    every: str = "all-linear"
    constant: str = "none"
    rounded: str = "none"


class Made(NamedTuple):
    """The files of a case.

    Attributes:
        case: the case.
        model: the other library's model.
        folder: of the checkpoint, `base`, and of PEFT's adapters.
        logits: PyTorch's, of the base and with each adapter.
        base: the parameters from the checkpoint, by the table.
        run: the other library's model with an adapter, (parameters, adapter, tokens) to logits.
    """

    case: Case
    model: Model
    folder: pathlib.Path
    logits: dict[str, np.ndarray]
    base: Any
    run: Callable[..., jax.Array]


def make(case: Case, folder: pathlib.Path) -> Made:
    """Writes what `transformers` and PEFT write of a random model."""
    kind, fields = case.config
    own = SIZES | dict(fields)
    targets = {"all": (case.every, case.experts), "some": (case.some, ())}
    said = pytorch("make", str(folder), kind, own, targets, TOKENS.tolist(), case.constant)
    logits = {which: np.asarray(x, np.float32) for which, x in said.items()}
    config = getattr(transformers, kind)(**own)
    config.allow_global_per_layer_attribute_access = True  # what layers differ in, builders know
    model = case.build(config)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.like)
    base = peft.load_base(folder / "base", like, case.names)
    run = jax.jit(jlora.transform(model.apply, jlora.LoRA()).apply)
    return Made(case, model, folder, logits, base, run)


def made_of(cases: Mapping[str, Case], *daily: str) -> Any:
    """A fixture with what is made of each case; all but the `daily` ones are slow."""
    assert cases.keys() >= set(daily)
    slow = {name: [pytest.mark.slow] for name in cases if name not in daily}
    names = [pytest.param(name, marks=slow.get(name, [])) for name in cases]

    @pytest.fixture(scope="module", params=names)
    def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
        return make(cases[request.param], tmp_path_factory.mktemp(request.param))

    return made


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
# More of some.
TIED = {"tie_word_embeddings": True}
ALIKE = {"num_key_value_heads": 4}
GEMMA2 = {"query_pre_attn_scalar": 8, "sliding_window": 5}
GEMMA3 = GEMMA2 | {"num_hidden_layers": 6}  # the sixth layer sees everything
GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"],
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "sliding_window": 5,
    "final_logit_softcapping": 30.0,
}
GEMMA4_EXPERTS = GEMMA4 | {
    "enable_moe_block": True,
    "num_experts": 3,
    "top_k_experts": 2,
    "moe_intermediate_size": 20,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")


def scaled(window: int) -> dict[str, Any]:
    """Fields of Llama 3.1 and later, first trained on so many positions."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": window}
    return {
        "rope_parameters": rope | {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    }


def sizes(config: Any, vocabulary: str = "num_embed") -> dict[str, Any]:
    """Fields of a configuration of gemma or tunix."""
    return {
        vocabulary: config.vocab_size,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }


def sizes_of_gemma2(config: Any) -> dict[str, Any]:
    """Those of Gemma 2 and 3."""
    return sizes(config) | {
        "final_logit_softcap": config.final_logit_softcapping,
        "attn_logits_soft_cap": config.attn_logit_softcapping,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "sliding_window_size": config.sliding_window,
    }


def sizes_of_gemma4(config: Any) -> dict[str, Any]:
    """Those of Gemma 4, with experts or without."""
    return sizes(config) | {
        "sliding_window_size": config.sliding_window,
        "final_logit_softcap": config.final_logit_softcapping,
        "per_layer_input_dim": config.hidden_size_per_layer_input,
        "num_global_kv_heads": config.per_layer_config[-1].num_key_value_heads,
        "global_key_size": config.per_layer_config[-1].head_dim,
        "k_eq_v_global": config.attention_k_eq_v,
        "enable_moe": config.enable_moe_block,
        "num_experts": config.num_experts or 0,
        "expert_dim": config.moe_intermediate_size or 0,
        "moe_dense_hidden_dim": config.intermediate_size,
    }


def pytorch(call: str, *arguments: Any) -> Any:
    """What `pytorch.py` answers, here or in the Python that the environment names."""
    return _process()(call, *arguments)


@functools.cache
def _process() -> Callable[..., Any]:
    python = os.environ.get("PYTORCH_PYTHON")
    if python is None:
        from tests.peft.names.tables import pytorch

        return lambda call, *arguments: getattr(pytorch, call)(*arguments)
    script = pathlib.Path(__file__).with_name("pytorch.py")
    pipe = subprocess.PIPE
    process = subprocess.Popen([python, script], stdin=pipe, stdout=pipe, text=True)
    atexit.register(process.communicate)

    def ask(*line: Any) -> Any:
        assert process.stdin and process.stdout
        print(json.dumps([line[0], line[1:]]), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    return ask


def _logits(folder: pathlib.Path, adapter: pathlib.Path | None = None) -> np.ndarray:
    said = pytorch("logits", str(folder), TOKENS.tolist(), adapter and str(adapter))
    return np.asarray(said, np.float32)


def our_logits(made: Made, adapter: Any) -> np.ndarray:
    """The logits of the other library's model with an adapter."""
    return np.asarray(made.run(made.base, adapter, jnp.asarray(TOKENS)))


def _assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------ the laws


def split(leaf: NamedLeaf, folder: pathlib.Path) -> NamedLeaf:
    """A leaf with a module for each expert, if a checkpoint has them one by one."""
    base = open_checkpoint(folder, "folder")
    places = next(find(leaf.parameters, base.shapes, base.config))
    views = [places[key] for key in leaf.parameters if key in places]
    name = leaf.name
    j, n = name.part or (0, 1)
    each = [[piece.tensor.removesuffix(".weight") for piece in view.pieces] for view in views]
    is_apart = views and all(len(x) == n * leaf.experts for x in each)
    if name.kind != "experts" or not is_apart or views[0].is_tensor:
        return leaf
    stacked = name.where("le")
    lengths = [leaf.shape[d] for d in (*name.where("l"), *name.where("e"))]
    modules = np.reshape([tensors[j::n] for tensors in each], lengths)
    modules = np.moveaxis(modules, -1, stacked.index(*name.where("e")))
    row = Name(name.path, "{}" * len(stacked), name.axes.replace("e", "l"), times=name.times)
    return leaf._replace(name=row, modules=tuple(modules.flat))


def test_found_by_value(made: Made) -> None:
    """Without the table, by the values: every matrix as the table has it."""
    tokens = jnp.asarray(TOKENS)
    sites = jlora.transform(made.model.apply, jlora.LoRA()).sites(made.base, tokens)
    found = peft.find_names(made.folder / "base", made.base, sites)
    ours, theirs = (
        {leaf.path: split(leaf, made.folder / "base") for leaf in find_leaves(made.base, rows)}
        for rows in (found, made.case.names)
    )
    for path, leaf in theirs.items():
        if leaf.name.kind is not None:
            assert path in ours, found.left
            own = ours[path]
            assert own.parameters == leaf.parameters
            assert own.name.weight_groups == leaf.name.weight_groups
            assert (own.name.interleaved, own.name.part) == (leaf.name.interleaved, leaf.name.part)
            assert own.name.is_swapped == leaf.name.is_swapped
            assert own.factor == pytest.approx(leaf.factor, rel=1e-6)
        elif path in ours:
            assert ours[path].parameters == leaf.parameters


def test_base(made: Made) -> None:
    """The base by the table has PyTorch's logits, and the leaves that the library itself loads."""
    _assert_close(our_logits(made, {}), made.logits["base"], made.model.tolerance)
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
    expected = stack_experts(load_file(made.folder / "base" / "model.safetensors"))
    tensors = peft.to_tensors(made.base, made.case.names)
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        off = 2.0**-22 if made.case.rounded in name else 0.0
        np.testing.assert_allclose(tensors[name], x, rtol=off, atol=0, err_msg=name)


def stack_experts(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of all experts, as `transformers` has them in memory."""
    found, each = dict[str, np.ndarray](), dict[str, list[np.ndarray]]()
    for name in sorted(tensors, key=lambda name: [int(x) for x in re.findall(r"\d+", name)]):
        single = re.fullmatch(r"(.*experts)\.\d+\.(\w+)\.weight", name)
        if single is None:
            found[name] = tensors[name]
        else:
            each.setdefault(f"{single[1]}.{single[2]}", []).append(tensors[name])
    for name, own in each.items():
        if not name.endswith("up_proj"):
            module, _, part = name.rpartition(".")
            stacked = np.stack(own)
            if part == "gate_proj":
                stacked = np.concatenate([stacked, np.stack(each[f"{module}.up_proj"])], 1)
            found[f"{module}.{part.replace('gate', 'gate_up')}"] = stacked
    return found


@each_adapter
def test_logits(which: str, made: Made) -> None:
    """PEFT's adapter means the same here."""
    adapter = peft.load(made.folder / which, made.base, made.case.names)
    assert np.abs(made.logits[which] - made.logits["base"]).max() > 0.1
    _assert_close(our_logits(made, adapter), made.logits[which], made.model.tolerance)


@each_adapter
def test_files_come_back(which: str, made: Made, tmp_path: pathlib.Path) -> None:
    """Byte for byte."""
    adapter = peft.load(made.folder / which, made.base, made.case.names)
    config = config_of(made.folder / which)
    peft.save(tmp_path / "copy", made.base, adapter, made.case.names, config=config)
    assert_same_files(tmp_path / "copy", made.folder / which)


@each_adapter
def test_merged(which: str, made: Made, tmp_path: pathlib.Path) -> None:
    """The checkpoint with the adapter's tree in its weights, in PyTorch."""
    adapter = peft.load(made.folder / which, made.base, made.case.names)
    peft.export_merged(made.folder / "base", adapter, tmp_path / "merged", names=made.case.names)
    _assert_close(_logits(tmp_path / "merged"), made.logits[which])


def test_own_adapter(made: Made, tmp_path: pathlib.Path) -> None:
    """An adapter that was made here, in PEFT, whose configuration is found anew."""
    lora = jlora.transform(made.model.apply, *made.case.rules)
    _, adapter = lora.init(jax.random.key(0), made.base, jnp.asarray(TOKENS))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    adapter = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), adapter)
    peft.save(tmp_path / "own", made.base, adapter, made.case.names)
    expected = _logits(made.folder / "base", tmp_path / "own")
    _assert_close(our_logits(made, adapter), expected, made.model.tolerance)
    own, theirs = (load_file(x / TENSORS) for x in (tmp_path / "own", made.folder / "all"))
    odd = own.keys() ^ {key for key in theirs if f".{made.case.left}." not in key}
    assert not odd, odd

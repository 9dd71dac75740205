"""jlora's files in the real PEFT on PyTorch, and back. Needs the extra `interop`."""

import importlib.util
import pathlib
import sys
import warnings
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peft_models as models  # noqa: E402
from peft_files import CONFIG, TENSORS, assert_close, assert_equal, config_of, node  # noqa: E402

import jlora  # noqa: E402
from jlora import Full, LoRA, Rows, Slots, peft  # noqa: E402
from jlora._tree import leaves_by_path, nest  # noqa: E402
from jlora.peft import Name  # noqa: E402

KEY = jax.random.key(0)
# In bfloat16 the two frameworks round the base model's own activations differently.
TOLERANCE = {"bf16": 2e-2}
# Whose gradients differ: of each module that shares a weight, and none of the row of padding.
APART = ("bf16", "gpt2_tied", "tied", "embeddings")


def _make() -> Any:
    spec = importlib.util.spec_from_file_location("peft_make", models.FIXTURES / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make = _make()


def outputs(case: models.Case, adapter: Any) -> np.ndarray:
    """What the adapted JAX model says of the case's inputs."""
    lora = jlora.transform(case.apply, LoRA())
    y = lora.apply(case.base, adapter, jnp.asarray(case.torch["inputs"]))
    return np.asarray(y, np.float32)


def in_peft(name: str, folder: pathlib.Path) -> Any:
    """The case's PyTorch model with the adapter of `folder`; every tensor must find its place."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = hf_peft.PeftModel.from_pretrained(make.base_model(name), folder).eval()
    said = [str(w.message) for w in caught]
    assert not [s for s in said if "adapter keys" in s or "matched" in s], said
    return model


def round_trip(name: str, case: models.Case, adapter: Any, folder: pathlib.Path) -> Any:
    """Jlora → PEFT → jlora → files; gives the adapter that came back."""
    peft.save(folder / "ours", case.base, adapter, case.names)
    model = in_peft(name, folder / "ours")
    tolerance = TOLERANCE.get(name, 1e-5)
    assert_close(make.outputs(name, model).numpy(), outputs(case, adapter), tolerance)
    model.save_pretrained(folder / "theirs")
    again = peft.load(folder / "theirs", case.base, case.names)
    fields = config_of(folder / "theirs")
    peft.save(folder / "again", case.base, again, case.names, config=fields)
    for file in (CONFIG, TENSORS):
        assert (folder / "again" / file).read_bytes() == (folder / "theirs" / file).read_bytes()
    return again


@pytest.mark.parametrize("name", models.CASES)
def test_fixture_through_peft(name: str, tmp_path: pathlib.Path) -> None:
    """Each fixture, saved by jlora without its configuration, means the same to PEFT."""
    case = models.case(name)
    adapter = peft.load(case.folder, case.base, case.names)
    assert_equal(round_trip(name, case, adapter, tmp_path), adapter)


@pytest.mark.parametrize("name", models.CASES)
def test_fixtures_are_what_peft_writes(name: str, tmp_path: pathlib.Path) -> None:
    """The committed tensors are those of `make.py` with the PEFT that is installed."""
    make.adapted_model(name).save_pretrained(tmp_path)
    written = (tmp_path / TENSORS).read_bytes()
    assert written == (models.FIXTURES / name / TENSORS).read_bytes()


QV, QUERY = LoRA("(query|value)/kernel", rank=2), LoRA("query/kernel", rank=2)
SOME = LoRA("h/0/.*c_attn/kernel", rank=2, slots=Slots(3, (1,)))
ROOT = LoRA("(query|key)/kernel", rank=3, alpha=7, rslora=True)
# A fixture's model, and rules of ours.
RULES = {
    "slots": ("gpt2", [LoRA("c_attn/kernel", rank=2, alpha=3, slots=Slots(3, (0, 2)))]),
    "slots_and_more": (
        "gpt2",
        [SOME, LoRA("c_(attn|proj|fc)/kernel", rank=3), LoRA("wte", rank=4, alpha=2)],
    ),
    "rslora": ("qv", [ROOT, LoRA("output/dense/kernel", rank=2)]),
    "biases": ("qv", [QV, Full("(query|value)/bias")]),
    "all_biases": (
        "qv",
        [QV, Full("(LayerNorm|query|key|value|(output|intermediate)/dense|classifier)/bias")],
    ),
    "some_biases": ("qv", [QV, Full("output/dense/bias")]),
    "head_and_norms": ("modules_to_save", [QUERY, Full("LayerNorm"), Full("classifier/kernel")]),
    "no_factors": ("modules_to_save", [Full("LayerNorm"), Full("classifier")]),
    "scan": ("scanned", [LoRA("query|value|down", rank=4, alpha=1), Full("norm/scale")]),
    "full_tied": ("scanned", [QUERY, Full("embed/embedding")]),
    "full_tied_alone": ("scanned", [Full("embed/embedding")]),
    "full_tied_and_norm": ("scanned", [QUERY, Full("embed|norm/scale")]),
    "full_tied_wte": ("gpt2_tied", [LoRA("c_attn/kernel", rank=2), Full("wte/embedding")]),
    "scan_tied": ("scanned", [LoRA("embed", rank=3), LoRA("query", rank=2)]),
    "conv": ("conv", [LoRA("projection/kernel", rank=5), LoRA("key/kernel", rank=2, alpha=3)]),
    "untied_head": ("all_linear", [LoRA("lm_head|embed_tokens", rank=2), LoRA(rank=3)]),
    "rows": ("tied", [Rows("embed", [10, 4]), LoRA(rank=2)]),
    "experts": ("experts", [LoRA("gate_up|down", rank=2), Full("head")]),
    "one_expert_parameter": ("experts", [LoRA("down", rank=3, alpha=2)]),
}


@pytest.mark.parametrize("rules", RULES)
def test_own_adapter_through_peft(rules: str, tmp_path: pathlib.Path) -> None:
    """Adapters from `init`, with every leaf random: same outputs, and a fixed point after that."""
    name, given = RULES[rules]
    case = models.case(name)
    lora = jlora.transform(case.apply, *given)
    base, adapter = lora.init(KEY, case.base, jnp.asarray(case.torch["inputs"]))
    adapter = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), adapter)
    again = round_trip(name, case._replace(base=base), adapter, tmp_path)
    assert_close(outputs(case, again), outputs(case, adapter))
    # A shared factor, or slots, come back as PEFT has them: the same ΔW in other arrays.
    if name != "experts" and not rules.startswith("slots"):
        kept = {k: v for k, v in leaves(again).items() if k in leaves(adapter)}
        assert kept.keys() == leaves(adapter).keys()
        for path, x in kept.items():
            assert np.array_equal(x, leaves(adapter)[path]), path


def leaves(adapter: Any) -> dict[str, np.ndarray]:
    """The arrays of an adapter by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(adapter)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in flat}


@pytest.mark.parametrize("name", [x for x in models.CASES if x not in APART])
def test_gradients(name: str) -> None:
    """Those of all tensors are PyTorch's: of factors, magnitudes, rows, and leaves in full."""
    case, model = models.case(name), make.adapted_model(name)
    y = model(make.inputs(name))
    torch.sin(y if isinstance(y, torch.Tensor) else y[0]).sum().backward()
    slopes = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    expected = hf_peft.get_peft_model_state_dict(model, state_dict=slopes)
    lora, inputs = jlora.transform(case.apply, LoRA()), jnp.asarray(case.torch["inputs"])
    adapter = peft.load(case.folder, case.base, case.names)
    found = jax.grad(lambda x: jnp.sin(lora.apply(case.base, x, inputs)).sum())(adapter)
    actual = peft.tensors(case.base, found, case.names)
    assert expected and expected.keys() <= actual.keys()
    largest = max(float(x.abs().max()) for x in expected.values())  # that of a key's bias is 0
    for key, x in expected.items():
        np.testing.assert_allclose(actual[key], x.numpy(), rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["qv", "patterns", "scanned", "rslora", "embeddings", "tied"])
def test_vllm_profile_in_peft(name: str, tmp_path: pathlib.Path) -> None:
    """Padding and folding change nothing of what PEFT computes."""
    case = models.case(name)
    adapter = peft.load(case.folder, case.base, case.names)
    peft.save(tmp_path / "a", case.base, adapter, case.names, profile="vllm")
    model = in_peft(name, tmp_path / "a")
    assert_close(make.outputs(name, model).numpy(), outputs(case, adapter))


def in_order() -> Any:
    """Sequences whose modules have numbers: linear ones, a norm, and some without parameters."""
    nn = torch.nn
    head = nn.Sequential(nn.Dropout(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    return nn.Sequential(OrderedDict(body=body, act=nn.Sequential(nn.ReLU()), head=head))


def one_end() -> Any:
    """Modules whose whole names other names end with: those of a module, and of a container."""
    nn = torch.nn
    low = nn.Sequential(OrderedDict(head=nn.Linear(4, 4), body=nn.Sequential(nn.Linear(4, 4))))
    return nn.Sequential(OrderedDict(low=low, body=nn.Linear(4, 4), head=nn.Linear(4, 3)))


# A model of numbered modules, and those that are adapted.
NUMBERED: dict[str, tuple[Any, list[str]]] = {
    "end of others": (one_end, ["head", "body"]),
    "first": (in_order, ["body.0"]),
    "both": (in_order, ["body.0", "head.3"]),
    "all": (in_order, ["body.0", "body.2", "head.1", "head.3"]),
}


@pytest.mark.parametrize("case", NUMBERED)
def test_numbers_name_one_module(case: str, tmp_path: pathlib.Path) -> None:
    """PEFT finds the modules that jlora adapted, and no container or other module."""
    make_model, adapted = NUMBERED[case]
    model = make_model()
    names = {len(axes): Name("(.*)/weight", r"\1", axes) for axes in ("o", "oi", "oikk")}
    weights = {
        tuple(key.split(".")): x.detach().numpy()
        for key, x in model.named_parameters()
        if key.endswith(".weight")
    }
    base = nest(weights)
    chosen = {path: x for path, x in weights.items() if ".".join(path[:-1]) in adapted}
    adapter = nest({path: node(names[x.ndim], x.shape) for path, x in chosen.items()})
    peft.save(tmp_path / "a", base, adapter, [*names.values()])
    ours = {path: np.asarray(x) for path, x in leaves_by_path(jlora.merge(base, adapter))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of keys that are missing or have no place
        found = hf_peft.PeftModel.from_pretrained(model, tmp_path / "a")
    modules = found.base_model.model.named_modules()
    assert {name for name, x in modules if hasattr(x, "lora_A")} == set(adapted)
    theirs = found.merge_and_unload().state_dict()
    for path, x in ours.items():
        np.testing.assert_allclose(x, theirs[".".join(path)].numpy(), rtol=0, atol=1e-5)

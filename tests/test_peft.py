"""PEFT's files without PyTorch: against what PEFT wrote and computed, and against a formula.

The law behind most tests: what is read means what PyTorch computed, what is written is what PEFT
would have written, and whatever is wrong is refused as a whole, by name.
"""

import functools
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft_models as models
import pytest
from flax import nnx
from peft_files import (
    CONFIG,
    ENDS,
    PREFIX,
    TENSORS,
    Damage,
    Files,
    Folder,
    all_of,
    assert_close,
    assert_equal,
    change,
    copy,
    drop,
    mutate,
    normal,
    pair,
    put,
    raw,
    say,
    write,
)
from safetensors.numpy import save_file
from small import some

import jlora
from jlora import DoRA, Full, LoRA, Slots, initializers, peft
from jlora.peft import Name
from jlora.peft.names._leaves import resolve
from jlora.types import Layout, LowRank

KEY = jax.random.key(0)
CASES = models.CASES


# ----------------------------------------------------------------------- what PEFT itself wrote

# Of the outputs one of each kind for every day; what is merged is compared for all.
DAILY = ("dora_conv", "embeddings", "experts", "gpt2_tied", "modules_to_save", "scanned", "tokens")


def loaded(name: str) -> tuple[models.Case, Any]:
    """A fixture and its adapter."""
    case = models.case(name)
    return case, peft.load(case.folder, case.base, case.names)


@pytest.mark.parametrize("name", some(CASES, *DAILY))
def test_outputs_are_pytorch_s(name: str) -> None:
    """The adapted JAX model gives what the adapted PyTorch model gave."""
    case, adapter = loaded(name)
    lora = jlora.transform(case.apply, LoRA())
    y = jax.jit(lora.apply)(case.base, adapter, jnp.asarray(case.torch["inputs"]))
    # In bfloat16 the two frameworks round the base model's own activations differently.
    assert_close(y, case.torch["outputs"], 2e-2 if name == "bf16" else 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_merged_is_pytorch_s(name: str) -> None:
    """Merged here equals merged there, in every leaf."""
    case, adapter = loaded(name)
    expected = models.tree(name, case.merged())
    # PEFT adds ΔW to a weight once for each module that shares it.
    if path := {"tied": ["params", "embed"], "gpt2_tied": ["transformer", "wte"]}.get(name):
        holder = functools.reduce(dict.__getitem__, path, expected)
        base = functools.reduce(dict.__getitem__, path, case.base)["embedding"]
        holder["embedding"] = (holder["embedding"] + base) / 2
    # PEFT rounds ΔW to bfloat16 before it adds; here the sum is rounded once.
    assert_close(jlora.merge(case.base, adapter), expected, 2**-7 if name == "bf16" else 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_files_come_back(name: str, tmp_path: Folder) -> None:
    """Both files have PEFT's bytes with its configuration; without it another one says the same."""
    case, adapter = loaded(name)
    config = peft.read_config(case.folder)
    peft.save(tmp_path / "a", case.base, adapter, case.names, config=config)
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "a" / file).read_bytes() == (case.folder / file).read_bytes()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", CONFIG, TENSORS]
    peft.save(tmp_path / "b", case.base, adapter, case.names, base_model="some/model")
    assert_equal(peft.load(tmp_path / "b", case.base, case.names), adapter)
    ours = peft.read_config(tmp_path / "b")
    assert ours.keys() == config.keys()
    assert ours["base_model_name_or_path"] == "some/model"
    assert (tmp_path / "b" / CONFIG).read_text() == json.dumps(ours, indent=2, sort_keys=True)


@pytest.mark.parametrize("name", ["qv", "tied"])
def test_shapes_suffice_as_base(name: str, tmp_path: Folder) -> None:
    """To load; and to save, unless PEFT stores frozen values with the adapter."""
    case, adapter = loaded(name)
    shapes, config = jax.eval_shape(lambda: case.base), peft.read_config(case.folder)
    assert_equal(peft.load(case.folder, shapes, case.names), adapter)
    save = functools.partial(peft.save, tmp_path / "a", shapes, adapter, case.names)
    if name == "tied":
        with pytest.raises(ValueError, match=r"`base` must hold arrays .* at params/embed/embed"):
            save(config=config)
        assert not list(tmp_path.iterdir())
    else:
        save(config=config)
        assert_equal(peft.load(tmp_path / "a", case.base, case.names), adapter)


def test_dropout_is_carried() -> None:
    """PEFT's `lora_dropout` is that of each site."""
    nodes = jax.tree.leaves(loaded("qv")[1], is_leaf=lambda x: isinstance(x, LowRank))
    assert {(x.dropout, x.scale) for x in nodes} == {(0.1, 8.0)}


# ----------------------------------------------------------------------- layouts, by the formula

# Axes of the leaf, its shape, PyTorch's module, and the einsum from the leaf to all of PyTorch's
# weights, with the modules first: their number, then the shape of each.
LAYOUTS = {
    "dense": ("io", (4, 6), "m", "io->oi", 1, (6, 4)),
    "transposed": ("oi", (6, 4), "m", "oi->oi", 1, (6, 4)),
    "heads_out": ("ioo", (4, 3, 2), "m", "iab->abi", 1, (6, 4)),
    "heads_in": ("iio", (3, 2, 4), "m", "abo->oab", 1, (4, 6)),
    "scanned": ("lio", (3, 4, 6), "m.{}", "lio->loi", 3, (6, 4)),
    "scanned_inside": ("ilo", (4, 3, 6), "m.{}", "ilo->loi", 3, (6, 4)),
    "scanned_last": ("iol", (4, 6, 3), "m.{}", "iol->loi", 3, (6, 4)),
    "scanned_heads": ("lioo", (2, 4, 3, 2), "m.{}", "liab->labi", 2, (6, 4)),
    "twice_scanned": ("lilo", (2, 4, 3, 6), "m.{}.n.{}", "kilo->kloi", 6, (6, 4)),
    "embedding": ("vo", (9, 4), "m", "vo->vo", 1, (9, 4)),
    "conv1d": ("kio", (3, 4, 6), "m", "xio->oix", 1, (6, 4, 3)),
    "conv2d": ("kkio", (3, 2, 4, 6), "m", "xyio->oixy", 1, (6, 4, 3, 2)),
    "scanned_conv": ("lkio", (2, 3, 4, 6), "m.{}", "lxio->loix", 2, (6, 4, 3)),
    "experts": ("eio", (3, 4, 6), "m", "eio->eoi", 1, (3, 6, 4)),
    "scanned_experts": ("leio", (2, 3, 4, 6), "m.{}", "leio->leoi", 2, (3, 6, 4)),
    "experts_inside": ("ieo", (4, 3, 6), "m", "ieo->eoi", 1, (3, 6, 4)),
    "modules": ("soio", (2, 3, 4, 2), ("k", "v"), "saib->sabi", 2, (6, 4)),
    "modules_inside": ("iso", (4, 3, 6), ("k", "q", "v"), "iso->soi", 3, (6, 4)),
    "scanned_modules": ("lsio", (2, 2, 4, 6), ("m.{}.k", "m.{}.v"), "lsio->lsoi", 4, (6, 4)),
    "modules_of_scans": ("slio", (2, 3, 4, 6), ("m.{}.k", "m.{}.v"), "slio->lsoi", 6, (6, 4)),
}


def node(name: Name, shape: tuple[int, ...], rank: int, scale: float) -> LowRank:
    """A random node for a leaf."""
    from jlora._adapters import factor_shapes

    a, b = factor_shapes(name.layout, shape, rank)
    return LowRank(normal(1, *a), normal(2, *b), scale, name.layout)


def delta(tensors: dict[str, np.ndarray], module: str, kind: str, scale: float) -> np.ndarray:
    """ΔW of one module as PEFT forms it, in PyTorch's layout."""
    is_table = kind == "embedding"
    ends = (".lora_embedding_A", ".lora_embedding_B") if is_table else ENDS
    a, b = (tensors[PREFIX + module + end] for end in ends)
    if kind == "experts":
        r = a.shape[0] // 3
        return scale * np.stack([b[:, e::3] @ a[e * r : (e + 1) * r] for e in range(3)])
    flat = scale * b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
    return flat.T if is_table else flat.reshape(b.shape[0], *a.shape[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_by_the_formula(layout: str, tmp_path: Folder) -> None:
    """For each layout of axes weights and ΔW are those of the file, and come back bit for bit."""
    axes, shape, module, equation, count, torch_shape = LAYOUTS[layout]
    name = Name("block/w", module, axes)
    base = {"params": {"block": {"w": normal(0, *shape)}}}
    adapter = {"params": {"block": {"w": node(name, shape, rank=2, scale=1.5)}}}
    of_torch = lambda tree: np.einsum(equation, tree["params"]["block"]["w"])  # noqa: E731

    tensors = peft.to_tensors(base, [name])
    weights = np.stack([tensors[name] for name in sorted(tensors)])
    assert np.array_equal(weights, of_torch(base).reshape(count, *torch_shape))
    assert_equal(peft.from_tensors(tensors, jax.eval_shape(lambda: base), [name]), base)

    peft.save(tmp_path / "a", base, adapter, [name])
    assert_equal(peft.load(tmp_path / "a", base, [name]), adapter)
    zero = jax.tree.map(jnp.zeros_like, base)
    ours = of_torch(jlora.merge(zero, adapter)).reshape(count, *torch_shape)
    tensors = models.read(tmp_path / "a" / TENSORS)
    modules = sorted({key.split(".lora_")[0].removeprefix(PREFIX) for key in tensors})
    theirs = [delta(tensors, m, name.kind or "", 1.5) for m in modules]
    assert len(modules) == count
    assert_close(np.stack(theirs), ours, 1e-6)


def come_back(tmp_path: Folder, base: Any, adapter: Any, names: Any) -> Any:
    """The adapter after `save` and `load`, whose ΔW must be the same."""
    peft.save(tmp_path / "a", base, adapter, names)
    again = peft.load(tmp_path / "a", base, names)
    assert_close(jlora.merge(base, again), jlora.merge(base, adapter), 1e-6)
    return again


def test_experts_of_the_other_orientation(tmp_path: Folder) -> None:
    """Where PyTorch keeps (experts, inputs, outputs) without saying so, PEFT's A is our B."""
    name = Name("w", "m", "eio", "gate_up_proj", transposed=True)
    base = {"w": jnp.zeros((3, 4, 6))}
    adapter = {"w": node(name, (3, 4, 6), rank=2, scale=0.5)}
    assert_equal(come_back(tmp_path, base, adapter, [name]), adapter)
    tensors = models.read(tmp_path / "a" / TENSORS)
    assert_close(delta(tensors, "m", "experts", 0.5), jlora.merge(base, adapter)["w"], 1e-6)


@pytest.mark.parametrize("axes", ["inputs", "outputs"])
def test_experts_that_share_a_factor(axes: str, tmp_path: Folder) -> None:
    """What experts share here is written for each, with the same ΔW."""
    layouts = {"inputs": Layout((), (0, 1), (2,)), "outputs": Layout((), (1,), (0, 2))}
    shapes = {"inputs": ((3, 4, 2), (2, 6)), "outputs": ((4, 2), (2, 3, 6))}
    a, b = (normal(i, *shape) for i, shape in enumerate(shapes[axes]))
    name, base = Name("w", "m", "eio", "down_proj"), {"w": jnp.zeros((3, 4, 6))}
    come_back(tmp_path, base, {"w": LowRank(a, b, 2.0, layouts[axes])}, [name])


@pytest.mark.parametrize("chosen", some([(0, 2), (1,), (2, 0, 1)], (0, 2)))
def test_slots_become_one_adapter(chosen: tuple[int, ...], tmp_path: Folder) -> None:
    """Slots of a fused kernel are blocks of B with zeros around them: the same ΔW."""
    base = {"transformer": {"h": {"0": {"attn": {"c_attn": {"kernel": normal(0, 12, 4)}}}}}}
    apply = lambda p, x: x @ p["transformer"]["h"]["0"]["attn"]["c_attn"]["kernel"].T  # noqa: E731
    rule = LoRA("c_attn", rank=2, alpha=3, slots=Slots(3, chosen))
    base, adapter = jlora.transform(apply, rule).init(KEY, base, jnp.ones((1, 4)))
    come_back(tmp_path, base, jax.tree.map(lambda x: x + normal(1, *x.shape), adapter), peft.GPT2)
    fields = peft.read_config(tmp_path / "a")
    assert (fields["r"], fields["lora_alpha"]) == (2 * len(chosen), 3 * len(chosen))
    assert fields["fan_in_fan_out"] is True
    [b] = [x for k, x in models.read(tmp_path / "a" / TENSORS).items() if "lora_B" in k]
    assert np.count_nonzero(b) == 2 * 4 * len(chosen)


def test_nnx_state(tmp_path: Folder) -> None:
    """An NNX state is named by the paths of its variables."""
    graph, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    apply = lambda s, x: nnx.merge(graph, s, copy=True)(x)  # noqa: E731
    rules = LoRA("kernel", rank=2), Full("bias")
    base, adapter = jlora.transform(apply, *rules).init(KEY, state, jnp.ones((1, 4)))
    names = [Name("kernel", "linear", "io"), Name("bias", "linear", "o", "bias")]
    assert_equal(come_back(tmp_path, base, adapter, names), adapter)
    assert peft.read_config(tmp_path / "a")["bias"] == "all"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_dtypes_are_kept(dtype: Any, tmp_path: Folder) -> None:
    """A and B keep their dtype, also those that NumPy has no name for."""
    base, adapter, names = small()
    adapter = jax.tree.map(lambda x: x.astype(dtype), adapter)
    assert_equal(come_back(tmp_path, base, adapter, names), adapter)


def test_leaves_in_full_alone(tmp_path: Folder) -> None:
    """PEFT has a word for targets that are none, and refuses an empty list."""
    base = {"head": {"kernel": jnp.zeros((3, 2))}}
    adapter, names = jax.tree.map(jnp.ones_like, base), [Name("(.*)/kernel", r"\1", "io")]
    assert_equal(come_back(tmp_path, base, adapter, names), adapter)
    assert peft.read_config(tmp_path / "a")["target_modules"] == "dummy-target-modules"
    given = {"target_modules": ["other"]}
    peft.save(tmp_path / "b", base, adapter, names, config=given)
    assert peft.read_config(tmp_path / "b")["target_modules"] == ["other"]


def test_patterns_of_many_ranks(tmp_path: Folder) -> None:
    """Ranks and scales that differ by site become short patterns that select just those."""
    paths = [f"layers/{i}/{p}/kernel" for i in (1, 2, 11, 12) for p in ("q", "k", "kq")]
    name = Name("(.*)/kernel", r"\1", "io")
    made = {
        path: node(name, (8, 8), 1 + i % 3, [1.0, 0.1, 1 / 3, 2.5][i % 4])
        for i, path in enumerate(paths)
    }
    nested = lambda leaves: jlora._tree.nest({tuple(k.split("/")): x for k, x in leaves.items()})  # noqa: E731
    base = nested({path: jnp.zeros((8, 8)) for path in (*paths, "layers/3/q/kernel")})
    assert raw(come_back(tmp_path, base, nested(made), [name])) == raw(nested(made))


# ----------------------------------------------------------------------- tables


def test_tables_of_the_examples() -> None:
    """One for all sizes of a model: the same names as of this one's own configuration."""
    from models import bert, llama

    config = bert.Config(11, 8, 2, 2, 12, 16, 2, 1e-12, bare=True)
    sizes = llama.Config(11, 2, 8, 12, 2, 1)
    for model, of, params in (
        (bert, config, bert.shapes(config, 3)),
        (llama, sizes, llama.shapes(sizes)),
    ):
        modules = {leaf.path: leaf.modules for leaf in resolve(params, model.NAMES)}
        assert len(modules) == len(jax.tree.leaves(params))
        assert modules == {leaf.path: leaf.modules for leaf in resolve(params, model.names(of))}


def test_tensors_need_a_name_for_every_leaf() -> None:
    """Nothing is left out in silence."""
    tree = {
        "a": {"kernel": jnp.ones((2, 2))},
        "b": {"kernel": jnp.ones((2, 2, 2)), "c": jnp.ones(2)},
    }
    table = [Name(r"(\w+)/kernel", r"\1", "io")]
    for argument, call in (
        ("params", lambda: peft.to_tensors(tree, table)),
        ("like", lambda: peft.from_tensors({}, tree, table)),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == (
            f"`names` has no row that fits these leaves of `{argument}` by path and number of "
            "axes. 2 problems:\n  b/c\n  b/kernel\n`names` has rows for paths like "
            r"'(\\w+)/kernel'. Give the table of this model, or add rows of your own, such as "
            r"jlora.peft.Name(r'(.*)/kernel', r'\1', 'io')."
        )


def test_tensors_that_do_not_fit() -> None:
    """All of them at once."""
    like = {name: {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)} for name in "abc"}
    fits, turned = np.ones((3, 2), np.float32), np.ones((2, 3), np.float32)
    tensors = {"b.weight": fits, "c.weight": turned, "d.weight": fits}
    with pytest.raises(ValueError) as error:
        peft.from_tensors(tensors, like, [Name(r"(\w+)/kernel", r"\1", "io")])
    assert str(error.value) == (
        "`tensors` do not fit `like`. 3 problems:\n"
        "  a.weight: missing, of shape (3, 2)\n"
        "  c.weight: expected shape (3, 2), got (2, 3)\n"
        "  d.weight: unexpected, of shape (3, 2)"
    )


# ----------------------------------------------------------------------- vLLM


def test_vllm_profile(tmp_path: Folder) -> None:
    """One rank of those allowed, zeros beside, scales in B: the same ΔW, alpha = r."""
    case, adapter = loaded("patterns")
    peft.save(tmp_path / "a", case.base, adapter, case.names, profile="vllm")
    fields = peft.read_config(tmp_path / "a")
    assert (fields["r"], fields["lora_alpha"]) == (8, 8)
    assert (fields["rank_pattern"], fields["alpha_pattern"]) == ({}, {})
    shapes = {x.shape for k, x in models.read(tmp_path / "a" / TENSORS).items() if "lora_A" in k}
    assert {s[0] for s in shapes} == {8}
    again = peft.load(tmp_path / "a", case.base, case.names)
    assert_close(jlora.merge(case.base, again), jlora.merge(case.base, adapter), 1e-6)
    assert not peft.check(tmp_path / "a", "vllm", max_lora_rank=8).findings


def test_vllm_profile_is_exact_for_powers_of_two(tmp_path: Folder) -> None:
    """Folding a power of two into B changes no bit of s·B."""
    case, adapter = loaded("qv")  # scale 8
    peft.save(tmp_path / "a", case.base, adapter, case.names, profile="vllm")
    theirs, ours = (models.read(f / TENSORS) for f in (case.folder, tmp_path / "a"))
    for key, x in theirs.items():
        mine = ours[key][:2] if "lora_A" in key else ours[key][:, :2] / 8
        assert np.array_equal(mine, x)
        assert np.count_nonzero(ours[key]) == np.count_nonzero(x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conv", "vit.embeddings.patch_embeddings.projection: of kind conv"),
        ("experts", "experts.gate_up_proj: of kind experts"),
        ("bias", "query.base_layer.bias: trained in full"),
    ],
)
def test_vllm_profile_refuses(name: str, message: str, tmp_path: Folder) -> None:
    """What vLLM has no place for is refused before anything is written."""
    case, adapter = loaded(name)
    with pytest.raises(ValueError, match=re.escape(message)):
        peft.save(tmp_path / "a", case.base, adapter, case.names, profile="vllm")
    assert not list(tmp_path.iterdir())


def test_convert_names_what_vllm_would_read_otherwise(tmp_path: Folder) -> None:
    """A scale that is folded into B may take it beyond what its dtype holds."""
    base = {"q": {"kernel": np.ones((4, 3), np.float32)}}
    ab = np.ones((4, 1), "f"), np.full((1, 3), 1e30, "f")
    node = LowRank(*ab, 1e30, Layout((), (0,), (1,)))
    peft.save(tmp_path / "a", base, {"q": {"kernel": node}}, [peft.Name("q/kernel", "q", "io")])
    message = (
        r"`path`: the adapter in .*a has no form for vLLM that would be read as (?s:.*)not finite"
    )
    with pytest.raises(ValueError, match=message), np.errstate(over="ignore"):
        peft.to_vllm(tmp_path / "a", tmp_path / "b")


# ----------------------------------------------------------------------- saving


def small() -> tuple[Any, Any, list[Name]]:
    """The smallest base, adapter and table."""
    name = Name("w", "m", "io")
    return {"w": jnp.zeros((4, 6))}, {"w": node(name, (4, 6), 2, 1.0)}, [name]


def test_never_overwrites(tmp_path: Folder) -> None:
    """A folder with something in it stays as it is, an empty one is filled, parents are made."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"`path`: .* is not an empty folder; nothing is ever"
    ):
        peft.save(tmp_path / "full", *small())
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes"]
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "deep" / "er" / "a"):
        peft.save(folder, *small())
        assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS]


UNWRITABLE: dict[str, tuple[Callable[..., Any], str]] = {
    "no names": (
        lambda b, a, n: (b, a, []),
        "`names` must be a table of jlora.peft.Name rows, such as jlora.peft.LLAMA; got [].",
    ),
    "unnamed": (
        lambda b, a, n: (b, a, [Name("v", "m", "io")]),
        "w: no row of `names` fits 'w' with 2 axes",
    ),
    "unnamed in a collection": (  # as rows have it, whose paths leave out a leading params/
        lambda b, a, n: ({"params": b}, {"params": a}, [Name("params/w", "m", "io")]),
        "params/w: no row of `names` fits 'w' with 2 axes",
    ),
    "orientation": (
        lambda b, a, n: (b, a, [Name("w", "m", "oi")]),
        "w: expected Layout(stack=(), inputs=(1,), outputs=(0,), slots=None) by `names`, "
        "got Layout(stack=(), inputs=(0,), outputs=(1,), slots=None)",
    ),
    "nan": (
        lambda b, a, n: (b, {"w": a["w"]._replace(b=a["w"].b.at[0, 0].set(jnp.nan))}, n),
        "w: holds values that are not finite",
    ),
    "abstract": (
        lambda b, a, n: (b, jax.eval_shape(lambda: a), n),
        "w: expected arrays, got jax.ShapeDtypeStruct",
    ),
    "one name twice": (
        lambda b, a, n: (b | {"v": b["w"]}, a, [Name("[wv]", "m", "io")]),
        "`names` gives two leaves one name:\n  m.weight: v, w\nNarrow its patterns.",
    ),
    "inseparable": (
        lambda b, a, n: (b | {"v": b["w"]}, a, [*n, Name("v", "x.m", "io")]),
        "as where its modules cannot be selected apart from others",
    ),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_save_refuses(case: str, tmp_path: Folder) -> None:
    """Before a file is made."""
    change, message = UNWRITABLE[case]
    with pytest.raises(TypeError if case == "no names" else ValueError, match=re.escape(message)):
        peft.save(tmp_path / "a", *change(*small()))
    assert not list(tmp_path.iterdir())


def test_save_refuses_options(tmp_path: Folder) -> None:
    """A profile that there is not, and fields that mean something else."""
    with pytest.raises(ValueError, match="`profile` must be None or 'vllm'; got 'tgi'"):
        peft.save(tmp_path / "a", *small(), profile="tgi")
    with pytest.raises(
        ValueError, match="`config` cannot be written:\n  use_qalora: True is a fea"
    ):
        peft.save(tmp_path / "a", *small(), config={"use_qalora": True})


@pytest.mark.parametrize("dtype", [np.int32, jnp.float8_e4m3fn])
def test_what_is_saved_beside_it_must_be_floats(dtype: Any, tmp_path: Folder) -> None:
    """PEFT saves a module whole, with the leaves of the base that are not trained."""
    base = {"q": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3).astype(dtype)}}
    names = [peft.Name("(.*)/kernel", r"\1", "io"), peft.Name("(.*)/bias", r"\1", "o", "bias")]
    adapter = {"q": {"kernel": np.ones((4, 3), np.float32)}}
    message = re.escape(
        "`base` must hold arrays of floats, of F64, F32, F16, BF16, where PEFT stores frozen "
        f"values with the adapter; got {np.dtype(dtype)} at q/bias. Give them, adapt another leaf, "
        "or export the merged model."
    )
    for call in (peft.tensors, functools.partial(peft.save, tmp_path / "a")):
        with pytest.raises(ValueError, match=message):
            call(base, adapter, names)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "("}, "`path` is not a regular expression"),
        ({"axes": "ix"}, "`axes` must be of the letters"),
        ({"axes": "ee"}, "`axes` must be of the letters"),
        ({"module": "m.{}"}, "`module` needs one {} for each l"),
        ({"tied": "lm_head"}, "only an embedding is `tied`"),
        ({"axes": "ssio", "module": ("k", "v")}, "`axes` must be of the letters"),
        ({"axes": "sio"}, "`module` is a tuple where `axes` has an s"),
        ({"module": ("k", "v")}, "`module` is a tuple where `axes` has an s"),
        ({"axes": "sio", "module": ()}, "`module` is a tuple where `axes` has an s"),
        ({"axes": "seio", "module": ("k", "v")}, "an s goes with i, o and l"),
        ({"axes": "slio", "module": ("k.{}", "v")}, "`module` needs one {} for each l"),
    ],
)
def test_names_are_checked(options: dict[str, Any], message: str) -> None:
    """A row that contradicts itself."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Name(**{"path": "w", "module": "m", "axes": "io", **options})


# ----------------------------------------------------------------------- strict reading

LAYER = PREFIX + "encoder.layer.0.attention.self."
Q, V, HEAD = LAYER + "query", LAYER + "value", PREFIX + "lm_head"


def header(key: str, shape: list[int], *more: str) -> Damage:
    """Tensors of four bytes, one after the other in the same place."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
    return lambda f: f.header(dict.fromkeys((key, *more), entry), b"\0" * 4)


def cut(size: int) -> Damage:
    return lambda f: os.truncate(f.folder / TENSORS, size % (f.folder / TENSORS).stat().st_size)


def text(file: str, data: bytes) -> Damage:
    return lambda f: (f.folder / file).write_bytes(data)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (drop(Q + ENDS[1]), f"  {Q}{ENDS[1]}: missing, though {Q}{ENDS[0]} is there"),
    "unexpected": (
        copy(Q, LAYER + "key"),
        f"  {LAYER}key: unexpected; adapter_config.json does not select it",
    ),
    "selected": (
        drop(*(Q + end for end in ENDS)),
        "  encoder.layer.0.attention.self.query.weight: selected by adapter_config.json, but "
        "missing in adapter_model.safetensors",
    ),
    "beside": (
        copy(Q, PREFIX + "x.query"),
        f"  {PREFIX}x.query: unexpected; names no leaf of `base` under `names`",
    ),
    "kind": (
        change(lambda t: [t.update({f"{Q}.lora_embedding_{x}": t.pop(f"{Q}.lora_{x}.weight")})
                          for x in "AB"]),
        f"  {Q}: expected A and B of linear, got those of embedding",
    ),
    "beside A and B": (
        all_of(
            say(modules_to_save=None, ensure_weight_tying=True, target_modules=["lm_head"]),
            change(lambda t: t.clear() or t.update(pair(HEAD, 2, 8, 9))),
            put(HEAD + ".weight", np.zeros((9, 8), np.float32)),
        ),
        f"  {HEAD}.weight: in full, beside A and B of lm_head",
    ),
    "two biases": (
        all_of(
            say(bias="all"),
            put(Q + ".bias", np.zeros(8, np.float32)),
            put(Q + ".base_layer.bias", np.zeros(8, np.float32)),
        ),
        f"  {Q}.bias: there twice, with and without base_layer",
    ),
    "prefix": (
        put("../../x", np.zeros(2)), f"  ../../x: unexpected; PEFT's keys start with {PREFIX!r}"
    ),
    "dora": (
        put(Q + ".lora_magnitude_vector", np.ones(8, np.float32)),
        f"  {Q}.lora_magnitude_vector: unexpected; adapter_config.json has no use_dora",
    ),
    "misshapen": (
        put(V + ENDS[0], np.zeros((2, 9), np.float32)),
        f"  {V}{ENDS[0]}: expected shape (2, 8), got (2, 9)",
    ),
    "rank": (say(r=3), f"  {Q}: expected rank 3 by adapter_config.json, got an A of shape (2, 8)"),
    "dtype": (
        put(V + ENDS[0], np.zeros((2, 8), np.int32)),
        f"  {V}{ENDS[0]}: expected a floating-point dtype, got I32",
    ),
    "float64": (
        put(V + ENDS[0], np.zeros((2, 8))), f"  {V}{ENDS[0]}: dtype F64 needs jax_enable_x64"
    ),
    "nan": (
        change(lambda t: t[V + ENDS[0]].__setitem__((0, 1), np.nan)),
        f"  {V}{ENDS[0]}: 1 of 16 values are not finite",
    ),
    "nothing": (
        say(target_modules="nothing"),
        f"  {Q}: unexpected; adapter_config.json does not select it",
    ),
    "method": (say(peft_type="LOHA"), "  peft_type: expected 'LORA', got 'LOHA'"),
    "use_dora": (
        say(use_dora=True), f"  {Q}.lora_magnitude_vector: missing, though {Q}{ENDS[0]} is "
    ),
    "qalora": (
        say(use_qalora=True), "  use_qalora: True is a feature that jlora does not support"
    ),
    "future": (
        say(use_tomorrow={"a": 1}),
        "  use_tomorrow: {'a': 1} is a feature that jlora does not support",
    ),
    "pissa": (
        say(init_lora_weights="pissa_niter_16"),
        "  init_lora_weights: 'pissa_niter_16' changes the base model, so that the adapter alone "
        "means nothing; convert it in PEFT (path_initial_model_for_weight_conversion)",
    ),
    "r": (say(r=True), "  r: expected an integer of at least 1, got True"),
    "alpha": (say(lora_alpha="1"), "  lora_alpha: expected a finite number, got '1'"),
    "pattern": (
        say(target_modules="query|(?=(a+)+$)" + "a" * 10_000),
        "' is of 10016 characters; expected at most 10000",
    ),
    "no pattern": (say(rank_pattern={"(": 2}), "  rank_pattern: '(' is no regular expression"),
    "cut header": (cut(900), "of 900 bytes claims a header of"),
    "cut data": (cut(-4), "bytes of data but holds"),
    "empty": (text(TENSORS, b""), "of 0 bytes claims a header of 0"),
    "lying length": (
        text(TENSORS, b"\xff" * 8 + b"{}"), "claims a header of 18446744073709551615"
    ),
    "twice": (
        lambda f: f.header(
            json.dumps(f.split[0]).replace("{", '{"__metadata__":{},', 1), f.split[1]
        ),
        f"the header of {TENSORS} is no valid JSON: the key '__metadata__' is there twice",
    ),
    "twice in the configuration": (
        text(CONFIG, b'{"r": 1, "r": 2}'), f"{CONFIG} is no valid JSON: the key 'r' is there twice"
    ),
    "deep": (text(CONFIG, b"[" * 100_000), f"{CONFIG} is"),
    "large": (
        text(CONFIG, b'{"r": 1}' + b" " * 2**23),
        f"{CONFIG} has 8388616 bytes; expected at most 4194304",
    ),
    "infinite": (text(CONFIG, b'{"r": Infinity}'), "Infinity is no number of JSON"),
    "list": (text(CONFIG, b"[]"), "must be a JSON object; got list"),
    "huge shape": (header("x", [2**40, 2**40]), "describes 'x' wrongly"),
    "negative shape": (header("x", [-1]), "describes 'x' wrongly"),
    "overlap": (header("x", [1], "y"), "has 'y' at byte 0 of the data; expected byte 4"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_refuses(damage: str, tmp_path: Folder) -> None:
    """Each by name; the message says where, what was expected and what was got."""
    change, message = DAMAGES[damage]
    change(files := Files(tmp_path))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        files.load()
    assert str(caught.value).startswith("`path`: ")


def test_all_problems_are_listed_at_once(tmp_path: Folder) -> None:
    """One error names everything that is wrong with the tensors."""
    files = Files(tmp_path)
    wrong = np.zeros((4, 4), np.float32)
    all_of(drop(Q + ENDS[0]), put("x", np.zeros(3)), put(V + ENDS[1], wrong))(files)
    with pytest.raises(ValueError) as caught:
        files.load()
    assert str(caught.value) == (
        f"`path`: the adapter in {files.folder} cannot be loaded onto `base` with `names`; nothing "
        "was loaded. 3 problems:\n"
        f"  x: unexpected; PEFT's keys start with {PREFIX!r}\n"
        f"  {Q}{ENDS[0]}: missing, though {Q}{ENDS[1]} is there\n"
        f"  {V}{ENDS[1]}: expected shape (8, 2), got (4, 4)"
    )


ALIKE: dict[str, dict[str, Any]] = {
    # As PEFT lists all of "all-linear", also those that it then excludes.
    "excluded": {"target_modules": ["query", "value", "dense"], "exclude_modules": ["dense"]},
    "mica": {"init_lora_weights": "mica"},
    "capitals": {"init_lora_weights": "Gaussian"},
    "any layers": {"layers_to_transform": [0, 1], "layers_pattern": ""},
}


@pytest.mark.parametrize("fields", ALIKE)
def test_fields_that_change_nothing(fields: str, tmp_path: Folder) -> None:
    """As PEFT reads them, with the model and without."""
    files = Files(tmp_path)
    files.config(**ALIKE[fields])
    assert_equal(files.load(), peft.load(files.case.folder, files.case.base, files.case.names))
    assert peft.read(files.folder).keys() == peft.read(files.case.folder).keys()


def test_what_peft_ties_itself_alone(tmp_path: Folder) -> None:
    """It saves in full the head of an embedding that is saved in full, and does not list it."""
    files = Files(tmp_path, "modules_to_save")
    table = np.ones((11, 8), np.float32)
    names = [f"base_model.model.{m}.weight" for m in ("embed_tokens", "lm_head")]
    files.tensors(lambda t: t.update(dict.fromkeys(names, table)))
    saved = json.loads((files.folder / CONFIG).read_text())["modules_to_save"]
    files.config(modules_to_save=[*saved, "embed_tokens"], ensure_weight_tying=True)
    leaves = peft.read(files.folder)
    assert {"embed_tokens.weight", "lm_head.weight"} <= leaves.keys()
    # Which it also does once the vocabulary has been resized, whatever is listed.
    files.config(ensure_weight_tying=False)
    assert peft.read(files.folder).keys() == leaves.keys()
    files.tensors(lambda t: t.update({names[0].replace("embed_tokens", "proj"): table}))
    with pytest.raises(ValueError, match=r"proj\.weight: unexpected"):
        peft.read(files.folder)


VOCABULARY = (
    Name("embed/embedding", "embed_tokens", "vo", tied="lm_head"),
    Name("(q|lm_head)/kernel", r"\1", "io"),
    Name("lm_head/bias", "lm_head", "o", "bias"),
    Name("norm/weight", "norm", "o"),
    Name("norm/running_mean", "norm", "o", "running_mean"),
)


def vocabulary(*, tied: bool) -> Any:
    """A base of an embedding and a head, which may share a weight, and a projection."""
    tree = {"embed": {"embedding": normal(0, 11, 4)}, "q": {"kernel": normal(1, 4, 6)}}
    head = {"kernel": normal(2, 4, 11), "bias": normal(3, 11)}
    return tree if tied else tree | {"lm_head": head}


def pefts(folder: Folder, tensors: dict[str, Any], **fields: Any) -> Folder:
    """A folder with A and B of `q`, unless others are given, and other tensors."""
    own = {} if any("lora" in key for key in tensors) else pair("q", 2, 4, 6)
    return write(folder, own | tensors, **{"r": 2, "lora_alpha": 2} | fields)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary(tied: bool, tmp_path: Folder) -> None:
    """PEFT saves embedding and head by itself: their values are those of the adapter."""
    table = np.ones((11, 4), "f4")
    own = {"embed_tokens.weight": table, "lm_head.weight": table if tied else 2 * table}
    own |= {} if tied else {"lm_head.bias": np.ones(11, "f4")}
    base = vocabulary(tied=tied)
    merged = jlora.merge(base, peft.load(pefts(tmp_path / "a", own), base, VOCABULARY))
    assert_close(merged["q"]["kernel"], base["q"]["kernel"] + 2, 1e-6)
    assert (merged["embed"]["embedding"] == 1).all()
    if not tied:
        assert (merged["lm_head"]["kernel"] == 2).all() and (merged["lm_head"]["bias"] == 1).all()
    small = jax.tree.map(lambda x: x, base) | {"embed": {"embedding": jnp.ones((9, 4))}}
    message = r"embed_tokens.weight: has 11 rows in the adapter, .* and 9 in the base; resize that "
    with pytest.raises(ValueError, match=message + r"too, by resize_token_embeddings\(11\)"):
        peft.load(tmp_path / "a", small, VOCABULARY)


def test_a_head_with_a_bias(tmp_path: Folder) -> None:
    """PEFT saves the frozen weight and bias beside its A and B; they must be those of the base."""
    base = vocabulary(tied=False)
    frozen = {
        "lm_head.base_layer.weight": base["lm_head"]["kernel"].T,
        "lm_head.base_layer.bias": base["lm_head"]["bias"],
    }
    own, targets = pair("lm_head", 2, 4, 11), {"target_modules": ["lm_head"]}
    adapter = peft.load(pefts(tmp_path / "a", own | frozen, **targets), base, VOCABULARY)
    assert adapter.keys() == {"lm_head"} and adapter["lm_head"].keys() == {"kernel"}
    merged = jlora.merge(base, adapter)["lm_head"]
    assert_close(merged["kernel"], base["lm_head"]["kernel"] + 2, 1e-6)
    frozen["lm_head.base_layer.bias"] += 1
    with pytest.raises(ValueError, match=r"lm_head.base_layer.bias: expected the values of `base`"):
        peft.load(pefts(tmp_path / "b", own | frozen, **targets), base, VOCABULARY)
    # Trained, by `bias`, they take the place of the base's.
    found = peft.load(pefts(tmp_path / "c", own | frozen, **targets, bias="all"), base, VOCABULARY)
    assert_close(found["lm_head"]["bias"], base["lm_head"]["bias"] + 1, 1e-6)


def test_names_that_are_kept_whole_come_first(tmp_path: Folder) -> None:
    """A head that PEFT does not tie itself is in front of what it is tied to."""
    names = [Name("wte/embedding", "wte", "vo", tied="m.lm_head"), Name("q/kernel", "m.q", "io")]
    base = {"wte": {"embedding": normal(0, 11, 4)}, "q": {"kernel": normal(1, 4, 6)}}
    lora = jlora.transform(
        lambda p, x: p["wte"]["embedding"][x] @ p["q"]["kernel"], LoRA(".*", rank=1)
    )
    base, adapter = lora.init(KEY, base, jnp.arange(3))
    peft.save(tmp_path / "a", base, adapter, names)
    assert peft.read_config(tmp_path / "a")["target_modules"] == ["m.lm_head", "wte", "q"]


def test_counts_of_batches(tmp_path: Folder) -> None:
    """A batch norm of PyTorch's that is saved counts its batches, which Flax's does not."""
    base = vocabulary(tied=True) | {"norm": {"weight": jnp.ones(4), "running_mean": jnp.zeros(4)}}
    norm = {"norm.weight": np.ones(4, "f4") * 3, "norm.running_mean": np.ones(4, "f4") * 2}
    norm["norm.num_batches_tracked"] = np.asarray(7)
    given = pefts(tmp_path / "a", norm, modules_to_save=["norm"])
    found = peft.load(given, base, VOCABULARY)["norm"]
    assert (found["weight"] == 3).all() and (found["running_mean"] == 2).all()
    assert peft.read(given)["norm.num_batches_tracked"] == 7
    with pytest.raises(ValueError, match=r"norm.weight: expected a floating-point dtype, got I64"):
        wrong = norm | {"norm.weight": np.ones(4, int)}
        peft.load(pefts(tmp_path / "b", wrong, modules_to_save=["norm"]), base, VOCABULARY)


def test_rows_of_a_table_of_several_modules(tmp_path: Folder) -> None:
    """T5's `shared` is the table of encoder and decoder, which PEFT writes once each."""
    base, new = {"shared": normal(0, 11, 4)}, np.ones((2, 4), np.float32)
    names = [Name("shared", "shared", "vo", tied="lm_head")]
    modules = ("decoder.embed_tokens", "encoder.embed_tokens", "lm_head", "shared")
    own = {f"{module}.trainable_tokens_delta": new for module in modules}
    alone = {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["shared"], "token_indices": [5, 1]}
    (tmp_path / "a").mkdir()
    save_file({PREFIX + k: x for k, x in own.items()}, tmp_path / "a" / TENSORS)
    (tmp_path / "a" / CONFIG).write_text(json.dumps(alone))
    found = peft.load(tmp_path / "a", base, names)
    assert_close(jlora.merge(base, found)["shared"][jnp.array([5, 1])], new, 1e-6)
    own["encoder.embed_tokens.trainable_tokens_delta"] = new + 1
    save_file({PREFIX + k: x for k, x in own.items()}, tmp_path / "a" / TENSORS)
    with pytest.raises(ValueError, match=r"encoder.embed_tokens.* expected the values of "):
        peft.load(tmp_path / "a", base, names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["query", "value", "wq"]}, r"target_modules: 'wq' names no module"),
        ({"rank_pattern": {"wq": 2}}, "rank_pattern: 'wq' matches no adapted module"),
        ({"modules_to_save": ["head"]}, "modules_to_save: 'head' names none of the"),
    ],
)
def test_what_names_nothing(fields: dict[str, Any], message: str, tmp_path: Folder) -> None:
    """Read with a warning, as PEFT takes it."""
    files = Files(tmp_path)
    files.config(**fields)
    with pytest.warns(UserWarning, match=message):
        adapter = files.load()
    assert_equal(adapter, peft.load(files.case.folder, files.case.base, files.case.names))


def test_scanned_layers_must_agree(tmp_path: Folder) -> None:
    """One leaf has one rank and one scale, and is adapted in all layers or in none."""
    files = Files(tmp_path, "scanned")
    files.config(
        rank_pattern={"layers.1.mlp.down_proj": 3}, target_modules=["0.mlp.up_proj", "down_proj"]
    )
    with pytest.raises(ValueError) as caught:
        files.load()
    said = str(caught.value)
    assert "layers/mlp/down/kernel: its layers are one leaf but differ: rank 3 and scale 2," in said
    assert "layers/mlp/up/kernel: its layers are one leaf, of which 1 of 2 are adapted" in said


def test_a_tied_weight_is_adapted_on_both_sides(tmp_path: Folder) -> None:
    """PEFT may adapt the lookup alone; here one weight has one adapter."""
    files = Files(tmp_path, "tied")
    files.config(ensure_weight_tying=False)
    with pytest.raises(ValueError, match="embed_tokens: adapted without lm_head, which shares its"):
        files.load()
    files = Files(tmp_path / "tied", "gpt2_tied")
    head = "base_model.model.lm_head.lora_B.weight"
    files.tensors(lambda t: t.update({head: 2 * t[head]}))
    with pytest.raises(ValueError, match=f"{head}: expected the transpose of .*lora_embedding_A"):
        files.load()


TIED_IN_FULL = {
    "with LoRA": ("scanned", [LoRA("query/kernel", rank=2)], "embed/embedding", {}),
    "alone": ("scanned", [], "embed/embedding", {}),
    "with DoRA": ("scanned", [DoRA("query/kernel", rank=2)], "embed/embedding", {}),
    "GPT-2": ("gpt2_tied", [LoRA("mlp/c_proj/kernel", rank=2)], "wte/embedding", {}),
    "MiSS": (
        "scanned",
        [LoRA("query/kernel", rank=2, alpha=2, init=initializers.miss)],
        "embed/embedding",
        {"peft_type": "MISS"},
    ),
    "as configured": (
        "scanned",
        [LoRA("query/kernel", rank=2)],
        "embed/embedding",
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    ),
}


@pytest.mark.parametrize("form", some(TIED_IN_FULL, "with DoRA", "GPT-2", "MiSS", "as configured"))
def test_a_tied_weight_in_full(form: str, tmp_path: Folder) -> None:
    """It is written for the embedding and for the head; read, both must be there and the same."""
    name, rules, path, config = TIED_IN_FULL[form]
    case = models.case(name)
    lora = jlora.transform(case.apply, *rules, Full(path))
    base, adapter = lora.init(KEY, case.base, jnp.asarray(case.torch["inputs"]))
    adapter = jax.tree_util.tree_map_with_path(  # the A of MiSS is known
        lambda at, x: x if getattr(at[-1], "name", "") == "a" else x + 0.3, adapter
    )
    files = Files(tmp_path, name)
    shutil.rmtree(files.folder)
    peft.save(files.folder, base, adapter, case.names, config=config)
    assert_equal(files.load(), adapter)
    fields, tensors = peft.read_config(files.folder), models.read(files.folder / TENSORS)
    own = [key for key in tensors if "lora" not in key and "miss" not in key]
    assert len(own) == 2 and np.array_equal(tensors[own[0]], tensors[own[1]])
    assert fields["modules_to_save"][-1] == "lm_head"
    assert fields.get("ensure_weight_tying", True)
    table = next(key for key in own if key != HEAD + ".weight")
    files.tensors(lambda t: t.update({HEAD + ".weight": t[table] + 1}))
    with pytest.raises(ValueError, match=f"{HEAD}.weight: expected the values of {table}, got"):
        files.load()
    files.tensors(lambda t: t.pop(HEAD + ".weight"))
    with pytest.raises(ValueError, match=f"{table}: saved in full without lm_head, which shares"):
        files.load()


def test_a_changed_embedding_is_refused(tmp_path: Folder) -> None:
    """A base embedding in the file must be the one that is there."""
    files = Files(tmp_path, "tied")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    files.tensors(lambda t: t.update({key: t[key] + 1}))
    with pytest.raises(ValueError, match=f"{key}: expected the values of `base` at params/embed"):
        files.load()


def test_pickles_are_refused(tmp_path: Folder) -> None:
    """With the reason; beside a safetensors file they are not looked at."""
    files = Files(tmp_path)
    (files.folder / "adapter_model.bin").write_bytes(b"code")
    files.load()
    (files.folder / TENSORS).unlink()
    with pytest.raises(
        ValueError, match=r"holds adapter_model.bin, a pickle.* runs the code in it"
    ):
        files.load()


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_links_and_pipes_are_refused(file: str, tmp_path: Folder) -> None:
    """Only regular files of the folder are read, which must be there."""
    files = Files(tmp_path)
    path = files.folder / file
    path.rename(tmp_path / "outside")
    with pytest.raises(FileNotFoundError, match=f"has no {file}"):
        files.load()
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{file} is a symbolic link.*cp -L"):
        files.load()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{file} is no regular file"):
        files.load()
    with pytest.raises(FileNotFoundError, match="`path`: there is no folder"):
        peft.load(tmp_path / "nowhere", *small()[::2])


def test_a_sparse_file_allocates_nothing(tmp_path: Folder) -> None:
    """A header that is right about a terabyte of zeros is refused by its shapes."""
    files = Files(tmp_path)
    entry = {"dtype": "F32", "shape": [2, 2**37], "data_offsets": [0, 2**40]}
    b = {"dtype": "F32", "shape": [0, 2], "data_offsets": [2**40, 2**40]}
    files.header({LAYER + "query" + end: x for end, x in zip(ENDS, (entry, b), strict=True)}, b"")
    try:
        os.truncate(files.folder / TENSORS, 2**40 + (files.folder / TENSORS).stat().st_size)
    except OSError:
        pytest.skip("no sparse files of a terabyte here")
    with pytest.raises(ValueError, match=r"expected shape \(2, 8\), got \(2, 137438953472\)"):
        files.load()


# ----------------------------------------------------------------------- fuzz


def fuzz(seeds: range, folder: Folder) -> int:
    """Loads mutated adapters; gives how many were right in spite of it."""
    loaded = {name: Files(folder, name).load() for name in ("qv", "tied")}
    whole = {name: [x.shape for x in jax.tree.leaves(tree)] for name, tree in loaded.items()}
    right = 0
    for seed in seeds:
        draw = random.Random(seed)
        place = folder / str(seed)
        place.mkdir()
        files = Files(place, name := draw.choice(sorted(whole)))
        mutate(files, draw)
        before = sorted(place.rglob("*"))
        start = time.monotonic()
        try:
            adapter = files.load()
        except (ValueError, FileNotFoundError) as e:
            assert str(e).startswith("`path`: "), (seed, e)
        else:
            right += 1
            assert [x.shape for x in jax.tree.leaves(adapter)] == whole[name], seed
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(adapter)), seed
        assert time.monotonic() - start < 10, seed
        assert sorted(place.rglob("*")) == before, seed
        shutil.rmtree(place)
    return right


def test_fuzz(tmp_path: Folder) -> None:
    """A hundred damages: an error that says what, or finite numbers of the right shapes."""
    assert 0 < fuzz(range(100), tmp_path) < 100


@pytest.mark.slow
def test_fuzz_long(tmp_path: Folder) -> None:
    """Ten thousand."""
    assert 0 < fuzz(range(200, 10_200), tmp_path) < 10_000

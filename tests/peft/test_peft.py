"""PEFT's files without PyTorch: against what PEFT wrote and computed, and against a formula.

The law behind most tests: what is read means what PyTorch computed, what is written is what PEFT
would have written, and whatever is wrong is refused as a whole, by name.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft_models as models
import pytest
from flax import nnx
from messages import all_refused, refused
from peft_files import (
    CONFIG,
    ENDS,
    PREFIX,
    TENSORS,
    Files,
    Folder,
    assert_close,
    assert_equal,
    assert_same_files,
    come_back,
    config_of,
    node,
    normal,
    pair,
    raw,
    write,
)
from small import KEY, some

import jlora
from jlora import DoRA, Full, LoRA, peft
from jlora.peft import Name, _contents, _save
from jlora.peft.adapter._config import list_misformed
from jlora.peft.adapter._describe import _select
from jlora.peft.adapter._draft import make_draft
from jlora.peft.names._leaves import find_leaves
from jlora.types import Layout, LowRank
from tests.peft.merge.test_peft_merged import checkpoint
from tests.peft.merge.test_peft_merged import read as read_all

CASES = models.CASES


# ----------------------------------------------------------------------- what PEFT itself wrote

# One of each kind; what is merged into checkpoints is compared for all: test_peft_merged.py.
DAILY = ("experts", "gpt2_tied", "tokens")


def loaded(name: str) -> tuple[models.Case, Any]:
    """A fixture and its adapter."""
    case = models.case(name)
    return case, peft.load(case.folder, case.base, case.names)


@pytest.mark.parametrize("name", some(CASES, *DAILY))
def test_outputs_and_merged_weights_are_pytorch_s(name: str) -> None:
    """The adapted JAX model gives what the adapted PyTorch model gave, and has its weights."""
    case, adapter = loaded(name)
    lora = jlora.transform(case.apply, LoRA())
    y = jax.jit(lora.apply)(case.base, adapter, jnp.asarray(case.torch["inputs"]))
    # In bfloat16 the two frameworks round the base model's own activations differently.
    y = np.asarray(y, np.float32)
    assert_close(y, case.torch["outputs"], 2e-2 if name == "bf16" else 1e-5)
    expected = models.tree(name, case.merged())
    # PEFT adds ΔW to a weight once for each module that shares it.
    if path := {"tied": ["params", "embed"], "gpt2_tied": ["transformer", "wte"]}.get(name):
        holder = functools.reduce(dict.__getitem__, path, expected)
        base = functools.reduce(dict.__getitem__, path, case.base)["embedding"]
        holder["embedding"] = (holder["embedding"] + base) / 2
    # PEFT rounds ΔW to bfloat16 before it adds; here the sum is rounded once.
    assert_close(jlora.merge(case.base, adapter), expected, 2**-7 if name == "bf16" else 1e-6)


# In a model with experts PEFT may take `up_proj` for a part of them, but not where it selected the
# module itself.
BASE = {
    "m.q.weight": (6, 6),
    "m.shared_experts.up_proj.weight": (4, 6),
    "m.experts.gate_up_proj": (2, 8, 6),
    "m.experts.down_proj": (2, 6, 4),
}
OF_EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
KEPT: dict[str, dict[str, Any]] = {
    "an alpha": {"alpha_pattern": {"up_proj": 3}},
    "a rank": {"rank_pattern": {"up_proj": 4}},
    "whole names": {"rank_pattern": {"m.shared_experts.up_proj": 4}, "alpha_pattern": {"q": 3}},
}
KEPT |= {f"{what}, and experts": fields | OF_EXPERTS for what, fields in KEPT.items()}


def of_peft(name: str, folder: Folder) -> models.Case:
    """A fixture, or a case of `KEPT` in a new folder."""
    if name in CASES:
        return models.case(name)
    base = {name: np.asarray(normal(i, *x)) for i, (name, x) in enumerate(BASE.items())}
    homes = {name: name.rpartition(".")[::2] for name in base}
    names = tuple(Name(n, m, ("oi", "eoi")[base[n].ndim > 2], p) for n, (m, p) in homes.items())
    rank = next(iter(KEPT[name].get("rank_pattern", {}).values()), 2)
    sizes = {"m.q": (2, 6, 6), "m.shared_experts.up_proj": (rank, 6, 4)}
    if "target_parameters" in KEPT[name]:
        sizes |= {"m.experts.base_layer": (4, 6, 8), "m.experts": (4, 4, 6)}
    tensors = {
        module + end: normal(i, *shape)
        for module, (r, inputs, outputs) in sizes.items()
        for i, (end, shape) in enumerate(zip(ENDS, ((r, inputs), (outputs, r)), strict=True))
    }
    usual = {"peft_type": "LORA", "peft_version": "0.21.2", "r": 2, "lora_alpha": 32}
    write(folder, tensors, **usual, target_modules=["q", "up_proj"], **KEPT[name])
    return models.Case(folder, None, base, names, {})


@pytest.mark.parametrize("name", [*CASES, *KEPT])
def test_what_is_written_changes_no_number(name: str, tmp_path: Folder) -> None:
    """With the configuration or without it, from a tree or without a model: it says what was read.

    Of the fixtures both files have PEFT's bytes with its configuration; `test_merged_is_peft_s` has
    the law for what is merged.
    """
    case = of_peft(name, tmp_path / "peft")
    contents, adapter = peft.read(case.folder), peft.load(case.folder, case.base, case.names)
    config, chosen = config_of(case.folder), tmp_path / "chosen"
    peft.save(tmp_path / "kept", case.base, adapter, case.names, config=config)
    peft.save(chosen, case.base, adapter, case.names, base_model="some/model")
    peft.write(tmp_path / "written", contents)
    ours = config_of(chosen)
    assert ours["base_model_name_or_path"] == "some/model"
    assert (chosen / CONFIG).read_text() == json.dumps(ours, indent=2, sort_keys=True)
    if name in CASES:
        assert_same_files(tmp_path / "kept", case.folder)
        assert sorted(p.name for p in chosen.iterdir()) == [CONFIG, TENSORS]
        assert ours.keys() == config.keys()
        assert contents.config == config
    for folder in ("kept", "chosen", "written"):
        assert_equal(peft.load(tmp_path / folder, case.base, case.names), adapter)
    for folder in ("kept", "written"):
        assert_equal(dict(peft.read(tmp_path / folder).leaves), dict(contents.leaves))
    if name in KEPT:
        checkpoint(tmp_path / "base", case.base)
        peft.export_merged(tmp_path / "base", adapter, tmp_path / "tree", names=case.names)
        for folder in ("kept", "chosen", "written"):
            peft.export_merged(tmp_path / "base", tmp_path / folder, tmp_path / f"{folder} merged")
            assert_equal(read_all(tmp_path / f"{folder} merged"), read_all(tmp_path / "tree"))


# What a draft may say otherwise than the adapter: fields, or the tensors of keys that end so.
LAYER, OF_BERT = "model.layers.0", "encoder.layer.0.attention.self"
OTHERS = "has other values than the files"
DRAFTED: dict[str, tuple[str, Any, tuple[str, str]]] = {
    "a scale": ("patterns", {"lora_alpha": 64}, (f"{LAYER}.mlp.down_proj.weight", "scale 32")),
    "A": ("qv", "query.lora_A.weight", (f"{OF_BERT}.query.weight", OTHERS)),
    "B": ("experts", "experts.lora_B.weight", ("experts.down_proj", OTHERS)),
    "magnitudes": ("dora", "lora_magnitude_vector", (f"{LAYER}.mlp.down_proj.weight", OTHERS)),
    "rows": ("tokens", "trainable_tokens_delta", ("model.embed_tokens.weight", OTHERS)),
    "a bias": ("bias", "query.base_layer.bias", (f"{OF_BERT}.query.bias", OTHERS)),
    "a whole leaf": ("modules_to_save", "classifier.weight", ("classifier.weight", OTHERS)),
}


@pytest.mark.parametrize("what", DRAFTED)
def test_what_is_drafted_is_compared(
    what: str, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that changes a number: no file is written that says something else."""
    name, changed, facts = DRAFTED[what]
    case, adapter = loaded(name)
    contents = peft.read(case.folder)

    def draft(*args: Any) -> Any:
        made = make_draft(*args)
        if isinstance(changed, dict):
            return made._replace(fields=made.fields | changed)
        new = {k: x + x.dtype.type(k.endswith(changed)) for k, x in made.tensors.items()}
        return made._replace(tensors=new)

    for module in (_save, _contents):
        monkeypatch.setattr(module, "make_draft", draft)
    with refused(ValueError, "adapter", *facts):
        peft.save(tmp_path / "a", case.base, adapter, case.names, config=contents.config)
    with refused(ValueError, "contents", *facts):
        peft.write(tmp_path / "a", contents)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "name"), [({"_name_or_path": "some/model"}, "some/model"), ({}, None)]
)
def test_a_folder_names_its_model(config: Any, name: str | None, tmp_path: Folder) -> None:
    """By its configuration, or by its path."""
    case, adapter = loaded("qv")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    base = tmp_path / "base"
    peft.save(tmp_path / "a", case.base, adapter, case.names, base_model=base)
    assert config_of(tmp_path / "a")["base_model_name_or_path"] == (name or str(base))
    with refused(FileNotFoundError, "base_model", "config.json"):
        peft.save(tmp_path / "b", case.base, adapter, case.names, base_model=tmp_path)


@pytest.mark.parametrize("kind", [str, Folder])
def test_the_model_inside_of_the_one_in_a_folder(kind: Any, tmp_path: Folder) -> None:
    """Its modules have shorter names than those of the model with a head, as PEFT loads that."""
    case, adapter = loaded("qv")
    weights = {k.removeprefix("base."): x for k, x in case.torch.items() if k.startswith("base.")}
    for first in ("", "bert."):
        checkpoint(tmp_path / f"base{first}", {first + name: x for name, x in weights.items()})
    save = functools.partial(peft.save, base=case.base, adapter=adapter, names=case.names)
    save(tmp_path / "a", base_model=kind(tmp_path / "base"))
    with pytest.warns(UserWarning, match=r"has 'bert\.encoder\.\S*' for the adapter's 'enc"):
        save(tmp_path / "b", base_model=kind(tmp_path / "basebert."))


@pytest.mark.parametrize("name", ["qv", "tied"])
def test_shapes_suffice_as_base(name: str, tmp_path: Folder) -> None:
    """To load; and to save, unless PEFT stores frozen values with the adapter."""
    case, adapter = loaded(name)
    shapes, config = jax.eval_shape(lambda: case.base), config_of(case.folder)
    assert_equal(peft.load(case.folder, shapes, case.names), adapter)
    save = functools.partial(peft.save, tmp_path / "a", shapes, adapter, case.names)
    if name == "tied":
        with refused(ValueError, "base", "params/embed/embedding"):
            save(config=config)
        assert not list(tmp_path.iterdir())
    else:
        save(config=config)
        assert_equal(peft.load(tmp_path / "a", case.base, case.names), adapter)
        nodes = jax.tree.leaves(adapter, is_leaf=lambda x: isinstance(x, LowRank))
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
    "square_experts": ("eio", (3, 4, 4), "m", "eio->eoi", 1, (3, 4, 4)),
    "scanned_experts": ("leio", (2, 3, 4, 6), "m.{}", "leio->leoi", 2, (3, 6, 4)),
    "experts_inside": ("ieo", (4, 3, 6), "m", "ieo->eoi", 1, (3, 6, 4)),
    "modules": ("soio", (2, 3, 4, 2), ("k", "v"), "saib->sabi", 2, (6, 4)),
    "modules_inside": ("iso", (4, 3, 6), ("k", "q", "v"), "iso->soi", 3, (6, 4)),
    "scanned_modules": ("lsio", (2, 2, 4, 6), ("m.{}.k", "m.{}.v"), "lsio->lsoi", 4, (6, 4)),
    "modules_of_scans": ("slio", (2, 3, 4, 6), ("m.{}.k", "m.{}.v"), "slio->lsoi", 6, (6, 4)),
}


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


OF_EACH_KIND = ("transposed", "heads_in", "twice_scanned", "embedding", "conv2d", "scanned_conv")
OF_EACH_KIND += ("experts", "square_experts", "scanned_experts", "modules", "modules_of_scans")


@pytest.mark.parametrize("layout", some(LAYOUTS, *OF_EACH_KIND))
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

    peft.save_base(tmp_path / "base", base, [name])
    peft.export_merged(tmp_path / "base", adapter, tmp_path / "out", names=[name])
    merged = peft.load_base(tmp_path / "out", base, [name])
    assert_close(merged, jlora.merge(base, adapter), 1e-6)


def test_experts_of_the_other_orientation(tmp_path: Folder) -> None:
    """Where PyTorch keeps (experts, inputs, outputs) without saying so, PEFT's A is our B."""
    name = Name("w", "m", "eio", "gate_up_proj", transposed=True)
    base = {"w": jnp.zeros((3, 4, 6))}
    adapter = {"w": node(name, (3, 4, 6), rank=2, scale=0.5)}
    assert_equal(come_back(tmp_path / "a", base, adapter, [name]), adapter)
    tensors = models.read(tmp_path / "a" / TENSORS)
    assert_close(delta(tensors, "m", "experts", 0.5), jlora.merge(base, adapter)["w"], 1e-6)


@pytest.mark.parametrize("axes", ["inputs", "outputs"])
def test_experts_that_share_a_factor(axes: str, tmp_path: Folder) -> None:
    """What experts share here is written for each, with the same ΔW."""
    layouts = {"inputs": Layout((), (0, 1), (2,)), "outputs": Layout((), (1,), (0, 2))}
    shapes = {"inputs": ((3, 4, 2), (2, 6)), "outputs": ((4, 2), (2, 3, 6))}
    a, b = (normal(i, *shape) for i, shape in enumerate(shapes[axes]))
    name, base = Name("w", "m", "eio", "down_proj"), {"w": jnp.zeros((3, 4, 6))}
    come_back(tmp_path / "a", base, {"w": LowRank(a, b, 2.0, layouts[axes])}, [name])


@pytest.mark.parametrize("chosen", some([(0, 2), (1,), (2, 0, 1)], (0, 2)))
def test_slots_become_one_adapter(chosen: tuple[int, ...], tmp_path: Folder) -> None:
    """Slots of a fused kernel are blocks of B with zeros around them: the same ΔW."""
    within = lambda x: {"transformer": {"h": {"0": {"attn": {"c_attn": {"kernel": x}}}}}}  # noqa: E731
    adapter = node(Layout((), (1,), (0,), (3, chosen, 0)), (12, 4))
    come_back(tmp_path / "a", within(normal(0, 12, 4)), within(adapter), peft.TABLES["gpt2"])
    fields = config_of(tmp_path / "a")
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
    assert_equal(come_back(tmp_path / "a", base, adapter, names), adapter)
    assert config_of(tmp_path / "a")["bias"] == "all"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_dtypes_are_kept(dtype: Any, tmp_path: Folder) -> None:
    """A and B keep their dtype, also those that NumPy has no name for."""
    base, adapter, names = of_modules("q", "", "q")
    adapter = jax.tree.map(lambda x: x.astype(dtype), adapter)
    assert_equal(come_back(tmp_path / "a", base, adapter, names), adapter)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_factors_of_8_bits_are_read_as_float32(dtype: Any, tmp_path: Folder) -> None:
    """Exactly, as PEFT does."""
    files, found = Files(tmp_path), []
    for to in (dtype, np.float32):
        files.tensors(lambda t, to=to: t.update({key: x.astype(to) for key, x in t.items()}))
        found.append((files.load(), peft.read(files.folder).leaves))
    assert_equal(*found)


def test_leaves_in_full_alone(tmp_path: Folder) -> None:
    """PEFT has a word for targets that are none, and refuses an empty list."""
    base = {"head": {"kernel": jnp.zeros((3, 2))}}
    adapter, names = jax.tree.map(jnp.ones_like, base), [Name("(.*)/kernel", r"\1", "io")]
    assert_equal(come_back(tmp_path / "a", base, adapter, names), adapter)
    assert config_of(tmp_path / "a")["target_modules"] == "dummy-target-modules"
    given = {"target_modules": ["other"], "modules_to_save": ["head"]}
    peft.save(tmp_path / "b", base, adapter, names, config=given)
    assert given.items() <= config_of(tmp_path / "b").items()


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
    assert raw(come_back(tmp_path / "a", base, nested(made), [name])) == raw(nested(made))


def test_the_first_pattern_of_a_file_counts(tmp_path: Folder) -> None:
    """A file has them in order, whatever order a configuration has them in."""
    base, _, names = of_modules("m.q m.k", "", "")
    sites = {m: {"kernel": node(names[0], (4, 4), 2, s)} for m, s in (("q", 5.0), ("k", 2.0))}
    given = {"alpha_pattern": {"q": 10, ".*": 4}}  # in the order of a file, q is 4 too
    peft.save(tmp_path / "a", base, {"m": sites}, names, config=given)
    adapter = peft.load(tmp_path / "a", base, names)
    assert_equal(adapter, {"m": sites})
    fields = config_of(tmp_path / "a") | {"lora_alpha": 1} | given
    (tmp_path / "a" / CONFIG).write_text(json.dumps(fields))  # which keeps the order
    for again in (
        lambda out: peft.write(out, peft.read(tmp_path / "a")),
        lambda out: peft.save(out, base, adapter, names, config=config_of(tmp_path / "a")),
    ):
        again(tmp_path / "b")
        assert_equal(peft.load(tmp_path / "b", base, names), adapter)
        shutil.rmtree(tmp_path / "b")


# Linear modules, norms, the adapted modules, and the names by which PEFT finds these alone.
SHORT: dict[str, tuple[str, str, str, list[str]]] = {
    "all with a word": ("0.q 1.q 0.k", "0.norm", "0.q 1.q", ["q"]),
    "some with a word": ("l.0.q l.1.q l.1.k", "", "l.1.q l.1.k", ["l.1.k", "l.1.q"]),
    "a container": ("head.1 layer.0.c layer.1.c", "", "head.1", ["head.1"]),
    "of a sequence": ("a.head.0 b.q", "", "a.head.0", ["a.head.0"]),
    "a norm": ("f.0 f.3", "f.1 g.3", "f.0 f.3", ["f.0", "f.3"]),
    "a word of containers": ("l.0.attn.q l.1.attn", "", "l.1.attn", ["l.1.attn"]),
    "a word of norms": ("a.proj b.q", "c.proj", "a.proj", ["a.proj"]),
    "no word": ("a.q-1 b.q", "", "a.q-1", ["a.q-1"]),
    "no parent": ("0 2", "1", "0 2", ["0", "2"]),
    "the end of a name": ("q a.q b.q.k", "c.q", "q b.q.k", ["b.q.k", "q"]),
}


def of_modules(linear: str, norms: str, adapted: str) -> tuple[Any, Any, list[Name]]:
    """A base of these modules, and an adapter of some of them."""
    names = [Name("(.*)/kernel", r"\1", "io"), Name("(.*)/scale", r"\1", "o")]
    kernel = lambda m: (*m.split("."), "kernel")  # noqa: E731
    base = {kernel(m): jnp.zeros((4, 4)) for m in linear.split()}
    base |= {(*m.split("."), "scale"): jnp.zeros(4) for m in norms.split()}
    adapter = {kernel(m): node(names[0], (4, 4)) for m in adapted.split()}
    return jlora._tree.nest(base), jlora._tree.nest(adapter), names


@pytest.mark.parametrize("case", SHORT)
def test_names_are_short_where_they_are_words(case: str, tmp_path: Folder) -> None:
    """PEFT also searches containers, norms, and modules without parameters."""
    linear, norms, adapted, expected = SHORT[case]
    base, adapter, names = of_modules(linear, norms, adapted)
    assert_equal(come_back(tmp_path / "a", base, adapter, names), adapter)
    assert config_of(tmp_path / "a")["target_modules"] == expected
    others = {*linear.split(), *norms.split()} - set(adapted.split())
    others |= {m[:i] for m in f"{linear} {norms}".split() for i in range(len(m)) if m[i] == "."}
    taken = {m for m in others for t in expected if f".{m}".endswith(f".{t}")}
    assert taken == {*(config_of(tmp_path / "a")["exclude_modules"] or ())}


def test_names_of_thousands_of_modules_are_whole() -> None:
    """If one more has their last word; `load` takes so many."""
    experts = {f"layers.{i}.experts.{j}.up": True for i in range(8) for j in range(1500)}
    found = _select(experts | {"layers.0.shared.up": False})
    assert found == [*experts] and not list_misformed({"target_modules": found})
    assert _select(experts) == ["up"]


def test_patterns_are_last_words_or_whole_names(tmp_path: Folder) -> None:
    """A whole name that another one ends with begins with `^`: PEFT matches the ends of names."""
    base, _, names = of_modules("q a.q a.k b.k b.v", "", "")
    ranks = {"q": 1, "a.q": 2, "a.k": 2, "b.k": 3, "b.v": 4}
    sites = {(*m.split("."), "kernel"): node(names[0], (8, 8), r) for m, r in ranks.items()}
    base = {path: jnp.zeros((8, 8)) for path in sites}
    base, adapter = jlora._tree.nest(base), jlora._tree.nest(sites)
    assert_equal(come_back(tmp_path / "a", base, adapter, names), adapter)
    config = config_of(tmp_path / "a")
    assert config["r"] == 2 and config["rank_pattern"] == {"^q": 1, r"b\.k": 3, "v": 4}


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
        modules = {leaf.path: leaf.modules for leaf in find_leaves(params, model.NAMES)}
        assert len(modules) == len(jax.tree.leaves(params))
        assert modules == {leaf.path: leaf.modules for leaf in find_leaves(params, model.names(of))}


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
        with refused(ValueError, "names", "b/kernel", "of shape (2, 2, 2)", f"`{argument}`"):
            call()


def test_tensors_that_do_not_fit() -> None:
    """All of them at once."""
    like = {name: {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)} for name in "abc"}
    fits, turned = np.ones((3, 2), np.float32), np.ones((2, 3), np.float32)
    tensors = {"b.weight": fits, "c.weight": turned, "d.weight": fits}
    with refused(ValueError, "tensors", "c.weight", "got (2, 3)") as error:
        peft.from_tensors(tensors, like, [Name(r"(\w+)/kernel", r"\1", "io")])
    assert [x.where for x in error.value.problems] == ["a.weight", "c.weight", "d.weight"]


# ----------------------------------------------------------------------- vLLM


def test_vllm_profile_is_exact_for_powers_of_two(tmp_path: Folder) -> None:
    """Folding a power of two into B changes no bit of s·B."""
    case, adapter = loaded("qv")  # scale 8
    peft.save(tmp_path / "a", case.base, adapter, case.names, profile="vllm")
    theirs, ours = (models.read(f / TENSORS) for f in (case.folder, tmp_path / "a"))
    for key, x in theirs.items():
        mine = ours[key][:2] if "lora_A" in key else ours[key][:, :2] / 8
        assert np.array_equal(mine, x)
        assert np.count_nonzero(ours[key]) == np.count_nonzero(x)


def test_convert_names_what_vllm_would_read_otherwise(tmp_path: Folder) -> None:
    """A scale that is folded into B may take it beyond what its dtype holds."""
    base, _, names = of_modules("q", "", "")
    low = node(names[0], (4, 4), 1, 1e30)._replace(b=np.full((1, 4), 1e30, "f"))
    peft.save(tmp_path / "a", base, {"q": {"kernel": low}}, names)
    given = refused(ValueError, "contents", "cannot be written so that", "not finite")
    with given, np.errstate(over="ignore"):
        peft.write(tmp_path / "b", peft.read(tmp_path / "a"), "vllm")


# ----------------------------------------------------------------------- saving


ROWS_ODD: dict[str, dict[str, Any]] = {
    "`path` ... is not a regular expression": {"path": "("},
    "`axes` ... 'ix'": {"axes": "ix"},
    "`axes` ... 'ee'": {"axes": "ee"},
    "`axes` ... 'ssio'": {"axes": "ssio", "module": ("k", "v")},
    "`module` ... one {} for each l ... 'm.{}'": {"module": "m.{}"},
    "`module` ... one {} for each l ... 'm.{2*+1}'": {"module": "m.{2*+1}"},
    "`module` ... or a sum with it such as {2*+1}": {"axes": "lio", "module": "m.{1}"},
    "`module` ... one {} for each l ... ('k.{}', 'v')": {"axes": "slio", "module": ("k.{}", "v")},
    "`module` ... a tuple if `axes` has an s ... 'm'": {"axes": "sio"},
    "`module` ... a tuple if `axes` has an s ... ('k', 'v')": {"module": ("k", "v")},
    "`module` ... a tuple if `axes` has an s ... ()": {"axes": "sio", "module": ()},
    "combined only with i, o and l": {"axes": "seio", "module": ("k", "v")},
    "only an embedding can be `tied`": {"tied": "lm_head"},
    "`part` ... must be (j, n) with 0 <= j < n": {"part": (2, 2)},
    "that are not transposed": {"part": (0, 2), "transposed": True},
}


# A row that contradicts itself.
test_names_are_checked = all_refused(
    {ValueError: ROWS_ODD}, lambda row: Name(**{"path": "w", "module": "m", "axes": "io", **row})
)


# Fields, and what `load` warns of those that name nothing.
ALIKE: dict[str, tuple[dict[str, Any], str]] = {
    # As PEFT lists all of "all-linear", also those that it then excludes.
    "excluded": ({"target_modules": ["query", "value", "dense"], "exclude_modules": ["dense"]}, ""),
    "mica": ({"init_lora_weights": "mica"}, ""),
    "capitals": ({"init_lora_weights": "Gaussian"}, ""),
    "any layers": ({"layers_to_transform": [0, 1], "layers_pattern": ""}, ""),
    "no target": (
        {"target_modules": ["query", "value", "wq"]},
        "target_modules: 'wq' matches no module",
    ),
    "no rank": ({"rank_pattern": {"wq": 2}}, "rank_pattern: 'wq' matches no adapted module"),
    "no head": ({"modules_to_save": ["head"]}, "modules_to_save: 'head' matches none of the"),
}


@pytest.mark.parametrize("case", ALIKE)
def test_fields_that_change_nothing(case: str, tmp_path: Folder) -> None:
    """As PEFT reads them, with the model and without."""
    files, (fields, warning) = Files(tmp_path), ALIKE[case]
    files.config(**fields)
    with pytest.warns(UserWarning, match=warning) if warning else contextlib.nullcontext():
        adapter = files.load()
        assert peft.read(files.folder).leaves.keys() == peft.read(files.case.folder).leaves.keys()
    assert_equal(adapter, peft.load(files.case.folder, files.case.base, files.case.names))


@pytest.mark.parametrize("fixture", ["qv", "experts"])
def test_a_word_for_all_linear_modules(fixture: str, tmp_path: Folder) -> None:
    """The file says which these are; those of `target_parameters` are not among them."""
    files = Files(tmp_path, fixture)
    expected = files.load()
    files.config(target_modules="all-linear")
    assert_equal(files.load(), expected)
    peft.write(tmp_path / "again", contents := peft.read(files.folder))
    assert contents.config["target_modules"] == config_of(tmp_path / "again")["target_modules"]
    files.config(target_modules=contents.config["target_modules"])
    assert_equal(files.load(), expected)


def test_what_peft_ties_itself_alone(tmp_path: Folder) -> None:
    """It saves in full the head of an embedding that is saved in full, and does not list it."""
    files = Files(tmp_path, "modules_to_save")
    table = np.ones((11, 8), np.float32)
    names = [f"base_model.model.{m}.weight" for m in ("embed_tokens", "lm_head")]
    files.tensors(lambda t: t.update(dict.fromkeys(names, table)))
    saved = json.loads((files.folder / CONFIG).read_text())["modules_to_save"]
    files.config(modules_to_save=[*saved, "embed_tokens"], ensure_weight_tying=True)
    leaves = peft.read(files.folder).leaves
    assert {"embed_tokens.weight", "lm_head.weight"} <= leaves.keys()
    # Which it also does once the vocabulary has been resized, whatever is listed.
    files.config(ensure_weight_tying=False)
    assert peft.read(files.folder).leaves.keys() == leaves.keys()
    files.tensors(lambda t: t.update({names[0].replace("embed_tokens", "proj"): table}))
    with refused(ValueError, "path", PREFIX + "proj.weight", "unexpected"):
        peft.read(files.folder)


def test_a_module_in_one_that_is_saved(tmp_path: Folder) -> None:
    """PEFT does not load it if both are listed; the outer one has it."""
    names = [Name("head/scale", "m.head", "o", "scale"), Name("(.*)/kernel", r"m.\1", "io")]
    adapter = {"q": {"kernel": node(names[1], (4, 6))}}
    adapter["head"] = {"scale": normal(0, 3), "dense": {"kernel": normal(1, 4, 6)}}
    base = {"q": {"kernel": normal(2, 4, 6)}, "head": adapter["head"]}
    for i, config in enumerate(({}, {"modules_to_save": ["head", "head.dense"]})):
        peft.save(tmp_path / f"{i}", base, adapter, names, config=config)
        assert config_of(tmp_path / f"{i}")["modules_to_save"] == ["m.head"]
        assert_equal(peft.load(tmp_path / f"{i}", base, names), adapter)
        contents = dataclasses.replace(peft.read(tmp_path / f"{i}"), config=config)
        assert peft.write(tmp_path / f"{i}b", contents)["modules_to_save"] == ["m.head"]


HEAD = PREFIX + "lm_head"
VOCABULARY = (
    Name("embed/embedding", "embed_tokens", "vo", tied="lm_head"),
    Name("(q|lm_head)/kernel", r"\1", "io"),
    Name("lm_head/bias", "lm_head", "o", "bias"),
    Name("norm/weight", "norm", "o"),
    Name("norm/running_mean", "norm", "o", "running_mean"),
    Name("shared", "shared", "vo", tied="lm_head"),
)
TABLE, COUNT = np.ones((11, 4), np.float32), "norm.num_batches_tracked"
TIED = {"embed": {"embedding": normal(0, 11, 4)}, "q": {"kernel": normal(1, 4, 6)}}
UNTIED = TIED | {"lm_head": {"kernel": normal(2, 4, 11), "bias": normal(3, 11)}}
NORMED = TIED | {"norm": {"weight": jnp.ones(4), "running_mean": jnp.zeros(4)}}
FROZEN = {
    "lm_head.base_layer.weight": UNTIED["lm_head"]["kernel"].T,
    "lm_head.base_layer.bias": UNTIED["lm_head"]["bias"],
}
OTHER = FROZEN | {"lm_head.base_layer.bias": FROZEN["lm_head.base_layer.bias"] + 1}
NORM = {"norm.weight": 3 * TABLE[0], "norm.running_mean": 2 * TABLE[0], COUNT: np.asarray(7)}
OF_HEAD, OF_NORM = {"target_modules": ["lm_head"]}, {"modules_to_save": ["norm"]}
SHARED = ("decoder.embed_tokens", "encoder.embed_tokens", "lm_head", "shared")
ROWS = {f"{module}.token_adapter.trainable_tokens_delta": TABLE[:2] for module in SHARED}
OF_ROWS: dict[str, Any] = {"trainable_token_indices": {module: [5, 1] for module in SHARED}}
OF_ROWS |= {"target_modules": "dummy-target-modules"}
ENCODER = "encoder.embed_tokens.token_adapter.trainable_tokens_delta"
RESIZED = {"embed_tokens.weight": TABLE, "lm_head.weight": 2 * TABLE, "lm_head.bias": TABLE[:, 0]}
# With `modules_to_save` beside it, PEFT stores each table three times.
COPIES = {
    key.replace(".", f".{copied}."): x + (copied == "original_module")
    for key, x in RESIZED.items()
    for copied in ("modules_to_save", "original_module")
}
OF_TABLES = {"modules_to_save": ["embed_tokens", "lm_head"]}
SMALL = UNTIED | {"embed": {"embedding": normal(4, 9, 4)}}
# The base, what is stored but for A and B of q, the fields, and the weights, or what is said.
BESIDE: dict[str, tuple[Any, dict[str, Any], dict[str, Any], Any]] = {
    "a resized vocabulary": (UNTIED, RESIZED, {}, RESIZED),
    "one that is tied": (
        TIED,
        {"embed_tokens.weight": TABLE, "lm_head.weight": TABLE},
        {},
        {"embed_tokens.weight": TABLE},
    ),
    "one that is saved": (UNTIED, RESIZED | COPIES, OF_TABLES, RESIZED),
    "copies alone": (UNTIED, COPIES, OF_TABLES, "unexpected; ... embed_tokens.weight is not there"),
    "one of another size": (
        SMALL | {"lm_head": {"kernel": normal(5, 4, 9), "bias": normal(6, 9)}},
        RESIZED | {"lm_head.bias": TABLE[:10, 0]},
        {},
        "has 11 rows in the adapter ... but 9 in the base ... or call resize_token_embeddings(11)",
    ),
    "a frozen head": (
        UNTIED,
        pair("lm_head", 2, 4, 11) | FROZEN,
        OF_HEAD,
        {"lm_head.weight": FROZEN["lm_head.base_layer.weight"] + 2}
        | {"lm_head.bias": FROZEN["lm_head.base_layer.bias"]},
    ),
    "another bias": (UNTIED, pair("lm_head", 2, 4, 11) | OTHER, OF_HEAD, " values"),
    "a trained bias": (
        UNTIED,
        pair("lm_head", 2, 4, 11) | OTHER,
        OF_HEAD | {"bias": "all"},
        {"lm_head.bias": OTHER["lm_head.base_layer.bias"]},
    ),
    # A batch norm of PyTorch's counts its batches, which Flax's does not.
    "counts of batches": (NORMED, NORM, OF_NORM, NORM),
    "integers": (
        NORMED,
        NORM | {"norm.weight": np.ones(4, int)},
        OF_NORM,
        "expected a floating-point dtype, got I64",
    ),
    # T5's `shared` is the table of encoder and decoder, which PEFT writes once each.
    "rows of several modules": ({"shared": 0 * TABLE}, ROWS, OF_ROWS, {"shared.weight": None}),
    "other rows of one": (
        {"shared": 0 * TABLE},
        ROWS | {ENCODER: 2 * TABLE[:2]},
        OF_ROWS,
        "expected the values of ",
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_peft_saves_beside_a_and_b(case: str, tmp_path: Folder) -> None:
    """Onto a tree and onto a checkpoint: the same weights, or the same refusal."""
    base, tensors, fields, expected = BESIDE[case]
    own = {} if "target_modules" in fields else pair("q", 2, 4, 6)
    write(tmp_path / "a", own | tensors, **fields, r=2, lora_alpha=2)
    weights = peft.to_tensors(base, VOCABULARY)
    weights |= {COUNT: np.asarray(2)} if "norm" in base else {}
    config = {"architectures": ["AForMaskedLM"], "tie_word_embeddings": "lm_head" not in base}
    checkpoint(tmp_path / "base", weights, **config, vocab_size=11)

    def load() -> dict[str, np.ndarray]:
        adapter = peft.load(tmp_path / "a", base, VOCABULARY)
        return peft.to_tensors(jlora.merge(base, adapter), VOCABULARY)

    def export() -> dict[str, np.ndarray]:
        peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "out")
        return read_all(tmp_path / "out")

    for way in (load, export):
        if way is export and "shared" in base and not isinstance(expected, str):
            with refused(ValueError, "adapter", "shared.weight", "may read this weight twice"):
                export()
            continue
        if isinstance(expected, str):
            with refused(ValueError, "", *expected.split(" ... ")):
                way()
            continue
        found = way()
        assert found.keys() == weights.keys() - ({COUNT} if way is load else set())
        if own:
            assert_close(found["q.weight"], weights["q.weight"] + 2, 1e-6)
        for name in expected.keys() & found.keys():
            if name == "shared.weight":
                assert np.flatnonzero(found[name].all(1)).tolist() == [1, 5]
            else:
                assert_close(found[name], expected[name], 1e-6)
                assert found[name].dtype == np.asarray(expected[name]).dtype


def test_a_head_that_peft_does_not_tie_is_chosen_by_its_whole_name(tmp_path: Folder) -> None:
    """With its last word alone PEFT would store its frozen weight too."""
    names = [Name("wte/embedding", "wte", "vo", tied="m.lm_head"), Name("q/kernel", "m.q", "io")]
    base = {"wte": {"embedding": normal(0, 11, 4)}, "q": {"kernel": normal(1, 4, 6)}}
    adapter = {
        "wte": {"embedding": node(names[0], (11, 4))},
        "q": {"kernel": node(names[1], (4, 6))},
    }
    peft.save(tmp_path / "a", base, adapter, names)
    assert config_of(tmp_path / "a")["target_modules"] == ["wte", "m.q", "m.lm_head"]


QUERY = LoRA("query/kernel", rank=2)
TIED_IN_FULL: dict[str, tuple[str, list[Any], str]] = {
    "with LoRA": ("scanned", [QUERY], "embed/embedding"),
    "alone": ("scanned", [], "embed/embedding"),
    "with DoRA": ("scanned", [DoRA("query/kernel", rank=2)], "embed/embedding"),
    "GPT-2": ("gpt2_tied", [LoRA("mlp/c_proj/kernel", rank=2)], "wte/embedding"),
}


@pytest.mark.parametrize("form", some(TIED_IN_FULL, "with DoRA", "GPT-2"))
def test_a_tied_weight_in_full(form: str, tmp_path: Folder) -> None:
    """It is written for the embedding and for the head; read, both must be there and the same."""
    name, rules, path = TIED_IN_FULL[form]
    case = models.case(name)
    lora = jlora.transform(case.apply, *rules, Full(path))
    base, adapter = lora.init(KEY, case.base, jnp.asarray(case.torch["inputs"]))
    adapter = jax.tree.map(lambda x: x + 0.3, adapter)
    files = Files(tmp_path, name)
    shutil.rmtree(files.folder)
    given = {"modules_to_save": [path.split("/")[0]], "target_modules": []}
    with refused(ValueError, "config", "leave out what the adapter has in full", "lm_head"):
        peft.save(files.folder, base, adapter, case.names, config=given)
    peft.save(files.folder, base, adapter, case.names)
    assert_equal(files.load(), adapter)
    fields, tensors = config_of(files.folder), models.read(files.folder / TENSORS)
    own = [key for key in tensors if "lora" not in key]
    assert len(own) == 2 and np.array_equal(tensors[own[0]], tensors[own[1]])
    assert fields["modules_to_save"][-1] == "lm_head"
    assert fields.get("ensure_weight_tying", True)
    table = next(key for key in own if key != HEAD + ".weight")
    files.tensors(lambda t: t.update({HEAD + ".weight": t[table] + 1}))
    with refused(ValueError, "path", f"{HEAD}.weight", f"expected the values of {table}, got"):
        files.load()
    files.tensors(lambda t: t.pop(HEAD + ".weight"))
    with refused(ValueError, "path", table, "saved in full without lm_head, which shares"):
        files.load()

"""Leaves of several modules of PyTorch, such as k and v, and several leaves of one, as experts."""

import dataclasses
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import refused
from peft_files import (
    PREFIX,
    TENSORS,
    Folder,
    assert_close,
    assert_equal,
    assert_same_files,
    come_back,
    config_of,
    node,
    normal,
    pair,
    write,
)
from safetensors.numpy import load_file
from small import some

import jlora
from jlora import peft
from jlora._tree import nest
from jlora.peft import Name
from jlora.peft.names._advice import advise
from jlora.peft.names._leaves import find_leaves, row_of
from jlora.peft.names.tables import transformers
from jlora.types import Layout, LowRank
from tests.peft.formats import test_base_files as base_files
from tests.peft.test_peft import delta

NAMES = (
    Name(r"(\d+)/kv/w", (r"h.\1.k_proj", r"h.\1.v_proj"), "soio"),
    Name(r"(\d+)/kv/bias", (r"h.\1.k_proj", r"h.\1.v_proj"), "so", "bias"),
)


SHAPE = (2, 3, 4, 2)


def params() -> Any:
    """Keys and values of two layers."""
    kv = lambda i: {"w": normal(i, *SHAPE), "bias": normal(9 + i, 2, 6)}  # noqa: E731
    return {"0": {"kv": kv(0)}, "1": {"kv": kv(1)}}


def of_slots(*chosen: int) -> Any:
    """A random node of some of the modules."""
    return node(Layout((), (2,), (0, 1, 3), (2, chosen, 0)), SHAPE)


def in_layers(x: Any) -> Any:
    return {i: {"kv": {"w": x}} for i in "01"}


@pytest.mark.parametrize("chosen", some([(0,), (1,), (0, 1)], (1,), (0, 1)))
def test_only_some_modules(chosen: tuple[int, ...], tmp_path: Folder) -> None:
    """Those of the adapted slots are in the file, are what it selects, and come back."""
    node = of_slots(*chosen)
    assert_equal(come_back(tmp_path / "a", params(), in_layers(node), NAMES), in_layers(node))
    wanted = [f"{'kv'[i]}_proj" for i in chosen]
    assert config_of(tmp_path / "a")["target_modules"] == wanted
    tensors = load_file(tmp_path / "a" / TENSORS)
    modules = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors}
    assert modules == {f"h.{layer}.{name}" for layer in range(2) for name in wanted}
    for at, name in enumerate(wanted):
        np.testing.assert_array_equal(tensors[f"{PREFIX}h.1.{name}.lora_A.weight"], node.a[at].T)


# What has no such form in PEFT, and the rank that it gets.
SLOTS = {
    "in any order": (of_slots(1, 0), 2),  # they come back in order
    "a shared factor": (node(Layout((), (2,), (0, 1, 3)), SHAPE), 2),  # a copy for each module
    "of another axis": (node(Layout((), (2,), (0, 1, 3), (3, (0, 2), 1)), SHAPE), 4),
}


@pytest.mark.parametrize("form", SLOTS)
def test_other_slots(form: str, tmp_path: Folder) -> None:
    """They are written with the same ΔW."""
    given, rank = SLOTS[form]
    again = come_back(tmp_path / "a", params(), in_layers(given), NAMES)["0"]["kv"]["w"]
    assert again.layout.slots == (2, (0, 1), 0)
    assert config_of(tmp_path / "a")["r"] == again.a.shape[-1] == rank


def test_in_full(tmp_path: Folder) -> None:
    """Biases beside A and B, and whole modules."""
    base, whole = params(), {"w": normal(5, *SHAPE), "bias": normal(6, 2, 6)}
    biases = {i: {"kv": {"w": of_slots(0, 1), "bias": normal(int(i), 2, 6)}} for i in "01"}
    for i, adapter in enumerate((biases, in_layers(of_slots(1)) | {"1": {"kv": whole}})):
        assert_equal(come_back(tmp_path / str(i), base, adapter, NAMES), adapter)


def test_quantized(tmp_path: Folder) -> None:
    """A leaf of 4 bits is that of its modules, which are quantized one by one."""
    names = [Name("kv/w", ("k_proj", "v_proj"), "soio"), Name("norm", "norm", "o")]
    files = {m: base_files.gptq(seed=i) for i, m in enumerate(("k_proj", "v_proj"))}
    shape = (2, 2, base_files.COLUMNS, base_files.ROWS // 2)
    like = {"kv": {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, "norm": normal(0, 64)}
    base = peft.load_base(base_files.write(tmp_path / "base", files), like, names)
    assert isinstance(base["kv"]["w"], jlora.Quantized)
    for w, file in zip(jlora.dequantize(base)["kv"]["w"], files.values(), strict=True):
        w = np.moveaxis(w, 1, 0).reshape(base_files.COLUMNS, base_files.ROWS)
        base_files.assert_rounded(w.T, file.matrix)


HALVES = [f"h.0.{x}_proj" for x in "kv"]
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "ranks": (
        pair("h.1.k_proj", 2, 4, 6) | pair("h.1.v_proj", 3, 4, 6),
        {"target_modules": ["k_proj", "v_proj"], "rank_pattern": {"h.1.v_proj": 3}},
        "rank 2 and scale 1.5, rank 3 and scale 1",
    ),
    "one of two": (
        {"h.1.k_proj.weight": np.ones((6, 4), "f4"), "h.1.k_proj.bias": np.ones(6, "f4")},
        {"target_modules": HALVES, "modules_to_save": ["h.1.k_proj"]},
        "only 1 of 2 are adapted, not h.1.v_proj",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_load_refuses(case: str, tmp_path: Folder) -> None:
    """What one node, or one array, cannot hold."""
    tensors, fields, got = REFUSED[case]
    first = pair(HALVES[0], 2, 4, 6) | pair(HALVES[1], 2, 4, 6)
    write(tmp_path / "a", first | tensors, r=2, lora_alpha=3, **fields)
    with refused(ValueError, "path", "1/kv/w", got, "adapt all of them equally"):
        peft.load(tmp_path / "a", params(), NAMES)


EXPERTS = [f"model.layers.3.mlp.experts.{i}.down_proj" for i in range(2)]
ATTENTION, MLP = "model.layers.3.self_attn.{}_proj", "model.layers.3.mlp.{}_proj"
# A path of a table and its shape: the modules that it is of, and their kind.
PATHS: dict[tuple[str, str, tuple[int, ...]], tuple[list[str], str | None]] = {
    ("llama-scanned", "model/layers/self_attn/q_proj/kernel", (2, 4, 4)): (
        [f"model.layers.{i}.self_attn.q_proj" for i in range(2)], "linear"
    ),
    ("tunix-llama3", "layers/3/attn/q_proj/w", (4, 2, 8)): ([ATTENTION.format("q")], "linear"),
    ("tunix-qwen2", "layers/3/attn/k_bias", (16,)): ([ATTENTION.format("k")], None),
    ("tunix-qwen3", "layers/3/mlp/down_proj", (2, 4, 8)): (EXPERTS, "linear"),
    ("tunix-qwen3", "layers/3/mlp/router/kernel", (4, 2)): (["model.layers.3.mlp.gate"], "linear"),
    ("tunix-gemma", "layers/3/attn/kv_einsum/w", (2, 1, 4, 8)): (
        [ATTENTION.format(x) for x in "kv"], "linear"
    ),
    ("tunix-gemma", "layers/3/post_attn_norm/scale", (4,)): (
        ["model.layers.3.post_attention_layernorm"], None
    ),
    ("gemma3", "params/layer_3/attn/qkv_einsum/w", (3, 2, 4, 8)): (
        [ATTENTION.format(x) for x in "qkv"], "linear"
    ),
    ("gemma3", "params/layer_3/attn/_key_norm/scale", (8,)): (
        ["model.layers.3.self_attn.k_norm"], None
    ),
    ("gemma2-2b", "params/layer_3/mlp/gating_einsum", (2, 4, 8)): (
        [MLP.format(x) for x in ("gate", "up")], "linear"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("table", "path", "shape"), PATHS)
def test_tables(table: str, path: str, shape: tuple[int, ...]) -> None:
    """One path of each kind; whole models need their libraries: `tests/peft/names/tables`."""
    [leaf] = find_leaves(nest({tuple(path.split("/")): jnp.zeros(shape)}), peft.TABLES[table])
    assert (list(leaf.modules), leaf.name.kind) == PATHS[table, path, shape]


FLAX = {
    "bert": ("BertFor(CausalLM|PreTraining|SequenceClassification|QuestionAnswering)", "BertModel"),
    "roberta": ("(XLM)?RobertaFor(CausalLM|SequenceClassification|TokenClass.*)", "RobertaModel"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Model"),
    "llama": ("(Llama|Mistral|Gemma)ForCausalLM", "LlamaModel"),
    "vit": ("ViTForImageClassification", "ViTModel"),
}


def flax_shapes(table: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """The leaves of the models of `transformers` that a table is for, by path."""
    import transformers

    found = {}
    for name in dir(transformers):
        if any(re.fullmatch(f"Flax{pattern}", name) for pattern in FLAX[table]):
            cls = getattr(transformers, name)
            sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12}
            sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
            sizes |= {"is_decoder": True, "add_cross_attention": True} if "Causal" in name else {}
            sizes |= {"add_cross_attention": True} if "LMHead" in name else {}
            model = cls(cls.config_class(vocab_size=9, image_size=16, **sizes), _do_init=False)
            leaves = jlora._tree.leaves_by_path(model.params_shape_tree)
            found[name] = {"/".join(path): x.shape for path, x in leaves}
    return found


@pytest.mark.parametrize("table", some(FLAX, "gpt2"))
def test_tables_of_flax_models(table: str) -> None:
    """Every leaf but ViT's own parameters is called as in PyTorch, with any head or none."""
    models = flax_shapes(table)
    assert len(models) >= len(FLAX[table])
    for shapes in models.values():
        leaves = [tree_of(path, shape) for path, shape in shapes.items()]
        resolved = [find_leaves(leaf, peft.TABLES[table]) for leaf in leaves]
        for (path, shape), found in zip(shapes.items(), resolved, strict=True):
            if len(shape) == 3:  # ViT's token and positions
                assert not found
                continue
            module, _, last = path.replace("/", ".").rpartition(".")
            assert [(x.modules, x.name.parameter) for x in found] == [
                ((module,), "bias" if last == "bias" else "weight")
            ]
            is_conv1d = re.search(r"/(c_attn|q_attn|c_proj|c_fc)/kernel", path) is not None
            assert [x.name.transposed for x in found] == [is_conv1d]


def tree_of(path: str, shape: tuple[int, ...]) -> Any:
    return nest({tuple(path.split("/")): jnp.zeros(shape)})


# Trees of no library's model.
FOREIGN = ("params/layers_0/kernel", "linear/w")


@pytest.mark.parametrize("table", some(peft.TABLES, "bert", "llama4"))
def test_a_table_refuses_other_models(table: str, tmp_path: Folder) -> None:
    """Both ways, and says what it is for and what else to give."""
    names = peft.TABLES[table]
    said = f"`names` is jlora.peft.TABLES[{first_alike(table)!r}], for paths such "
    for other in FOREIGN:
        base = tree_of(other, (4, 3))
        adapter = jax.tree.map(jnp.ones_like, base)
        path = other.removeprefix("params/")  # as rows have it
        with refused(ValueError, "adapter", other, "no row of `names` fits", said):
            peft.save(tmp_path / "a", base, adapter, names)
        with refused(ValueError, "names", path, said):
            peft.to_tensors(base, names)
        own = [Name(path, "m", "io")]
        peft.save(tmp_path / "own", base, adapter, own)
        with refused(ValueError, "path", "it matches no leaf of `base` under `names`", said):
            peft.load(tmp_path / "own", base, names)
        shutil.rmtree(tmp_path / "own")


@pytest.mark.parametrize("table", some(peft.TABLES, "bert", "llama4", "tunix-gemma", "gpt-oss"))
def test_a_table_refuses_the_models_of_others(table: str) -> None:
    """The error names the tables that have rows for them."""
    names, path = peft.tables.WITH_PATHS[first_alike(table)]
    for other, (rows, theirs) in peft.tables.WITH_PATHS.items():
        parts = tuple(theirs.split("/"))
        [shape] = (s for n in (2, 3, 4) if row_of(parts, s := (3,) * n, rows))
        if row_of(parts, shape, names):
            assert theirs == path or {table, other} <= ALIKE
        else:
            said = advise(names, {parts: shape})
            assert re.search(f"for paths such as {path}. For these .*'{other}'", said)


def test_rows_that_begin_with_params_and_rows_of_biases() -> None:
    """The error says what such a row needs."""
    params = {"params": {"q": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}}
    with refused(ValueError, "names", "without the first `params/`: leave it out"):
        peft.to_tensors(params, [Name("params/(.*)/kernel", r"\1", "io")])
    rows = [Name("(.*)/kernel", r"\1", "io"), Name("(.*)/bias", r"\1", "o")]
    with refused(ValueError, "", "q.weight", "needs parameter='bias'"):
        peft.to_tensors(params, rows)
    stacked = {"q": {"bias": jnp.ones((2, 4))}}  # as layers are in a scan
    for tree in (params, stacked):
        with refused(ValueError, "names", "find_names", r"Name(r'(.*)/bias', r'\1', 'o', 'bias')"):
            peft.to_tensors(tree, rows[:1])


# Whose layers are called the same.
ALIKE = {"llama", "llama-scanned", "gpt-oss", "llama4"}


def first_alike(table: str) -> str:
    """The first of the tables with the same rows."""
    return next(name for name, rows in peft.TABLES.items() if rows == peft.TABLES[table])


# --------------------------------------------------------------------------- bare parameters

BARE = [
    Name("router/w", "m.router", "oi", "w"),
    Name("router/bias", "m.router", "o", "bias"),
    Name("([qkv])/kernel", r"m.\1", "oi"),
]


def test_a_bare_parameter(tmp_path: Folder) -> None:
    """PEFT selects it by its name, and its module's bias with it."""
    base = {"router": {"w": jnp.zeros((4, 6)), "bias": jnp.zeros(4)}, "q": {"kernel": jnp.eye(6)}}
    adapter = {"router": {"w": node(BARE[0], (4, 6)), "bias": jnp.ones(4)}}
    assert_equal(come_back(tmp_path / "a", base, adapter, BARE), adapter)
    fields = config_of(tmp_path / "a")
    assert (fields["target_parameters"], fields["target_modules"]) == (["w"], [])
    given = {"bias": "lora_only"}
    peft.save(tmp_path / "b", base, adapter, BARE, config=given)
    peft.write(tmp_path / "c", peft.read(tmp_path / "b"))
    assert_same_files(tmp_path / "c", tmp_path / "b")
    assert_equal(peft.load(tmp_path / "c", base, BARE), adapter)


@pytest.mark.parametrize("pattern", ["q.weight", "q"])
def test_a_weight_by_its_own_name(pattern: str, tmp_path: Folder) -> None:
    """Patterns match the name by which it is selected."""
    base = {m: {"kernel": jnp.zeros((6, 6))} for m in "qkv"}
    scales = {"q": 4.5, "k": 1.5, "v": 1.5}
    adapter = {m: {"kernel": node(BARE[2], (6, 6), scale=s)} for m, s in scales.items()}
    given = {"target_parameters": ["q.weight"], "target_modules": ["k", "v"]}
    given |= {"r": 2, "lora_alpha": 3, "alpha_pattern": {pattern: 9}}
    peft.save(tmp_path / "a", base, adapter, BARE, config=given)
    assert_equal(peft.load(tmp_path / "a", base, BARE), adapter)
    assert config_of(tmp_path / "a")["target_parameters"] == ["q.weight"]


OF_EXPERTS = {
    "embed": (Name("embed", "embed_tokens", "vo", tied="lm_head"), (9, 6)),
    "q": (Name("q", "m.q", "oi"), (6, 6)),
    "shared": (Name("shared", "mlp.shared_expert.up_proj", "oi"), (4, 6)),
    "fused": (Name("fused", "mlp.experts", "eoi", "gate_up_proj"), (2, 8, 6)),
    "down": (Name("down", "mlp.experts", "eoi", "down_proj"), (2, 6, 4)),
    "single": (Name("single", "mlp.experts.0.up_proj", "oi"), (4, 6)),
}


@pytest.mark.parametrize("experts", [(), ("fused", "down"), ("single",)])
def test_what_peft_takes_for_experts(experts: tuple[str, ...], tmp_path: Folder) -> None:
    """A linear module with such a name, in a model with experts: selected as a parameter."""
    own = {x: OF_EXPERTS[x] for x in ("embed", "q", "shared", *experts)}
    names = [name for name, _ in own.values()]
    base = {x: jnp.zeros(shape) for x, (_, shape) in own.items()}
    adapter = {x: node(*row) for x, row in own.items()}
    assert_equal(come_back(tmp_path / "a", base, adapter, names), adapter)
    fields = config_of(tmp_path / "a")
    found = [x for x in fields["target_parameters"] or [] if x.endswith("up_proj.weight")]
    assert len(found) == bool(experts)
    contents = peft.read(tmp_path / "a")
    peft.write(tmp_path / "b", contents)
    assert_equal(peft.load(tmp_path / "b", base, names), adapter)
    peft.save(tmp_path / "c", base, adapter, names, profile="vllm")
    peft.write(tmp_path / "d", contents, profile="vllm")
    served = (load_file(tmp_path / x / TENSORS) for x in "cd")
    assert_equal(*served)


@pytest.mark.parametrize("version", [{}, {"peft_version": "0.21.2"}])
def test_what_peft_wrote_of_experts(version: dict[str, str], tmp_path: Folder) -> None:
    """PEFT knew the model, so what it selected as a module is one."""
    own = {x: OF_EXPERTS[x] for x in ("q", "shared", "fused")}
    names = [name for name, _ in own.values()]
    base = {x: jnp.zeros(shape) for x, (_, shape) in own.items()}
    adapter = {x: node(*row) for x, row in own.items()}
    given = {"target_modules": ["q", "up_proj"], "target_parameters": ["experts.gate_up_proj"]}
    peft.save(tmp_path, base, adapter, names, config={"r": 2, "lora_alpha": 3} | given | version)
    assert_equal(peft.load(tmp_path, base, names), adapter)
    assert (given.items() <= config_of(tmp_path).items()) == bool(version)


# --------------------------------------------------------------------------- parts of a parameter

PARTS = transformers.experts("", "experts", leaves=("gate", "up", "down"))[:3]
LINEAR_PARTS = tuple(Name(n, "mlp.fused", "io", part=(j, 3)) for j, n in enumerate("abc"))


def nodes(*names: str, rank: int = 2, shared: bool = False, scale: float = 1.5) -> Any:
    """Random nodes of three experts, or, of one letter, of plain weights."""
    lead = () if len(names[0]) == 1 else (3,)
    layout = Layout((0,), (1,), (2,)) if lead else Layout((), (0,), (1,))
    return {
        name: LowRank(
            normal(0 if shared else i, *lead, 4, rank), normal(7 + i, *lead, rank, 6), scale, layout
        )
        for i, name in enumerate(names)
    }


def zeros(adapter: Any) -> Any:
    return {name: jnp.zeros((*x.a.shape[:-1], x.b.shape[-1])) for name, x in adapter.items()}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("table", "module", "kind"),
    [(PARTS[:2], "experts", "experts"), (LINEAR_PARTS, "mlp.fused", "linear")],
)
def test_parts(table: Any, module: str, kind: str, shared: bool, tmp_path: Folder) -> None:
    """One A if it is the same, else all of them; the same ΔW, and the same leaves again."""
    adapter = nodes(*(name.path for name in table), shared=shared)
    base = zeros(adapter)
    assert_equal(come_back(tmp_path / "a", base, adapter, table), adapter)
    each = np.concatenate([*jlora.merge(base, adapter).values()], axis=-1).swapaxes(-1, -2)
    assert_close(delta(load_file(tmp_path / "a" / TENSORS), module, kind, 1.5), each)
    config = config_of(tmp_path / "a")
    rank = max(config["rank_pattern"].values(), default=config["r"])
    assert rank == (2 if shared else 2 * len(table))


def scaled(adapter: Any, *scales: float) -> Any:
    each = zip(adapter.items(), scales, strict=True)
    return {name: x.replace(scale=scale) for (name, x), scale in each}


ALL_PARTS, TWO, ONE_A = (
    nodes("gate", "up", "down"),
    nodes("gate", "up"),
    nodes("gate", "up", shared=True),
)
# Adapters of parts, and whether these very leaves come back; else there is the same ΔW.
UNEQUAL: dict[str, tuple[Any, bool]] = {
    "one": (nodes("gate", "down"), False),  # the other gets zeros
    "ranks": (ALL_PARTS | nodes("gate", rank=3), False),
    "scales": (ALL_PARTS | nodes("gate", scale=0.25), False),
    "the first of scale 0": (scaled(TWO, 0.0, 1.5), False),
    "the second of scale 0": (scaled(ONE_A, 1.5, 0.0), False),
    "both of scale 0": (scaled(TWO, 0.0, 0.0), True),
    "both of scale 0, with one A": (scaled(ONE_A, 0.0, 0.0), True),
    # A B of zeros says nothing of blocks: A is that of all ranks.
    "untrained": ({n: x.replace(b=np.zeros_like(x.b)) for n, x in ONE_A.items()}, True),
}


@pytest.mark.parametrize("case", UNEQUAL)
def test_unequal_parts(case: str, tmp_path: Folder) -> None:
    adapter, is_same = UNEQUAL[case]
    again = come_back(tmp_path / "a", zeros(ALL_PARTS), adapter, PARTS)
    assert again.keys() == adapter.keys() | {"gate", "up"}
    if is_same:
        assert_equal(again, adapter)


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("table", [PARTS, LINEAR_PARTS], ids=["experts", "linear"])
def test_parts_of_weights(table: Any, alternating: bool) -> None:
    """The parts of a parameter are joined, and taken apart again."""
    table = [dataclasses.replace(name, alternating=alternating) for name in table]
    made = nodes(*(name.path for name in table))
    base = jax.tree.map(lambda x: x + normal(len(x), *x.shape), zeros(made))
    tensors = peft.to_tensors(base, table)
    assert_equal(peft.from_tensors(tensors, base, table), base)
    each = [base[name.path].swapaxes(-1, -2) for name in table if name.part]
    expected = np.stack(each, -2 if alternating else -3)
    found = tensors[f"{table[0].module}.{table[0].parameter}"]
    assert_equal(found, expected.reshape(found.shape))


def test_lone_parts_of_weights() -> None:
    """A checkpoint has all of a parameter, or nothing."""
    base = zeros(nodes("gate", "down"))
    with refused(ValueError, "names", "makes these leaves of `params` parts of"):
        peft.to_tensors(base, PARTS)


@pytest.mark.parametrize(
    ("path", "module", "axes", "shape", "layers"),
    [
        ("layers/layers_1/w", r"h.{2*+\1}", "ilo", (3, 2, 4), [1, 3]),
        ("rest_1/w", r"h.{\1+3}", "io", (3, 4), [4]),
        ("rest_1/w", r"h.{1*+3}", "ilo", (3, 2, 4), [3, 4]),
        ("local_1/w", "h.{6*+1*}", "illo", (3, 2, 5, 4), [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]),
        ("local_1/w", "h.{1*+6*}", "illo", (3, 1, 2, 4), [0, 6]),
    ],
)
def test_layers_in_blocks(
    path: str, module: str, axes: str, shape: tuple[int, ...], layers: list[int], tmp_path: Folder
) -> None:
    """Sums between braces number the layers; each is a module, with A and B of its own."""
    names = [Name(r".*_(\d+)/w", module, axes)]
    base = nest({tuple(path.split("/")): normal(0, *shape)})
    tensors = peft.to_tensors(base, names)
    assert list(tensors) == [f"h.{i}.weight" for i in layers]
    assert_equal(peft.from_tensors(tensors, base, names), base)
    stack = tuple(d for d, letter in enumerate(axes) if letter == "l")
    layout, lead = Layout(stack, (0,), (len(axes) - 1,)), tuple(shape[d] for d in stack)
    adapter = LowRank(normal(1, *lead, 3, 2), normal(2, *lead, 2, 4), 1.5, layout)
    adapter = nest({tuple(path.split("/")): adapter})
    assert_equal(come_back(tmp_path / "a", base, adapter, names), adapter)


def test_sizes_tell_rows_apart() -> None:
    """A row of two modules is none of a leaf of three."""
    base = {"0": {"kv": {"w": jnp.zeros((3, 3, 4, 2))}}}
    assert find_leaves(base, NAMES) == []

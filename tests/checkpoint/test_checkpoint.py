"""`jlora.checkpoint`: what is saved comes back bit for bit, and anything else is refused by name.

Faults of disks and processes are in `test_checkpoint_faults.py`, meshes in
`test_checkpoint_mesh.py`.
"""

import dataclasses
import functools
import json
import operator
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import CASES
from flax import nnx
from laws import from_numpy, make
from messages import refused
from peft_files import assert_equal
from small import KEY, array, set_up, set_up_noisy, some

import jlora
from jlora import Full, LoRA, Slots, checkpoint
from tests.test_guides import run

# Every day; in the long run all.
DAILY = ("nnx_scan_only_up", "stacked_with_factors_of_two_dtypes", "tree_with_integers_and_scalars")
TABLE = [
    pytest.param(case, id=case.name, marks=[] if case.name in DAILY else [pytest.mark.slow])
    for case in CASES
]
SLOTS = Slots(np.int64(3), (np.int32(0), 2), axis=np.int8(0))
RULES = (
    LoRA("up", rank=2, alpha=3.0, dropout=0.25, rslora=True, init=jlora.initializers.gaussian),
    LoRA("qkv", rank=3, slots=SLOTS, materialize=True, dtype=jnp.bfloat16),
    LoRA(rank=2),
    Full("norm"),
)


def model(params: Any, x: jax.Array) -> jax.Array:
    """Four products and a scale."""
    return ((x @ params["up"] @ params["down"] * params["norm"]) @ params["qkv"]) @ params["out"]


@functools.cache
def made(rules: tuple[Any, ...] = RULES) -> tuple[Any, Any]:
    """A base and an adapter of random numbers."""
    shapes = {"up": (4, 8), "down": (8, 6), "qkv": (6, 9), "out": (9, 5)}
    params = {name: array(*shape) for name, shape in shapes.items()}
    params["norm"] = jnp.linspace(0.5, 1.5, 6)
    return set_up_noisy(model, [*map(from_numpy, rules)], params, jnp.ones((1, 4)))[1:]


def abstract(tree: Any) -> Any:
    """The shapes and dtypes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def fields_of(path: pathlib.Path) -> dict[str, Any]:
    """The metadata of a checkpoint."""
    return json.loads((path / "jlora" / "metadata").read_text())


def edit(path: pathlib.Path, hashed: bool = True, **fields: Any) -> None:
    """Changes fields of the metadata, and their hash if it is to be right."""
    fields = fields_of(path) | fields
    fields |= {"sha256": checkpoint._meta.digest(fields)} if hashed else {}
    (path / "jlora" / "metadata").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint that stays as it is."""
    path, (base, adapter) = tmp_path_factory.mktemp("a") / "saved", made()
    checkpoint.save(path, adapter, RULES, base=base, step=7, hash_values=True)
    return path


@pytest.fixture
def saved(original: pathlib.Path, tmp_path: pathlib.Path) -> tuple[pathlib.Path, Any, Any]:
    """A checkpoint, its base and its adapter."""
    return shutil.copytree(original, tmp_path / "saved"), *made()


# ------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("case", TABLE)
def test_every_adapter_comes_back(case, tmp_path):
    entry = make(case, jnp.float32)
    base, adapter = entry.base, entry.adapter
    checkpoint.save(tmp_path / "a", adapter, case.rules, base=base)
    assert_equal(checkpoint.restore(tmp_path / "a", base=base), adapter)
    assert_equal(checkpoint.restore(tmp_path / "a", like=abstract(adapter)), adapter)
    assert checkpoint.read(tmp_path / "a").rules == case.rules


def test_read_gives_everything_but_the_numbers(saved):
    path, base, adapter = saved
    found = checkpoint.read(path)
    assert found.rules == RULES and found.rules[0].scale == RULES[0].scale
    assert found.rules[0].init is jlora.initializers.gaussian
    assert found.step == 7
    assert found.versions["jax"] == jax.__version__
    assert found.versions.keys() == {"jlora", "jax", "jaxlib", "orbax-checkpoint"}
    assert found.base == checkpoint.fingerprint(base, values=True)
    assert jax.tree.structure(found.adapter) == jax.tree.structure(adapter)
    assert jax.tree.leaves(found.adapter) == jax.tree.leaves(abstract(adapter))
    assert_equal(checkpoint.restore(path, like=found.adapter), adapter)
    on_host = checkpoint.restore(path, base=base)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(on_host))


def test_the_base_is_not_in_the_files(tmp_path):
    base, adapter = made()
    big = {**base, "table": array(500, 1000)}  # 2 MB
    checkpoint.save(tmp_path / "a", adapter, RULES, base=big)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) < 50_000


def test_dropout_is_that_of_like(saved, tmp_path):
    """And `materialize`; keys of dropout are left out."""
    path, _, adapter = saved
    like = {**adapter, "up": adapter["up"]._replace(dropout=0.5, materialize=True)}
    assert_equal(checkpoint.restore(path, like=like), like)
    checkpoint.save(tmp_path / "a", jlora.dropout(adapter, jax.random.key(0)), RULES)
    assert_equal(checkpoint.restore(tmp_path / "a"), adapter)


@pytest.mark.parametrize(
    "form", some(["root", "frozen", "dots", "names", "many", "scalar", "numpy"], "frozen", "names")
)
def test_any_tree_comes_back(form, tmp_path):
    _, adapter = made()
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapter)
    layout = jlora.types.Layout((), (np.int64(0),), (1,))
    tree = {
        "root": jnp.arange(3.0),
        "frozen": __import__("flax").core.freeze(adapter),
        "dots": {"a.b": adapter["up"], "a": {"c": adapter["down"]}},
        "names": {"": adapter["up"], "ü /\\*": {"0": adapter["norm"]}, "full": adapter["down"]},
        "many": many,
        "scalar": {"temperature": jnp.float32(0.5)},
        "numpy": {"up": adapter["up"]._replace(scale=np.float32(1.5), layout=layout)},
    }[form]
    checkpoint.save(tmp_path / "a", tree, Full(".*"))
    assert_equal(checkpoint.restore(tmp_path / "a", like=tree), tree)
    if form != "frozen":
        assert_equal(checkpoint.restore(tmp_path / "a"), tree)


def mine(key, w, site, rule):
    return jlora.initializers.gaussian(key, w, site, rule)


@dataclasses.dataclass(frozen=True)
class Wider(jlora.initializers.Initializer):
    """An initializer with an option."""

    by: float = 2.0

    def __call__(self, key, w, site, rule):
        """Draws a wider A."""
        w, a, b = mine(key, w, site, rule)
        return w, self.by * a, b


def test_an_initializer_with_options_is_held(tmp_path):
    rule = LoRA("up", rank=2, init=jlora.initializers.loftq(jlora.NF4()))
    checkpoint.save(tmp_path / "a", {"up": made()[1]["up"]}, rule)
    assert checkpoint.read(tmp_path / "a").rules == (rule,)


UNHELD = {
    "test_checkpoint.mine": mine,
    "test_checkpoint.Wider": Wider(),
    "jlora.initializers.eva": jlora.initializers.eva(jlora.types.Sketch({}, "inputs")),
    "jlora.initializers.lora_ga": jlora.initializers.lora_ga(jlora.types.Sketch({}, "gradient")),
}


@pytest.mark.parametrize("name", UNHELD)
def test_an_initializer_that_is_not_held_keeps_its_name_and_says_so(name, tmp_path):
    """Functions of the user, and those with a sketch; also if the rules are saved again."""
    adapter = {"up": made()[1]["up"]}
    checkpoint.save(tmp_path / "a", adapter, LoRA("up", rank=2, init=UNHELD[name]))
    (rule,) = checkpoint.read(tmp_path / "a").rules
    with refused(NotImplementedError, "init", name):
        made((rule,))
    assert made((dataclasses.replace(rule, init=jlora.initializers.gaussian),))[1].keys() == {"up"}
    checkpoint.save(tmp_path / "b", adapter, rule)
    assert checkpoint.read(tmp_path / "b").rules == (rule,)


@pytest.mark.parametrize(
    "name",
    [
        "my._foo.foo.<locals>.start",
        "jlora.initializers._eva",
        "jlora.kaiming_uniform",
    ],
)
def test_other_functions_keep_their_names(name, saved):
    rule = fields_of(saved[0])["rules"][0]
    inits = {"function": name}, {"function": name, "options": {"of": "a newer version"}}
    edit(saved[0], rules=[rule | {"init": init} for init in inits])
    for read in checkpoint.read(saved[0]).rules:
        with refused(NotImplementedError, "init", name, "give dataclasses.replace"):
            read.init()


def test_items_join_a_managers_checkpoint(tmp_path):
    base, adapter = made()
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2):
            mine = checkpoint.items(adapter, RULES, step=step, base=base)
            manager.save(
                step, args=ocp.args.Composite(**mine, data=ocp.args.JsonSave({"at": step}))
            )
    assert checkpoint.read(tmp_path / "run" / "2").step == 2
    assert_equal(checkpoint.restore(tmp_path / "run" / "2", like=adapter, base=base), adapter)
    with refused(ValueError, "path", tmp_path / "run", "has the steps 1, 2", "give one of them"):
        checkpoint.read(tmp_path / "run")


def test_a_relative_path_and_new_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, adapter = made()
    checkpoint.save("new/parents/a", adapter, RULES)
    assert_equal(checkpoint.restore(pathlib.Path("new/parents/a")), adapter)
    assert os.listdir(tmp_path / "new" / "parents") == ["a"]


# ------------------------------------------------------------------------------------ fingerprints

KINDS_OF_LEAVES = {
    "float32": jnp.asarray([1.5, -0.0, 0.0, jnp.nan, jnp.inf]),
    "bfloat16": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
    "float8_e4m3fn": jnp.arange(4, dtype=jnp.float8_e4m3fn),
    "int4": jnp.arange(4, dtype=jnp.int4),
    "uint8": jnp.arange(4, dtype=jnp.uint8),
    "int32": jnp.arange(4),
    "bool": jnp.asarray([True, False]),
    "complex64": jnp.asarray([1 + 2j, 3 - 1j]),
    "key<fry>": jax.random.key(3),
}


@pytest.mark.parametrize("dtype", KINDS_OF_LEAVES)
def test_a_hash_depends_on_every_bit_and_place(dtype):
    x = KINDS_OF_LEAVES[dtype]

    def printed(x):
        (leaf,) = checkpoint.fingerprint({"x": x}, values=True).values()
        return leaf

    assert printed(x).dtype == dtype
    assert re.fullmatch("[0-9a-f]{16}", printed(x).hash)
    if dtype == "key<fry>":
        assert printed(jax.random.key(4)) != printed(x)
        return
    host = np.asarray(x)
    assert printed(host) == printed(x)
    others = {printed(np.roll(host, 1, axis=-1)).hash}
    for i in range(host.size):
        other = host.copy()
        other.reshape(-1)[i] = np.logical_not(other.reshape(-1)[i])
        others.add(printed(other).hash)
    assert len(others) == host.size + 1
    assert printed(x).hash not in others


def test_float64_of_another_session(tmp_path):
    """Read as it is where x64 is off, on the host; a narrower `like` is told so."""
    with jax.enable_x64(True):
        adapter = {"head": jnp.linspace(0.0, 1.0, 6).reshape(2, 3)}
        checkpoint.save(tmp_path / "a", adapter, (Full("head"),))
        expected = np.asarray(adapter["head"])
    found = checkpoint.restore(tmp_path / "a")["head"]
    assert found.dtype == np.float64 and found.tobytes() == expected.tobytes()
    with refused(ValueError, "like", "head", "got float32"):
        checkpoint.restore(tmp_path / "a", like={"head": jnp.zeros((2, 3))})
    checkpoint.save(tmp_path / "b", {"head": expected}, (Full("head"),))
    again = checkpoint.restore(tmp_path / "b", like={"head": expected})["head"]
    assert again.dtype == np.float64 and again.tobytes() == expected.tobytes()


@pytest.mark.parametrize("first", [False, True])
def test_a_base_with_and_without_x64(first, tmp_path):
    """Numbers of Python and of 64 bits are as wide as the session has them, but the same base."""
    base = {"w": np.ones((2, 3), np.float32), "n": 3, "x": 0.5, "i": np.arange(3)}
    adapter = {"w": np.zeros((2, 3), np.float32)}
    with jax.enable_x64(first):
        checkpoint.save(tmp_path / "a", adapter, (Full("w"),), base=base, hash_values=True)
    with jax.enable_x64(not first):
        checkpoint.restore(tmp_path / "a", base=base)
        with refused(ValueError, "", "n", "expected dtype int"):
            other = {**base, "n": 3.0, "w": adapter["w"]}
            checkpoint.restore(tmp_path / "a", base=other)


def test_what_cannot_be_compared_is_refused(tmp_path):
    base, adapter = made()
    checkpoint.save(tmp_path / "a", adapter, RULES)
    with refused(ValueError, "base", tmp_path / "a", "was saved without one"):
        checkpoint.restore(tmp_path / "a", base=base)
    with refused(TypeError, "base", "at down", "DtypeStruct"):
        checkpoint.fingerprint(abstract(base), values=True)
    with refused(TypeError, "hash_values", "needs the base"):
        checkpoint.items(adapter, RULES, hash_values=True)


def test_bytes_in_another_order_are_refused(tmp_path):
    """JAX has no such arrays, but would run a program that it compiled for native ones."""
    native = np.arange(73, dtype=np.float32)  # of a shape that no other test hashes
    other = native.astype(">f4")
    checkpoint.fingerprint({"w": native}, values=True)
    with pytest.raises(TypeError):
        checkpoint.fingerprint({"w": other}, values=True)
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "a", {"a": native, "head": other}, ())
    assert os.listdir(tmp_path) == []


def test_a_base_of_what_converts_to_arrays_is_hashed(tmp_path):
    class Lazy:
        """Reads an array when NumPy asks for it."""

        dtype, shape = np.dtype(np.float32), (2, 3)

        def __array__(self, dtype=None, copy=None):
            return np.ones(self.shape, dtype or self.dtype)

    adapter = {"w": jnp.zeros((2, 3))}
    rules, base = (Full("w"),), {"w": np.ones((2, 3), np.float32)}
    checkpoint.save(tmp_path / "a", adapter, rules, base={"w": Lazy()}, hash_values=True)
    assert checkpoint.read(tmp_path / "a").base == checkpoint.fingerprint(base, values=True)
    checkpoint.restore(tmp_path / "a", base={"w": Lazy()})


def test_another_base_is_refused_with_all_differences(saved):
    path, base, adapter = saved
    other = {
        "up": base["up"] + 1,
        "down": jnp.zeros((8, 7)),
        "qkv": base["qkv"].astype(jnp.bfloat16),
        "out": base["out"],
        "extra": jnp.zeros(1),
    }
    with refused(ValueError, "base", "down", "got (8, 7)", "an adapter of this base."):
        checkpoint.restore(path, base=other)
    assert_equal(checkpoint.restore(path, base=abstract(base)), adapter)  # no values to compare


def test_a_base_in_another_scheme_is_refused(tmp_path):
    """Both ways, by shapes or values; a checkpoint that does not say the scheme fits all."""
    rule, params, x = LoRA("w", rank=2), {"w": jnp.ones((64, 64))}, jnp.ones((1, 64))
    adapter = jlora.transform(lambda p, x: x @ p["w"], rule).init(KEY, params, x)[1]
    bases = {"none": params}
    for scheme in (jlora.NF4("w"), jlora.NF4("w", block=32)):
        bases[jlora._quantized.spell(scheme)] = jlora.quantize(params, scheme)
    for i, (scheme, own) in enumerate(bases.items()):
        path = tmp_path / str(i)
        checkpoint.save(path, adapter, (rule,), base=own)
        for got, other in bases.items():
            for base in (other, abstract(other), checkpoint.fingerprint(other)):
                if got == scheme:
                    checkpoint.restore(path, base=base)
                    continue
                with refused(ValueError, "base", "w", f"expected scheme {scheme}, got {got}"):
                    checkpoint.restore(path, base=base)
        edit(path, base=[leaf[:4] for leaf in fields_of(path)["base"]])
        assert checkpoint.read(path).base["w",].scheme is None
        for base in bases.values():
            checkpoint.restore(path, base=base)


# ----------------------------------------------------------------------------------------- refusals


def test_another_form_is_refused_with_all_differences(saved):
    path, _, adapter = saved
    like = {
        "up": adapter["up"]._replace(scale=5.0, a=jnp.zeros((4, 3))),
        "down": adapter["down"]._replace(layout=jlora.types.Layout((0,), (), (1,))),
        "qkv": adapter["qkv"].a,
        "out": jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter["out"]),
        "more": jnp.zeros(2),
    }
    with refused(ValueError, "like", "up", "got 5.0", "checkpoint.read(path).rules."):
        checkpoint.restore(path, like=like)


CHAINED = jlora.optimizer(optax.chain(optax.clip(1.0), optax.trace(0.9)))
OTHERS = {
    "base": (lambda base, adapter: base, "down, norm, out, qkv, up", "has no jlora.Full"),
    "dict": (lambda base, adapter: {"base": base, "adapter": adapter}, "adapter/norm, base/down"),
    "bound": (jlora.bind, "", "a tree from `bind`", "Give the adapter in it"),
    "pair": (lambda base, adapter: (base, adapter), "", "the pair", "Unpack it"),
    "Params": (jlora.Params, "", "Params", "Give its `base` and its `adapter`"),
    "Adam": (lambda base, adapter: optax.adam(1.0).init(adapter), "", "state of an optimizer"),
    "chain": (lambda base, adapter: CHAINED.init(adapter), "", "the state of an optimizer"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_tree_that_is_no_adapter_is_named(case, tmp_path):
    make, *facts = OTHERS[case]
    with refused(TypeError, "adapter", *facts):
        checkpoint.save(tmp_path / "a", make(*made()), RULES[:3])
    assert not list(tmp_path.iterdir())


def test_arrays_alone_need_their_rules(tmp_path):
    """Those of an adapter from a file do not, as it has nodes too."""
    base, adapter = made()
    with refused(TypeError, "adapter", "down, norm, out, qkv, up", "as parameters have"):
        checkpoint.save(tmp_path / "a", base, ())
    checkpoint.save(tmp_path / "a", adapter, ())


def in_nnx() -> Any:
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    rules = LoRA("kernel", rank=2), Full("bias")
    return jlora.nnx.adapt(linear, *rules, rngs=nnx.Rngs(1), example=(jnp.ones((1, 4)),))


def in_keras() -> Any:
    import keras

    import jlora.keras

    model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(3)], name="m")
    return jlora.keras.adapt(model, LoRA("kernel", rank=2), Full("bias"), example=jnp.ones((1, 4)))


@pytest.mark.parametrize("make", some([in_nnx, in_keras], in_nnx))
def test_a_module_is_saved_as_its_adapter(make, tmp_path):
    """And stands for it in `like`."""
    adapted, rules = make(), (LoRA("kernel", rank=2), Full("bias"))
    checkpoint.save(tmp_path / "a", adapted, rules)
    assert_equal(checkpoint.restore(tmp_path / "a", like=adapted), adapted.adapter)
    assert_equal(checkpoint.restore(tmp_path / "a"), adapted.adapter)


def test_what_cannot_be_saved_is_refused(tmp_path):
    base, adapter = made()
    path = tmp_path / "a"
    with refused(TypeError, "adapter", "x", "must be a nested dict of LowRank nodes"):
        checkpoint.save(path, {"x": 1.0}, ())
    with refused(TypeError, "adapter", "up/a: S", "must have arrays to be saved"):
        checkpoint.save(path, abstract(adapter), RULES)
    with refused(TypeError, "adapter", "no registered rule", "up: Routed", "jlora.many.prepare"):
        checkpoint.save(path, jlora.many.prepare(jlora.many.stack([{"up": adapter["up"]}])), RULES)
    with refused(TypeError, "rules", "got 'up'"):
        checkpoint.save(path, adapter, ("up",))
    with refused(ValueError, "adapter", "norm", "Use the adapter with the parameters"):
        checkpoint.save(path, adapter, RULES, base={**base, "norm": jnp.ones(3)})
    with refused(ValueError, "adapter", "a.b.full", "that Orbax confuses", "Rename"):
        checkpoint.save(path, {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}}, ())
    with refused(TypeError, "merged", "x", "got x: float"):
        checkpoint.export(path, {"x": 1.0})
    with refused(TypeError, "merged", "got {}"):
        checkpoint.export(path, {})
    assert os.listdir(tmp_path) == []


def test_what_is_no_checkpoint_is_refused(saved, tmp_path):
    path, _, _ = saved
    for read in (checkpoint.restore, checkpoint.base_shapes, checkpoint.base_values):
        with refused(FileNotFoundError, "path", tmp_path / "nowhere", "there is no checkpoint at"):
            read(tmp_path / "nowhere")
    text = tmp_path / "text"
    text.mkdir()
    (text / "adapter_config.json").touch()
    with refused(ValueError, "path", text, "it has adapter_config.json", "Give a folder"):
        checkpoint.read(text)
    with refused(ValueError, "path", text / "adapter_config.json", "but it is a file"):
        checkpoint.read(text / "adapter_config.json")
    edit(path, hashed=False, step=8)
    with refused(ValueError, "path", path, "are damaged (ValueError: their hash"):
        checkpoint.read(path)
    edit(path, hashed=False, format=3)
    with refused(ValueError, "path", path, "in format 3", "Update jlora."):
        checkpoint.restore(path)
    edit(path, format=["x" * 10**6])
    with refused(ValueError, "path", path, "in format ['xxx", "Update jlora."):
        checkpoint.restore(path)
    (path / "jlora" / "metadata").write_text("[]")
    with refused(ValueError, "path", path, "are damaged (TypeError"):
        checkpoint.restore(path)


LIES = {
    "shape": (("arrays", "a", 0), [8, 2], "the values of out/a are not those"),
    "no array has it": (("arrays", "a", 0), [2**62, 2**62], "cannot be read"),
    "dtype": (("arrays", "a", 1), "key<fry>", "cannot be read"),
    "hash": (("arrays", "a", 2), "0" * 16, "the values of out/a are not those"),
    **{
        f"a length of {x!r}": (("arrays", "a", 0, 0), x, "a shape, got")
        for x in (1e300, -1, 2**70, True, "2")
    },
    "slots": (("layout", "slots"), [0, [0], 1], "are damaged"),
    "axis": (("layout", "slots"), [1, [0], 0], "are damaged"),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_do_not_describe_the_arrays(lie, saved):
    """Although their hash is right."""
    path, _, _ = saved
    items = fields_of(path)["adapter"]
    [item] = [x for x in items if x["path"] == ["out"]]
    (*keys, last), value, fact = LIES[lie]
    functools.reduce(operator.getitem, keys, item)[last] = value
    edit(path, adapter=items)
    with refused(ValueError, "path", path, fact, "Take another checkpoint"):
        checkpoint.restore(path)


# ---------------------------------------------------------------------------- checkpoints of before

BEFORE = pathlib.Path(__file__).parents[1] / "fixtures" / "checkpoint"  # as jlora 0.2 wrote it


def heads(p: Any, x: jax.Array) -> jax.Array:
    """The model of that checkpoint; its rules were "quer", "out/w", and "head" in full."""
    x = x @ p["multi_head"]["query"]["w"] @ p["multi_head"]["out"]["w"]
    return x @ p["head"]["w"] + p["head"]["b"]


def test_a_checkpoint_of_before_is_refused():
    """The lines in the guide, to which the error leads, restore it."""
    for call in (checkpoint.read, checkpoint.restore, checkpoint.base_shapes):
        with refused(ValueError, "path", BEFORE, "in format 1", 'under "Checkpoints".'):
            call(BEFORE)
    params = {"query": {"w": jnp.ones((4, 6))}, "out": {"w": jnp.ones((6, 4))}}
    params = {"multi_head": params, "head": {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}}
    rules = LoRA("query", rank=2, alpha=16), LoRA("out", rank=1, alpha=16), Full(".*head")
    *_, like = set_up(heads, rules, params, jnp.ones((1, 4)))
    restored = run("migration")["arrays_of_02"](BEFORE, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    for x in (restored["head"]["b"], restored["multi_head"]["query"]["w"].b):
        np.testing.assert_array_equal(x, jnp.ones_like(x))  # trained from zero to one
    flat = checkpoint._meta.flatten_leaves(jlora._tree.adapter_leaves(restored))
    arrays = {tuple(x["path"]): x["arrays"] for x in fields_of(BEFORE)["adapter"]}
    saved = {(*path, name): x[2] for path, each in arrays.items() for name, x in each.items()}
    assert {path: checkpoint._fingerprint.hash_of(x) for path, x in flat.items()} == saved


def test_a_pattern_is_not_tried(tmp_path):
    """A file may have one that takes for ever: exponential in a path, or in its own length."""
    leaves = {"a" * 50: jnp.ones(3), "b": jnp.ones(3)}
    checkpoint.save(tmp_path / "a", leaves, Full(".*"))
    hostile = ["(a+)+$", "(a|a)" * 40 + "c", "(a|aa)*$", ".*.*.*.*.*.*.*.*x", r"(a*)*\1$"]
    edit(tmp_path / "a", rules=[{"rule": "Full", "pattern": x} for x in hostile])
    assert [rule.pattern for rule in checkpoint.read(tmp_path / "a").rules] == hostile


@pytest.mark.parametrize("pattern", [0, False, [], 5, ["q"]], ids=repr)
def test_a_pattern_that_is_none(pattern, saved):
    edit(saved[0], rules=[{"rule": "Full", "pattern": pattern}])
    with refused(ValueError, "path", saved[0], "are damaged"):
        checkpoint.read(saved[0])


@pytest.mark.parametrize(
    "given", [Full("w"), iter([Full("w")]), {"first": Full("w")}.values()], ids=type
)
def test_rules_are_one_or_several(given, tmp_path):
    checkpoint.save(tmp_path / "a", {"w": jnp.ones(3)}, given)
    assert checkpoint.read(tmp_path / "a").rules == (Full("w"),)


@pytest.mark.parametrize("name", [[], {}, None, "Other"], ids=repr)
def test_unknown_names(name, saved):
    """Whatever stands in the place of a method's is said; nothing registers schemes."""
    for kind, place in (("rule", "rules"), ("node", "adapter")):
        before = fields_of(saved[0])
        edit(saved[0], **{place: [before[place][0] | {kind: name}, *before[place][1:]]})
        with refused(ValueError, "path", saved[0], f"the {kind} {name!r}, which is not registered"):
            checkpoint.restore(saved[0])
        edit(saved[0], **before)
    init = {"options": {"scheme": {"scheme": name, "fields": {}}}}
    init["function"] = "jlora.initializers.loftq"
    edit(saved[0], rules=[before["rules"][0] | {"init": init}])
    with refused(ValueError, "path", saved[0], f"has the scheme {name!r}", "Take another"):
        checkpoint.read(saved[0])


def test_an_error_of_arrays_keeps_its_end(tmp_path):
    """There is the cause, however long the paths before it."""
    folder = tmp_path.joinpath(*["a_long_name" * 9] * 3)
    checkpoint.save(folder / "a", {"head": jnp.ones(3)}, Full("head"))
    shutil.rmtree(folder / "a" / "adapter" / "d")
    with pytest.raises(ValueError, match=r"\.\.\. .*/a/adapter/d/\w+\"\)\. Take another") as found:
        checkpoint.restore(folder / "a")
    assert len(str(found.value)) < 800 + len(str(folder))


def test_other_arrays_than_the_metadata_say(tmp_path):
    """The error says which, and gives no option of Orbax."""
    for name, leaves in (("a", ("x", "y")), ("b", ("x",))):
        adapter = {leaf: jnp.ones(3) for leaf in leaves}
        checkpoint.save(tmp_path / name, adapter, Full(".*"))
    shutil.rmtree(tmp_path / "a" / "adapter")
    shutil.copytree(tmp_path / "b" / "adapter", tmp_path / "a" / "adapter")
    with pytest.raises(ValueError, match=r"y: .*MISSING\)\. Take another checkpoint") as found:
        checkpoint.restore(tmp_path / "a")
    assert "partial_restore" not in str(found.value)


def test_no_parameters_are_no_damage(saved, tmp_path):
    """An empty folder, an adapter or steps cannot be saved again as parameters."""
    (tmp_path / "steps" / "12").mkdir(parents=True)
    for folder in (tmp_path / "steps" / "12", tmp_path / "steps", saved[0]):
        with refused(ValueError, "path", folder, "Give the whole folder of a checkpoint"):
            checkpoint.base_values(folder)


def test_values_like_another_tree(tmp_path):
    """Paths and shapes are compared; dtypes are those of the checkpoint."""
    checkpoint.export(tmp_path / "base", {"w": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.ones(3)})
    like = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    assert checkpoint.base_values(tmp_path / "base", like=like)["w"].dtype == jnp.bfloat16
    like = {"w": jnp.zeros((3, 4)), "c": jnp.zeros(3)}
    with refused(ValueError, "path", "w", "expected shape (3, 4), got (4, 3)", "b", "c"):
        checkpoint.base_values(tmp_path / "base", like=like)


def test_values_like_a_tree_are_read_in_pieces(tmp_path, monkeypatch):
    """So the metadata are not read for each leaf, nor all leaves held at once."""
    tree = {f"w{i}": i + jnp.arange(1.0 + i) for i in range(50)} | {"large": jnp.ones(10**4)}
    checkpoint.export(tmp_path / "base", tree)
    sizes = []

    def restore(self, *args, **kwargs):
        values = original(self, *args, **kwargs)
        held = [x for x in jax.tree.leaves(values) if x is not ocp.PLACEHOLDER]
        sizes.append(sum(x.nbytes for x in held))
        return values

    original = ocp.PyTreeCheckpointer.restore
    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", restore)
    assert_equal(checkpoint.base_values(tmp_path / "base", like=tree), tree)
    total = sum(x.nbytes for x in tree.values())
    assert len(sizes) <= 17 and max(sizes) < tree["large"].nbytes + total / 16

"""`jlora.plan` and `jlora plan` without a compiler; `plan_on_devices.py` has what needs devices."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plan_jobs
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from messages import check_text, refused

import jlora
from jlora import sharding
from jlora._planning import _mesh
from tests.cli.test_cli import run

JOBS = pathlib.Path(plan_jobs.__file__)
MESH = AbstractMesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
LOSS, BASE, ADAPTER, (X,) = JOB = plan_jobs.job(MESH)


@functools.cache
def planned():
    return jlora.plan(*JOB, capacity=10**9)


def test_arithmetic():
    """Every number, written out."""
    found = planned()
    base = 2 * (2 * 4 * 256 * 1024) // 8  # two stacks in bfloat16, over 8 devices
    a = 4 * 8 * (256 // 4 + 1024 // 2)  # up's over fsdp, down's over tensor
    b = 4 * 8 * (1024 // 2 + 256 // 4)
    adapter = 4 * (a + b)
    batch = 2 * 16 * 64 * 256 // 4
    assert found[:2] == (8, None)
    assert found[3:8] == (base, adapter, 2 * adapter + 4, batch, adapter)  # and Adam's count
    assert found.exact == sum(found[3:8])
    assert found.activations is found.peak is found.fits is None
    assert found._replace(capacity=found.exact).fits is None
    assert found._replace(capacity=found.exact - 1).fits is False


def test_the_table():
    sizes = (2**20, 512, 1024, 64, 512)
    found = jlora.types.Plan(8, None, dict(MESH.shape), *sizes, 2**30, 2**31, capacity=None)
    exact = found._replace(activations=None, peak=None, capacity=2**30)
    bare = found._replace(missing_options=("xla_one", "xla_two"))
    for plan in (
        found,
        found._replace(capacity=2**30),
        exact,
        exact._replace(capacity=2**20),
        bare,
    ):
        check_text(str(plan))


def test_full_fine_tuning_is_the_same_with_an_empty_base():
    layer = lambda x, w: (x @ w["up"] @ w["down"], None)  # noqa: E731
    loss = lambda params, _, x: jax.lax.scan(layer, x, params)[0].var()  # noqa: E731
    found = jlora.plan(loss, {}, BASE, (X,), optax.adam(1e-3))
    size = 2 * (2 * 4 * 256 * 1024) // 8
    assert (found.base, found.adapter, found.moments) == (0, size, 2 * size + 4)


BARE = jax.ShapeDtypeStruct(X.shape, X.dtype)
WHOLE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BASE)
PLACED = jax.tree.map(lambda a, s: a.update(sharding=s), ADAPTER, sharding.specs(BASE, ADAPTER))
# Jobs of which some leaves have lost their shardings, and what is said of it.
LOST = {
    "base": (  # as jax.eval_shape(lora.init, ...) gives it
        (LOSS, WHOLE, ADAPTER, (X,)), "base", "2 of 2 paths: down, up", "that you gave to `init`"
    ),
    "one": ((LOSS, BASE | {"extra": BARE}, ADAPTER, (X,)), "base", "1 of 3 paths: extra"),
    "quantized": (
        (LOSS, jlora.quantize(WHOLE, jlora.NF4(".*")), ADAPTER, (X,)),
        *("base", "2 of 2 paths: down, up", "that you gave to `init`"),
    ),
    "args": ((LOSS, BASE, ADAPTER, ({"ids": BARE},)), "args", "1 of 1 paths: 0/ids"),
    "adapter": (
        (LOSS, BASE, PLACED | {"up": ADAPTER["up"]}, (X,)),
        *("adapter", "2 of 4 paths: up/a, up/b", "jlora.sharding.specs(base, adapter)"),
    ),
    "full": ((LOSS, {}, WHOLE, (X,)), "adapter", "2 of 2 paths"),
}  # fmt: skip


@pytest.mark.parametrize("part", LOST)
def test_shapes_that_lost_their_shardings_are_refused(part):
    """Rather than planned whole on every device, as an exact number."""
    job, *facts = LOST[part]
    with refused(ValueError, *facts):
        jlora.plan(*job)


def test_what_eval_shape_gives_along_explicit_axes():
    """There it keeps them, so that its base is planned as it lies."""
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"), (AxisType.Explicit,) * 2)
    rows = NamedSharding(mesh, P("fsdp"))
    params, x = (jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=rows) for _ in range(2))
    key = jax.random.key(0)
    with jax.sharding.use_abstract_mesh(mesh):
        spread = lambda w: jax.sharding.reshard(w, P())  # noqa: E731
        lora = jlora.transform(lambda p, x: x @ spread(p["w"]), jlora.LoRA(rank=2))
        base, adapter = jax.eval_shape(lora.init, key, {"w": params}, x)
        found = jlora.plan(lambda a, b, x: lora.apply(b, a, x).sum(), base, adapter, (x,))
    assert (found.base, found.replicated) == (4 * 64 * 64 // 4, False)


@pytest.mark.parametrize("kind", ["spec", "arrays"])
def test_a_base_that_is_whole_on_every_device(kind):
    """Data parallelism: accepted, and said where the bytes are."""
    loss, base, adapter, args = plan_jobs.job(MESH, d=16, width=32)
    everywhere = NamedSharding(MESH, P())
    if kind == "spec":
        base = jax.tree.map(lambda x: x.update(sharding=everywhere), base)
    else:  # on no mesh, as jax.jit replicates them
        base = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), base)
        adapter = jax.tree.map(lambda x: x.update(sharding=everywhere), adapter)
    found = jlora.plan(loss, base, adapter, args)
    assert (found.base, found.replicated) == (2 * (2 * 4 * 16 * 32), True)
    [line] = [line for line in str(found).splitlines() if line.startswith("base")]
    assert line.endswith("exact, all of it on every device")
    assert "on every device" not in str(planned())


def test_numbers_need_no_sharding():
    """A step's count is everywhere, and no part of what a base takes."""
    count = jax.ShapeDtypeStruct((), jnp.int32)
    step = lambda adapter, base, x, count: LOSS(adapter, base, x) + count  # noqa: E731
    found = jlora.plan(step, BASE, ADAPTER, (X, count))
    assert found.batch == planned().batch + 4


def test_arguments_count_as_in_a_step():
    """NumPy's integers have 32 bits in JAX, and a Python number widens no activation."""
    seen = []

    def loss(adapter, base, ids, factor):
        rows = (base["table"] + adapter["table"])[ids] * factor
        seen.append(rows.dtype)
        return rows.sum()

    base = {"table": jnp.ones((8, 4), jnp.bfloat16)}
    found = jlora.plan(loss, base, base, (np.arange(6), 0.5), compile=False)
    assert found.batch == 4 * 6 + 4
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}


def test_compiling_needs_devices():
    with refused(ValueError, "compile", "needs a mesh of devices"):
        jlora.plan(*JOB, compile=True)


@pytest.mark.parametrize(
    ("args", "got"),
    [
        (jnp.ones((4, 16)), "float32[4,16]"),
        ({"x": jnp.ones(3)}, "an object of type dict"),
        (None, "an object of type NoneType"),
    ],
    ids=["array", "dict", "None"],
)
def test_other_arguments_are_a_tuple(args, got):
    """An array would be unpacked along its rows."""
    lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2))
    base, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((16, 4))}, jnp.ones((1, 16)))
    with refused(TypeError, "args", f"got {got}", "plan(loss, base, adapter, (x,))"):
        jlora.plan(lambda a, b, x: lora.apply(b, a, x).sum(), base, adapter, args)


def test_what_the_step_refuses_is_refused():
    """Without a compiler too: the step is traced."""
    with pytest.raises(TypeError, match="scalar-output"):
        jlora.plan(lambda *xs: LOSS(*xs) * jnp.ones(2), BASE, ADAPTER, (X,))


# ------------------------------------------------------------------------------ the command line


SLICE = ("--topology", "v5p:2x2x2", "--mesh", "fsdp=4,tensor=2", "--arithmetic")


@pytest.mark.parametrize("name", ["job", "sgd"])
def test_command(name):
    found = json.loads(run("plan", f"{JOBS}:{name}", *SLICE, "--json").stdout)
    expected = jlora.plan(*getattr(plan_jobs, name)(MESH))._asdict()
    assert expected.pop("program") is None and expected.pop("missing_options") == ()
    capacity = _mesh.CHIPS["v5p"].capacity
    assert found == expected | {
        "topology": "v5p:2x2x2",
        "device": "TPU v5",
        "capacity": capacity,
        "fits": None,
    }
    text = run("plan", f"plan_jobs:{name}", *SLICE).stdout
    assert (
        text.startswith("8 × TPU v5, fsdp=4 × tensor=2") and " of 95.7 GiB for activations" in text
    )


def test_what_does_not_fit_is_exit_code_1():
    args = ("--topology", "v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--arithmetic")
    assert "does not fit in 15.8 GiB" in run("plan", f"{JOBS}:large", *args, code=1).stdout


# The argument that is named first, and what is given.
ERRORS = {
    "wrong": ("JOB", f"{JOBS}:wrong", *SLICE),
    "nowhere": ("JOB", f"{JOBS}:nowhere", *SLICE),
    "lost": ("`base`", f"{JOBS}:lost", *SLICE),
    "missing": ("JOB", f"{JOBS}:missing", *SLICE),
    "no name": ("JOB", f"{JOBS}", *SLICE),
    "no module": ("JOB", "nowhere:job", *SLICE),
    "few": ("--mesh", f"{JOBS}:job", "--topology", "v5p:2x2x2", "--mesh", "fsdp=4"),
    "count": ("--topology", f"{JOBS}:job", "--topology", "v5p-8", "--mesh", "fsdp=4"),
    "tpu7x": ("--mesh", f"{JOBS}:job", "--topology", "tpu7x:2x2x1", "--mesh", "fsdp=4"),
    "a word": ("--mesh", f"{JOBS}:job", "--topology", "v5p:2x2x2", "--mesh", "fsdp=four"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_the_command(case):
    named, *args = ERRORS[case]
    result = run("plan", *args, code=2)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"jlora: {named}")
    check_text(result.stderr.strip())


def test_without_libtpu_it_says_so(monkeypatch):
    monkeypatch.setattr(_mesh.importlib.util, "find_spec", lambda name: None)
    text = run("plan", f"{JOBS}:job", *SLICE[:-1]).stdout
    assert "without the compiler for TPUs" in text
    check_text(text)


def test_options_of_a_compiler_that_is_not_there(monkeypatch):
    """None are known, nor are there any for other platforms."""
    monkeypatch.setattr(_mesh.importlib.util, "find_spec", lambda name: None)
    assert [jlora.compiler_options(p) for p in (None, "tpu", "cpu", "cuda")] == [{}] * 4


def test_the_job_of_the_guide(tmp_path):
    """It is whole: the file alone, as the page has it, gives a base that is divided."""
    page = pathlib.Path(__file__).parents[2] / "notebooks" / "pods.md"
    [code] = [
        b
        for b in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
        if "def job(mesh)" in b
    ]
    (tmp_path / "job.py").write_text(code)
    found = json.loads(run("plan", f"{tmp_path}/job.py:job", *SLICE, "--json").stdout)
    assert found["base"] == 2 * 4 * 4096 * 16384 // 8
    assert (found["replicated"], found["fits"]) == (False, None)

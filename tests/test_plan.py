"""`jlora.plan` and `jlora plan` without a compiler; `plan_on_devices.py` has what needs devices."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import plan_jobs
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_cli import run

import jlora
from jlora import sharding
from jlora._planning import _mesh

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
    assert str(found) == (
        "8 × device, fsdp=4 × tensor=2  a device\n"
        "base (frozen)                   1.0 MiB  exact\n"
        "adapter (trainable)               512 B  exact\n"
        "moments                         1.0 KiB  exact\n"
        "batch                              64 B  exact\n"
        "gradients                         512 B  exact\n"
        "activations                     1.0 GiB  compiled\n"
        "peak                            2.0 GiB  compiled\n"
        "the capacity of a device is not known"
    )
    found = found._replace(capacity=2**30)
    assert str(found).endswith("\ndoes not fit in 1.0 GiB")
    exact = found._replace(activations=None, peak=None)
    assert str(exact).endswith(
        "gradients                         512 B  exact\n"
        "sum without activations         1.0 MiB  exact\n"
        "leaves 1023.0 MiB of 1.0 GiB for activations"
    )
    assert str(exact._replace(capacity=2**20)).endswith("\ndoes not fit in 1.0 MiB")


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
    "base": (
        (LOSS, WHOLE, ADAPTER, (X,)),  # as jax.eval_shape(lora.init, ...) gives it
        "`base` has shapes without `sharding`, on a mesh of fsdp=4 × tensor=2, at 2 of 2 paths: "
        "down, up. Give the parameters that you gave to `init`, not the `base` that jax.eval_shape "
        "returns: jax.eval_shape drops shardings along automatic mesh axes. Write a leaf as "
        "jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)); with "
        "PartitionSpec() every device holds all of it.",
    ),
    "one": ((LOSS, BASE | {"extra": BARE}, ADAPTER, (X,)), "at 1 of 3 paths: extra. Give the"),
    "quantized": (
        (LOSS, jlora.quantize(BASE, jlora.NF4(".*")), ADAPTER, (X,)),
        "at 2 of 2 paths: down, up. Give the parameters that you gave to `init`",
    ),
    "args": (
        (LOSS, BASE, ADAPTER, ({"ids": BARE},)),
        "`args` has shapes without `sharding`, on a mesh of fsdp=4 × tensor=2, at 1 of 1 paths: "
        "0/ids. Write a leaf as",
    ),
    "adapter": (
        (LOSS, BASE, PLACED | {"up": ADAPTER["up"]}, (X,)),
        "`adapter` has shapes without `sharding`, on a mesh of fsdp=4 × tensor=2, at 2 of 4 paths: "
        "up/a, up/b. jlora.sharding.specs(base, adapter) returns the shardings of an adapter.",
    ),
    "full": ((LOSS, {}, WHOLE, (X,)), "`adapter` has shapes without `sharding`, on a mesh of"),
}


@pytest.mark.parametrize("part", LOST)
def test_shapes_that_lost_their_shardings_are_refused(part):
    """Rather than planned whole on every device, as an exact number."""
    job, message = LOST[part]
    with pytest.raises(ValueError, match=re.escape(message)):
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


def test_compiling_needs_devices():
    with pytest.raises(ValueError, match="`compile` needs a mesh of devices, but the shard"):
        jlora.plan(*JOB, compile=True)


@pytest.mark.parametrize(
    ("args", "got"),
    [
        (jnp.ones((4, 16)), r"float32\[4,16\]"),
        ({"x": jnp.ones(3)}, "an object of type dict"),
        (None, "an object of type NoneType"),
    ],
    ids=["array", "dict", "None"],
)
def test_other_arguments_are_a_tuple(args, got):
    """An array would be unpacked along its rows."""
    lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2))
    base, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((16, 4))}, jnp.ones((1, 16)))
    message = (
        rf"`args` must be the tuple of .*; got {got}\. Write plan\(loss, base, adapter, \(x,\)\)"
    )
    with pytest.raises(TypeError, match=message):
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
    assert expected.pop("program") is None
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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((f"{JOBS}:wrong", *SLICE), "must return (loss, base, adapter, args) or"),
        (
            (f"{JOBS}:nowhere", *SLICE),
            f"JOB: no leaf that {JOBS}:nowhere returned is on the mesh that it got. Give "
            "each leaf of the base and of the arguments a sharding: jax.ShapeDtypeStruct(",
        ),
        ((f"{JOBS}:lost", *SLICE), "jlora: `base` has shapes without `sharding`, on a mesh of"),
        ((f"{JOBS}:missing", *SLICE), "plan_jobs.py has no missing"),
        ((f"{JOBS}", *SLICE), "JOB: expected module:NAME or file.py:NAME"),
        (("nowhere:job", *SLICE), "JOB: nowhere cannot be imported (ModuleNotFoundError"),
        (
            (f"{JOBS}:job", "--topology", "v5p:2x2x2", "--mesh", "fsdp=4"),
            "jlora: --mesh must have the 8 devices of v5p:2x2x2; got fsdp=4 = 4.",
        ),
        (
            (f"{JOBS}:job", "--topology", "v5p-8", "--mesh", "fsdp=4"),
            "jlora: --topology must be a chip and the shape of the slice, such as v5p:4x4x8. The ",
        ),
        (
            (f"{JOBS}:job", "--topology", "tpu7x:2x2x1", "--mesh", "fsdp=4"),
            "must have the 8 devices of tpu7x:2x2x1",
        ),
        (
            (f"{JOBS}:job", "--topology", "v5p:2x2x2", "--mesh", "fsdp=four"),
            "--mesh: expected axes such as fsdp=16,tensor=8; got 'fsdp=four'.",
        ),
    ],
)
def test_errors_of_the_command(args, message):
    result = run("plan", *args, code=2)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_without_libtpu_it_says_so(monkeypatch):
    monkeypatch.setattr(_mesh.importlib.util, "find_spec", lambda name: None)
    text = run("plan", f"{JOBS}:job", *SLICE[:-1]).stdout
    assert text.endswith(
        "GiB of 95.7 GiB for activations\n"
        "activations are unknown without the compiler for TPUs: "
        'pip install "jax[tpu]"\n'
    )


def test_the_job_of_the_guide(tmp_path):
    """It is whole: the file alone, as the page has it, gives a base that is divided."""
    page = pathlib.Path(__file__).parents[1] / "notebooks" / "pods.md"
    [code] = [
        b
        for b in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
        if "def job(mesh)" in b
    ]
    (tmp_path / "job.py").write_text(code)
    found = json.loads(run("plan", f"{tmp_path}/job.py:job", *SLICE, "--json").stdout)
    assert found["base"] == 2 * 4 * 4096 * 16384 // 8
    assert (found["replicated"], found["fits"]) == (False, None)

"""A process that saves and restores a sharded adapter, for `test_checkpoint_mesh.py`.

    checkpoint_worker.py FOLDER save:2x2,restore:4x1 DEVICES [PROCESS PROCESSES PORT]
    checkpoint_worker.py FOLDER fail:2x1 DEVICES [PROCESS PROCESSES PORT]

Each task has the shape of its mesh; each process has DEVICES forced CPU devices. What fails does so
in FOLDER/fail.
"""

import contextlib
import functools
import os
import re
import sys
import traceback

if __name__ == "__main__":  # before JAX counts devices
    flags = f"--xla_force_host_platform_device_count={sys.argv[3]}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ["JAX_PLATFORMS"] = "cpu"

import disks
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import checkpoint


def main(folder, tasks, devices, process="0", processes="1", port="0"):
    """Does the tasks; a failing process takes the others with it."""
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        limits = {"heartbeat_timeout_seconds": 10, "shutdown_timeout_seconds": 10}
        jax.distributed.initialize(f"localhost:{port}", int(processes), int(process), **limits)
    try:
        for task in tasks.split(","):
            name, shape = task.split(":")
            {"save": save, "restore": restore, "fail": fail}[name](folder, make_mesh(shape))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # not through the barrier at exit, where the others would be waited for


def make_mesh(shape):
    """A mesh such as 2x2 of the first devices."""
    rows, columns = map(int, shape.split("x"))
    devices = jax.devices()[: rows * columns]
    return jax.make_mesh((rows, columns), ("x", "y"), (AxisType.Auto,) * 2, devices=devices)


RULES = (
    jlora.LoRA("layers", rank=4, alpha=8, init=jlora.initializers.gaussian),
    jlora.Full("norm"),
)


@functools.cache
def problem(mesh):
    """A base, an adapter and both merged; the arrays lie on `mesh`.

    The numbers are small integers, so that sums are exact in whatever order a mesh adds them.
    """

    def model(params, x):
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]
        return h * params["norm"]

    def on_mesh(x, sharding):
        values = np.random.default_rng(x.shape).integers(-9, 9, x.shape).astype(x.dtype)
        return jax.make_array_from_callback(x.shape, sharding, values.__getitem__)

    shapes = {"layers": (3, 16, 16), "norm": (16,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    init = jlora.transform(model, *RULES).init
    adapter = jax.eval_shape(init, jax.random.key(0), params, jnp.ones((1, 16)))[1]
    specs = {"layers": P(None, "x", "y"), "norm": P("y")}
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    base = jax.tree.map(on_mesh, params, places)
    adapter = jax.tree.map(on_mesh, adapter, jlora.sharding.specs(places, adapter))
    return base, adapter, jlora.merge(base, adapter)


def save(folder, mesh):
    """The adapter, which is not overwritten, and the merged tree."""
    base, adapter, merged = problem(mesh)
    checkpoint.save(f"{folder}/adapter", adapter, RULES, base=base, step=5, hash_values=True)
    checkpoint.export(f"{folder}/merged", merged)
    kind, message = FileExistsError, "nothing is ever overwritten"
    if jax.process_index():
        kind, message = OSError, "process 0: .*nothing is ever overwritten"
    raises(kind, message, checkpoint.save, f"{folder}/adapter", adapter, RULES)


def restore(folder, mesh):
    """On this mesh, on the host, and the merged tree: all as if made here."""
    base, adapter, merged = problem(mesh)
    found = checkpoint.restore(f"{folder}/adapter", like=adapter, base=base)
    equal(found, adapter)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(adapter), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
    host = checkpoint.restore(f"{folder}/adapter")
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host))
    equal(host, adapter)
    saved = checkpoint.read(f"{folder}/adapter")
    assert (saved.rules, saved.step) == (RULES, 5)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), merged
    )
    with ocp.StandardCheckpointer() as plain:
        equal(plain.restore(f"{folder}/merged", shapes), merged)


def fail(folder, mesh):
    """Each process in turn cannot write, or gives what it must not: all raise, and are in step."""
    base, adapter, merged = problem(mesh)
    number, folder = jax.process_index(), f"{folder}/fail"
    save = functools.partial(checkpoint.save, rules=RULES, base=base)
    right = {"adapter": (save, adapter), "merged": (checkpoint.export, merged)}
    for culprit in range(jax.process_count()):
        mine, place = number == culprit, f"{folder}/lost{culprit}"
        message, kind = ("", TypeError) if mine else (f"process {culprit}: .*", RuntimeError)
        for name, (write, tree) in right.items():
            with disks.full() if mine else contextlib.nullcontext():
                raises(OSError, f"{message}File too large", write, place, tree)
            raises(kind, f"{message}`{name}` must", write, place, {} if mine else tree)
        assert not os.path.exists(place)
    save(f"{folder}/adapter", adapter)
    here = f"{folder}/adapter" if number else f"{folder}/elsewhere"
    kind = RuntimeError if number else FileNotFoundError
    raises(kind, "there is no checkpoint at", checkpoint.restore, here)
    equal(checkpoint.restore(f"{folder}/adapter", like=adapter, base=base), adapter)
    assert [x for x in os.listdir(folder) if ".orbax-" not in x] == ["adapter"]


def raises(kind, pattern, work, *arguments):
    """The work must raise."""
    try:
        work(*arguments)
    except kind as e:
        assert re.search(pattern, str(e)), (pattern, str(e))
    else:
        raise AssertionError(f"no {kind.__name__}: {pattern}")


def equal(actual, expected):
    """Structures and bits, of the shards that this process has."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        shards = {} if isinstance(x, np.ndarray) else {s.device: s for s in x.addressable_shards}
        for shard in y.addressable_shards:
            same = shards.get(shard.device)
            assert same is None or same.index == shard.index
            part = x[shard.index] if same is None else same.data
            np.testing.assert_array_equal(np.asarray(part), np.asarray(shard.data))


if __name__ == "__main__":
    main(*sys.argv[1:])

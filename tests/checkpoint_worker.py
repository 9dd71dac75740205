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
import resource
import sys
import time
import traceback


def main(folder, tasks, devices, process="0", processes="1", port="0"):
    """Sets up the devices, then does the tasks; a failing process takes the others with it."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"localhost:{port}",
            int(processes),
            int(process),
            heartbeat_timeout_seconds=10,
            shutdown_timeout_seconds=10,
        )
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
    import jax

    rows, columns = map(int, shape.split("x"))
    devices, types = jax.devices()[: rows * columns], (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((rows, columns), ("x", "y"), types, devices=devices)


def problem(mesh):
    """A base, an adapter and rules; the arrays lie on `mesh`.

    The numbers are small integers, so that sums are exact in whatever order a mesh adds them.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    import jlora

    def model(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]

    def lies(spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    rules = (
        jlora.LoRA("layers", rank=4, alpha=8, init=jlora.initializers.gaussian),
        jlora.Full("norm"),
    )
    lora = jlora.transform(lambda p, x: model(p, x) * p["norm"], *rules)

    def integers(seed, like):
        return jax.random.randint(jax.random.key(seed), like.shape, -9, 9).astype(like.dtype)

    def start():
        params = {"layers": integers(0, jnp.empty((3, 16, 16))), "norm": jnp.arange(16.0)}
        base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 16)))
        return base, jax.tree.map(functools.partial(integers, 1), adapter)

    _, adapter = jax.eval_shape(start)
    low = adapter["layers"]._replace(a=lies((None, "x")), b=lies((None, None, "y")))
    shardings = (
        {"layers": lies((None, "x", "y")), "norm": lies("y")},
        {"layers": low, "norm": lies("y")},
    )
    return *jax.jit(start, out_shardings=shardings)(), rules


def save(folder, mesh):
    """The adapter, and the merged tree; the hashes of both to the standard output."""
    from jlora import checkpoint, merge

    base, adapter, rules = problem(mesh)
    checkpoint.save(f"{folder}/adapter", adapter, rules, base=base, step=5, hash_values=True)
    checkpoint.export(f"{folder}/merged", merge(base, adapter))
    try:
        checkpoint.save(f"{folder}/adapter", adapter, rules)
    except OSError as e:
        assert "nothing is ever overwritten" in str(e) or "process 0 failed" in str(e), e
    else:
        raise AssertionError("overwritten")


def restore(folder, mesh):
    """On this mesh, on the host, and the merged tree: all as if made here."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from jlora import checkpoint, merge

    base, adapter, rules = problem(mesh)
    restored = checkpoint.restore(f"{folder}/adapter", like=adapter, base=base)
    equal(restored, adapter)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(adapter), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
    host = checkpoint.restore(f"{folder}/adapter")
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host))
    equal(host, adapter)
    saved = checkpoint.read(f"{folder}/adapter")
    assert (saved.rules, saved.step) == (rules, 5)
    merged = merge(base, adapter)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), merged
    )
    with ocp.StandardCheckpointer() as plain:
        equal(plain.restore(f"{folder}/merged", abstract), merged)


def fail(folder, mesh):
    """Each process in turn cannot write, or gives what it must not: all raise, and are in step."""
    import jax

    from jlora import checkpoint, merge

    base, adapter, rules = problem(mesh)
    number, folder = jax.process_index(), f"{folder}/fail"

    def save(path, given):
        checkpoint.save(path, given, rules, base=base)

    for culprit in range(jax.process_count()):
        mine, place = number == culprit, f"{folder}/lost{culprit}"
        said = "" if mine else f"process {culprit}: .*"
        kind = TypeError if mine else RuntimeError
        for write, name, right in (
            (save, "adapter", adapter),
            (checkpoint.export, "merged", merge(base, adapter)),
        ):
            with no_room() if mine else contextlib.nullcontext():
                raises(OSError, f"{said}File too large", write, place, right)
            raises(kind, f"{said}`{name}` must", write, place, {} if mine else right)
        assert not os.path.exists(place)

    save(f"{folder}/adapter", adapter)
    here = f"{folder}/adapter" if number else f"{folder}/elsewhere"
    kind = RuntimeError if number else FileNotFoundError
    raises(kind, "there is no checkpoint at", checkpoint.restore, here)
    equal(checkpoint.restore(f"{folder}/adapter", like=adapter, base=base), adapter)
    assert sorted(os.listdir(folder)) == ["adapter"]


@contextlib.contextmanager
def no_room():
    """This process can write next to nothing."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def raises(kind, pattern, work, *arguments):
    """The work must raise, and soon."""
    start = time.monotonic()
    try:
        work(*arguments)
    except kind as e:
        assert re.search(pattern, str(e)), (pattern, str(e))
    else:
        raise AssertionError(f"no {kind.__name__}: {pattern}")
    assert time.monotonic() - start < 30


def equal(actual, expected):
    """Structures and bits, of the shards that this process has."""
    import jax
    import numpy as np

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        for shard in y.addressable_shards:
            part = np.asarray(x)[shard.index] if isinstance(x, np.ndarray) else part_of(x, shard)
            np.testing.assert_array_equal(part, np.asarray(shard.data))


def part_of(x, shard):
    """The values of `x` on the device of `shard`, for the same indices."""
    import numpy as np

    (same,) = [s for s in x.addressable_shards if s.device == shard.device]
    assert same.index == shard.index
    return np.asarray(same.data)


if __name__ == "__main__":
    main(*sys.argv[1:])

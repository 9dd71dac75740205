"""Fine-tune a model that is sharded over many devices of many hosts.

Every host runs the same line:

    python examples/pod.py train --shape 175b --mesh 16,8 --base gs://…/gpt3 --data ids.npy

On Cloud TPU, GKE, SLURM and Open MPI the processes find each other. Elsewhere say where process 0
is and which one this is; so for a rehearsal on one machine, here with eight devices on a CPU:

    export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8
    python examples/pod.py train --coordinator localhost:1234 --num-processes 1 --process-id 0

The base is sharded over the mesh from the start and never whole in one place; the adapter is
sharded like its weights. OUT must be a folder that all processes see. OUT/checkpoints/STEP holds
what a step changes. Start the same line again, with as many processes or another number, and
training goes on from the last checkpoint to the same losses. OUT/merged/STEP is the merged model.

If a process fails, its error is on its standard error, and all others end within a minute.

Letters in the shapes: B sequences in a batch, L tokens, N sequences in all.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from models import gpt, llama
from models.parts import RULES, SEQUENCE_RULES, shardings
from progress import progress

import jlora
from jlora import checkpoint, sharding

LEARNING_RATE = 2e-4
STEPS = 100
BATCH = 16
RANK = 8
SEED = 0
SAVE_EVERY = 20
LOG_EVERY = 10
OUT = "out/pod"
HEARTBEAT = 30  # seconds without a sign of a process, until all others end
SHUTDOWN = 30  # seconds in which all processes must end once one has
RUN = ("shape", "adapt", "rank", "batch", "length", "learning_rate", "seed", "base", "data")

# ---- the models ---------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A model and the most tokens of a sequence."""

    model: nn.Module
    length: int


SMALL = gpt.Config(vocab=128, positions=64, layers=2, dim=64, heads=8)
# A table of tokens whose rows can be cut along the mesh.
GPT3 = dataclasses.replace(gpt.SIZES["gpt3-175b"], pad_vocab=128)
LARGE = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "remat": True}
SHAPES = {
    "small": Shape(gpt.GPT(SMALL), 64),
    "7b": Shape(llama.Llama(llama.SIZES["llama2-7b"], **LARGE), 4096),
    "8b": Shape(llama.Llama(llama.SIZES["llama3-8b"], **LARGE), 8192),
    "70b": Shape(llama.Llama(llama.SIZES["llama2-70b"], **LARGE), 4096),
    "175b": Shape(gpt.GPT(GPT3, **LARGE), 2048),
}


def make_rules(model: nn.Module, adapt: str, rank: int) -> tuple[jlora.LoRA, ...]:
    """The paper's query and value projections, or every dense layer."""
    if adapt == "all":
        return (jlora.LoRA(rank=rank),)
    if isinstance(model, gpt.GPT):  # one kernel for queries, keys and values
        return (jlora.LoRA("c_attn/kernel", rank=rank, slots=jlora.Slots(3, (0, 2))),)
    return (jlora.LoRA("(query|value)/kernel", rank=rank),)


# ---- processes ----------------------------------------------------------------------------------


@contextlib.contextmanager
def end_process_on_error() -> Iterator[None]:
    """Ends the process where it fails, so that the others end too.

    An error that leaves Python as usual waits at JAX's exit for the other processes, which wait
    for this one in the next step. One that is gone is missed: by collectives at once where they
    notice, else by heartbeats.
    """
    try:
        yield
    except BaseException:
        try:
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also where nothing can be written
            os._exit(1)


def connect(args: argparse.Namespace) -> None:
    """Joins the other processes; before anything else is done with JAX."""
    jax.distributed.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )


def say(text: str) -> None:
    """Prints a line, above the progress bar, on one process."""
    if jax.process_index() == 0:
        progress.write(text)


# ---- data ---------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order in which an epoch visits the sequences."""
    return np.random.default_rng((seed, epoch)).permutation(size)


class Data(NamedTuple):
    """Sequences of tokens, each a function of the seed and its number; so there is no state."""

    ids: np.ndarray | None  # (N, L + 1 or more), of which only what is used is read
    length: int
    vocab: int
    seed: int

    def read(self, visits: np.ndarray) -> np.ndarray:
        """The sequences that are visited as number `visits` (n,) from the start: (n, L + 1)."""
        if self.ids is None:  # for rehearsals: numbers that go up by the same step
            start = visits[:, None] * 7919 + self.seed
            stride = visits[:, None] % 5 + 1
            return ((start + stride * np.arange(self.length + 1)) % self.vocab).astype(np.int32)
        size = len(self.ids)
        index = [order(self.seed, visit // size, size)[visit % size] for visit in visits]
        rows = np.stack([self.ids[i, : self.length + 1] for i in index]).astype(np.int32)
        for i, row in zip(index, rows, strict=True):
            if len(row) <= self.length or row.min() < 0 or row.max() >= self.vocab:
                raise ValueError(
                    f"`--data`: expected {self.length + 1} tokens from 0 to {self.vocab - 1} in "
                    f"row {i}, got {len(row)} from {row.min()} to {row.max()}"
                )
        return rows


def rows_here(place: Any, batch: int) -> np.ndarray:
    """The rows of a batch of which this process has devices."""
    parts = place.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[part] for part in parts]))


def make_batch(data: Data, step: int, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The batch of a step, (B, L + 1); each process reads its own rows."""
    batch = like.shape[0]
    rows = data.read(step * batch + rows_here(like.sharding, batch))
    return jax.make_array_from_process_local_data(like.sharding, rows, like.shape)


# ---- training -----------------------------------------------------------------------------------


class State(NamedTuple):
    """What a step changes."""

    adapter: Any
    optimizer: Any


def make_loss(lora: jlora.types.Transformed, places: Any, dtype: Any) -> Any:
    """The mean loss of (adapter, base, ids), for an adapter that is sharded as `places` say.

    FSDP-sharded factors would be gathered in every layer: they are cast and gathered once a step.
    """
    whole = sharding.replicated(places, "fsdp")

    def loss_fn(adapter, base, ids):
        adapter = jax.tree.map(lambda x: x.astype(dtype), adapter)
        adapter = jax.lax.with_sharding_constraint(adapter, whole)
        return mean_loss(lora.apply(base, adapter, ids[:, :-1]), ids)

    return loss_fn


def mean_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The cross entropy of (B, L + 1) ids, each after the first, by (B, L, V) logits."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def make_step(loss_fn: Any, tx: optax.GradientTransformation) -> Any:
    """The training step: (state, base, ids) to (state, loss)."""

    def step(state, base, ids):
        loss, grads = jax.value_and_grad(loss_fn)(state.adapter, base, ids)
        updates, optimizer = tx.update(grads, state.optimizer, state.adapter)
        return State(optax.apply_updates(state.adapter, updates), optimizer), loss

    return step


class Job(NamedTuple):
    """A training run, before any array of it is there."""

    model: nn.Module
    rules: tuple[jlora.LoRA, ...]
    base: Any  # as the next two, `jax.ShapeDtypeStruct`s with shardings
    state: State
    ids: Any
    start: Any  # key to a base of random weights
    init: Any  # (key, base) to state
    step: Any  # (state, base, ids) to (state, loss)


def with_shardings(shapes: Any, places: Any) -> Any:
    """Gives each shape its sharding."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def places_of(tree: Any) -> Any:
    """The sharding of each array."""
    return jax.tree.map(lambda x: x.sharding, tree)


def make_base(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> tuple[nn.Module, Any, Any]:
    """The model, and the shapes and shardings of its frozen weights and of a batch."""
    model = SHAPES[args.shape].model
    key, ids = jax.random.key(0), jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32)
    places = shardings(jax.eval_shape(model.init, key, ids), mesh)  # by the axes' names
    shapes = jax.eval_shape(lambda key, ids: nn.unbox(model.init(key, ids)), key, ids)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    batch = jax.ShapeDtypeStruct((args.batch, args.length + 1), jnp.int32, sharding=rows)
    return model, with_shardings(shapes, places), batch


def make_job(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Job:
    """Everything that follows from the arguments and the mesh, traced and not computed."""
    model, base, ids = make_base(args, mesh)
    rules = make_rules(model, args.adapt, args.rank)
    lora = jlora.transform(model.apply, *rules)
    tx = jlora.optimizer(optax.adamw(args.learning_rate))

    def start(key):
        return nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32)))

    def init(key, base):
        _, adapter = lora.init(key, base, jax.ShapeDtypeStruct((1, args.length), jnp.int32))
        return State(adapter, tx.init(adapter))

    state = jax.eval_shape(init, jax.random.key(0), base)
    adapter = sharding.specs(base, state.adapter)
    moments = sharding.moments(state.optimizer, state.adapter, adapter)
    state = with_shardings(state, State(adapter, moments))
    loss_fn = make_loss(lora, adapter, model.dtype)
    every = NamedSharding(mesh, PartitionSpec())  # the loss is on every device
    return Job(
        model,
        rules,
        base,
        state,
        ids,
        start=jax.jit(start, out_shardings=places_of(base)),
        init=jax.jit(init, out_shardings=places_of(state)),
        step=jax.jit(
            make_step(loss_fn, tx),
            donate_argnums=0,
            out_shardings=(places_of(state), every),
            compiler_options=jlora.compiler_options(),
        ),
    )


def load_base(job: Job, path: epath.Path | None, key: jax.Array) -> Any:
    """The frozen weights, each device reading its part; without `path`, random ones."""
    if path is None:
        return job.start(key)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, job.base)


def restore(
    manager: ocp.CheckpointManager, like: State, base: Any, run: dict[str, Any]
) -> tuple[int, State]:
    """The step and state of the last checkpoint; step 0 and `like` where there is none.

    Raises:
        ValueError: if the checkpoint belongs to a run with other settings.
    """
    if (step := manager.latest_step()) is None:
        return 0, like
    # The settings first: with another rank, say, the state would not fit its template.
    saved = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
    if changed := [f"{k} was {saved.get(k)}, is {v}" for k, v in run.items() if saved.get(k) != v]:
        raise ValueError(f"cannot resume from {manager.directory}: " + "; ".join(changed))
    adapter = checkpoint.restore(manager.directory / str(step), like=like.adapter, base=base)
    args = ocp.args.Composite(optimizer=ocp.args.StandardRestore(like.optimizer))
    return step, State(adapter, manager.restore(step, args=args).optimizer)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: State,
    rules: Any,
    base: Any,
    run: Any,
    force: bool = False,
) -> None:
    """Writes what `restore` reads, if `step` is one of the manager's, or with `force`."""
    items = ocp.args.Composite(
        **checkpoint.items(state.adapter, rules, step=step, base=base),
        optimizer=ocp.args.StandardSave(state.optimizer),
        run=ocp.args.JsonSave(run),
    )
    manager.save(step, args=items, force=force)


def train(args: argparse.Namespace) -> None:
    """Trains from the last checkpoint, if any, and writes the merged model."""
    connect(args)
    mesh = jax.make_mesh(args.mesh, ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        job = make_job(args, mesh)
        base_key, key = jax.random.split(jax.random.key(args.seed))
        base = load_base(job, args.base, base_key)
        state = job.init(key, base)
        say(
            f"{jax.process_count()} processes, {jax.device_count()} devices; "
            f"parameters: {jlora.count(state.adapter):,} train, {jlora.count(base):,} frozen"
        )
        step, state = loop(args, job, base, state)
        if step < args.steps:
            return say(f"stopped at step {step}; the same line goes on from there")
        if not (place := args.out / "merged" / str(step)).exists():
            merge = jax.jit(jlora.merge, donate_argnums=0, out_shardings=places_of(job.base))
            checkpoint.export(place, merge(base, state.adapter))
        say(f"merged: {place}")


def loop(args: argparse.Namespace, job: Job, base: Any, state: State) -> tuple[int, State]:
    """Trains from the last checkpoint in `args.out`, if any, to `args.steps` or a preemption."""
    run = {name: str(getattr(args, name)) for name in RUN}
    ids = None if args.data is None else np.load(args.data, mmap_mode="r")
    data = Data(ids, args.length, job.model.config.vocab, args.seed)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        save_interval_steps=args.save_every,
        cleanup_tmp_directories=True,
        # An adapter is soon written; an error in the background would be heard much later.
        enable_async_checkpointing=False,
    )
    # Not in a `with`, which would wait for the other processes after an error too.
    manager = ocp.CheckpointManager(args.out / "checkpoints", options=options)
    start, state = restore(manager, state, base, run)
    say(f"from step {start} of {args.steps}")
    done, steps = start, range(start, args.steps)
    for step in progress(steps, initial=start, total=args.steps, disable=jax.process_index() > 0):
        state, loss = job.step(state, base, make_batch(data, step, job.ids))
        done = step + 1
        if done % args.log_every == 0:
            say(f"step {done}: loss {float(loss):.7f}")
        stop = manager.reached_preemption(done)  # SIGTERM: the machine is taken
        if stop or done == args.steps or manager.should_save(done):
            save(manager, done, state, job.rules, base, run, force=True)
        if stop:
            break
    manager.close()
    return done, state


# ---- planning -----------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> None:
    """Compiles steps for a slice that is not there; see `pod_plan`."""
    import pod_plan

    pod_plan.run(
        args, functools.partial(plan_step, args), SEQUENCE_RULES if args.sequence else RULES
    )


def plan_step(args: argparse.Namespace, method: str, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """What `jlora.plan` takes: loss, base, adapter, args and the optimizer of a method."""
    import pod_plan

    args = argparse.Namespace(**vars(args) | {"batch": args.rows * mesh.shape["fsdp"]})
    model, base, ids = make_base(args, mesh)
    if method == "full":

        def loss_fn(params, _, ids):
            return mean_loss(model.apply(params, ids[:, :-1]), ids)

        return loss_fn, {}, base, (ids,), pod_plan.in_float32(optax.adamw(LEARNING_RATE))
    norms = (jlora.Full(r"(.*norm|ln_\w)/scale$"),)
    adapt = "all" if method == "nf4" else method
    rules = norms if method == "floor" else make_rules(model, adapt, args.rank)
    lora, token = jlora.transform(model.apply, *rules), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if method == "nf4":
        dense = places_of(base)
        block = min(64, model.config.dim // max(mesh.shape.values()))  # a part of no other device
        base = jlora.quantize(base, jlora.NF4(block=block), sites=lora.sites(base, token))
        base = with_shardings(base, sharding.specs(dense, base))
        base = sharding.gathered(base, sharding.replicated(dense, "fsdp"))
    _, adapter = jax.eval_shape(lora.init, jax.random.key(0), base, token)
    places = sharding.specs(base, adapter)
    loss_fn = make_loss(lora, places, model.dtype)
    return loss_fn, base, with_shardings(adapter, places), (ids,), optax.adamw(LEARNING_RATE)


# ---- the command line ---------------------------------------------------------------------------


def location(name: str) -> epath.Path:
    """A folder or file, also in a bucket (`gs://…`)."""
    return epath.Path(name if "://" in name else os.path.abspath(name))


def mesh_shape(text: str) -> tuple[int, int]:
    """`16,8` is 16 devices along fsdp and 8 along tensor."""
    fsdp, tensor = map(int, text.split(","))
    return fsdp, tensor


def parse_plan(command: argparse.ArgumentParser) -> None:
    """The options of `plan`."""
    command.set_defaults(command=plan)
    add = command.add_argument
    add("--shape", choices=SHAPES, default="175b")
    add("--topology", default="v5p:4x4x8", help="a TPU slice, or cuda:SLICESxHOSTSxGPUS of H100s")
    add("--mesh", type=mesh_shape, default=(16, 8), help="devices along fsdp and tensor; 16,8")
    add("--smallest", metavar="CHIP", help="instead: slices of v5e, v5p or v6e until each fits")
    add("--methods", nargs="*", choices=("floor", "qv", "all", "nf4", "full"), help="default: all")
    add("--rank", type=int, default=RANK)
    add("--rows", type=int, default=1, help="sequences a step, for each device along fsdp")
    add("--length", type=int, help="tokens of a sequence; all that the shape allows")
    add("--sequence", action="store_true", help="tokens are cut along tensor between the layers")
    add("--out", default=OUT)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parse_plan(commands.add_parser("plan", help="what a step needs on a slice that is not there"))
    command = commands.add_parser("train", help="fine-tune, on every host")
    command.set_defaults(command=train)
    add = command.add_argument
    add("--shape", choices=SHAPES, default="small")
    add("--mesh", type=mesh_shape, default=(4, 2), help="devices along fsdp and tensor; 4,2")
    add("--adapt", choices=("qv", "all"), default="qv", help="query and value, or all dense layers")
    add("--rank", type=int, default=RANK)
    add("--batch", type=int, default=BATCH, help="sequences a step, over all processes")
    add("--length", type=int, help="tokens of a sequence; all that the shape allows")
    add("--learning-rate", type=float, default=LEARNING_RATE)
    add("--seed", type=int, default=SEED)
    add("--steps", type=int, default=STEPS)
    add("--save-every", type=int, default=SAVE_EVERY, help="steps from checkpoint to checkpoint")
    add("--log-every", type=int, default=LOG_EVERY, help="steps from loss to loss")
    add("--base", type=location, help="an Orbax checkpoint; without it, random weights")
    add("--data", type=pathlib.Path, help="NumPy file of ids (N, L + 1 or more); else made up")
    add("--out", type=location, default=location(OUT))
    add("--coordinator", help="host:port of process 0, where it is not found by itself")
    add("--num-processes", type=int)
    add("--process-id", type=int)
    args = parser.parse_args(argv)
    most = SHAPES[args.shape].length
    args.length = args.length or most
    if args.length > most:
        parser.error(f"--length is {args.length}, but sequences of {args.shape} have up to {most}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command."""
    args = parse(argv)
    with end_process_on_error():
        args.command(args)


if __name__ == "__main__":
    main()

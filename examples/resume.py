"""Train so that nothing is lost: kill the run at any moment, and resume it exactly.

    python examples/resume.py             # MiniLM on movie reviews; three minutes on two CPU cores
    python examples/resume.py --resume    # go on after Ctrl-C, kill -9, a full disk, a preemption

OUT/checkpoints/STEP holds all that a step changes: the adapter, the optimizer's state, the random
key and the position in the data. A checkpoint is written while training goes on, and appears whole
or not at all; the last `--keep` stay. On SIGTERM, which clusters send before they take a machine,
the run saves and stops. OUT/losses.txt has a line for each step. In the end it is the same, to the
last bit, as that of a run that was never stopped.

Each OUT/checkpoints/STEP is also a checkpoint of jlora: `checkpoint.restore` reads the adapter.

Letters in the shapes: N sentences, B sentences in a batch, L tokens.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import pathlib
import shutil
import socket
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from models import bert
from progress import progress
from quickstart import Batch, encode, take
from tokenizers import Tokenizer

import jlora
from jlora import checkpoint

LEARNING_RATE = 1e-3
STEPS = 200
BATCH = 32
LENGTH = 48  # in tokens; at most 4% of the sentences are longer, and cut
RANK = 8
DROPOUT = 0.1
SAVE_EVERY = 20
KEEP = 2
SEED = 0
OUT = pathlib.Path("out/resume")
RUN = ("batch", "length", "sentences", "layers", "rank", "seed")  # what the losses depend on
CHECKPOINTS, DELETED, LOSSES, LOCK = "checkpoints", "deleted", "losses.txt", "lock"

# ---- data ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Reader:
    """Gives batch after batch, each epoch in an order of its own, from any position on."""

    batch: Batch
    size: int
    seed: int
    epoch: int = 0
    position: int = 0

    def next(self) -> Batch:
        """The next `size` sentences; what does not fill a batch at an epoch's end is left out."""
        if self.position + self.size > len(self.batch.labels):
            self.epoch, self.position = self.epoch + 1, 0
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.batch.labels))
        rows = order[self.position : self.position + self.size]
        self.position += self.size
        return take(self.batch, rows)


# ---- training -----------------------------------------------------------------------------------


class State(NamedTuple):
    """What a step changes, besides the position in the data."""

    adapter: Any
    optimizer: Any
    key: jax.Array


def make_step(lora: jlora.types.Transformed, tx: optax.GradientTransformation) -> Any:
    """The compiled training step: (state, base, batch) to (state, loss)."""

    def loss_fn(adapter, key, base, batch):
        logits = lora.apply(base, jlora.dropout(adapter, key), batch.ids, batch.mask)  # (B, 2)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    @jax.jit
    def step(state, base, batch):
        key, now = jax.random.split(state.key)
        loss, grads = jax.value_and_grad(loss_fn)(state.adapter, now, base, batch)
        updates, optimizer = tx.update(grads, state.optimizer, state.adapter)
        return State(optax.apply_updates(state.adapter, updates), optimizer, key), loss

    return step


# ---- checkpoints --------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: pathlib.Path) -> Iterator[None]:
    """Holds `folder` for this process; the system lets go of it however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{folder} is in use by another run: give another --out.") from None
        yield


@contextlib.contextmanager
def explain_write_errors(folder: pathlib.Path) -> Iterator[None]:
    """Says what to do when a checkpoint cannot be written, whatever Orbax raises."""
    try:
        yield
    except Exception as e:
        raise OSError(
            f"cannot write a checkpoint to {folder}: {' '.join(str(e).split())}\n"
            "Those before are whole. Make room or permission there, then go on with --resume."
        ) from e


@contextlib.contextmanager
def open_manager(
    folder: pathlib.Path, save_every: int, keep: int
) -> Iterator[ocp.CheckpointManager]:
    """Orbax's manager of the checkpoints in `folder`; in the end all that was saved is there."""
    purge(folder)
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=save_every,
        max_to_keep=keep,
        # An old checkpoint is first renamed, so that a kill never leaves half of one.
        todelete_subdir=DELETED,
        cleanup_tmp_directories=True,
    )
    manager = ocp.CheckpointManager(folder, options=options)
    try:
        yield manager
    finally:
        with explain_write_errors(folder):  # waits, and may have an error of its own
            manager.close()
    purge(folder)


def purge(folder: pathlib.Path) -> None:
    """Removes the checkpoints that the manager has put away."""
    for old in folder.glob(f"{DELETED}/*"):
        shutil.rmtree(old)


def rest(state: State) -> dict[str, Any]:
    """The state without the adapter, as arrays: Orbax restores no NumPy scalars and no keys."""
    optimizer = jax.tree.map(jnp.asarray, state.optimizer)
    return {"optimizer": optimizer, "key": jax.random.key_data(state.key)}


class Checkpoints(NamedTuple):
    """The checkpoints of a run, and what of it never changes."""

    manager: ocp.CheckpointManager
    rules: Sequence[Any]
    base: Any
    settings: dict[str, Any]  # all else that the losses depend on

    def save(self, step: int, state: State, reader: Reader) -> None:
        """Starts to write a checkpoint; an error of the one before appears here."""
        purge(pathlib.Path(self.manager.directory))
        run = {"epoch": reader.epoch, "position": reader.position, "settings": self.settings}
        args = ocp.args.Composite(
            **checkpoint.items(state.adapter, self.rules, step=step, base=self.base),
            rest=ocp.args.StandardSave(rest(state)),
            run=ocp.args.JsonSave(run),
        )
        self.manager.save(step, args=args, force=True)

    def restore(self, like: State, reader: Reader) -> tuple[int, State]:
        """The last checkpoint's step and state, `reader` moved to its place; else 0 and `like`.

        Raises:
            ValueError: if the checkpoint belongs to a run with other settings or another base.
        """
        if (step := self.manager.latest_step()) is None:
            return 0, like
        # The settings first: with another rank, say, the state would not fit its template.
        run = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        was, now = run["settings"], self.settings
        if changed := [f"{k} was {was.get(k)}, is {now[k]}" for k in now if was.get(k) != now[k]]:
            raise ValueError(f"cannot resume from {self.manager.directory}: " + "; ".join(changed))
        folder = self.manager.directory / str(step)
        adapter = checkpoint.restore(folder, like=like.adapter, base=self.base)
        args = ocp.args.Composite(rest=ocp.args.StandardRestore(rest(like)))
        saved = self.manager.restore(step, args=args).rest
        reader.epoch, reader.position = run["epoch"], run["position"]
        return step, State(adapter, saved["optimizer"], jax.random.wrap_key_data(saved["key"]))


def rewind(path: pathlib.Path, step: int) -> None:
    """Cuts from the log what was written after `step`, be it half a line."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = path.with_suffix(".new")
        kept.write_text("".join(lines[:step]))
        kept.replace(path)


# ---- the whole run ------------------------------------------------------------------------------


def load(layers: int) -> tuple[bert.Bert, dict[str, Any], Tokenizer]:
    """MiniLM's first layers with a new head, the variables and the tokenizer."""
    folder = data.minilm()
    config, variables = bert.load(folder)
    config = dataclasses.replace(config, num_hidden_layers=layers)
    params = dict(variables["params"])
    params["encoder"] = {f"layer_{i}": params["encoder"][f"layer_{i}"] for i in range(layers)}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return bert.Bert(config, classes=2), bert.add_head({"params": params}, 2), tokenizer


def train(args: argparse.Namespace) -> int:
    """Trains from the last checkpoint, if any; returns the step that it came to."""
    settings = {k: getattr(args, k) for k in RUN}
    model, variables, tokenizer = load(args.layers)
    snippets, _ = data.movie_snippets()
    batch = encode(tokenizer, snippets[: args.sentences], args.length)
    reader = Reader(batch, args.batch, args.seed)
    rules = (
        jlora.LoRA(r"(query|value)/kernel", rank=args.rank, dropout=DROPOUT),
        jlora.Full(r"classifier"),
    )
    lora = jlora.transform(model.apply, *rules)
    key, init_key = jax.random.split(jax.random.key(args.seed))
    base, adapter = lora.init(init_key, variables, batch.ids[:1], batch.mask[:1])
    tx = jlora.optimizer(optax.adamw(LEARNING_RATE))
    step_fn = make_step(lora, tx)

    folder, log = args.out.absolute() / CHECKPOINTS, args.out / LOSSES
    first = State(adapter, tx.init(adapter), key)
    with open_manager(folder, args.save_every, args.keep) as manager:
        checkpoints = Checkpoints(manager, rules, base, settings)
        start, state = checkpoints.restore(first, reader)
        step = start
        rewind(log, start)
        progress.write(f"from step {start} of {args.steps}")
        steps = range(start + 1, args.steps + 1)
        with log.open("a", buffering=1) as losses:  # a line reaches the system at once
            for step in progress(steps, initial=start, total=args.steps):
                state, loss = step_fn(state, base, reader.next())
                losses.write(f"{step} {float(loss).hex()}\n")  # every bit
                stop = manager.reached_preemption(step)
                if stop or step == args.steps or manager.should_save(step):
                    with explain_write_errors(folder):
                        checkpoints.save(step, state, reader)
                if stop:
                    break
    return step


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example; `argv` are the arguments of the command line."""
    args = parse(argv)
    coordinate()
    try:
        with lock(args.out):
            step = train(args)
    except OSError as e:
        raise SystemExit(f"stopped: {e}") from e
    progress.write(f"at step {step} of {args.steps}: {args.out / CHECKPOINTS / str(step)}")


def coordinate() -> None:
    """Starts JAX's coordination, which catches SIGTERM; on a cluster JAX finds its own settings."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    jax.distributed.initialize(f"localhost:{port}", num_processes=1, process_id=0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, if any")
    add("--out", type=pathlib.Path, default=OUT)
    add("--steps", type=int, default=STEPS)
    add("--save-every", type=int, default=SAVE_EVERY, help="steps from checkpoint to checkpoint")
    add("--keep", type=int, default=KEEP, help="checkpoints")
    add("--batch", type=int, default=BATCH)
    add("--length", type=int, default=LENGTH, help="the most tokens of a sentence")
    add("--sentences", type=int, help="the most sentences to train on")
    add("--layers", type=int, default=6, help="of MiniLM's six, from below")
    add("--rank", type=int, default=RANK)
    add("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)
    if not args.resume and (args.out / CHECKPOINTS).exists():
        parser.error(f"{args.out} exists: pass --resume to go on from there, or another --out")
    return args


if __name__ == "__main__":
    main()

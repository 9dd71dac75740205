"""Teach a chat model your answers: a folder of Hugging Face in, an adapter that engines serve out.

    python examples/chat.py                          # SmolLM2-135M-Instruct learns to define words
    python examples/chat.py --base DIR --data FILE   # your model, your conversations
    python examples/chat.py --quantize nf4           # on frozen weights of 4 bits
    python examples/chat.py --resume                 # go on after Ctrl-C, kill -9, a full disk
    python examples/chat.py --evaluate-every 10 --patience 3   # keep the best adapter, stop early
    python examples/chat.py --accumulate 4           # steps of four batches
    python examples/chat.py --vllm served/bin/python # serve the adapter too, and ask it

DIR is a checkpoint of Llama, Qwen 2, Qwen 3 or SmolLM 2: config.json, tokenizer, safetensors. A
line of FILE is a conversation, {"messages": [{"role": "user", "content": "..."}, {"role":
"assistant", "content": "..."}]}. The loss counts the tokens of the answers only; their
logits are never all there at once (`chunked`). Several conversations share a row of `--length`
tokens, and do not see each other. Each device has a part of the weights and of the rows.

Without arguments the run takes two minutes on two CPU cores, and the loss on held-out answers falls
from 5.1 to 2.4 nats per token. It writes OUT/adapter for PEFT and OUT/merged, and says how to serve
them; those of an earlier run are replaced. A run that has finished cannot be resumed.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import data
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import served
import tables
from advice import ALPHA, TABLE, best_rate
from conversations import (
    DEFINITIONS,
    Rows,
    Text,
    answer_nll,
    lay,
    load_tokenizer,
    mean_nll,
    pack,
    read,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial
from models import beam, llama, smollm2
from models.parts import RULES, shardings
from pod import State, restore, save, with_shardings
from progress import progress
from quickstart import draw, take

import jlora
from jlora import peft, sharding

WARMUP = 5
CHANGEABLE = "out", "resume", "save_every"  # options that change no number of a run
SHOWN = 3  # of the held-out conversations, answered before and after
SCHEMES = {"nf4": jlora.NF4(), "int8": jlora.Int8()}


def prepare(args: argparse.Namespace) -> tuple[pathlib.Path, llama.Config, Any, list[Text]]:
    """The model's folder, sizes and tokenizer, and texts. Says what is wrong with any of them."""
    folder = args.base or smollm2.write(data.smollm2(), pathlib.Path("out/smollm2"))
    config, devices = llama.read(folder), jax.device_count()
    if config.dim % devices or args.batch % devices:
        raise ValueError(
            f"--batch {args.batch} and hidden_size {config.dim} must be multiples of the {devices} "
            "devices: give another --batch, or let JAX see fewer devices"
        )
    tokenizer = load_tokenizer(folder)
    texts = read(args.data, tokenizer, args.length, more_than=args.held_out)
    random.Random(args.seed).shuffle(texts)
    if args.learning_rate is None:
        batch = args.batch * args.accumulate
        args.learning_rate = float(f"{best_rate(tables.read(TABLE), config.dim, batch):.1e}")
        progress.write(f"learning rate {args.learning_rate}, by the width and the batch")
    return folder, config, tokenizer, texts


def make_step(
    apply: Callable[..., jax.Array], tx: optax.GradientTransformation, parts: int = 1
) -> Any:
    """The compiled training step: (state, base, rows) to (state, loss).

    The loss is the mean over all answer tokens of the rows, which run in `parts`, one by one.
    """

    def nll(adapter, base, rows):
        return answer_nll(Partial(apply, base, adapter), rows)

    @functools.partial(jax.jit, compiler_options=jlora.compiler_options())
    def step(state, base, rows):
        sums = jax.value_and_grad(nll, has_aux=True)
        if parts > 1:
            sums = optax.microbatch(sums, argnums=2, microbatch_size=len(rows.ids) // parts)
        (total, count), grads = sums(state.adapter, base, rows)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, optimizer = tx.update(grads, state.optimizer, state.adapter)
        return State(optax.apply_updates(state.adapter, updates), optimizer), total / count

    return step


class Best(NamedTuple):
    """The adapter with the lowest NLL of held-out answers so far."""

    adapter: Any
    nll: float
    step: int


@dataclasses.dataclass
class Watch:
    """What is done between steps: it measures the adapter, keeps the best, and saves."""

    args: argparse.Namespace
    measure: Callable[[Any], float]
    save: Callable[[int, State], Any]
    best: Best

    def is_over(self, done: int) -> bool:
        """Whether the last `--patience` evaluations found nothing better."""
        patience = self.args.patience and self.args.patience * self.args.evaluate_every
        return bool(patience) and done - self.best.step >= patience

    def look(self, done: int, state: State) -> None:
        """Measures and saves where it is time to, after `done` steps."""
        every = self.args.evaluate_every
        if every and (done % every == 0 or done == self.args.steps):
            nll = self.measure(state.adapter)
            progress.write(f"held-out NLL after {done} steps: {nll:.3f}")
            if nll < self.best.nll:
                self.best = Best(state.adapter, nll, done)
        self.save(done, State(state.adapter, (state.optimizer, self.best)))


def train(
    state: State, base: Any, rows: Rows, step_fn: Any, plan: np.ndarray, start: int, watch: Watch
) -> tuple[State, list[float]]:
    """The state after a step for each row of `plan`, from `start` on, and the loss of each."""
    losses, tokens, began = [], 0, 0.0
    with progress(plan[start:], initial=start, total=len(plan)) as bar:
        for done, index in enumerate(bar, start + 1):
            if watch.is_over(done - 1):
                break
            batch = take(rows, index)
            state, loss = step_fn(state, base, batch)
            losses.append(float(loss))
            seconds = time.perf_counter() - began
            if len(losses) == 1:  # with the time to compile
                began += seconds
            else:
                tokens, left = tokens + np.count_nonzero(batch.segments), len(plan) - done
                if len(losses) == 2:
                    progress.write(f"{left} more steps take {left * seconds:.0f} s")
                speed = f"{tokens / seconds:.0f} tokens/s"
                bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed}", refresh=False)
            paused = time.perf_counter()
            watch.look(done, state)
            began += time.perf_counter() - paused
    return state, losses


class Result(NamedTuple):
    """The negative log-likelihood of held-out answers per token, the training losses, answers."""

    before: float
    after: float
    losses: list[float]
    step: int  # of the adapter that was written
    answers: list[str]
    served: list[str]  # the same by vLLM, with --vllm


def main(argv: Sequence[str] | None = None) -> Result:
    """Trains, measures before and after, writes, and says how to serve."""
    args = parse(argv)
    with explained():  # nothing is compiled yet
        found = prepare(args)
    mesh = jax.make_mesh((jax.device_count(), 1), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        return run(args, mesh, *found)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Ends with what is wrong with a file or an option, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(f"chat.py: {error}") from error


def run(args, mesh, folder, config, tokenizer, texts) -> Result:
    """All of it, on a mesh."""
    held_out = lay(pack(texts[: args.held_out], args.length), args.batch)
    rows = lay(pack(texts[args.held_out :], args.length))
    model = llama.Llama(config, dtype=jnp.dtype(args.dtype), remat=args.remat)
    places = shardings(jax.eval_shape(model.init, jax.random.key(0), rows.ids[:1]), mesh)
    like = with_shardings(llama.shapes(config), places)
    variables = peft.load_base(folder, llama.names(config), like=like)
    variables = jax.tree.map(
        lambda x: x if isinstance(x, jlora.Quantized) else x.astype(args.dtype),
        variables,
        is_leaf=lambda x: isinstance(x, jlora.Quantized),  # of a checkpoint in 4 bits
    )
    # As PEFT's all-linear: without the output head, which vLLM does not adapt in all models.
    rules = (jlora.LoRA(r"layers/.*/kernel", rank=args.rank, alpha=args.alpha),)
    lora = jlora.transform(model.apply, *rules)
    if args.quantize:
        sites = lora.sites(variables, rows.ids[:1])
        variables = jlora.quantize(variables, SCHEMES[args.quantize], sites=sites, donate=True)
    base, adapter = lora.init(jax.random.key(args.seed), variables, rows.ids[:1])
    # A and B are small: each device has the whole of them, and gathers nothing in the layers.
    adapter = jax.device_put(adapter, NamedSharding(mesh, PartitionSpec()))
    whole = sharding.replicated(places, "fsdp")  # codes are gathered, not what they stand for
    progress.write(
        f"{len(texts) - args.held_out} conversations in {len(rows.ids)} rows, {args.held_out} held "
        f"out; {jlora.count(adapter):,} parameters train, {jlora.count(base):,} are frozen"
    )

    def apply(base, *args, **more):
        return lora.apply(sharding.gathered(base, whole), *args, **more)

    shown = texts[: min(SHOWN, args.held_out)]
    ask = {"add_generation_prompt": True, "return_dict": False}
    prompts = [tokenizer.apply_chat_template(text.messages[:-1], **ask) for text in shown]

    def measure(adapter):
        return mean_nll(Partial(apply, base, adapter), held_out, args.batch)

    def answer(adapter):
        model_fn = Partial(apply, base, adapter)
        answers = beam.greedy(model_fn, prompts, config.cache, tokenizer.eos_token_id)
        return tokenizer.batch_decode(answers)

    before, first = measure(adapter), answer(adapter)  # B is zero: the model as it came
    progress.write(f"held-out NLL per token of the answers, before: {before:.3f}")
    warmup = min(WARMUP, args.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, warmup, args.steps)
    tx = jlora.optimizer(optax.adamw(schedule))
    settings = {name: str(x) for name, x in vars(args).items() if name not in CHANGEABLE}
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=args.save_every)
    with ocp.CheckpointManager(args.out.absolute() / "checkpoints", options=options) as manager:
        best = Best(adapter, before, 0)
        like = State(adapter, (tx.init(adapter), best))
        with explained():
            start, (adapter, (optimizer, best)) = restore(manager, like, base, settings)
        plan = draw(len(rows.ids), args.steps, args.batch * args.accumulate, args.seed)

        keep = functools.partial(save, manager, rules=rules, base=base, run=settings)
        watch = Watch(args, measure, keep, best)
        step_fn, state = make_step(apply, tx, args.accumulate), State(adapter, optimizer)
        state, losses = train(state, base, rows, step_fn, plan, start, watch)

    best = watch.best if args.evaluate_every else Best(state.adapter, np.nan, args.steps)
    saved, merged = args.out / "adapter", args.out / "merged"
    for earlier in (saved, merged):
        shutil.rmtree(earlier, ignore_errors=True)
    own = llama.names(config)
    peft.save(saved, base, best.adapter, own, base_model=str(folder), profile="vllm")
    peft.export_merged(folder, saved, merged)
    after, then = measure(best.adapter), answer(best.adapter)
    for text, old, new in zip(shown, first, then, strict=True):
        question, given = (message["content"] for message in text.messages[-2:])
        progress.write(f"\n{question}\n  given:  {given}\n  before: {old}\n  after:  {new}")
    progress.write(
        f"\nheld-out NLL per token of the answers: {before:.3f} before, {after:.3f} after "
        f"{best.step} steps"
    )
    for engine in peft.ENGINES:  # as `jlora check` does
        progress.write(f"{peft.check(saved, engine, base=folder)}")
    progress.write(f"merged: vllm serve {merged}")
    delete(args.out / "checkpoints")
    answers = serve(args, folder, saved, shown) if args.vllm else []
    for old, new in zip(then, answers, strict=bool(answers)):
        progress.write(f"JAX:  {old}\nvLLM: {new}")
    return Result(before, after, losses, best.step, then, answers)


def serve(args, folder, saved, shown) -> list[str]:
    """What vLLM answers with the adapter."""
    with served.serve(args.vllm, folder, saved, "--dtype", args.dtype) as url:
        return [served.ask(url, text.messages[:-1]) for text in shown]


def delete(folder: pathlib.Path) -> None:
    """Removes a folder; whenever it is stopped, the folder is whole or not there."""
    gone = folder.with_name(f"{folder.name}.deleted")
    shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(folder.rename(gone))


def count(text: str) -> int:
    """A number of at least 1, of the command line."""
    if (n := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {n}")
    return n


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    on_cpu = jax.default_backend() == "cpu"
    add("--base", type=pathlib.Path, help="folder of the model; SmolLM2-135M-Instruct by default")
    add("--data", type=pathlib.Path, default=DEFINITIONS, help="JSON lines of conversations")
    add("--vllm", help="the Python of an environment with vLLM: serve the adapter, and ask it")
    add("--quantize", choices=SCHEMES, help="what the frozen weights are kept in")
    add("--dtype", choices=("float32", "bfloat16"), default="float32" if on_cpu else "bfloat16")
    add("--out", type=pathlib.Path, default=pathlib.Path("out/chat"))
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--length", type=count, default=256, help="tokens of a row")
    add("--batch", type=count, default=2, help="rows at once")
    add("--accumulate", type=count, default=1, help="batches a step")
    add("--steps", type=count, default=40)
    add("--evaluate-every", type=count, help="steps; writes the best adapter, not the last")
    add("--patience", type=count, help="stop after so many evaluations without a better one")
    add("--save-every", type=count, default=20, help="steps from checkpoint to checkpoint")
    add("--held-out", type=count, default=24, help="conversations to measure on")
    add("--rank", type=count, default=8)
    add("--alpha", type=float, default=ALPHA, help="the adapter is scaled by alpha / rank")
    add("--learning-rate", type=float, help="at the end of the warmup; see `advice.py`")
    add("--seed", type=int, default=0, help="of the adapter, the split and the order")
    add("--remat", action="store_true", help="recompute the layers in the backward pass")
    args = parser.parse_args(argv)
    if args.alpha != ALPHA and args.learning_rate is None:
        parser.error(f"the rate of `advice.py` is for --alpha {ALPHA:g}: give --learning-rate too")
    if args.patience and not args.evaluate_every:
        parser.error("--patience counts evaluations: give --evaluate-every too")
    unfinished = (args.out / "checkpoints").exists()
    if unfinished and not args.resume:
        parser.error(f"{args.out} has an unfinished run: pass --resume to go on, or another --out")
    if args.resume and not unfinished and (args.out / "adapter").exists():
        parser.error(
            f"{args.out} has a run that has finished: nothing is left to resume. Pass another "
            "--out, or leave out --resume to train anew and replace it"
        )
    return args


if __name__ == "__main__":
    main()

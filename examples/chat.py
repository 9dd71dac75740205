"""Teach a chat model your answers: a folder of Hugging Face in, an adapter that engines serve out.

    python examples/chat.py                          # SmolLM2-135M-Instruct learns to define words
    python examples/chat.py --base DIR --data FILE   # your model, your conversations
    python examples/chat.py --quantize nf4           # on frozen weights of 4 bits
    python examples/chat.py --resume                 # go on after Ctrl-C, kill -9, a full disk
    python examples/chat.py --evaluate-every 10 --patience 3   # keep the best adapter, stop early
    python examples/chat.py --accumulate 4           # steps of four batches
    python examples/chat.py --base DIR --no-compare  # without PyTorch's outputs beside JAX's
    python examples/chat.py --vllm served/bin/python # serve the adapter too, and ask it

DIR is any causal language model of `transformers`: config.json, tokenizer, safetensors. It runs in
JAX through torchax, and its outputs for the first batch are compared with PyTorch's. A line of FILE
is a conversation: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
"content": "..."}]}, {"prompt": "...", "completion": "..."}, or one of ShareGPT. The loss counts the
tokens of the answers only; their logits are never all there at once (`chunked`). Several
conversations share a row of `--length` tokens, and do not see each other. Each device has a part of
the weights and of the rows.

Without arguments the run takes two minutes on two CPU cores, and the loss on held-out answers falls
from 5.1 to 2.4 nats per token. It writes OUT/adapter for PEFT, OUT/merged, and OUT/losses.csv with
a picture, and says how to serve them; those of an earlier run are replaced. A run that has finished
cannot be resumed.
"""

import argparse
import contextlib
import functools
import pathlib
import random
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import served
import tables
import watch
from advice import ALPHA, TABLE, best_rate
from conversations import (
    DEFINITIONS,
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
from models import smollm2
from models.parts import RULES, Causal
from pod import State, restore, save
from progress import progress
from quickstart import draw
from transformers import AutoConfig

import jlora
from jlora import peft, sharding

WARMUP = 5
CHANGEABLE = "out", "resume", "save_every", "compare"  # options that change no number of a run
SHOWN = 3  # of the held-out conversations, answered before and after
SCHEMES = {"nf4": jlora.NF4(), "int8": jlora.Int8()}


def prepare(args: argparse.Namespace) -> tuple[pathlib.Path, Any, list[Text]]:
    """The model's folder, its tokenizer, and texts. Says what is wrong with any of them."""
    folder = args.base or smollm2.write(pathlib.Path("out/smollm2"))
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"`{folder}` has no config.json: give the folder of a checkpoint")
    width = AutoConfig.from_pretrained(folder).get_text_config().hidden_size
    if args.batch % jax.device_count() or (not args.base and width % jax.device_count()):
        raise ValueError(
            f"--batch {args.batch} must be a multiple of the {jax.device_count()} devices: give "
            "another --batch, or let JAX see fewer devices"
        )
    tokenizer = load_tokenizer(folder)
    texts = read(args.data, tokenizer, args.length, more_than=args.held_out)
    random.Random(args.seed).shuffle(texts)
    if args.learning_rate is None:
        batch = args.batch * args.accumulate
        args.learning_rate = float(f"{best_rate(tables.read(TABLE), width, batch):.1e}")
        progress.write(f"learning rate {args.learning_rate}, by the width and the batch")
    return folder, tokenizer, texts


def load(args: argparse.Namespace, folder: pathlib.Path, mesh: jax.sharding.Mesh) -> Causal:
    """The model: SmolLM2 in Flax, without PyTorch, or that of --base."""
    options = args.dtype, args.remat, SCHEMES.get(args.quantize)
    if not args.base:
        return smollm2.causal(folder, mesh, *options)
    try:
        from models import causal
    except ModuleNotFoundError as error:
        needed = "pip install -e '.[examples,torch]' accelerate"
        raise ValueError(f"--base runs a model of PyTorch ({error}): {needed}") from error
    return causal.load(folder, mesh, *options)


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
    except (OSError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"chat.py: {error}") from error


def run(args, mesh, folder, tokenizer, texts) -> Result:
    """All of it, on a mesh."""
    with explained():
        model = load(args, folder, mesh)
    share = pack if model.is_packed else lambda texts, _: [[text] for text in texts]
    held_out = lay(share(texts[: args.held_out], args.length), args.batch)
    rows = lay(share(texts[args.held_out :], args.length))
    variables = jax.tree.map(
        lambda x: x if isinstance(x, jlora.Quantized) else x.astype(args.dtype),
        model.variables,
        is_leaf=lambda x: isinstance(x, jlora.Quantized),
    )
    rules = (jlora.LoRA(model.pattern, rank=args.rank, alpha=args.alpha),)
    lora = jlora.transform(model.apply, *rules)
    base, adapter = lora.init(jax.random.key(args.seed), variables, rows.ids[:1])
    # A and B are small: each device has the whole of them, and gathers nothing in the layers.
    adapter = jax.device_put(adapter, NamedSharding(mesh, PartitionSpec()))
    whole = sharding.replicated(model.places, "fsdp")  # codes are gathered, not what they stand for
    progress.write(
        f"{len(texts) - args.held_out} conversations in {len(rows.ids)} rows, {args.held_out} held "
        f"out{'' if model.is_packed else ', one in a row, as it would see others'}; "
        f"{jlora.count(adapter):,} parameters train, {jlora.count(base):,} are frozen"
    )
    size = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(base))
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    progress.write(
        f"the weights take {size / 1e9:.2f} GB of each device; loading took {peak / 1e9:.2f} GB of "
        "the host at most"
    )

    if args.compare and model.compare:
        with explained():
            compare(model, rows.ids[: args.batch], rows.positions[: args.batch])

    def apply(base, *args, **more):
        return lora.apply(sharding.gathered(base, whole), *args, **more)

    shown = texts[: min(SHOWN, args.held_out)]
    ask = {"add_generation_prompt": True, "return_dict": False}
    prompts = [tokenizer.apply_chat_template(text.messages[:-1], **ask) for text in shown]

    def measure(adapter):
        return mean_nll(Partial(apply, base, adapter), held_out, args.batch)

    def answer(adapter):
        model_fn = Partial(apply, base, adapter)
        return tokenizer.batch_decode(model.answer(model_fn, prompts, [tokenizer.eos_token_id]))

    before, first = measure(adapter), answer(adapter)  # B is zero: the model as it came
    progress.write(f"held-out NLL per token of the answers, before: {before:.3f}")
    warmup = min(WARMUP, args.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, warmup, args.steps)
    tx = jlora.optimizer(optax.adamw(schedule))
    settings = {name: str(x) for name, x in vars(args).items() if name not in CHANGEABLE}
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=args.save_every)
    with ocp.CheckpointManager(args.out.absolute() / "checkpoints", options=options) as manager:
        best = watch.Best(adapter, before, 0)
        like = State(adapter, (tx.init(adapter), best))
        with explained():
            start, (adapter, (optimizer, best)) = restore(manager, like, base, settings)
        if args.resume:
            progress.write(
                f"goes on after {start} steps" if start else "no checkpoint: begins anew"
            )
        plan = draw(len(rows.ids), args.steps, args.batch * args.accumulate, args.seed)

        watch.begin(file := args.out / "losses.csv", start)
        note = functools.partial(watch.note, file)
        if not start:
            note(0, held_out=before)
        keep = functools.partial(save, manager, rules=rules, base=base, run=settings)
        watched = watch.Watch(args, measure, keep, note, best)
        step_fn, state = make_step(apply, tx, args.accumulate), State(adapter, optimizer)
        state, losses = watch.train(state, base, rows, step_fn, plan, start, watched)

    best = watched.best if args.evaluate_every else watch.Best(state.adapter, np.nan, args.steps)
    saved, merged = args.out / "adapter", args.out / "merged"
    for earlier in (saved, merged):
        shutil.rmtree(earlier, ignore_errors=True)
    peft.save(saved, base, best.adapter, model.names, base_model=str(folder), profile="vllm")
    peft.export_merged(folder, saved, merged)
    after, then = measure(best.adapter), answer(best.adapter)
    if not args.evaluate_every:
        note(best.step, held_out=after)
    watch.draw(file)
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


def compare(model: Causal, ids: np.ndarray, positions: np.ndarray) -> None:
    """Raises if the model computes something else than in PyTorch."""
    if found := model.compare(ids, positions):
        raise ValueError(f"{found}\nTo train anyway, pass --no-compare")
    progress.write("for the first batch, the model computes what it does in PyTorch")


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

    def add(name: str, *, help: str, **options: Any) -> None:
        is_shown = isinstance(options.get("default"), int | float | str)
        parser.add_argument(name, help=help + ", by default %(default)s" * is_shown, **options)

    on_cpu = jax.default_backend() == "cpu"
    add("--base", type=pathlib.Path, help="folder of the model, by default SmolLM2-135M-Instruct")
    data = "JSON lines, by default definitions of words"
    add("--data", type=pathlib.Path, nargs="+", default=[DEFINITIONS], help=data)
    add("--vllm", help="the Python of an environment with vLLM: serve the adapter, and ask it")
    add("--quantize", choices=SCHEMES, help="of the frozen weights, by default --dtype")
    dtypes = "float32", "bfloat16"
    add("--dtype", choices=dtypes, default=dtypes[not on_cpu], help="of the model")
    add("--out", type=pathlib.Path, default="out/chat", help="folder to write")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--length", type=count, default=256, help="tokens of a row")
    add("--batch", type=count, default=2, help="rows at once")
    add("--accumulate", type=count, default=1, help="batches a step")
    add("--steps", type=count, default=40, help="steps to train")
    add("--evaluate-every", type=count, help="steps; writes the best adapter, not the last")
    add("--patience", type=count, help="stop after so many evaluations without a better one")
    add("--save-every", type=count, default=20, help="steps from checkpoint to checkpoint")
    add("--held-out", type=count, default=24, help="conversations to measure on")
    add("--rank", type=count, default=8, help="of the adapter")
    add("--alpha", type=float, default=ALPHA, help="the adapter is scaled by alpha / rank")
    add("--learning-rate", type=float, help="after the warmup, by default that of `advice.py`")
    add("--seed", type=int, default=0, help="of the adapter, the split and the order")
    add("--compare", action=argparse.BooleanOptionalAction, default=True, help="with PyTorch")
    add("--remat", action=argparse.BooleanOptionalAction, help="recompute layers, as --base does")
    args = parser.parse_args(argv)
    if args.remat is None:
        args.remat = args.base is not None
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

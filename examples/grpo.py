"""GRPO with a reward that can be checked: SmolLM2-135M-Instruct learns to add, from right or wrong.

    python examples/grpo.py                      # two minutes of one CPU core
    python examples/grpo.py --resume             # go on after Ctrl-C, kill -9, a full disk
    python examples/grpo.py --full --rate 1e-5   # all weights, for comparison
    python examples/grpo.py --allocate           # ranks by the gradient, with as many parameters
    for rank in 1 8 128; do python examples/grpo.py --rank $rank --out out/grpo-$rank; done

A step samples a group of answers to each of some sums, from the model with its adapter. An answer
ends with the first token that is no digit. Its reward is 1 if it is the sum, else 0. Its advantage
is the reward less the mean of its group, divided by the standard deviation (arXiv 2402.03300,
section 4.1). Each answer is used for one step, so that its ratio of probabilities is 1, and none is
clipped. The reference of the KL term is the base without the adapter, not a copy of the model.

Of sums that are never trained on, 16% are right at first, 62% after 16 steps and 77% after 32, as
OUT/result.csv says. OUT/steps.csv has all steps. Shapes: B answers, P tokens a prompt, T an answer.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tables
from models import llama, smollm2
from pod import State, restore, save
from progress import progress
from resume import rewind

import jlora

SHOTS, PROMPT = "14+5=19\n62+8=70\n", "{}+{}="
PAIRS = np.random.default_rng(0).permutation([(a, b) for a in range(10, 100) for b in range(1, 10)])
HELD_OUT, TRAIN = PAIRS[:128], PAIRS[128:]
TOKENS = 4  # T: three digits, and what is none
SKETCHED = 4  # batches whose gradient gives the ranks of --allocate


def reward(pair: Sequence[int], answer: str) -> float:
    """1 if the answer is the sum of the pair and then no digit, else 0."""
    total = str(sum(pair))
    return float(answer.startswith(total) and not answer[len(total) :][:1].isdigit())


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Of rewards (groups, size), whose rows are groups; 0 in a group whose answers are alike."""
    centered = rewards - rewards.mean(1, keepdims=True)
    return centered / (rewards.std(1, keepdims=True) + 1e-4)


# ---- what is compiled ---------------------------------------------------------------------------


def make_programs(
    apply: Callable[..., Any], config: Any, tokenizer: Any, tx: Any, beta: float
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Rollouts and steps, compiled.

    A rollout takes (base, adapter, prompts (B, P), key, temperature). It gives ids (B, P + T), and
    counts (B, T): 1 up to the end of the answer, then 0. A step takes (state, base, ids, counts,
    advantages (B,)), and gives the next state and the KL divergence per token.
    """
    shots = np.array(tokenizer([SHOTS])["input_ids"])
    is_digit = jnp.array([tokenizer.decode([i]).isdigit() for i in range(config.vocab)])

    def start(base, adapter, ids):  # the shots are read once for all rows
        cache = config.cache(1, shots.size + ids.shape[1])
        return apply(base, adapter, shots, cache=cache)[1].rows(jnp.zeros(len(ids), int))

    @jax.jit
    def rollout(base, adapter, prompts, key, temperature):
        cache = start(base, adapter, jnp.pad(prompts, ((0, 0), (0, TOKENS))))
        _, cache = apply(base, adapter, prompts[:, :-1], cache=cache)

        def write(carry, key):
            token, goes_on, cache = carry
            logits, cache = apply(base, adapter, token[:, None], cache=cache)
            token = jax.random.categorical(key, logits[:, 0] / temperature)  # (B,)
            return (token, goes_on & is_digit[token], cache), (token, goes_on)

        carry = prompts[:, -1], jnp.ones(len(prompts), bool), cache
        _, (tokens, counts) = jax.lax.scan(write, carry, jax.random.split(key, TOKENS))
        return jnp.concatenate([prompts, tokens.T], 1), counts.T.astype(jnp.float32)

    def loss_fn(adapter, base, ids, counts, gains):
        def log_probs(adapter):  # of the answers' tokens, (B, T)
            cache, answers = start(base, adapter, ids), ids[:, -TOKENS:]
            return apply(base, adapter, ids[:, :-1], cache=cache, labels=answers)[0]

        own, reference = log_probs(adapter), log_probs({})
        kl = jnp.exp(reference - own) - (reference - own) - 1  # at least 0; its mean is the KL
        weights = counts / counts.sum(1, keepdims=True) / len(counts)  # a mean over each answer
        kl = (weights * kl).sum()
        return beta * kl - (weights * gains[:, None] * own).sum(), kl

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=jlora.compiler_options())
    def step(state, base, *answers):
        grads, kl = jax.grad(loss_fn, has_aux=True)(state.adapter, base, *answers)
        updates, optimizer = tx.update(grads, state.optimizer, state.adapter)
        return State(optax.apply_updates(state.adapter, updates), optimizer), kl

    return rollout, step


# ---- the whole run ------------------------------------------------------------------------------


def answer(
    rollout: Callable[..., Any],
    tokenizer: Any,
    base: Any,
    adapter: Any,
    pairs: np.ndarray,
    key: jax.Array,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Ids and counts of a rollout on pairs (B, 2), and the reward of each answer."""
    prompts = np.array(tokenizer([PROMPT.format(*pair) for pair in pairs])["input_ids"])
    ids, counts = rollout(base, adapter, prompts, key, temperature)
    texts = tokenizer.batch_decode(np.asarray(ids[:, -TOKENS:]))
    return ids, counts, np.array([reward(*x) for x in zip(pairs, texts, strict=True)])


def draw_pairs(args: argparse.Namespace, *seed: int) -> np.ndarray:
    """Sums for training, each as often as it is answered."""
    found = np.random.default_rng(seed).choice(TRAIN, args.groups, replace=False)
    return found.repeat(args.size, axis=0)


def allocate(args: argparse.Namespace, model: Any, rule: jlora.LoRA) -> tuple[Any, ...]:
    """Rules with as many parameters, and ranks of up to four times by the first steps' gradient."""
    config, params, tokenizer = model
    apply, shots = llama.Llama(config).apply, np.array(tokenizer([SHOTS])["input_ids"])
    alone = lambda params, _, *args, **options: apply(params, *args, **options)  # noqa: E731
    rollout, _ = make_programs(alone, config, tokenizer, None, 0.0)
    rows = []
    for i in range(SKETCHED):
        pairs, key = draw_pairs(args, args.seed, 0, i), jax.random.key(i)
        ids, counts, found = answer(rollout, tokenizer, params, {}, pairs, key)
        gains = advantages(found.reshape(args.groups, args.size)).ravel()
        ids = np.concatenate([shots.repeat(len(ids), 0), ids], 1)
        rows.append((ids, counts / counts.sum(1, keepdims=True) / len(counts), gains))

    def loss(params: Any, rows: Any) -> jax.Array:
        ids, weights, gains = rows
        own = apply(params, ids[:, :-1], labels=ids[:, -TOKENS:])
        return -(weights * gains[:, None] * own).sum()

    most = 4 * rule.rank
    sketch = jlora.sketch(loss, params, rule, rows, kind="gradient", components=most, passes=2)
    return jlora.allocate(sketch, rule, max_rank=most)


def run(args: argparse.Namespace, model: Any, before: dict[str, float] | None) -> State:
    """Trains from the last checkpoint, if any, to the last step."""
    rules = (jlora.Full(".*") if args.full else jlora.LoRA(rank=args.rank, alpha=args.alpha),)
    if args.allocate:
        rules = allocate(args, model, *rules)
    config, params, tokenizer = model
    lora, key = jlora.transform(llama.Llama(config).apply, *rules), jax.random.key(args.seed)
    base, adapter = lora.init(key, params, np.zeros((1, 2), np.int32))
    adam = optax.inject_hyperparams(optax.adam)(args.rate)  # one program for all rates
    tx = adam if args.full else jlora.optimizer(adam)
    rollout, step_fn = make_programs(lora.apply, config, tokenizer, tx, args.beta)
    ask = functools.partial(answer, rollout, tokenizer, base)

    def measure(adapter, when):
        rows, found = args.groups * args.size, {}
        for name, temperature in (("sampled", 1.0), ("greedy", 1e-4)):
            parts = np.split(HELD_OUT, range(rows, len(HELD_OUT), rows))
            parts = progress(parts, f"held out, {name}", leave=False)
            rewards = [ask(adapter, x, jax.random.key(0), temperature)[2] for x in parts]
            found[f"{name}_{when}"] = np.concatenate(rewards).mean()
        progress.write(", ".join(f"{name} {x:.3f}" for name, x in found.items()))
        return found

    names, log = "rank alpha full allocate rate beta groups size seed", args.out / "steps.csv"
    settings = {name: getattr(args, name) for name in names.split()}
    progress.write(f"{jlora.count(adapter):,} parameters train")
    state = State(jax.tree.map(jnp.copy, adapter), tx.init(adapter))  # a step takes its arrays
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, save_interval_steps=args.save_every, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(args.out.absolute() / "checkpoints", options=options) as manager:
        done, state = restore(manager, state, base, settings)
        if done > args.steps:
            raise SystemExit(f"{args.out} has {done} steps: pass --steps {done} or more")
        result, rewards = before or measure(adapter, "before"), []
        rewind(log, done + 1)  # with the header
        with progress(range(done + 1, args.steps + 1), initial=done, total=args.steps) as bar:
            for step in bar:
                began, now = time.perf_counter(), jax.random.fold_in(key, step)
                pairs = draw_pairs(args, args.seed, step)
                ids, counts, found = ask(state.adapter, pairs, now)
                gains = advantages(found.reshape(args.groups, args.size)).ravel()
                state, kl = step_fn(state, base, ids, counts, gains)
                rewards.append(found.mean())
                row = settings | {"step": step, "reward": rewards[-1], "kl": float(kl)}
                seconds, left = time.perf_counter() - began, args.steps - step
                speed = float(counts.sum()) / seconds
                tables.append(log, row | {"tokens_per_second": round(speed, 1)})
                if len(rewards) == 2:  # the first has the time to compile
                    progress.write(f"{left} more steps take {left * seconds:.0f} s")
                shown = f"reward {np.mean(rewards[-10:]):.3f}, {speed:.0f} tokens/s"
                bar.set_postfix_str(shown, refresh=False)
                save(manager, step, state, rules, base, settings, force=step == args.steps)
    row = settings | {"steps": args.steps} | result | measure(state.adapter, "after")
    tables.write(args.out / "result.csv", [row])
    return state


def main(argv: Sequence[str] | None = None, model: Any = None, before: Any = None) -> State:
    """Runs the example: `argv` of the command line; the model and its score, if already known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=32.0, help="the adapter is scaled by alpha / rank")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="train all weights instead")
    size.add_argument("--allocate", action="store_true", help="choose ranks by the gradient")
    add("--rate", type=float, default=1e-4, help="of Adam")
    add("--beta", type=float, default=0.02, help="weight of the KL term")
    add("--groups", type=int, default=4, help="sums a step")
    add("--size", type=int, default=8, help="answers to each")
    add("--steps", type=int, default=16)
    add("--save-every", type=int, default=4, help="steps from checkpoint to checkpoint")
    add("--seed", type=int, default=0, help="of the adapter, the sums and the answers")
    add("--out", type=pathlib.Path, default=pathlib.Path("out/grpo"))
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args(argv)
    if not args.resume and (args.out / "checkpoints").exists():
        parser.error(f"{args.out} has a run: pass --resume to go on, or another --out")
    return run(args, model or smollm2.load(data.smollm2()), before)


if __name__ == "__main__":
    main()

"""Serve requests for several adapters from one base, mixed in one batch.

    python examples/serve.py                         # six minutes on two CPU cores, mostly training
    python examples/serve.py                         # again: the adapters are there, one minute
    python examples/serve.py --requests FILE         # JSON lines {"adapter": "movies", "text": "…"}

Three adapters of MiniLM learn to tell positive sentences from negative ones: in movie reviews, in
product reviews and in tweets. One table holds all three, and each row of a batch uses its own. So
requests are answered in the order in which they come, by one compiled program. Halfway a fourth
adapter, for newspaper editorials, is put into the table; nothing is compiled for it. The program
writes the answers to OUT/answers.jsonl and prints how many tokens a second it reaches: beside one
adapter for all rows, and beside a merged model for each adapter.

This loop shows what `jlora.many` does. For a server use an engine: see the guide
"Serve an adapter".
"""

import argparse
import collections
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import data
import jax
import jax.numpy as jnp
import numpy as np
import quickstart
from progress import progress
from quickstart import LENGTH, MARGIN

import jlora
from jlora import checkpoint, many

STEPS = 100
BATCH = 32
SLOTS = 8  # of the table: four are in use
EACH = 150  # requests for an adapter
AT_FIRST = ("movies", "products", "tweets")
LATER = "editorials"
NOT_THERE = "there is no such adapter yet"
OUT = pathlib.Path("out/serve")


class Request(NamedTuple):
    """A sentence and the adapter that is to judge it; its label if that is known."""

    adapter: str
    text: str
    label: int | None = None


# ---- adapters -----------------------------------------------------------------------------------


def get_adapter(
    name: str, lora: jlora.types.Transformed, base: Any, like: Any, tokenizer: Any, args: Any
) -> Any:
    """Loads the adapter for the sentences of `name` from an earlier run, or trains it."""
    folder = args.out / "adapters" / f"{name}-{args.steps}"
    if folder.exists():
        return checkpoint.restore(folder, like=like, base=base)
    sentences, _ = data.snippets(name, MARGIN)
    batch = quickstart.encode(tokenizer, sentences)
    print(f"training on {len(sentences):,} sentences of {name}")
    plan = quickstart.draw(len(sentences), args.steps, 32, seed=0)
    adapter, _ = quickstart.train(lora, base, like, batch, plan)
    checkpoint.save(folder, adapter, quickstart.make_rules(quickstart.RANK), base=base)
    return adapter


# ---- requests -----------------------------------------------------------------------------------


def read(file: pathlib.Path) -> list[Request]:
    """Requests from JSON lines."""
    with file.open(encoding="utf-8-sig") as lines:
        return [Request(**json.loads(line)) for line in lines if line.strip()]


def draw_requests(names: Sequence[str], each: int) -> list[Request]:
    """Held-out sentences of every kind, in random order."""
    found = [
        Request(name, sentence.text, sentence.label)
        for name in names
        for sentence in data.snippets(name, MARGIN)[1][:each]
    ]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def batches(queue: collections.deque[Request], size: int) -> Iterable[list[Request]]:
    """What waits in the queue, at most `size` requests at a time, whatever their adapters are."""
    while queue:
        yield [queue.popleft() for _ in range(min(size, len(queue)))]


# ---- the loop -----------------------------------------------------------------------------------


class Served(NamedTuple):
    """Answers, in the order of the requests, and what was measured."""

    answers: list[dict[str, Any]]
    compiled: int
    accuracy: dict[str, float]


def serve(
    lora: jlora.types.Transformed,
    base: Any,
    adapters: dict[str, Any],
    tokenizer: Any,
    requests: Sequence[Request],
    batch: int,
) -> Served:
    """Answers every request; the adapter `LATER` comes when half of them are answered."""
    compiled = []

    @jax.jit
    def step(base, table, ids, tokens, mask):
        compiled.append(1)  # only while it is traced
        return jax.nn.softmax(many.route(lora.apply)(base, table, ids, tokens, mask))  # (B, 2)

    table = many.stack([adapters[name] for name in AT_FIRST], size=SLOTS, base=base)
    slots = {name: slot for slot, name in enumerate(AT_FIRST)}
    queue, answers = collections.deque(requests), []
    with progress(total=len(requests), unit=" requests") as bar:
        for rows in batches(queue, batch):
            if LATER not in slots and len(answers) >= len(requests) / 2:
                slots[LATER] = len(slots)
                table = many.insert(table, slots[LATER], adapters[LATER], base=base)
            found = step(base, table, *pad_batch(rows, slots, tokenizer, batch))
            for row, p in zip(rows, np.asarray(found)[:, 1].tolist(), strict=False):
                known = row.adapter in slots
                more = {"positive": round(p, 4)} if known else {"error": NOT_THERE}
                answers.append(row._asdict() | more)
            bar.update(len(rows))
    return Served(answers, len(compiled), accuracy(answers))


def pad_batch(
    rows: Sequence[Request], slots: dict[str, int], tokenizer: Any, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slots (B,), tokens (B, L) and mask (B, L) of a full batch: what has no slot is the base's."""
    encoded = quickstart.encode(tokenizer, [data.Snippet(row.text, 0) for row in rows])
    more = batch - len(rows)
    ids = np.pad([slots.get(row.adapter, -1) for row in rows], (0, more), constant_values=-1)
    tokens, mask = (np.pad(x, ((0, more), (0, 0)), "edge") for x in (encoded.ids, encoded.mask))
    return jnp.asarray(ids, jnp.int32), tokens, mask


def accuracy(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The share of right answers for each adapter, where labels are known."""
    right = collections.defaultdict(list)
    for x in answers:
        if x.get("label") is not None and "positive" in x:
            right[x["adapter"]].append((x["positive"] > 0.5) == bool(x["label"]))
    return {name: float(np.mean(found)) for name, found in right.items()}


# ---- how fast -----------------------------------------------------------------------------------


def speeds(
    lora: jlora.types.Transformed, base: Any, adapters: dict[str, Any], tokenizer: Any, batch: int
) -> dict[str, float]:
    """Tokens a second of one batch, by how its rows come to their adapters; medians of turns.

    All adapters get equally many rows, at least one each.
    """
    sentences = draw_requests(list(adapters), max(1, batch // len(adapters)))
    slots = {name: slot for slot, name in enumerate(adapters)}
    table = many.stack(list(adapters.values()), size=SLOTS, base=base)
    ids, tokens, mask = pad_batch(sentences, slots, tokenizer, len(sentences))
    apply = jax.jit(lora.apply)
    merged = {name: jlora.merge(base, adapter) for name, adapter in adapters.items()}
    rows = {name: np.flatnonzero(np.asarray(ids) == slot) for name, slot in slots.items()}
    one = next(iter(adapters.values()))
    ways: dict[str, Callable[[], Any]] = {
        "one adapter for all rows": lambda: apply(base, one, tokens, mask),
        "an adapter a row": functools.partial(
            jax.jit(many.route(lora.apply)), base, table, ids, tokens, mask
        ),
        "a merged model for each adapter": lambda: [
            apply(merged[name], {}, tokens[at], mask[at]) for name, at in rows.items()
        ],
    }
    seconds = collections.defaultdict(list)
    for _ in progress(range(8), desc="timing"):
        for name, run in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: tokens.size / float(np.median(s[1:])) for name, s in seconds.items()}


# ---- the whole run ------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> Served:
    """Runs the example; `argv` are the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=pathlib.Path, help="JSON lines; default: held-out ones")
    parser.add_argument("--each", type=int, default=EACH, help="held-out requests for an adapter")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training each adapter")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args(argv)

    model, variables, tokenizer = quickstart.load()
    lora = quickstart.adapt(model)
    example = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    base, like = lora.init(jax.random.key(0), variables, example, example)
    names = (*AT_FIRST, LATER)
    adapters = {name: get_adapter(name, lora, base, like, tokenizer, args) for name in names}

    requests = read(args.requests) if args.requests else draw_requests(names, args.each)
    served = serve(lora, base, adapters, tokenizer, requests, args.batch)
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(x, ensure_ascii=False) for x in served.answers]
    (args.out / "answers.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")

    early = sum("error" in x for x in served.answers)
    print(f"{len(served.answers)} requests, {early} of them for {LATER} before it was there;")
    print(f"programs compiled: {served.compiled}; answers in {args.out / 'answers.jsonl'}")
    for name, share in sorted(served.accuracy.items()):
        print(f"  {name:11} {share:.1%} right")
    found = speeds(lora, base, adapters, tokenizer, args.batch)
    for name, speed in found.items():
        print(f"  {name:32} {speed:8,.0f} tokens a second")
    return served


if __name__ == "__main__":
    main()

"""Training several adapters: all in one step, or a few together, against one after the other."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from jlora import many

from . import adapters, model, real, report, steps

RUNS = 8
TOGETHER = {"at once": RUNS, "by twos": 2}  # of the runs
RATES = np.geomspace(1e-4, 1e-2, RUNS).astype(np.float32)


def run(quick: bool) -> None:
    """A row for each size; the target on a CPU is 1.5 times the throughput of one by one."""
    rounds = 2 if quick else 9
    rows = [measure(setting, rounds) for setting in (tiny() if quick else settings())]
    report.table(f"sweep: throughput of {RUNS} runs, against one after the other", rows)


class Setting(NamedTuple):
    """What is trained.

    Attributes:
        name: the model.
        lora: its transform.
        base: its weights.
        inputs: the arguments of the model in a batch.
        loss: of the model's apply function, parameters and a batch.
        batch: that all runs see.
        columns: what else a row of the table says of it.
    """

    name: str
    lora: jlora.types.Transformed
    base: Any
    inputs: Callable[[Any], tuple[Any, ...]]
    loss: steps.Loss
    batch: Any
    columns: dict[str, Any]


def tiny() -> Iterator[Setting]:
    """For CI."""
    yield of_size(64, tokens=32, rank=2, layers=1)


def settings() -> Iterator[Setting]:
    """Widths and tokens; ranks; all matrices of a layer; MiniLM on sentences."""
    for dim in (128, 384, 768):
        for tokens in (32, 128, 512):
            yield of_size(dim, tokens, rank=8)
    for rank in (2, 64):
        yield of_size(384, tokens=128, rank=rank)
    yield of_size(384, tokens=128, rank=8, sites="all-linear")
    for sentences in (1, 4, 16):
        yield minilm(sentences)


def of_size(dim: int, tokens: int, rank: int, sites: str = "q, v", layers: int = 4) -> Setting:
    """The language model of the other benchmarks; all runs see as many tokens."""
    length = 16
    shape = model.Shape(layers, dim, max(1, dim // 64), tokens // length, length)
    lm = model.LM(shape)
    ids, params = model.batch_and_params(lm)
    lora = jlora.transform(lm.apply, *adapters.RULES[sites](rank))
    columns = {"sites": sites, "rank": rank, "tokens": tokens}
    name, inputs = f"{layers} layers, d={dim}", lambda ids: (ids[:, :-1],)
    return Setting(name, lora, params, inputs, steps.next_token, ids, columns)


def minilm(sentences: int, rank: int = 8) -> Setting:
    """The quickstart's."""
    work = real.minilm(sentences)
    rules = (*model.attention(rank), jlora.Full("classifier"))
    params, batch = jax.tree.map(jnp.asarray, (work.params, work.batch))
    columns = {"sites": "q, v, head", "rank": rank, "tokens": batch.ids.size}
    lora = jlora.transform(work.apply, *rules)
    return Setting("MiniLM", lora, params, work.inputs, work.loss, batch, columns)


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    """A row of the table."""
    alone = one_by_one(setting)
    calls = {name: together(setting, count) for name, count in TOGETHER.items()}
    for call in calls.values():
        check(setting, call, alone)
    assert _flops(calls["at once"]) <= 1.01 * RUNS * _flops(alone), setting.name
    seconds = steps.interleave({"alone": alone, **calls}, None, rounds, setting.name)
    throughput = {name: steps.ratio(seconds["alone"], seconds[name]) for name in calls}
    temp = {f"MB {name}": call.temp / 1e6 for name, call in calls.items()}
    runs = {"runs/s": RUNS / float(np.median(seconds["alone"]))}
    memory = {"MB of one": alone.temp / 1e6, **temp}
    return {"model": setting.name, **setting.columns, **runs, **throughput, **memory}


def make(learning_rate: Any) -> optax.GradientTransformation:
    """Clipped AdamW."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate))


def together(setting: Setting, count: int) -> adapters.Call:
    """The step of a table, `count` of whose runs are computed together.

    The table is not kept: each call repeats the first step, which costs the same.
    """
    tx = many.optimizer(make, learning_rate=RATES)
    _, table = many.init(setting.lora, keys(), setting.base, *setting.inputs(setting.batch))
    slope = jax.value_and_grad(loss_of(setting))

    def slopes(table: Any, base: Any, batch: Any) -> Any:
        one = lambda adapter: slope(adapter, base, batch)  # noqa: E731
        return jax.vmap(one)(table) if count == RUNS else jax.lax.map(one, table, batch_size=count)

    arguments = (setting.base, table, tx.init(table), setting.batch)
    return adapters.Call.make(step_of(slopes, tx.update), arguments)


def one_by_one(setting: Setting) -> adapters.Call:
    """The steps of the same runs apart: one program, of which the rate is an argument."""
    _, table = many.init(setting.lora, keys(), setting.base, *setting.inputs(setting.batch))

    def update(grads: Any, state: Any, adapter: Any) -> tuple[Any, Any]:
        rate, inner = state
        updates, inner = make(rate).update(grads, inner, adapter)
        return updates, (rate, inner)

    parts = []
    for k, rate in enumerate(jnp.asarray(RATES)):
        adapter = jax.tree.map(lambda x, k=k: x[k], table)
        state = rate, make(rate).init(adapter)
        parts.append((setting.base, adapter, state, setting.batch))
    return adapters.Call.make(step_of(jax.value_and_grad(loss_of(setting)), update), *parts)


def keys() -> jax.Array:
    """Of the runs."""
    return jax.random.split(jax.random.key(0), RUNS)


def loss_of(setting: Setting) -> Callable[..., jax.Array]:
    """A function of adapter, base and batch."""

    def loss(adapter: Any, base: Any, batch: Any) -> jax.Array:
        apply = lambda base, *args: setting.lora.apply(base, adapter, *args)  # noqa: E731
        return setting.loss(apply, base, batch)

    return loss


def step_of(slope: Callable[..., Any], update: Callable[..., Any]) -> Callable[..., Any]:
    """A step `(base, adapter, state, batch) -> (adapter, state, loss)`."""

    def step(base: Any, adapter: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = slope(adapter, base, batch)
        updates, state = update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    return step


def check(setting: Setting, call: adapters.Call, alone: adapters.Call) -> None:
    """Losses agree before and after an update; nothing of the base is there twice."""
    [(base, table, state, batch)] = call.arguments
    given = call.compiled.memory_analysis().argument_size_in_bytes
    expected = sum(x.nbytes for x in jax.tree.leaves((base, table, state, batch)))
    assert given <= expected, f"{setting.name}: an argument is copied"
    losses = []
    for _ in range(2):
        table, state, value = call.compiled(base, table, state, batch)
        losses.append(value)
    for k, (base, adapter, state, batch) in enumerate(alone.arguments):
        for both in losses:
            adapter, state, value = alone.compiled(base, adapter, state, batch)
            np.testing.assert_allclose(both[k], value, rtol=1e-5)


def _flops(call: adapters.Call) -> float:
    return call.compiled.cost_analysis()["flops"]

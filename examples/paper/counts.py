"""What LoRA trains and stores in the paper's models, at full size and without memory.

    python examples/paper counts

Every model is built, adapted and differentiated in shapes alone: trainable parameters, the bytes
of an adapter and of a merged checkpoint in float16, and the bytes of gradients and of Adam's
moments in float32, beside those of full fine-tuning.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from models import bert, deberta, gpt
from tqdm import tqdm

import jlora

IDS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
KEY = jax.random.key(0)


def bert_rules(rank: int) -> list[jlora.LoRA]:
    """Query and value of every layer."""
    return [jlora.LoRA(r"attention/(query|value)/kernel", rank=rank)]


def gpt_rules(matrices: str, rank: int) -> list[jlora.LoRA]:
    """Those of the matrices q, k, v and o of every layer; the first three are in one kernel."""
    slots = jlora.Slots(3, tuple("qkv".index(m) for m in matrices if m != "o"))
    rules = [jlora.LoRA("c_attn/kernel", rank=rank, slots=slots)]
    return rules + [jlora.LoRA("attn/c_proj/kernel", rank=rank)] * ("o" in matrices)


class Row(NamedTuple):
    """A row of the paper's table."""

    name: str
    adapted: str
    model: nn.Module
    rules: list[jlora.LoRA]
    expected: int  # 2 · matrices · d · rank


def rows() -> list[Row]:
    """The paper's models and ranks."""
    roberta_base = bert.Bert(bert.SIZES["roberta-base"], scan=True)
    roberta_large = bert.Bert(bert.SIZES["roberta-large"], scan=True)
    xxl = deberta.Deberta(deberta.SIZES["deberta-v2-xxlarge"], scan=True)
    medium, large, gpt3 = (
        gpt.GPT(gpt.SIZES[name]) for name in ("gpt2-medium", "gpt2-large", "gpt3-175b")
    )
    ours = [
        Row("RoBERTa-base", "q, v, r = 8", roberta_base, bert_rules(8), 294_912),
        Row("RoBERTa-large", "q, v, r = 8", roberta_large, bert_rules(8), 786_432),
        Row("DeBERTa-v2-XXL", "q, v, r = 16", xxl, bert_rules(16), 4_718_592),
        Row("GPT-2 medium", "q, v, r = 4", medium, gpt_rules("qv", 4), 393_216),
        Row("GPT-2 large", "q, v, r = 4", large, gpt_rules("qv", 4), 737_280),
    ]
    budgets = {
        4_718_592: [("qv", 1), ("v", 2)],
        37_748_736: [("qv", 8), ("qkvo", 4)],
        18_874_368: [("q", 8), ("qv", 4), ("qkvo", 2)],
    }
    return ours + [
        Row("GPT-3 175B", f"{', '.join(m)}, r = {r}", gpt3, gpt_rules(m, r), count)
        for count, choices in budgets.items()
        for m, r in choices
    ]


class Figures(NamedTuple):
    """Of one row, in parameters and bytes."""

    parameters: int
    trainable: int
    adapter_bytes: int  # in float16
    merged_bytes: int  # in float16
    gradient_bytes: int  # in float32
    moment_bytes: int  # in float32
    full_gradient_bytes: int
    full_moment_bytes: int


def measure(model: nn.Module, rules: list[jlora.LoRA]) -> Figures:
    """The figures of an adapted model, by shapes alone."""
    stored, trained = (
        jax.eval_shape(functools.partial(adapt, model, rules, dtype))
        for dtype in (jnp.float16, jnp.float32)
    )
    lora, (base, adapter) = jlora.transform(model.apply, *rules), trained
    summary = jlora.summary(*stored)

    def loss(adapter: Any, base: Any, ids: jax.Array) -> jax.Array:
        return lora.apply(base, adapter, ids).mean()

    def full_loss(params: Any, ids: jax.Array) -> jax.Array:
        return model.apply(params, ids).mean()

    return Figures(
        parameters=summary.base,
        trainable=summary.trainable,
        adapter_bytes=summary.trainable_bytes,
        merged_bytes=size(jax.eval_shape(jlora.merge, *stored)),
        gradient_bytes=size(jax.eval_shape(jax.grad(loss), adapter, base, IDS)),
        moment_bytes=size(jax.eval_shape(jlora.optimizer(optax.adamw(1e-3)).init, adapter)),
        full_gradient_bytes=size(jax.eval_shape(jax.grad(full_loss), base, IDS)),
        full_moment_bytes=size(jax.eval_shape(optax.adamw(1e-3).init, base)),
    )


def adapt(model: nn.Module, rules: list[jlora.LoRA], dtype: Any) -> tuple[Any, Any]:
    """Base and adapter of a new model, all of `dtype`."""
    model = model.clone(param_dtype=dtype)
    rules = [dataclasses.replace(rule, dtype=dtype) for rule in rules]
    variables = nn.unbox(model.init(KEY, jnp.zeros(IDS.shape, IDS.dtype)))
    return jlora.transform(model.apply, *rules).init(KEY, variables, IDS)


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def readable(count: int) -> str:
    """Bytes in decimal units, as the paper counts."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def main(argv: Sequence[str] | None = None, table: Sequence[Row] | None = None) -> None:
    """Prints the figures of each row, in Markdown."""
    del argv  # there are no options
    print("| model | parameters | adapted | trainable | adapter | merged | gradients | Adam |")
    print("|---|---|---|---|---|---|---|---|")
    for row in tqdm(table or rows(), disable=None):
        f = measure(row.model, row.rules)
        cells = (
            row.name,
            f"{f.parameters:,}",
            row.adapted,
            f"{f.trainable:,}",
            readable(f.adapter_bytes),
            readable(f.merged_bytes),
            f"{readable(f.gradient_bytes)} of {readable(f.full_gradient_bytes)}",
            f"{readable(f.moment_bytes)} of {readable(f.full_moment_bytes)}",
        )
        tqdm.write(f"| {' | '.join(cells)} |")

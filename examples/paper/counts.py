"""What LoRA trains and stores in the paper's models, at full size and without memory.

    python examples/paper counts

Every model is built and adapted in shapes alone: trainable parameters, the bytes of an adapter and
of a merged checkpoint in float16, and the bytes of gradients and of Adam's moments in float32,
beside those of full fine-tuning.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from models import bert, deberta, gpt
from progress import progress

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


def measure(model: nn.Module, rules: list[jlora.LoRA]) -> tuple[int, int]:
    """The parameters of a model, and those that LoRA trains, by shapes alone."""

    def adapt() -> tuple[Any, Any]:
        variables = nn.unbox(model.init(KEY, jnp.zeros(IDS.shape, IDS.dtype)))
        return jlora.transform(model.apply, *rules).init(KEY, variables, IDS)

    base, adapter = jax.eval_shape(adapt)
    return jlora.count(base), jlora.count(adapter)


def format_count(count: int) -> str:
    """Bytes in decimal units, as the paper counts."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the figures of each row, in Markdown."""
    del argv  # there are no options
    print("| model | parameters | adapted | trainable | adapter | merged | gradients | Adam |")
    print("|---|---|---|---|---|---|---|---|")
    for row in progress(rows()):
        full, trained = measure(row.model, row.rules)
        cells = (
            row.name,
            f"{full:,}",
            row.adapted,
            f"{trained:,}",
            format_count(2 * trained),  # in float16
            format_count(2 * full),
            f"{format_count(4 * trained)} of {format_count(4 * full)}",  # in float32
            f"{format_count(8 * trained)} of {format_count(8 * full)}",  # two moments
        )
        progress.write(f"| {' | '.join(cells)} |")

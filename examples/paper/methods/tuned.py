"""Methods that train what a model has, or low-rank changes of it: nothing but rules of jlora."""

import flax.linen as nn
from models import gpt

import jlora

from .added import Method, Rule, with_rules


def full(model: nn.Module, *rules: Rule) -> Method:
    """Full fine-tuning: every parameter."""
    return with_rules(model, *rules, jlora.Full("^params"))


def bitfit(model: nn.Module, *rules: Rule) -> Method:
    """BitFit: every bias, those of norms too.

    Source: Ben Zaken et al., arXiv 2106.10199.
    """
    return with_rules(model, *rules, jlora.Full("^params/.*bias$"))


def lora(
    model: nn.Module, *rules: Rule, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0
) -> Method:
    """LoRA on the query and value projections: 4·L·d·r parameters.

    Source: Hu et al., arXiv 2106.09685.
    """
    fused = isinstance(model, gpt.GPT)
    pattern, slots = r"(query|value)/kernel", None
    if fused:
        pattern, slots = "c_attn/kernel", jlora.Slots(3, (0, 2))
    return with_rules(model, *rules, jlora.LoRA(pattern, rank, alpha, slots, dropout))


def lora_all(
    model: nn.Module, *rules: Rule, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0
) -> Method:
    """LoRA on every dense kernel that no other rule takes."""
    return with_rules(model, *rules, jlora.LoRA(rank=rank, alpha=alpha, dropout=dropout))

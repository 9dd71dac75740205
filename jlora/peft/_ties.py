"""Weights that two modules share: a checkpoint stores them once, an adapter twice."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ._checkpoint import Checkpoint
from ._json import shown
from ._parts import Part

Full = Mapping[str, np.ndarray]


def absent(checkpoint: Checkpoint, parts: Sequence[Part], full: Full) -> list[str]:
    """Problems with what the checkpoint has no tensor for: a tied weight is there once."""
    there = [part for part in parts if part.name in checkpoint.where]
    kept = {name: x for name, x in full.items() if name in checkpoint.where}
    lost = [p.name for p in parts if p.name not in checkpoint.where and not _twin(p, there)]
    lost += [
        name
        for name, x in full.items()
        if name not in kept and not any(np.array_equal(x, other) for other in kept.values())
    ]
    return [f"{shown(name)}: not in the checkpoint{_reason(name, checkpoint)}" for name in lost]


def _reason(name: str, checkpoint: Checkpoint) -> str:
    if checkpoint.vocabulary and name.endswith((".weight", ".bias")):
        return (
            "; if it shares the input embedding's weight, the adapter must change both alike, or "
            "the checkpoint must be saved untied"
        )
    return "; save the base model as it was adapted, with its head"


def untied(checkpoint: Checkpoint, parts: Sequence[Part], full: Full) -> list[str]:
    """Changes of a shared weight that PEFT would apply in only one of its places."""
    alone = [p.name for p in parts if _is_tied(checkpoint, p.name) and not _twin(p, parts)]
    alone += [
        name
        for name, x in full.items()
        if _is_tied(checkpoint, name)
        and not any(name != other and np.array_equal(x, y) for other, y in full.items())
    ]
    return [
        f"{shown(name)}: the input embedding and the output head share this weight (config.json: "
        "tie_word_embeddings), but the adapter does not change both alike; save the base model "
        "untied first"
        for name in alone
    ]


def twins(checkpoint: Checkpoint, changed: Sequence[str]) -> Iterator[tuple[str, str]]:
    """A changed weight that is shared, and another tensor that may be its copy."""
    for name in changed:
        if _is_tied(checkpoint, name):
            entry = checkpoint.entry(name)
            for other in checkpoint.where:
                form = checkpoint.entry(other)[:2]
                if other not in changed and form == entry[:2]:
                    yield name, other


def _is_tied(checkpoint: Checkpoint, name: str) -> bool:
    if name not in checkpoint.where:
        return False
    shape = checkpoint.entry(name).shape
    return len(shape) == 2 and shape[0] in checkpoint.vocabulary


def _twin(part: Part, parts: Sequence[Part]) -> bool:
    """Whether one of `parts` is the same on the other side of a shared weight."""
    return any(
        {part.kind, other.kind} == {"embedding", "linear"}
        and part.scale == other.scale
        and np.array_equal(part.a, other.b.T)
        and np.array_equal(part.b, other.a.T)
        for other in parts
    )

"""Modules are called otherwise in a model with a head and in the same model without one."""

from collections.abc import Collection
from typing import NamedTuple

# Names of old checkpoints, which `transformers` replaces as it loads them.
_OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


class Renaming(NamedTuple):
    """From the names of the adapted model to those of a checkpoint.

    Attributes:
        names: the checkpoint's.
        add: a first part, such as `bert.`, that the checkpoint has before all of the model.
        strip: one that the model has and the checkpoint has not.
    """

    names: Collection[str]
    add: str = ""
    strip: str = ""

    def there(self, name: str) -> str:
        """The tensor of the checkpoint for a parameter of the model."""
        if name not in self.names:
            name = self.add + name.removeprefix(self.strip)
        old = next(
            (name.removesuffix(new) + o for new, o in _OLD.items() if name.endswith(new)), ""
        )
        return old if name not in self.names and old in self.names else name

    def back(self, name: str) -> str | None:
        """The inverse of `there`; None for what is outside of the adapted model."""
        new = next(
            (name.removesuffix(o) + new for new, o in _OLD.items() if name.endswith(o)), name
        )
        return self.strip + new.removeprefix(self.add) if new.startswith(self.add) else None


def renaming(wanted: Collection[str], names: Collection[str]) -> Renaming:
    """The one that finds the most of `wanted` among `names`.

    Raises:
        ValueError: if two find as many.
    """
    firsts = dict.fromkeys(name.partition(".")[0] + "." for name in names)
    own = dict.fromkeys(name.partition(".")[0] + "." for name in wanted)
    choices = [Renaming(names)]
    choices += [Renaming(names, add=p) for p in firsts] + [Renaming(names, strip=p) for p in own]
    counts = [sum(choice.there(n) in names for n in wanted) for choice in choices]
    best = [c for c, count in zip(choices, counts, strict=True) if count == max(counts)]
    if best[0] is not choices[0] and len(best) > 1:
        parts = ", ".join(repr(c.add or c.strip) for c in best)
        raise ValueError(
            f"`adapter` fits the checkpoint of `src_dir` with either of {parts} before its names. "
            "Rename its modules as they are in the checkpoint."
        )
    return best[0]

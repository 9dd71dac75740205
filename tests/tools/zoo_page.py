"""What the zoo of PyTorch's models has shown: the rows of a file, and the page of all files.

`python tests/tools/zoo_page.py` writes the page again. `zoo.py` makes the files.
"""

import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "notebooks" / "measurements" / "zoo.md"
CLOSE = 1e-4
VERDICTS = ("whole", "right", "refused", "failed", "wrong")
STAGES = ("forward", "linear", "adapter", "gradient", "merged")


class Row(NamedTuple):
    """What was found out about a model: of each stage an error, or a word in place of it.

    Attributes:
        family: its family.
        name: its class.
        forward: how far its outputs are from PyTorch's.
        linear: whether `all_linear` has the modules that PEFT adapts and calls.
        adapter: how far its outputs with the adapter of a file are from those of PEFT.
        gradient: how far the gradients of A and B are from PEFT's.
        merged: how far the outputs of the merged model are from those with the adapter.
        rounded: the largest of these in 32 bits, if they are of 64.
        seconds: how long it took.
        why: what was refused or raised.
    """

    family: str = ""
    name: str = ""
    forward: str = ""
    linear: str = ""
    adapter: str = ""
    gradient: str = ""
    merged: str = ""
    rounded: float | None = None
    seconds: int = 0
    why: str = ""

    @property
    def stages(self) -> list[str]:
        """What was found, by stage."""
        return [getattr(self, stage) for stage in STAGES]

    @property
    def errors(self) -> list[float]:
        """The errors that are numbers."""
        return [float(x) for x in self.stages if re.match(r"\d|inf|nan", x)]

    @property
    def verdict(self) -> str:
        """What the stages come to."""
        if not all(x < CLOSE for x in self.errors):
            return "wrong"
        if {"failed", "slow"} & {*self.stages}:
            return "failed"
        if self.forward == "refused":
            return "refused"
        is_whole = "different" not in self.linear and self.merged not in ("", "refused")
        return "whole" if is_whole else "right"


class Zoo(NamedTuple):
    """A drawn zoo."""

    seed: int
    versions: dict[str, str]
    rows: tuple[Row, ...]

    def count(self, *verdicts: str, family: str = "") -> int:
        """Counts rows."""
        return sum(x.verdict in verdicts for x in self.rows if family in ("", x.family))


def file_of(seed: int) -> pathlib.Path:
    """Where the zoo of a seed is."""
    return ROOT / "examples" / "results" / f"zoo_{seed}.jsonl"


def read(file: pathlib.Path) -> Zoo:
    """Reads a zoo: a line of its versions, and one for each row."""
    head, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return Zoo(head["seed"], head["versions"], tuple(Row(**x) for x in rows))


def write_line(x: Row) -> str:
    """Writes the line of a row."""
    return json.dumps({k: v for k, v in x._asdict().items() if v not in ("", None)}) + "\n"


# -------------------------------------------------------------------------------------- the page

HEAD = """# A zoo of PyTorch's models

What [`jlora.torch`](../loops/torch.md) makes of models that were drawn by lot, on a CPU. All are
tiny and have random weights. The classes of `transformers` are those that PyTorch computes with
tokens, images or sounds at these sizes; their configurations are the defaults made small. Models of
timm and torchvision have fewer than 16 million parameters. No class is in two draws.

A model is *whole* if all of this holds, to 1e-4 of the largest entry:

- **forward**: its outputs are PyTorch's.
- **linear**: `jlora.torch.all_linear` has, module for module, what PEFT adapts as `all-linear` and
  the model calls.
- **adapter**: PEFT computes with the saved adapter what JAX does.
- **gradient**: the gradients of A and B are PEFT's.
- **merged**: the merged folder, loaded by the model's own library, computes the same too.

Where PEFT refuses `all-linear`, as of Mamba's layers and of models without linear modules, the rest
must hold. A model is *right* if its outputs are, and `all_linear` is not PEFT's, or jlora or PEFT
fails in a later step by an error of its own. It is *refused* if jlora refuses to run it, with the
module and a remedy. *Failed* is an error that has neither, or no end within minutes. *Wrong* is a
number that is not PyTorch's, without an error.
"""


def write_page(zoos: Sequence[Zoo]) -> str:
    """Writes the page."""
    return "\n".join([HEAD, *(line for zoo in zoos for line in _write_zoo(zoo))])


def _write_zoo(zoo: Zoo) -> Iterator[str]:
    versions = ", ".join(f"{name} {x}" for name, x in zoo.versions.items())
    yield f"## Seed {zoo.seed}\n"
    yield f"{summarize(zoo)}\n\nVersions: {versions}.\n"
    families = (*dict.fromkeys(x.family for x in zoo.rows), "")
    counts = ([zoo.count(x, family=family) for x in VERDICTS] for family in families)
    rows = ((name or "all", sum(n), *n) for name, n in zip(families, counts, strict=True))
    yield from _table(("family", "drawn", *VERDICTS), rows)
    if wide := [x for x in zoo.rows if x.rounded]:
        worst = max(x.rounded or 0 for x in wide)
        names = ", ".join(f"`{x.name}`" for x in wide)
        yield f"Rounding in 32 bits is above 1e-4 in {len(wide)}, up to {worst:.1e}, so that"
        yield "they were measured in 64 bits, also where the model itself converts to 32:"
        yield f"{names}.\n"
    yield "### What is not whole\n"
    odd = [x for x in zoo.rows if x.verdict != "whole"]
    yield from _table(("model", "", "why"), ((f"`{x.name}`", x.verdict, _explain(x)) for x in odd))
    yield "### All models\n"
    yield from _table(("model", *STAGES), ((f"`{x.name}`", *x.stages) for x in zoo.rows))


def summarize(zoo: Zoo) -> str:
    """Says in numbers what a zoo has shown."""
    n = len(zoo.rows)
    right = zoo.count("whole", "right", "refused")
    return (
        f"Of {n} models, {right} ({right / n:.0%}) are right or refused by name, "
        f"{zoo.count('whole')} ({zoo.count('whole') / n:.0%}) whole, {zoo.count('wrong')} wrong."
    )


def _explain(x: Row) -> str:
    stages = [stage for stage in STAGES if getattr(x, stage) in ("refused", "failed", "PEFT fails")]
    text = " ".join(x.why.split()) or f"linear: {x.linear}"
    return ": ".join([*stages, text]).replace("|", r"\|")


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(map(str, x))} |" for x in rows)
    yield ""


def read_all() -> list[Zoo]:
    """Reads the zoos of all seeds."""
    return [read(x) for x in sorted(file_of(0).parent.glob("zoo_*.jsonl"))]


if __name__ == "__main__":
    PAGE.write_text(write_page(read_all()), encoding="utf-8")

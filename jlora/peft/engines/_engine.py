"""An engine, and the adapter that its rules check. Rules read only headers."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .._submodels import class_of
from ..adapter._config import DEFAULTS
from ..adapter._patterns import list_parents
from ..adapter._roles import Roles
from ._models import find_model


class Finding(NamedTuple):
    """A part of an adapter that an engine does not serve as PEFT would.

    Attributes:
        what: the field of the configuration, the tensors or the modules.
        why: the reason.
        remedy: what to do.
        silent: whether the engine gives no error, but ignores it or computes something else.
    """

    what: str
    why: str
    remedy: str
    silent: bool

    def __str__(self) -> str:
        kind = "dropped silently" if self.silent else "refused"
        return f"{kind}: {self.what}: {self.why}. {self.remedy}."


class Side(NamedTuple):
    """The A or the B of a module.

    Attributes:
        key: its key in the file.
        module: the module, without `base_model.model.`.
        depth: the number of adapted parameters that PEFT wrapped around it.
        side: `A` or `B`.
        table: whether the module is an embedding.
        shape: its shape.
    """

    key: str
    module: str
    depth: int
    side: str
    table: bool
    shape: tuple[int, ...]

    @property
    def last(self) -> str:
        """The last component of the module's name."""
        return self.module.rpartition(".")[2]

    @property
    def is_fused(self) -> bool:
        """Whether it is for all experts of a module together, by `target_parameters`."""
        return self.depth > 0 or self.last == "experts"


class Base:
    """The served model, from the headers and the configuration of its checkpoint."""

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]):
        """Takes `config.json` and the shapes of all tensors, with () for codes."""
        self.config, self.shapes = config, shapes
        self.architecture = class_of(config)
        self.model, self.is_listed = find_model(self.architecture)
        own = {name.rpartition(".")[0] for name in shapes}
        modules = {parent for module in own for parent in list_parents(module)}
        # The checkpoint's name of each module, by the engine's name.
        self.modules = {self.model.rename(module): module for module in modules}
        self.lasts = {self.last(module) for module in modules}

    def called(self, module: str) -> str | None:
        """Returns the checkpoint's name for a module; None if an engine finds no such module.

        A checkpoint of a model without its head may leave out the first `model.`. A tied head has
        the weight of the embedding.
        """
        if module == "lm_head" and "lm_head" not in self.lasts:
            return next((m for m in self.modules.values() if m.endswith("embed_tokens")), None)
        names = (self.model.rename(module), module.removeprefix("model."))
        return next((self.modules[name] for name in names if name in self.modules), None)

    def last(self, module: str) -> str:
        """Returns the last component of the engine's name for a module."""
        return self.model.rename(module).rpartition(".")[2]

    def shape(self, module: str) -> tuple[int, ...]:
        """Returns the shape of a module's weight; () if it is not known."""
        name = self.called(module)
        return () if name is None else self.shapes.get(f"{name}.weight", ())

    def nearest(self, module: str) -> str:
        """Returns the module of the base that has the longest ending in common with `module`."""
        tail = module
        while tail := tail.partition(".")[2]:
            if found := [m for m in self.modules.values() if m.endswith("." + tail)]:
                return min(found, key=lambda m: (len(m), m))
        return "others"


@dataclasses.dataclass
class Served:
    """An adapter as an engine gets it.

    Attributes:
        fields: its configuration.
        factors: each A and B.
        others: the keys of all other tensors.
        base: the served model, or None.
        max_lora_rank: the largest rank that the server supports.
    """

    fields: Mapping[str, Any]
    factors: list[Side]
    others: list[str]
    base: Base | None
    max_lora_rank: int

    @property
    def rank(self) -> int:
        """The default rank of modules."""
        return self.fields.get("r", DEFAULTS["r"])

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each module by the configuration."""
        roles = Roles({"r": self.rank, "rank_pattern": self.fields.get("rank_pattern")})
        return {side.module: roles[side.module].rank for side in self.factors}

    @functools.cached_property
    def pairs(self) -> dict[tuple[str, int], dict[str, Side]]:
        """A and B by module and depth."""
        found: dict[tuple[str, int], dict[str, Side]] = {}
        for side in self.factors:
            found.setdefault((side.module, side.depth), {})[side.side] = side
        return found


class Engine(NamedTuple):
    """An engine that serves adapters.

    Attributes:
        title: its name in texts.
        version: the version that was run.
        rules: the checks of an adapter.
        start: a command that starts it, with `{base}`, `{dir}` and the largest `{rank}`.
        ranks: the allowed values of its option `--max-lora-rank`.
        rank: the default of this option.
        notes: a function that returns what the user should know of an adapter that is served.
    """

    title: str
    version: str
    rules: tuple[Callable[[Served], Iterable[Finding]], ...]
    start: str
    ranks: tuple[int, ...]
    rank: int
    notes: Callable[[Served], Iterable[str]] = lambda served: ()

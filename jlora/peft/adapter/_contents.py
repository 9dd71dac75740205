"""Sorts the tensors of an adapter by their keys and its configuration."""

import collections
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from .._file import CONFIG, COUNT, COUNTS, DTYPES, PREFIX, TENSORS, TensorInfo, show
from .._problems import Problems
from ._config import PARAMETERS, ROWS_ALONE, problems_of
from ._files import MAGNITUDE, Files
from ._select import Selection
from ._tokens import DELTA, DELTA_ALONE, WRAPPED, Tokens, find_rows

BASE = ".base_layer"  # what is wrapped by an adapter
B_BIAS = ".lora_B.bias"
# PEFT saves the weights of an embedding that is targeted by one of these names beside its A and B.
SAVED_BY_NAME = ("embed_tokens", "lm_head")
# What the modules are called whose weight a model's head may share: of embeddings, then of heads.
SHARED = re.compile(
    r"(^|[._])(embed_tokens|embed_in|wte|word_embeddings?|tokens?_embed|tok_embeddings|shared"
    r"|lm_head|lm_head\.decoder|cls\.predictions\.decoder|embed_out|proj_out|output_projection"
    r"|generator_lm_head|lm_loss|pred_layer\.proj|output)$"
)
# PEFT lists these for every sequence classifier, whatever its head is called.
HEADS = ("classifier", "score")
FACTOR = re.compile(
    r"(?P<module>.+?)(?P<depth>(?:\.base_layer)*)"
    r"\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<table>[AB]))"
)


class Part(NamedTuple):
    """A and B of one parameter, in PEFT's layout.

    Attributes:
        name: PyTorch's parameter.
        kind: `linear`, `embedding`, `conv` or `experts`.
        key: what patterns match: the module, or the parameter where it is chosen by its name.
        a: PEFT's A, an array or a `TensorInfo` of the file.
        b: PEFT's B.
        scale: s.
        transposed: whether PyTorch keeps the weight as (inputs, outputs); None if not known.
        m: PEFT's magnitudes of DoRA, or None.
        experts: how many experts share A and B.
    """

    name: str
    kind: str
    key: str
    a: Any
    b: Any
    scale: float
    transposed: bool | None = None
    m: Any = None
    experts: int = 1

    @property
    def arrays(self) -> tuple[Any, ...]:
        """A and B, and the magnitudes if there are any."""
        return (self.a, self.b) if self.m is None else (self.a, self.b, self.m)

    @property
    def rank(self) -> int:
        """The rank of one expert."""
        return self.a.shape[0] // self.experts

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of B·A of one expert."""
        return self.b.shape[0], math.prod(self.a.shape[1:])

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """The shape of PEFT's magnitudes, one for each output."""
        n = self.b.shape[0]
        return (1, n, *[1] * (len(self.a.shape) - 2)) if self.kind == "conv" else (n,)


class Contents(NamedTuple):
    """What an adapter has for the parameters of a model, by PyTorch's names.

    Its arrays are values, or the `TensorInfo`s of a file whose values are not read yet.

    Attributes:
        parts: A and B.
        full: what replaces a parameter.
        frozen: what a parameter must be.
        tokens: what replaces rows of an embedding.
        biases: what `lora_bias` adds to the bias of a module, and its scale.
    """

    parts: list[Part]
    full: dict[str, Any]
    frozen: dict[str, Any]
    tokens: dict[str, Tokens]
    biases: dict[str, tuple[Any, float]]


class Adapter(NamedTuple):
    """The tensors of an adapter, sorted by what they are.

    Attributes:
        fields: its configuration.
        selection: the modules that this selects.
        modules: A and B by module. Where several parameters of a module are adapted, the file does
            not say which is which: they are in the order in which PEFT wraps them.
        others: all else that the adapter has.
        heads: names of tied heads, for which the configuration lists an embedding's rows once more.
    """

    fields: dict[str, Any]
    selection: Selection
    modules: dict[str, list[Part]]
    others: Contents
    heads: list[str]

    @property
    def names(self) -> list[str]:
        """The parameters that the adapter may change."""
        each = ((m, self.selection.parameters(m) or ["weight"]) for m in self.modules)
        adapted = (f"{module}.{name}" for module, names in each for name in names)
        return [*self.others.full, *self.others.tokens, *adapted]


def sort_tensors(files: Files, problems: Problems) -> Adapter:
    """Sorts tensors by what they are; raises for a configuration that is not supported."""
    fields = files.fields
    problems.stop(*problems_of(fields))
    selection = Selection(fields, f"`{files.argument}`")
    if fields.get("peft_type") == ROWS_ALONE:
        tokens = _rows_alone(selection, files.tensors, problems)
        return Adapter(fields, selection, {}, Contents([], {}, {}, tokens, {}), [])
    sides = collections.defaultdict[tuple[str, int, bool], dict[str, TensorInfo]](dict)
    endings = (MAGNITUDE, DELTA, B_BIAS) if fields.get("lora_bias") else (MAGNITUDE, DELTA)
    by_ending = {end: dict[str, TensorInfo]() for end in (MAGNITUDE, DELTA, B_BIAS)}
    others = dict[str, TensorInfo]()
    for x in files.tensors:
        name = x.key.removeprefix(PREFIX)
        if not x.key.startswith(PREFIX):
            problems.add(x.key, f"unexpected; PEFT's keys start with {PREFIX!r}")
        elif x.dtype not in (COUNTS if x.key.endswith(COUNT) else DTYPES):
            problems.add_not_floating(x)
        elif found := FACTOR.fullmatch(name):
            module, depth, side, table = found.group("module", "depth", "side", "table")
            sides[module, depth.count("."), bool(table)][side or table] = x
        elif end := next(filter(name.endswith, endings), None):
            by_ending[end][name.removesuffix(end)] = x
        else:
            others[name] = x
    magnitudes, deltas, biases = by_ending.values()
    adapted = {module for module, *_ in sides}
    selection.prepare(adapted)
    full, frozen = _others(selection, others, adapted, deltas, problems)
    parts = _parts(selection, sides, magnitudes, problems)
    rows, heads = find_rows(fields, deltas, problems)
    for module in rows:
        if module in adapted or selection.saves(module):
            problems.add(deltas[module].key, "rows of what is adapted as a whole too")
    tokens = {f"{module}.weight": Tokens(module, rows[module], deltas[module]) for module in rows}
    added = {f"{module}.bias": (x, selection.scale(module)) for module, x in biases.items()}
    others = Contents([], full, frozen, tokens, added)
    return Adapter(fields, selection, parts, others, heads)


def _rows_alone(
    selection: Selection, tensors: Iterable[TensorInfo], problems: Problems
) -> dict[str, Tokens]:
    """Sorts the tensors of an adapter that has nothing but rows."""
    rows, found = tuple(selection.fields["token_indices"]), dict[str, Tokens]()
    by_module = {x.key.removeprefix(PREFIX).removesuffix(DELTA_ALONE): x for x in tensors}
    if len(by_module) > PARAMETERS:
        problems.found.append(
            f"{TENSORS} has rows of {len(by_module)} modules; expected {PARAMETERS} or fewer"
        )
        return {}
    selection.prepare(by_module)
    selected = list(filter(selection.adapts, by_module))
    for module, x in by_module.items():
        # PEFT stores a head that is tied to an embedding beside that, selected or not.
        is_taken = module in selected or (selected and SHARED.search(module))
        if x.key != f"{PREFIX}{module}{DELTA_ALONE}" or not is_taken:
            problems.add(x.key, f"unexpected; {CONFIG} does not select it")
        elif x.dtype not in DTYPES:
            problems.add_not_floating(x)
        else:
            found[f"{module}.weight"] = Tokens(module, rows, x)
    return found


# ------------------------------------------------------------------------- parameters as a whole


def _others(
    selection: Selection,
    tensors: Mapping[str, TensorInfo],
    adapted: Collection[str],
    with_rows: Collection[str],
    problems: Problems,
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Separates the parameters that are replaced from those that must be the base's."""
    full, frozen = dict[str, TensorInfo](), dict[str, TensorInfo]()
    for key, x in tensors.items():
        wrapped, _, parameter = key.rpartition(".")
        module = wrapped.removesuffix(BASE).removesuffix(WRAPPED)
        name, is_wrapped, is_adapted = f"{module}.{parameter}", module != wrapped, module in adapted
        is_full = may_tie(selection.fields, module) or selection.saves_whole(
            module, parameter, is_adapted
        )
        is_frozen = parameter == "weight" or (parameter == "bias" and not is_full)
        is_resized = _is_of_vocabulary(module, parameter) and not (is_wrapped or is_adapted)
        if "modules_to_save" in key or "original_module" in key:
            why = "unexpected; bias 'all' beside modules_to_save is not supported"
            problems.add(x.key, why)
        elif name in full or name in frozen:
            problems.add(x.key, f"there twice, with and without {BASE[1:]}")
        elif is_frozen and is_wrapped and (is_adapted or module in with_rows):
            frozen[name] = x
        elif is_resized or (is_full and (parameter == "bias" or not is_adapted)):
            full[name] = x
        else:
            problems.add(
                x.key, f"in full, beside A and B of {show(module)}" if is_full else "unexpected"
            )
    return full, frozen


def _is_of_vocabulary(module: str, parameter: str) -> bool:
    """Whether PEFT saves a parameter by itself, once the vocabulary has been resized."""
    return parameter in ("weight", "bias") and bool(SHARED.search(module))


def may_tie(fields: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT may have changed `module` because it shares its weight with another."""
    return bool(fields.get("ensure_weight_tying")) and bool(SHARED.search(module))


def explain_resized(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str | None:
    """Explains why a parameter does not fit if its vocabulary has another size."""
    module, _, parameter = name.rpartition(".")
    if shape == wanted or shape[1:] != wanted[1:] or not _is_of_vocabulary(module, parameter):
        return None
    n = shape[0]
    return (
        f"{show(name)}: has {n} rows in the adapter, which was saved with a resized vocabulary, "
        f"and {wanted[0]} in the base; resize that too, by resize_token_embeddings({n}) in "
        "`transformers`, and save it. The values of all rows are in the adapter"
    )


# --------------------------------------------------------------------------------------- A and B


def _parts(
    selection: Selection,
    sides: Mapping[tuple[str, int, bool], Mapping[str, TensorInfo]],
    magnitudes: Mapping[str, TensorInfo],
    problems: Problems,
) -> dict[str, list[Part]]:
    """Pairs A and B of each module, the deepest first, with their magnitudes."""
    found: dict[str, list[Part]] = {module: [] for module, *_ in sides}
    shallowest: dict[str, int] = {}
    is_dora = bool(selection.fields.get("use_dora"))
    for (module, depth, table), pair in sorted(sides.items(), key=lambda x: -x[0][1]):
        key, shallowest[module] = PREFIX + module + BASE * depth, depth
        end = "lora_embedding_{}" if table else "lora_{}.weight"
        there, shapes = [*pair.values()], tuple(pair[side].shape for side in sorted(pair))
        if lost := [side for side in "AB" if side not in pair]:
            problems.add(f"{key}.{end.format(*lost)}", _without(there[0]))
        elif min(map(len, shapes)) < 2:
            problems.add(key, f"expected matrices as A and B, got shapes {shapes}")
        else:
            kind = "embedding" if table else "linear" if len(shapes[0]) == 2 else "conv"
            m, name = magnitudes.get(module) if is_dora else None, f"{module}.weight"
            scale = selection.scale(module)
            found[module].append(Part(name, kind, module, pair["A"], pair["B"], scale, m=m))
            if is_dora and m is None:
                problems.add(PREFIX + module + MAGNITUDE, _without(pair["A"]))
    for module, depth in shallowest.items():
        if depth:
            problems.add(PREFIX + module, "adapted more than once")
            found[module].clear()
    for module, x in magnitudes.items():
        if not is_dora:
            problems.add(x.key, f"unexpected; {CONFIG} has no use_dora")
        elif module not in found:
            problems.add(x.key, f"unexpected; there is no A and B of {show(module)}")
    return found


def _without(there: TensorInfo) -> str:
    return f"missing, though {show(there.key)} is there"

"""PEFT's files, read once: what the configuration selects, and what each tensor is.

Whoever has a model, a tree or a checkpoint, gives the shapes of its parameters by PyTorch's names,
and gets A and B of each. Values are read when all else is known to be right.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._config import LIMIT, problems
from ._file import (
    CONFIG,
    DTYPES,
    TENSORS,
    Header,
    Source,
    brief,
    opened,
    read_header,
    read_json,
    reader,
    shown,
)
from ._select import Names, Selection, parents

PREFIX = "base_model.model."
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
_FEATURES = {
    "lora_magnitude_vector": "DoRA is not supported",
    "trainable_tokens": "trainable token rows are not supported",
    "original_module": "bias 'all' beside modules_to_save is not supported",
    "modules_to_save": "bias 'all' beside modules_to_save is not supported",
}

Shapes = Mapping[str, tuple[int, ...]]


class Stored(NamedTuple):
    """A tensor of the file, which is not read yet."""

    key: str
    dtype: str
    shape: tuple[int, ...]


class Pair(NamedTuple):
    """A and B of one parameter of `module`, which the file does not name.

    Attributes:
        module: the module.
        depth: how many pairs are wrapped around it.
        table: whether the module is an embedding.
        a: A.
        b: B.
    """

    module: str
    depth: int
    table: bool
    a: Stored
    b: Stored


class Part(NamedTuple):
    """A and B of one parameter, in PEFT's layout.

    Attributes:
        name: PyTorch's parameter.
        kind: `linear`, `embedding`, `conv` or `experts`.
        key: what patterns match: the module, or the parameter where it is chosen by its name.
        a: PEFT's A, an array or `Stored`.
        b: PEFT's B.
        scale: s.
        transposed: whether PyTorch keeps the weight as (inputs, outputs); None if not known.
    """

    name: str
    kind: str
    key: str
    a: Any
    b: Any
    scale: float
    transposed: bool | None = None


class Adapter(NamedTuple):
    """An adapter in PEFT's files.

    Attributes:
        fields: its configuration.
        selection: what that says of a module.
        pairs: by module, the pair of its first parameter first.
        full: parameters that are replaced.
        frozen: parameters that the base must have just so.
        biases: what `lora_bias` adds to the outputs of a module, times s, by the bias.
        wrong: what is wrong with it.
        idle: what of its configuration names nothing, as PEFT takes it.
    """

    fields: dict[str, Any]
    selection: Selection
    pairs: dict[str, list[Pair]]
    full: dict[str, Stored]
    frozen: dict[str, Stored]
    biases: dict[str, Stored]
    wrong: list[str]
    idle: list[str]


def read_adapter(
    source: Source, raise_if: Callable[[Sequence[str]], None]
) -> tuple[Adapter, Header]:
    """Configuration and header of an adapter's folder.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if the files are damaged; and what `raise_if` does of a configuration.
    """
    fields = read_json(source, CONFIG, LIMIT)
    header = read_header(source)
    raise_if(problems(fields))
    tensors = [Stored(key, x.dtype, x.shape) for key, x in header.entries.items()]
    return parse(fields, tensors, f"`{source.argument}`"), header


def parse(fields: dict[str, Any], tensors: Iterable[Stored], what: str) -> Adapter:
    """What each of the `tensors` is, by the checked `fields` of what the user calls `what`."""
    selection, wrong = Selection(fields, what), list[str]()
    sides: dict[tuple[str, int, bool], dict[str, Stored]] = {}
    others = list[Stored]()
    for x in tensors:
        if not x.key.startswith(PREFIX):
            wrong.append(f"{shown(x.key)}: unexpected; PEFT's keys start with {PREFIX!r}")
        elif x.dtype not in DTYPES:
            wrong.append(f"{shown(x.key)}: expected a floating-point dtype, got {x.dtype}")
        elif found := FACTOR.fullmatch(x.key.removeprefix(PREFIX)):
            module, depth, side, table = found.group("module", "depth", "side", "table")
            place = module, depth.count("."), bool(table)
            sides.setdefault(place, {})[side or table] = x
        else:
            others.append(x)
    modules = {module for module, *_ in sides}
    selection.prepare(modules)
    full, frozen, biases = dict[str, Stored](), dict[str, Stored](), dict[str, Stored]()
    for x in others:
        module, _, parameter = x.key.removeprefix(PREFIX).rpartition(".")
        if fields.get("lora_bias") and x.key.endswith(B_BIAS):
            biases[x.key.removeprefix(PREFIX).removesuffix(B_BIAS) + ".bias"] = x
            continue
        inner = module.removesuffix(BASE)
        name = f"{inner}.{parameter}"
        feature = next((f"; {what}" for part, what in _FEATURES.items() if part in x.key), "")
        if name in full or name in frozen:
            wrong.append(f"{shown(x.key)}: there twice, with and without {BASE[1:]}")
        elif inner != module and inner in modules and parameter == "weight":
            frozen[name] = x
        elif feature or not _is_full(selection, inner, parameter, inner in modules):
            wrong.append(f"{shown(x.key)}: unexpected{feature}")
        elif inner in modules and parameter != "bias":
            wrong.append(f"{shown(x.key)}: in full, beside A and B of {shown(inner)}")
        else:
            full[name] = x
    return Adapter(fields, selection, _pairs(sides, wrong), full, frozen, biases, wrong, [])


def _is_full(selection: Selection, module: str, parameter: str, adapted: bool) -> bool:
    bias = selection.fields.get("bias", "none")
    by_bias = parameter == "bias" and (bias == "all" or (bias == "lora_only" and adapted))
    return by_bias or selection.saves(module) or may_tie(selection.fields, module)


def may_tie(fields: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT may have changed `module` because it shares its weight with another."""
    return bool(fields.get("ensure_weight_tying")) and bool(SHARED.search(module))


def _pairs(
    sides: Mapping[tuple[str, int, bool], Mapping[str, Stored]], wrong: list[str]
) -> dict[str, list[Pair]]:
    """What has both an A and a B of some rank; of other modules none."""
    found: dict[str, list[Pair]] = {module: [] for module, *_ in sides}
    for (module, depth, table), pair in sorted(sides.items(), key=lambda x: -x[0][1]):
        key = PREFIX + module + BASE * depth
        end = "lora_embedding_{}" if table else "lora_{}.weight"
        lost = [f"{shown(key)}.{end.format(side)}" for side in "AB" if side not in pair]
        shapes = tuple(pair[side].shape for side in sorted(pair))
        if lost:
            [there] = pair.values()
            wrong.append(f"{lost[0]}: missing, though {shown(there.key)} is there")
        elif min(map(len, shapes)) < 2:
            wrong.append(f"{shown(key)}: expected matrices as A and B, got shapes {shapes}")
        else:
            found[module].append(Pair(module, depth, table, pair["A"], pair["B"]))
    return found


# ----------------------------------------------------------------------------- beside a model


def without_biases(adapter: Adapter) -> None:
    """Adds to `adapter.wrong` what only a merge into a checkpoint has a place for."""
    adapter.wrong.extend(
        f"{shown(x.key)}: lora_bias adds to a bias, for which an adapter here has no place; merge "
        "it by jlora.peft.export_merged"
        for x in adapter.biases.values()
    )


def parts_of(
    adapter: Adapter, shapes: Shapes | None, where: str, *, ordered: bool = False
) -> list[Part]:
    """A and B of each parameter; what does not fit is added to `adapter.wrong`.

    Args:
        adapter: as it was parsed.
        shapes: all parameters of the model, by the names of the adapter; None if not known.
        where: what to call the model in errors.
        ordered: whether the parameters of a module come in the order in which PEFT wraps them, so
            that those of one shape can be told apart.
    """
    selection, wrong = adapter.selection, adapter.wrong
    order = {name: i for i, name in enumerate(shapes or ())}
    selection.prepare({name.rpartition(".")[0] for name in order})
    parts = list[Part]()
    for module, pairs in adapter.pairs.items():
        names = [f"{module}.{parameter}" for parameter in selection.parameters(module)]
        if shapes is not None:
            names = sorted((name for name in names if name in order), key=order.__getitem__)
        if names and pairs:
            parts += _of_parameters(adapter, module, names, pairs, shapes, ordered)
        else:
            parts += _of_module(adapter, module, pairs)
    if shapes is not None:
        wrong += missing(adapter, shapes)
        known = [n.removesuffix(".weight") for n, shape in shapes.items() if len(shape) > 1]
        adapter.idle.extend(selection.idle([*(part.key for part in parts), *known], where))
    adapter.idle.extend(_idle_names(adapter))
    adapter.idle.extend(selection.unused([part.key for part in parts]))
    if not (parts or adapter.full or wrong):
        wrong.append(f"{TENSORS} holds neither A and B nor a parameter in full")
    return parts


def names_of(adapter: Adapter) -> list[str]:
    """The parameters that A and B may belong to."""
    each = ((m, adapter.selection.parameters(m) or ["weight"]) for m in adapter.pairs)
    return [f"{module}.{parameter}" for module, parameters in each for parameter in parameters]


def _of_module(adapter: Adapter, module: str, pairs: Sequence[Pair]) -> Iterator[Part]:
    """The weight of a module."""
    selection, key = adapter.selection, shown(PREFIX + module)
    rank, scale = selection.rank(module), selection.scale(module)
    is_taken = selection.adapts(module) or may_tie(selection.fields, module)
    for pair in pairs:
        kind = "embedding" if pair.table else "linear" if len(pair.a.shape) == 2 else "conv"
        if pair.depth or len(pairs) > 1:
            adapter.wrong.append(f"{key}: adapted more than once")
            return
        if not is_taken or selection.saves(module):
            adapter.wrong.append(f"{key}: unexpected; {CONFIG} does not select it")
            return
        if pair.a.shape[0] != rank:
            adapter.wrong.append(
                f"{key}: expected rank {rank} by {CONFIG}, got an A of shape {pair.a.shape}"
            )
        yield Part(f"{module}.weight", kind, module, pair.a, pair.b, scale)


def _of_parameters(
    adapter: Adapter,
    module: str,
    names: Sequence[str],
    pairs: Sequence[Pair],
    shapes: Shapes | None,
    ordered: bool,
) -> list[Part]:
    """Those of parameters that the keys do not name, told apart by their shapes and ranks."""
    selection, fitting = adapter.selection, list[list[Part]]()
    # As there are n! ways. Of a model that is not at hand there may be fewer than are named.
    few = len(pairs) <= 6 and (shapes is None or len(pairs) == len(names))
    for order in itertools.permutations(names[:6], len(pairs)) if few else ():
        selection.clock.left()
        kinds = [_kind((shapes or {}).get(name)) for name in order]
        parts = [
            Part(name, *kind[:1], name, x.a, x.b, selection.scale(name), kind[1])
            for name, kind, x in zip(order, kinds, pairs, strict=True)
        ]
        if _all_fit(selection, parts, shapes):
            fitting.append(parts)
            if ordered or shapes is None:
                break
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(f"{n} {shapes[n]}" if shapes else f"{n} {selection.rank(n)}" for n in names)
    got = ", ".join(f"A {x.a.shape} with B {x.b.shape}" for x in pairs)
    what = "may be those of either of" if fitting else "are not those of"
    adapter.wrong.append(
        f"{shown(PREFIX + module)}: {got} {what} {'' if shapes else 'the ranks of '}{listed}"
    )
    return []


def _kind(shape: tuple[int, ...] | None) -> tuple[str, bool | None]:
    """The kind of a parameter that is chosen by its name, and whether it is transposed."""
    return ("experts", None) if shape is None or len(shape) == 3 else ("linear", False)


def _all_fit(selection: Selection, parts: Sequence[Part], shapes: Shapes | None) -> bool:
    ranks = [selection.rank(part.name) for part in parts]
    if shapes is None:
        counts = {x / r for part, r in zip(parts, ranks, strict=True) for x in _wide(part)}
        return len(counts) == 1 and counts.pop().is_integer()
    return all(
        orientations(part, shapes[part.name])
        and part.a.shape[0] == rank * (shapes[part.name][0] if part.kind == "experts" else 1)
        for part, rank in zip(parts, ranks, strict=True)
    )


def _wide(part: Part) -> tuple[int, int]:
    """The rank of all experts together, by A and by B."""
    return part.a.shape[0], part.b.shape[1]


def orientations(part: Part, shape: tuple[int, ...]) -> list[bool]:
    """Whether the weight of `shape` may be transposed as against B·A: none if `part` misfits."""
    rank, (rows, columns) = part.b.shape[1], matrix(part)
    if part.kind == "experts":
        fits = [len(shape) == 3 and shape[1:] == s for s in ((rows, columns), (columns, rows))]
        count = shape[0] if shape else 0
        fits = [f and part.a.shape[0] == rank and count and rank % count == 0 for f in fits]
    elif part.kind == "conv":
        fits = [(rows, *part.a.shape[1:]) == shape and part.a.shape[0] == rank, False]
    else:
        fits = [(rows, columns) == shape, (columns, rows) == shape]
        fits = [fit and part.a.shape == (rank, columns) for fit in fits]
    known = True if part.kind == "embedding" else part.transposed
    return [t for t in (False, True) if fits[t] and known in (None, t)]


def matrix(part: Part) -> tuple[int, int]:
    """The shape of B·A, of one of the experts."""
    return part.b.shape[0], math.prod(part.a.shape[1:])


def missing(adapter: Adapter, shapes: Shapes) -> list[str]:
    """What the configuration selects of the model and the file lacks."""
    selection, modules = adapter.selection, adapter.pairs.keys()
    bias, found = adapter.fields.get("bias", "none"), []
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        if selection.saves(module) or (
            parameter == "bias"
            and len(shape) == 1
            and (bias == "all" or (bias == "lora_only" and module in modules))
        ):
            lost = name not in adapter.full
        elif parameter == "weight" and len(shape) > 1 and selection.adapts(module):
            lost = module not in modules
        else:
            targeted = len(shape) > 1 and parameter in selection.parameters(module)
            lost = targeted and module not in modules
        if lost:
            found.append(f"{shown(name)}: selected by {CONFIG}, but missing in {TENSORS}")
    return found


def _idle_names(adapter: Adapter) -> list[str]:
    """The entries of `modules_to_save` that no tensor is of."""
    modules = {name.rpartition(".")[0] for name in adapter.full}
    holders = Names({parent for module in modules for parent in parents(module)})
    return [
        f"modules_to_save: {brief(name)} names none of the adapter's tensors"
        for name in adapter.fields.get("modules_to_save") or []
        if name not in HEADS and not holders.end_in(name)
    ]


# ------------------------------------------------------------------------------------ values


def values(
    source: Source, header: Header, wanted: Iterable[Stored], wrong: list[str]
) -> dict[str, np.ndarray]:
    """Tensors by their keys; those that are not finite are added to `wrong`."""
    with opened(source, TENSORS) as (file, _):
        read = reader(file, header)
        found = {x.key: read(x.key) for x in wanted}
    wrong += [
        f"{shown(key)}: {n} of {x.size} values are not finite"
        for key, x in found.items()
        if (n := x.size - np.count_nonzero(np.isfinite(x)))
    ]
    return found


def with_values(parts: Iterable[Part], found: Mapping[str, np.ndarray]) -> list[Part]:
    """The parts with arrays."""
    return [part._replace(a=found[part.a.key], b=found[part.b.key]) for part in parts]


def stored_in(parts: Iterable[Part]) -> Iterator[Stored]:
    """The tensors of parts."""
    for part in parts:
        yield from (part.a, part.b)


def twins(parts: Iterable[Part]) -> dict[str, Part]:
    """By name, the part that is the same on the other side of a weight that two modules share."""
    groups: dict[Any, dict[str, Part]] = {}
    for part in parts:
        if part.kind in ("embedding", "linear"):
            a, b = (part.a, part.b) if part.kind == "linear" else (part.b.T, part.a.T)
            values = hashlib.sha256(a.tobytes() + b.tobytes()).digest()
            group = groups.setdefault((part.scale, a.shape, b.shape, a.dtype, values), {})
            group.setdefault(part.kind, part)
    return {
        one.name: other
        for group in groups.values()
        if len(group) == 2
        for one, other in itertools.permutations(group.values())
    }

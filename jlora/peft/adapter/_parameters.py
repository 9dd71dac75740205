"""Which parameter each A and B is of.

Whoever has a model, a tree or a checkpoint, gives the shapes of its parameters by PyTorch's names,
and gets A and B of each.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from .._file import CONFIG, PREFIX, TENSORS, brief, shown
from ._config import ROWS_ALONE
from ._read import HEADS, Adapter, Pair, Part, may_tie
from ._select import Names, Selection, parents

Shapes = Mapping[str, tuple[int, ...]]


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
    selection.prepare(f"{m}.{p}" for m in adapter.pairs for p in selection.parameters(m))
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
    if not (parts or adapter.full or adapter.tokens or wrong):
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
        part = Part(f"{module}.weight", kind, module, pair.a, pair.b, scale, m=pair.m)
        if pair.m is not None and pair.m.shape != (shape := magnitude_shape(part)):
            adapter.wrong.append(f"{shown(pair.m.key)}: expected shape {shape}, got {pair.m.shape}")
            return
        yield part


def _of_parameters(
    adapter: Adapter,
    module: str,
    names: Sequence[str],
    pairs: Sequence[Pair],
    shapes: Shapes | None,
    ordered: bool,
) -> list[Part]:
    """Those of parameters that the keys do not name, told apart by their shapes and ranks."""
    # As there are n! ways. Of a model that is not at hand there may be fewer than are named.
    few = len(pairs) <= 6 and (shapes is None or len(pairs) == len(names))
    tried, selection = names[:6] if few else [], adapter.selection
    each = [{name: _part_of(selection, name, x, shapes) for name in tried} for x in pairs]
    fitting = list[list[Part]]()
    for order in itertools.permutations(tried, len(pairs)):
        selection.patterns.spend(len(order))
        found = [x for fits, name in zip(each, order, strict=True) if (x := fits[name])]
        if len(found) == len(pairs) and len({experts for _, experts in found}) == 1:
            fitting.append([part for part, _ in found])
            if ordered or shapes is None or len(fitting) > 1:
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


def _part_of(
    selection: Selection, name: str, pair: Pair, shapes: Shapes | None
) -> tuple[Part, int | None] | None:
    """A and B if they may be of a parameter, and of how many experts that seems to be."""
    kind, transposed = _kind((shapes or {}).get(name))
    part = Part(name, kind, name, pair.a, pair.b, selection.scale(name), transposed)
    rank, wide = selection.rank(name), pair.a.shape[0]
    if shapes is None:
        return (part, wide // rank) if wide == pair.b.shape[1] and wide % rank == 0 else None
    experts = shapes[name][0] if kind == "experts" else 1
    return (part, None) if orientations(part, shapes[name]) and wide == rank * experts else None


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


def magnitude_shape(part: Part) -> tuple[int, ...]:
    """The shape of PEFT's magnitudes: one for each output."""
    outputs = part.b.shape[0]
    return (1, outputs, *[1] * (len(part.a.shape) - 2)) if part.kind == "conv" else (outputs,)


def matrix(part: Part) -> tuple[int, int]:
    """The shape of B·A, of one of the experts."""
    return part.b.shape[0], math.prod(part.a.shape[1:])


def missing(adapter: Adapter, shapes: Shapes) -> list[str]:
    """What the configuration selects of the model and the file lacks."""
    selection, modules = adapter.selection, adapter.pairs.keys()
    bias, found = adapter.fields.get("bias", "none"), []
    is_alone = adapter.fields.get("peft_type") == ROWS_ALONE
    selection.prepare(name.rpartition(".")[0] for name in shapes)
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        if selection.saves(module) or (
            parameter == "bias"
            and len(shape) == 1
            and (bias == "all" or (bias == "lora_only" and module in modules))
        ):
            lost = name not in adapter.full
        elif parameter == "weight" and len(shape) > 1 and selection.adapts(module):
            lost = module not in modules and not (is_alone and name in adapter.tokens)
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

"""Sorts the tensors of an adapter by key and configuration."""

import collections
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from ..._errors import Problem, show
from .._file import COUNT, COUNTS, DTYPES, FLOATS, PREFIX, TensorInfo, explain_name
from .._problems import About
from ..names._kinds import CONV, EMBEDDING, LINEAR, ROWS
from ..names._peft import load_answers
from ..names._weights import explain_narrowing
from ..places._declared import is_table
from ._config import problems_of
from ._files import Files
from ._fits import is_of_vocabulary
from ._methods import ENDS, method_of
from ._parts import WRAPPED, Header, Headers, Parameters, Part, Whole, find_rows
from ._roles import Roles

BASE = ".base_layer"  # the module that an adapter wraps
B_BIAS = ".lora_B.bias"
SAVED_BY_NAME = load_answers()["tables"]
# Where PEFT has the new and the old values of a module in `modules_to_save`.
_WRAPPERS = re.compile(r"\.(modules_to_save|original_module)\.")
FACTOR = re.compile(
    r"(?P<module>.+?)(?P<depth>(?:\.base_layer)*)"
    r"\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<table>[AB]))"
)


class Adapter(NamedTuple):
    """The tensors of an adapter, sorted by kind.

    Attributes:
        files: its files.
        roles: what its configuration does with each module.
        modules: A and B by module. If several parameters of a module are adapted, the file does not
            distinguish them: they are in the order in which PEFT wraps them.
        rest: all but A and B.
        heads: tied heads, for which the configuration repeats the rows of the embedding.
    """

    files: Files
    roles: Roles
    modules: dict[str, list[Header]]
    rest: Headers
    heads: list[str]

    @property
    def fields(self) -> dict[str, Any]:
        """Its configuration."""
        return self.roles.fields

    @property
    def names(self) -> list[str]:
        """The parameters that the adapter may change."""
        each = ((m, self.roles[m].parameters or ("weight",)) for m in self.modules)
        adapted = (f"{module}.{name}" for module, names in each for name in names)
        return [*self.rest.changed, *self.rest.biases, *adapted]


def sort_tensors(
    files: Files, about: About, *, is_merged: bool = False
) -> tuple[Adapter, About, list[Problem]]:
    """Sorts tensors by kind; raises for problems with the configuration.

    Args:
        files: the adapter.
        about: what errors say of it.
        is_merged: whether it is merged in NumPy, so that dtypes and `lora_bias` are no problem.

    Returns:
        The adapter; what errors say of it, with its likely cause and its keys; and problems.
    """
    about = about._replace(cause=files.cause, keys=files.keys)
    about.stop(problems_of(files.fields))
    fields = files.fields
    problems = list(_list_odd(files, is_merged))
    sides = collections.defaultdict[tuple[str, int, bool], dict[str, TensorInfo]](dict)
    by_ending = {end: dict[str, TensorInfo]() for end in (*ENDS, *ROWS.keys, B_BIAS)}
    endings = [end for end in by_ending if end != B_BIAS or fields.get("lora_bias")]
    others = dict[str, TensorInfo]()
    for x in files.tensors:
        name = x.key.removeprefix(PREFIX)
        if not x.key.startswith(PREFIX):
            problems.append(Problem(x.key, f"unexpected; PEFT's keys start with {PREFIX!r}"))
        elif x.dtype not in (COUNTS if x.key.endswith(COUNT) else FLOATS):
            why = f"expected a floating-point dtype, got {x.dtype}"
            problems.append(Problem(x.key, why))
        elif found := FACTOR.fullmatch(name):
            module, depth, side, table = found.group("module", "depth", "side", "table")
            sides[module, depth.count("."), bool(table)][side or table] = x
        elif end := next(filter(name.endswith, endings), None):
            by_ending[end][name.removesuffix(end)] = x
        else:
            others[name] = x
    *_, deltas, biases = by_ending.values()
    further = {end: by_ending[end] for end in ENDS}
    for x in biases.values() if not is_merged else ():
        why = "lora_bias is supported only when merging; use jlora.peft.export_merged"
        problems.append(Problem(x.key, why))
    adapted = {module for module, *_ in sides}
    roles = Roles(fields, adapted)
    # A target such as `gate_up_proj` may be a parameter of any module, but not of a tied table.
    for module in (x for x in adapted if may_tie(fields, x)):
        roles[module] = roles[module]._replace(parameters=())
    full, frozen, unexpected = _sort_whole(roles, others, adapted, deltas)
    parts, unpaired = _parts(files, roles, sides, further)
    rows, heads, unlisted = find_rows(fields, deltas)
    problems += [*unexpected, *unpaired, *unlisted]
    for module in rows:
        name = f"{module}.weight"
        if module in adapted or roles[module].saves or name in full:
            why = "its module is also adapted or saved as a whole"
            problems.append(Problem(deltas[module].key, why))
        full[name] = Whole(name, deltas[module], rows[module])
    added = {f"{module}.bias": (x, roles[module].scale) for module, x in biases.items()}
    rest = Parameters([], full, frozen, added)
    return Adapter(files, roles, parts, rest, heads), about, problems


def _list_odd(files: Files, is_merged: bool) -> Iterator[Problem]:
    """Lists long names, tensors of no size, and those that JAX would narrow."""
    for x in files.tensors:
        if why := explain_name(files.keys.get(x.key, x.key)):
            yield Problem(x.key, why)
        if 0 in x.shape:
            yield Problem(x.key, f"has no values, as its shape is {x.shape}")
    for x in files.tensors if not (is_merged or files.is_own) else ():
        if x.dtype in DTYPES and explain_narrowing(DTYPES[x.dtype]):
            yield Problem(x.key, f"dtype {x.dtype} needs jax_enable_x64")


# ------------------------------------------------------------------------- parameters as a whole


def _find_home(key: str) -> tuple[str, str, str]:
    """Returns the module of a tensor, the same with what PEFT wraps it in, and the parameter."""
    wrapped, _, parameter = key.rpartition(".")
    return wrapped.removesuffix(BASE).removesuffix(WRAPPED), wrapped, parameter


def _sort_whole(
    roles: Roles,
    tensors: Mapping[str, TensorInfo],
    adapted: Collection[str],
    with_rows: Collection[str],
) -> tuple[dict[str, Whole[TensorInfo]], dict[str, Whole[TensorInfo]], list[Problem]]:
    """Separates parameters that are replaced from those that must equal the base's."""
    full, frozen = dict[str, Whole[TensorInfo]](), dict[str, Whole[TensorInfo]]()
    problems = list[Problem]()
    for key, x in tensors.items():
        module, wrapped, parameter = _find_home(key)
        name = f"{module}.{parameter}"
        is_wrapped = module != wrapped
        is_adapted = module in adapted
        is_full = roles.saves_whole(module, parameter, is_adapted)
        is_full = is_full or may_tie(roles.fields, module)
        is_frozen = parameter == "weight" or (parameter == "bias" and not is_full)
        is_resized = is_of_vocabulary(module, parameter) and not (is_wrapped or is_adapted)
        if (copied := _WRAPPERS.sub(".", key)) != key:
            # PEFT reads the module itself, and writes these beside it if the vocabulary was
            # resized, or with bias "all".
            if copied not in tensors or tensors[copied].shape != x.shape:
                why = f"unexpected; {PREFIX}{copied} is not there, or of other shape"
                problems.append(Problem(x.key, why))
        elif name in full or name in frozen:
            problems.append(Problem(x.key, f"duplicate, with and without {BASE[1:]}"))
        elif is_frozen and is_wrapped and (is_adapted or module in with_rows):
            frozen[name] = Whole(name, x)
        elif is_resized or (is_full and (parameter == "bias" or not is_adapted)):
            full[name] = Whole(name, x)
        else:
            why = f"in full, but {show(module)} also has A and B" if is_full else "unexpected"
            problems.append(Problem(x.key, why))
    return full, frozen, problems


def may_tie(fields: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT may have changed `module` because it shares a weight."""
    return bool(fields.get("ensure_weight_tying")) and is_table(module)


# --------------------------------------------------------------------------------------- A and B


def _parts(
    files: Files,
    roles: Roles,
    sides: Mapping[tuple[str, int, bool], Mapping[str, TensorInfo]],
    further: Mapping[str, Mapping[str, TensorInfo]],
) -> tuple[dict[str, list[Header]], list[Problem]]:
    """Pairs A and B of each module with the further tensor of their method, the innermost first."""
    found: dict[str, list[Header]] = {module: [] for module, *_ in sides}
    problems = list[Problem]()
    method = method_of(roles.fields)

    def add_missing(key: str, there: TensorInfo) -> None:
        other = show(files.keys.get(there.key, there.key))
        problems.append(Problem(key, f"missing, though {other} is there"))

    for (module, depth, table), pair in sorted(sides.items(), key=lambda x: -x[0][1]):
        key = PREFIX + module + BASE * depth
        ends = zip("AB", (EMBEDDING if table else LINEAR).keys, strict=True)
        shapes = tuple(pair[side].shape for side in sorted(pair))
        if lost := [end for side, end in ends if side not in pair]:
            add_missing(key + lost[0], *pair.values())
        elif min(map(len, shapes)) < 2:
            problems.append(Problem(key, f"expected matrices as A and B, got shapes {shapes}"))
        else:
            kind = EMBEDDING if table else LINEAR if len(shapes[0]) == 2 else CONV
            m = next((further[end].get(module) for end in method.keys), None)
            own = (pair["A"], pair["B"], roles[module].scale)
            found[module].append(Part(f"{module}.weight", kind, module, *own, m=m))
            if method.keys and m is None:
                add_missing(PREFIX + module + method.keys[0], pair["A"])
    outermost = {module for module, depth, _ in sides if not depth}
    for module in found:
        if module not in outermost:
            problems.append(Problem(PREFIX + module, "adapted more than once"))
            found[module].clear()
    for end, module, x in ((e, m, x) for e, own in further.items() for m, x in own.items()):
        if end not in method.keys:
            why = f"unexpected; {files.config} has no {ENDS[end].flag}"
            problems.append(Problem(x.key, why))
        elif module not in found:
            problems.append(Problem(x.key, f"unexpected; {show(module)} has no A and B"))
    return found, problems

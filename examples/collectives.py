"""The collectives of a compiled program: which, how often in a run, and how many bytes.

    compiled = jax.jit(step).lower(*args).compile()
    for kind, (count, size) in summary(collectives(compiled.as_text())).items():
        print(kind, count, size)

Counted in XLA's optimized HLO, where a loop's body stands once and its trip count beside it.

Bytes are those that a device receives from others, with an all-reduce done in a ring. So they do
not depend on the way that XLA takes: an all-gather's result has the device's own part in it, and
the permutations of which XLA makes it where it multiplies part by part have not.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# A computation's head, as in `%body.3 (p: f32[2]) -> f32[2] {`, and an instruction, as in
# `  ROOT %ar = f32[2]{0} all-reduce(%p), channel_id=1, …`. A type in parentheses is a tuple.
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|calls|to_apply|branch_computations)=\{?((?:%?[\w.-]+(?:, )?)+)")
_TRIPS = re.compile(r'known_trip_count[^\d]*"?n"?[^\d]*(\d+)')
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_CONSTANT = re.compile(r"^(\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
# How many devices join: `replica_groups=[4,2]<=[8]` has groups of 2, as `{{0,1},{2,3}}` has, and
# `mesh['x'=4,'y'=2] {'x'}` of 4.
_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_GROUP = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_DEVICES = re.compile(r"num_partitions=(\d+)")


class Collective(NamedTuple):
    """One instruction.

    Attributes:
        kind: as HLO calls it, such as `all-reduce`.
        size: bytes that a device receives, each time.
        count: how often it runs.
        shape: of its result, as HLO writes it.
    """

    kind: str
    size: int
    count: int
    shape: str


def collectives(hlo: str) -> list[Collective]:
    """The collectives in a program's text, `compiled.as_text()`.

    Raises:
        ValueError: if a loop with a collective in it has no known trip count.
    """
    computations, entry = _parse(hlo)
    all_devices = _DEVICES.search(hlo)
    found: dict[tuple[str, str], Collective] = {}
    for number, (shape, op, rest, count) in enumerate(_run(computations, entry, 1)):
        kind = op.removesuffix("-start")
        # One that runs beside other work can stand in several computations, with one channel.
        channel = _CHANNEL.search(rest)
        key = (kind, channel[1] if channel else f"{number}")
        if kind in KINDS and key not in found:
            if count is None:
                raise ValueError(f"{op} of {shape} is in a loop without a known trip count.")
            devices = _devices(rest) or (int(all_devices[1]) if all_devices else 1)
            size = _received(kind, _size(_result(shape, op)), devices)
            found[key] = Collective(kind, size, count, shape)
    return list(found.values())


def summary(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """For each kind how often it runs and the bytes of all of them; and of all kinds as `total`."""
    rows = {}
    for kind in (*KINDS, "total"):
        mine = [c for c in found if kind in (c.kind, "total")]
        if mine:
            rows[kind] = sum(c.count for c in mine), sum(c.count * c.size for c in mine)
    return rows


Instruction = tuple[str, str, str]  # type, name of the operation, operands and attributes


def _parse(hlo: str) -> tuple[Mapping[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append((instruction[1], instruction[2], instruction[3]))
    return computations, entry


def _run(
    computations: Mapping[str, list[Instruction]], name: str, count: int | None
) -> Iterator[tuple[str, str, str, int | None]]:
    """Each instruction that runs, with how often it does; None if nobody knows."""
    for shape, op, rest in computations.get(name, ()):
        yield shape, op, rest, count
        if op.removesuffix("-start") in KINDS:
            continue  # what it calls is the sum of two numbers
        inside = count
        if op == "while":
            trips = _trips(computations, rest)
            inside = count * trips if trips and count is not None else None
        for called in _CALLED.findall(rest):
            for inner in called.split(", "):
                yield from _run(computations, inner.lstrip("%"), inside)


def _trips(computations: Mapping[str, list[Instruction]], loop: str) -> int | None:
    """How often a loop runs: as is written beside it, or the one bound in its condition."""
    if known := _TRIPS.search(loop):
        return int(known[1])
    condition = _CONDITION.search(loop)
    instructions = computations[condition[1]] if condition else []
    constants = [_CONSTANT.match(rest) for _, op, rest in instructions if op == "constant"]
    bounds = [int(c[1]) for c in constants if c]
    return bounds[0] if len(bounds) == 1 else None


def _devices(instruction: str) -> int | None:
    """How many devices a collective joins; None for all."""
    if groups := _GROUPS.search(instruction):
        return int(groups[1])
    if group := _GROUP.search(instruction):
        return len(group[1].split(","))
    if mesh := _MESH.search(instruction):
        sizes = dict(axis.split("=") for axis in mesh[1].split(","))
        # Of an axis or of a part of it: `'x'`, or two devices of each four as `'x':(2)2`.
        axes = (axis.partition(")") for axis in mesh[2].split(","))
        return math.prod(int(part or sizes[axis]) for axis, _, part in axes)
    return None


def _received(kind: str, result: int, devices: int) -> int:
    """Bytes that each of some devices receives in a collective with a result of so many bytes."""
    if kind == "collective-permute":
        return result
    if kind == "reduce-scatter":
        return result * (devices - 1)
    return result * (devices - 1) * (2 if kind == "all-reduce" else 1) // devices


def _result(shape: str, op: str) -> str:
    """The part of a type that is the result.

    That of a start is (operands, results, …), but for an all-reduce that has several results.
    """
    several = op == "all-reduce-start" and not shape.startswith("((")
    if several or not (op.endswith("-start") and shape.startswith("(")):
        return shape
    parts, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts[1]


def _size(shape: str) -> int:
    """Bytes of the arrays in a type: `bf16[2,3]` has 12."""
    total = 0
    for letters, bits, lengths in _ARRAY.findall(shape):
        bits = 8 if letters == "pred" else int(bits)
        total += bits * math.prod(int(n) for n in lengths.split(",") if n) // 8
    return total

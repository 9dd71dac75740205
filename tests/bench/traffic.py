"""Bytes that a compiled program moves to and from its device's main memory, and its kernels.

On a GPU every kernel reads its operands from main memory and writes its results there. For a TPU
XLA's own count adds what is copied between main memory (HBM) and a core's own (VMEM) to what the
products then read there, so that a schedule which copies further ahead counts as more, though no
byte more comes from main memory. Here an operand or a result counts where it lies in main memory
alone, a copy between the two once, and the body of a loop once, as XLA counts it, unless the caller
says how often it runs.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"\b[a-z]+(\d*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?(\S+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][a-z\-]*)\((.*)")
_MOVES_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("copy-done", "slice-done", "async-done"),
}
_ALLOCATE = 'custom_call_target="AllocateBuffer"'
_CUBLAS = 'custom_call_target="__cublas$'
_WORKSPACE = re.compile(r"s8\[\d+\]")  # beside the result, written or not


class _Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: list[str]
    rest: str


class Kernel(NamedTuple):
    """What a device runs at once.

    Attributes:
        name: that of the instruction.
        size: bytes to and from main memory.
        multiplies: whether it is, or has in it, a product of matrices.
    """

    name: str
    size: int
    multiplies: bool


def main_memory(program: str, runs: int = 1) -> int:
    """Bytes to and from main memory, of the text of a compiled program."""
    return sum(kernel.size for kernel in kernels(program, runs))


def kernels(program: str, runs: int = 1) -> list[Kernel]:
    """What runs, of the text of a compiled program; the body of each loop `runs` times."""
    computations: dict[str, dict[str, _Instruction]] = {}
    current: dict[str, _Instruction] = {}
    entry = ""
    for line in program.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[1], {})
            entry = found[1] if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            root, name, kind, op, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            current[name] = _Instruction(name, kind, op, operands, rest)
            if root:
                current["ROOT"] = current[name]
    return list(_Program(computations, runs).kernels(entry))


class _Program:
    def __init__(self, computations: dict[str, dict[str, _Instruction]], runs: int) -> None:
        self.computations = computations
        self.runs = runs

    def kernels(self, computation: str) -> Iterator[Kernel]:
        """Those of one run of a computation."""
        inside = self.computations[computation]
        for name, i in inside.items():
            if name == "ROOT" or i.op in _MOVES_NOTHING or _ALLOCATE in i.rest:
                continue
            if i.op == "while":
                yield from list(self.kernels(_called(i, "body"))) * self.runs
            elif i.op == "call":
                yield from self.kernels(_called(i, "to_apply"))
            else:
                yield Kernel(name, self.of(i, inside), self.multiplies(i))

    def multiplies(self, i: _Instruction) -> bool:
        """Whether an instruction is a product of matrices, or a fusion with one in it."""
        if i.op == "fusion":
            return any(map(self.multiplies, self.computations[_called(i, "calls")].values()))
        return i.op in ("dot", "convolution") or _CUBLAS in i.rest

    def of(self, i: _Instruction, inside: dict[str, _Instruction]) -> int:
        """Bytes of an instruction that is none that calls others but a fusion."""
        operands = [inside[name] for name in i.operands if name in inside]
        if i.op in ("copy-start", "slice-start"):
            ends = [(size, fast) for size, fast in _arrays(i.type) if size > 8]  # no semaphore
            whole = min((size for size, _ in ends), default=0)
            return whole * sum(not fast for _, fast in ends)
        if i.op == "fusion":
            return self.of_fusion(i, operands)
        if i.op == "dynamic-slice":
            return 2 * _size(i.type)
        if i.op == "dynamic-update-slice":
            return 2 * _size(operands[1].type)
        result = i.type if _CUBLAS not in i.rest else _WORKSPACE.sub("", i.type)
        return _size(result) + sum(_size(x.type) for x in operands)

    def of_fusion(self, i: _Instruction, operands: list[_Instruction]) -> int:
        """What a fusion reads, of a stack its slices, and writes, in place what is new."""
        read, written = 0, _size(i.type)
        for number, operand in enumerate(operands):
            if whole := _size(operand.type):
                uses = [use or (0, 0) for use in self.uses(_called(i, "calls"), number)]
                updates = [update for use, update in uses if update]
                if updates and len(updates) == len(uses):
                    written += sum(updates) - whole
                else:
                    read += min(whole, sum(use or whole for use, _ in uses))
        return read + max(written, 0)

    def uses(self, computation: str, number: int) -> Iterator[tuple[int, int] | None]:
        """Of each use of a parameter the bytes of a slice and of an update, 0 if it is neither.

        None where the parameter is the result, whose uses are then those of the result.
        """
        inside = self.computations[computation]
        [name] = [
            key
            for key, x in inside.items()
            if key != "ROOT" and x.op == "parameter" and x.rest.startswith(f"{number})")
        ]
        names = [name]
        for name in names:
            for key, user in inside.items():
                if key == "ROOT" or name not in user.operands:
                    continue
                if user.op in ("bitcast", "copy"):
                    names.append(key)
                elif user.op == "fusion":
                    for use in self.uses(_called(user, "calls"), user.operands.index(name)):
                        if use is None:
                            names.append(key)
                        else:
                            yield use
                elif user.op in ("dynamic-slice", "slice"):
                    yield _size(user.type, everywhere=True), 0
                elif user.op == "dynamic-update-slice" and user.operands[0] == name:
                    yield 0, _size(inside[user.operands[1]].type, everywhere=True)
                else:
                    yield 0, 0
        if inside["ROOT"].name in names:
            yield None


def _called(i: _Instruction, what: str) -> str:
    found = re.search(rf"{what}=%?([\w.\-]+)", i.rest)
    assert found is not None, i
    return found[1]


def _arrays(kind: str) -> Iterator[tuple[int, bool]]:
    """The size of each array of a type, and whether it lies in the core's own memory."""
    for bits, shape, layout in _ARRAY.findall(kind):
        size = math.prod(int(n) for n in shape.split(",") if n)
        yield size * max(1, int(bits or 8) // 8), "S(1)" in layout


def _size(kind: str, everywhere: bool = False) -> int:
    """Bytes of a type that lie in main memory."""
    return sum(size for size, fast in _arrays(kind) if everywhere or not fast)

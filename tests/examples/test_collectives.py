"""`examples/collectives.py`: what is counted in a program's text.

Real programs are in `collectives_on_devices.py`.
"""

import pytest
from collectives import collectives

PAIR = "(f32[2]{0}, f32[2]{0}, u32[]{:S(2)}, u32[]{:S(2)})"
# Results and names of instructions, their kind, and the bytes that each of four devices receives.
LINES = [
    ("bf16[2,3]{1,0} all-reduce", "all-reduce", 18),
    ("f32[2]{0:T(128)} all-gather", "all-gather", 6),
    ("(f32[2]{0}, bf16[4]{0}) all-reduce", "all-reduce", 24),
    ("(f32[2]{0}, bf16[4]{0}) all-reduce-start", "all-reduce", 24),
    ("((f32[2]{0}), f32[2]{0}) all-reduce-start", "all-reduce", 12),
    ("(f32[2]{0}, f32[8]{0}) all-gather-start", "all-gather", 24),
    (f"{PAIR} collective-permute-start", "collective-permute", 8),
    ("(s8[4]{0}, pred[8]{0}) all-to-all", "all-to-all", 9),
    ("f8e4m3fn[16]{0} reduce-scatter", "reduce-scatter", 48),
]
# What says how many devices join, of four, and how many do.
GROUPS = [
    ("", 4),
    (", replica_groups={}", 4),
    (", replica_groups=[2,2]<=[4]T(1,0), dimensions={0}", 2),
    (", replica_groups={{0,2},{1,3}}, dimensions={0}", 2),
    (", replica_groups=mesh['x'=2,'y'=2] {'y'}, dimensions={0}", 2),
    (", replica_groups=mesh['x'=2,'y'=2] {'x','y'}", 4),
    (", replica_groups=mesh['x'=8,'y'=2] {'x':(2)4,'y'}", 8),
]


def program(line):
    """The text of a program of one instruction, for four devices."""
    head = "HloModule jit_f, num_partitions=4"
    return f"{head}\n\nENTRY %main (x: f32[2]) -> f32[2] {{\n  %a = {line}\n}}\n"


@pytest.mark.parametrize(("line", "kind", "size"), LINES)
def test_one_instruction(line, kind, size):
    """It counts where it starts, not again where it is done."""
    done = f"%d = f32[8]{{0}} {kind}-done(%a)"
    [found] = collectives(program(f"{line}(%x, %y)\n  {done}"))
    assert (found.kind, found.count, found.size) == (kind, 1, size)


@pytest.mark.parametrize(("groups", "devices"), GROUPS)
def test_how_many_join(groups, devices):
    """A device has its own part of what is gathered."""
    [found] = collectives(program(f"f32[8]{{0}} all-gather(%x){groups}"))
    assert found.size == 32 * (devices - 1) / devices

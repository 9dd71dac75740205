"""`examples/collectives.py`: what is counted in a program's text.

Real programs are in `collectives_on_devices.py`.
"""

import pytest
from collectives import collectives

PAIR = "(f32[2]{0}, f32[2]{0}, u32[]{:S(2)}, u32[]{:S(2)})"
# Results and names of instructions, their kind, and the bytes of each.
LINES = [
    ("bf16[2,3]{1,0} all-reduce", "all-reduce", 12),
    ("f32[2]{0:T(128)} all-gather", "all-gather", 8),
    ("(f32[2]{0}, bf16[3]{0}) all-reduce", "all-reduce", 14),
    ("(f32[2]{0}, bf16[3]{0}) all-reduce-start", "all-reduce", 14),
    ("((f32[2]{0}), f32[2]{0}) all-reduce-start", "all-reduce", 8),
    ("(f32[2]{0}, f32[8]{0}) all-gather-start", "all-gather", 32),
    (f"{PAIR} collective-permute-start", "collective-permute", 8),
    ("(s8[2]{0}, pred[4]{0}) all-to-all", "all-to-all", 6),
    ("f8e4m3fn[16]{0} reduce-scatter", "reduce-scatter", 16),
]


@pytest.mark.parametrize(("line", "kind", "size"), LINES)
def test_one_instruction(line, kind, size):
    """It counts where it starts, not again where it is done."""
    done = f"%d = f32[8]{{0}} {kind}-done(%a)"
    text = f"ENTRY %main (x: f32[2]) -> f32[2] {{\n  %a = {line}(%x, %y)\n  {done}\n}}\n"
    [found] = collectives(text)
    assert (found.kind, found.count, found.size) == (kind, 1, size)

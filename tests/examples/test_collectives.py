"""`examples/collectives.py`: what is counted in a program's text.

Real programs are in `collectives_on_devices.py`.
"""

import pytest
from collectives import collectives, summary

LOOP = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %sum = f32[4]{0} all-reduce(%x), channel_id=2, replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %sum)
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  BOUND
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %loop = (s32[], f32[4]{0}) while(%init), condition=%condition, body=%bodyTRIPS
  ROOT %y = f32[4]{0} get-tuple-element(%loop), index=1
}
"""
KNOWN = ', backend_config={"known_trip_count":{"n":"7"}}'
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


@pytest.mark.parametrize(
    ("bound", "trips"),
    [("", KNOWN), ("%bound = s32[] constant(7)", ""), ("%bound = s32[] constant(9)", KNOWN)],
)
def test_a_loop(bound, trips):
    """Its trip count is written beside it, or is the bound in its condition; else it is refused."""
    text = LOOP.replace("BOUND", bound).replace("TRIPS", trips)
    assert summary(collectives(text)) == {"all-reduce": (7, 112), "total": (7, 112)}
    with pytest.raises(ValueError, match="is in a loop without"):
        collectives(LOOP.replace("BOUND", "").replace("TRIPS", ""))


def test_one_channel_counts_once():
    """XLA may show one collective in two computations, once for each end of it."""
    sums = {name: f"f32[2]{{0}} all-reduce(%x), channel_id={n}" for name, n in (("a", 5), ("d", 6))}
    text = f"%part (p: f32[2]) -> f32[2] {{\n  ROOT %a = {sums['a']}\n}}\n\n"
    call = "f32[2]{0} fusion(%x), kind=kCustom, calls=%part"
    text += f"ENTRY %main (x: f32[2]) -> f32[2] {{\n  %b = {call}\n  %c = {call}\n"
    assert summary(collectives(f"{text}  ROOT %d = {sums['d']}\n}}\n"))["total"] == (2, 16)

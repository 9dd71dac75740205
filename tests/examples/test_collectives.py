"""`examples/collectives.py`: what is counted in a program's text, and in real programs."""

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
# A line of a program, and its kind, count and bytes.
LINES = [
    ("%a = bf16[2,3]{1,0} all-reduce(%x), channel_id=1", "all-reduce", 12),
    ("ROOT %a = f32[2]{0:T(128)} all-gather(%x), dimensions={0}", "all-gather", 8),
    ("%a = (f32[2]{0}, bf16[3]{0}) all-reduce(%x, %y)", "all-reduce", 14),
    ("%a = (f32[2]{0}, bf16[3]{0}) all-reduce-start(%x, %y)", "all-reduce", 14),
    ("%a = ((f32[2]{0}), f32[2]{0}) all-reduce-start(%x)", "all-reduce", 8),
    ("%a = (f32[2]{0}, f32[8]{0}) all-gather-start(%x)", "all-gather", 32),
    (
        "%a = (f32[2]{0}, f32[2]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)",
        "collective-permute",
        8,
    ),
    ("%a = (s8[2]{0}, pred[4]{0}) all-to-all(%x, %y)", "all-to-all", 6),
    ("%a = f8e4m3fn[16]{0} reduce-scatter(%x)", "reduce-scatter", 16),
    ("%a = f32[] all-reduce(%x)", "all-reduce", 4),
]


@pytest.mark.parametrize(("line", "kind", "size"), LINES)
def test_one_instruction(line, kind, size):
    done = "%d = f32[8]{0} " + kind + "-done(%a)"
    text = f"ENTRY %main (x: f32[2]) -> f32[2] {{\n  {line}\n  {done}\n}}\n"
    [found] = collectives(text)
    assert (found.kind, found.count, found.size) == (kind, 1, size)


@pytest.mark.parametrize(
    ("bound", "trips"),
    [("", KNOWN), ("%bound = s32[] constant(7)", ""), ("%bound = s32[] constant(9)", KNOWN)],
)
def test_a_loop(bound, trips):
    """Its trip count is written beside it, or is the bound in its condition."""
    text = LOOP.replace("BOUND", bound).replace("TRIPS", trips)
    assert summary(collectives(text)) == {"all-reduce": (7, 112), "total": (7, 112)}


def test_a_loop_of_unknown_length():
    text = LOOP.replace("BOUND", "%bound = s32[] parameter(1)").replace("TRIPS", "")
    with pytest.raises(ValueError, match=r"all-reduce of f32\[4\]\{0\} is in a loop without"):
        collectives(text)


def test_one_channel_counts_once():
    """XLA may show one collective in two computations, once for each end of it."""
    text = """
%part (p: f32[2]) -> f32[2] {
  ROOT %a = f32[2]{0} all-reduce(%p), channel_id=5
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %b = f32[2]{0} fusion(%x), kind=kCustom, calls=%part
  %c = f32[2]{0} fusion(%x), kind=kCustom, calls=%part
  ROOT %d = f32[2]{0} all-reduce(%x), channel_id=6
}
"""
    assert summary(collectives(text))["total"] == (2, 16)

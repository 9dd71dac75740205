"""Benchmarks: what LoRA costs over the frozen model's own step, and beside other libraries.

    python -m tests.bench                       # everything
    python -m tests.bench floor memory          # some of it
    python -m tests.bench --quick               # small, and asserts what XLA counts exactly

Numbers that depend on the machine are printed as ratios to a baseline that runs interleaved in the
same process. What XLA reports of a compiled program (FLOPs, bytes) is exact, and asserted.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

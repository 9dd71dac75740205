"""Runs what reproduces the paper, a command for each module of this folder.

python examples/paper train --task mnli …    # the scores of a task: the median over seeds
python examples/paper counts                 # what LoRA trains and stores, at full size
python examples/paper compare                # LoRA and eight other methods on movie reviews
python examples/paper ablations              # which matrices, which rank, which directions

`python examples/paper COMMAND --help` has the options of a command.
"""

import importlib
import pathlib
import sys

COMMANDS = ("train", "counts", "compare", "compare_table", "ablations")

if __name__ == "__main__":
    # Modules are imported from the folder of the examples, not from this one.
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    if not sys.argv[1:] or sys.argv[1] not in COMMANDS:
        raise SystemExit(__doc__)
    importlib.import_module(f"paper.{sys.argv[1]}").main(sys.argv[2:])

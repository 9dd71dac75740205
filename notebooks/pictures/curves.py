"""Runs what a page shows, and draws its curves: `python notebooks/pictures/curves.py audio|graphs|rates|vision`."""

import importlib
import pathlib
import re
import sys

import matplotlib.pyplot as plt
import numpy as np

HERE, NAME = pathlib.Path(__file__).parent, sys.argv[1]
LABELS = "LoRA", "full fine-tuning", "from random weights"
WHAT, EVERY = ("error, %", 50) if NAME == "graphs" else ("accuracy, %", 25)
EXAMPLES = {"audio": "voices", "graphs": "heat", "vision": "digits"}
if NAME in EXAMPLES:
    sys.path.insert(0, str(HERE.parents[1] / "examples"))
    names = {"curves": importlib.import_module(EXAMPLES[NAME]).main()[-1]}
else:
    page = (HERE.parent / "loops" / f"{NAME}.md").read_text(encoding="utf-8")
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(code, names)
if "figure" in names:
    names["figure"].savefig(HERE / f"{NAME}.png", dpi=100)
    sys.exit()

curves = names["curves"]
figure, axes = plt.subplots(1, len(curves), figsize=(7, 2.4), sharey=True, squeeze=False)
for axis, (title, found) in zip(axes[0], curves.items(), strict=True):
    for label, curve in zip(LABELS, found, strict=False):
        axis.plot(EVERY * np.arange(len(curve)), 100 * np.array(curve), marker=".", label=label)
    axis.set(title=title if len(curves) > 1 else None, xlabel="step")
axes[0][0].set_ylabel(WHAT)
axes[0][0].set_ylim(*((0, 80) if NAME == "graphs" else (None, None)))
axes[0][-1].legend()
figure.tight_layout()
figure.savefig(HERE / f"{NAME}.png", dpi=100)

"""Runs the page on vision, and draws its curves: `python notebooks/pictures/vision.py`."""

import pathlib
import re

import matplotlib.pyplot as plt
import numpy as np

HERE = pathlib.Path(__file__).parent
page = (HERE.parent / "loops" / "vision.md").read_text(encoding="utf-8")
names = {}
for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
    exec(code, names)

figure, axes = plt.subplots(1, 2, figsize=(7, 2.4), sharey=True)
for axis, (model, pair) in zip(axes, names["curves"].items(), strict=True):
    for label, curve in zip(("LoRA", "full fine-tuning"), pair, strict=True):
        axis.plot(25 * np.arange(len(curve)), 100 * np.array(curve), marker=".", label=label)
    axis.set(title=model, xlabel="step")
axes[0].set_ylabel("accuracy, %")
axes[1].legend()
figure.tight_layout()
figure.savefig(HERE / "vision.png", dpi=100)

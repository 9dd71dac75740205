"""Draws `gains.svg` from `examples/results/pod_8b.csv`: `python notebooks/pictures/gains.py`.

The file is what this command writes, with the compiler for TPUs and without a TPU:

    python examples/pod.py plan --shape 8b --topology v5e:1x1 \
      --mesh 1,1 --length 2048 --rank 16 --methods all nf4 full
"""

import csv
import pathlib

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parents[1] / "examples" / "results" / "pod_8b.csv"
NAMES = {
    "full fine-tuning": "full training",
    "LoRA, all dense layers": "LoRA",
    "the same on NF4": "LoRA on 4 bits",
}
DEVICES = {"TPU v5e": 17.2, "H100": 85.9}  # GB: 16 and 80 GiB
WIDTH, EDGE, TOP, ROW, BAR = 360, 14, 40, 43, 20
SCALE = 3.2  # of a GB
FOOT = TOP + ROW * len(NAMES)


def figures():
    """The peak of a step, in GB, by name."""
    with RESULTS.open(encoding="utf-8") as file:
        peaks = {row["step"]: float(row["peak"]) for row in csv.DictReader(file)}
    return {name: round(peaks[step], 1) for step, name in NAMES.items()}


def draw():
    """A bar for each way to train, and a line for the memory of each device."""
    parts = [f'<text x="{EDGE}" y="24" font-weight="bold">Memory of a step, Llama 3 8B</text>']
    for i, (name, value) in enumerate(figures().items()):
        y, color = TOP + ROW * i, "#5c6bc0" if i else "#90a4ae"
        parts += [
            f'<text x="{EDGE + 60}" y="{y + 12}">{name}: {value} GB</text>',
            f'<rect x="{EDGE}" y="{y + 18}" width="{round(SCALE * value)}" height="{BAR}" rx="2"'
            f' fill="{color}"/>',
        ]
    for name, size in DEVICES.items():
        x = EDGE + round(SCALE * size)
        parts += [
            f'<path d="M{x} {TOP - 4}V{FOOT}" stroke="#c62828" stroke-dasharray="4 3"/>',
            f'<text x="{x}" y="{FOOT + 16}" text-anchor="middle">{name}</text>',
            f'<text x="{x}" y="{FOOT + 33}" text-anchor="middle">{size} GB</text>',
        ]
    high = FOOT + 42
    size = f'width="{WIDTH}" height="{high}" viewBox="0 0 {WIDTH} {high}"'
    font = 'font-family="sans-serif" font-size="15"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>'
    back = f'<rect width="{WIDTH}" height="{high}" rx="8" fill="#fff"/><g fill="#222">'
    return "\n".join([head, back, *parts, "</g></svg>\n"])


if __name__ == "__main__":
    (HERE / "gains.svg").write_text(draw(), encoding="utf-8")

"""Draws cards of recipes from what their pages say: `python notebooks/pictures/cards.py`."""

import pathlib
import re

HERE = pathlib.Path(__file__).parent
WIDTH, HEIGHT, EDGE, TOP = 320, 150, 14, 34
BLUE, GRAY = "#5c6bc0", "#90a4ae"


def find(page, pattern):
    """What the pattern finds on a page, in each place."""
    found = re.findall(pattern, (HERE.parent / page).read_text(encoding="utf-8"), re.M)
    assert found, (page, pattern)
    return found


def frame(title, parts):
    """A whole picture."""
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    font = 'font-family="sans-serif" font-size="13"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>'
    back = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/><g fill="#222">'
    text = f'<text x="{EDGE}" y="22" font-weight="bold">{title}</text>'
    return "\n".join([head, back, text, *parts, "</g></svg>\n"])


def lines(title, curves):
    """A curve for each label, over equal steps, with its last number; the first curve is blue."""
    values = {name: [float(x.rstrip("%")) for x in curve] for name, curve in curves.items()}
    low, high = (f(map(f, values.values())) for f in (min, max))
    scale = (HEIGHT - TOP - 44) / (high - low)
    heights = {k: [round(TOP + 10 + scale * (high - x)) for x in v] for k, v in values.items()}
    left, right = EDGE + 44, WIDTH - EDGE - 84
    first = next(iter(curves))
    start = f'x="{left - 8}" y="{heights[first][0] + 5}" text-anchor="end"'
    parts, below = [f"<text {start}>{curves[first][0]}</text>"], 0
    for name in sorted(curves, key=lambda name: heights[name][-1]):
        color = BLUE if name == first else GRAY
        wide = (right - left) / (len(heights[name]) - 1)
        points = " ".join(f"{round(left + i * wide)},{y}" for i, y in enumerate(heights[name]))
        below = max(heights[name][-1] + 5, below + 16)
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2.5"/>',
            f'<text x="{right + 8}" y="{below}">{curves[name][-1]} {name}</text>',
        ]
    return frame(title, parts)


def bars(title, unit, figures):
    """A bar for each name; the first is blue."""
    parts, room = [], WIDTH - 2 * EDGE - 64
    for i, (name, value) in enumerate(figures.items()):
        y, color = TOP + 38 * i, GRAY if i else BLUE
        length = max(2, round(room * float(value) / max(map(float, figures.values()))))
        parts += [
            f'<text x="{EDGE}" y="{y + 13}">{name}</text>',
            f'<rect x="{EDGE}" y="{y + 18}" width="{length}" height="14" rx="2" fill="{color}"/>',
            f'<text x="{EDGE + length + 6}" y="{y + 30}">{value}{unit}</text>',
        ]
    return frame(title, parts)


def runs(page, row):
    """The curves of LoRA and of full fine-tuning that a page prints."""
    found = [re.findall(r"\d+%", x) for x in find(f"loops/{page}.md", rf"^    {row} .*$")]
    return {"LoRA": found[0], "full": found[1]}


def cards():
    """The pictures, by name."""
    text = find("quickstart.ipynb", r"step \d+: (\S+) of the held-out")
    chat = find("loops/chat.md", r"^    held-out NLL .*: (\d\.\d\d)\d$")
    best = chat.index(min(chat)) + 1  # the adapter that is kept
    [before, after] = find("measurements/ranks.md", r"^\| (?:before|r = 8) \| .*?\| (\d+)%(?: ± 1%)? \|")
    [(speed, times)] = find("measurements/cpu.md", r"64 adapters have (\d\S+) of one\n.*?, (\S+) and \S+ times")
    [(bits, half, full)] = find("costs.md", r"step of Llama 7B .* takes (\S+) GB. In .* (\S+) GB and\n.* (\S+) GB,")
    steps = {
        name: max(find("measurements/cpu.md", rf"^\| {row} \| (.*) \|$")[0].split(" | "), key=float)
        for name, row in {
            "all linear layers": "all-linear, r = 8",
            "query and value": "query and value, r = 8",
            "full fine-tuning": "full fine-tuning",
        }.items()
    }
    some, many = find("measurements/meshes.md", r"\| (\d+) chips \|$")[:2]
    return {
        "text": lines("Reviews: accuracy", {"LoRA": text}),
        "chat": lines("Definitions: held-out loss", {"LoRA": chat[:best]}),
        "digits": lines("Sideways digits: accuracy", runs("other", "ConvNet")),
        "heat": lines("Heat on graphs: error", runs("other", "(?:LoRA|full)")),
        "vowels": lines("Children's vowels: accuracy", runs("other", "children")),
        "sums": bars("Sums that are right", "%", {"after 32 steps": after, "before": before}),
        "adapters": bars(
            "Speed on a CPU, of 1",
            "",
            {
                "64 adapters, in one batch": speed,
                "one adapter": "1.00",
                "64 adapters, one by one": f"{float(speed) / float(times):.2f}",
            },
        ),
        "memory": bars(
            "A step of Llama 7B",
            " GB",
            {"LoRA on NF4": bits, "LoRA on bfloat16": half, "full fine-tuning": full},
        ),
        "times": bars("Longest step, CPU; frozen = 1", "", steps),
        "chips": bars(
            "GPT-3 175B: TPU v5p chips",
            "",
            {"LoRA, query and value": some, "full fine-tuning": many},
        ),
    }


if __name__ == "__main__":
    for name, picture in cards().items():
        (HERE / f"{name}.svg").write_text(picture, encoding="utf-8")

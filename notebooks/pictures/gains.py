"""Draws `gains.svg` from figures of `costs.md`: `python notebooks/pictures/gains.py`."""

import pathlib

PANELS = {
    "Peak memory of a step, Llama 7B, GB; a TPU v5e has 16.9": {
        "jlora on NF4": 7.7,
        "jlora on bfloat16": 18.5,
        "full fine-tuning": 84.8,
    },
    "Largest step time ÷ that with all weights frozen, CPU (AVX-512), d ≥ 384, r = 8": {
        "jlora, query and value": 1.05,
        "jlora, all-linear": 1.24,
        "full fine-tuning": 1.84,
    },
}
WIDTH, LABELS, ROW, BAR = 720, 190, 30, 20
COLORS = {"jlora": "#5c6bc0", "full": "#b0bec5"}


def draw() -> str:
    """Two panels of bars, one below the other."""
    parts, y = [], 10
    for title, bars in PANELS.items():
        parts.append(f'<text x="16" y="{y + 18}" font-weight="bold">{title}</text>')
        y += ROW
        for name, value in bars.items():
            length = round((WIDTH - LABELS - 70) * value / max(bars.values()))
            color = COLORS[name.split()[0].strip(",")]
            parts += [
                f'<text x="16" y="{y + 15}">{name}</text>',
                f'<rect x="{LABELS}" y="{y}" width="{length}" height="{BAR}" fill="{color}"/>',
                f'<text x="{LABELS + length + 8}" y="{y + 15}">{value}</text>',
            ]
            y += ROW
        y += 8
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    font = 'font-family="sans-serif" font-size="14"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>'
    back = f'<rect width="{WIDTH}" height="{y}" rx="8" fill="#fff"/><g fill="#222">'
    return "\n".join([head, back, *parts, "</g></svg>\n"])


if __name__ == "__main__":
    pathlib.Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")

"""What the notebooks print, kept in their files: GitHub shows it.

The site's build runs the notebooks. Then this compares, or writes:

    python notebooks/outputs.py build/.jupyter_cache
    python notebooks/outputs.py build/.jupyter_cache --write

Words and whole numbers must be the same, other numbers to 2%; in cells
with the tag `drifts`, such as those that print rounding errors, only
the words. Pictures are not compared.
"""

import argparse
import base64
import io
import itertools
import json
import math
import pathlib
import re

FOLDER = pathlib.Path(__file__).parent
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
CLOSE = 0.02


def shrink(png):
    """The same picture with 256 colors, in base 64."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(256).save(
        small := io.BytesIO(), "PNG", optimize=True
    )
    return base64.b64encode(small.getvalue()).decode()


def keep(outputs):
    """Text that was printed, values and pictures; no progress."""
    kept = []
    for kind, group in itertools.groupby(
        outputs, lambda x: x.get("name", "data")
    ):
        if kind == "stdout":
            text = "".join("".join(x["text"]) for x in group)
            lines = text.splitlines(keepends=True)
            kept.append(
                {
                    "name": "stdout",
                    "output_type": "stream",
                    "text": lines,
                }
            )
        elif kind == "data":
            kept += [_keep_data(x["data"]) for x in group]
    return kept


def _keep_data(data):
    found = {
        "text/plain": "".join(data["text/plain"]).splitlines(
            keepends=True
        )
    }
    if "image/png" in data:
        found = {"image/png": shrink(data["image/png"])} | found
    return {
        "data": found,
        "metadata": {},
        "output_type": "display_data",
    }


def text_of(outputs):
    """What a reader reads, without pictures."""
    return "".join(
        "".join(x.get("text", x.get("data", {}).get("text/plain", "")))
        for x in outputs
    )


def agree(kept, fresh, drifts):
    """Whether two texts say the same."""
    if NUMBER.sub("#", kept).split() != NUMBER.sub("#", fresh).split():
        return False
    numbers = NUMBER.findall(kept), NUMBER.findall(fresh)
    return drifts or all(map(_are_close, *numbers))


def _are_close(a, b):
    x, y = (float(n.replace(",", "")) for n in (a, b))
    if not {".", "e"} & set(a + b):
        return x == y
    unit = 0 if "e" in a else 10.0 ** -len(a.partition(".")[2])
    return math.isclose(x, y, rel_tol=CLOSE, abs_tol=1.5 * unit)


def refresh(notebook, ran):
    """Puts fresh outputs in; yields what they do not agree with."""
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            kept = text_of(cell["outputs"])
            cell["outputs"] = keep(ran.cells[i].outputs)
            fresh = text_of(cell["outputs"])
            drifts = "drifts" in cell["metadata"].get("tags", ())
            if not agree(kept, fresh, drifts):
                yield f"cell {i} has\n{kept}\nand now printed\n{fresh}"


def main():
    """Compares, or writes."""
    import nbformat
    from jupyter_cache import get_cache

    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("cache", type=pathlib.Path, help="of the build")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    cache, wrong = get_cache(args.cache), []
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        read = nbformat.read(path, 4)
        try:
            _, ran = cache.merge_match_into_notebook(read)
        except KeyError:
            raise SystemExit(
                f"{path.name} has changed: build the site first"
            ) from None
        wrong += [f"{path.name}, {x}" for x in refresh(notebook, ran)]
        if args.write:
            text = json.dumps(notebook, indent=1, ensure_ascii=False)
            path.write_text(f"{text}\n", encoding="utf-8")
    if wrong and not args.write:
        wrong.append("If that is right, pass --write.")
        raise SystemExit("\n\n".join(wrong))


if __name__ == "__main__":
    main()

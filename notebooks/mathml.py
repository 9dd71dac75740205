"""Formulas as MathML, which browsers draw themselves: a hook of MkDocs."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\(?:\((?P<inline>.*?)\\\)|\[(?P<block>.*?)\\\])</\1>', re.S
)
MATHJAX = re.compile(r"<script data-mkdocs-jupyter-mathjax=.*?</script>", re.S)


def on_page_content(content: str, **_: Any) -> str:
    """What the page shows, with its formulas drawn."""

    def draw(found: re.Match[str]) -> str:
        if found["inline"]:
            return convert(html.unescape(found["inline"]))
        block = convert(html.unescape(found["block"]), display="block")
        return f'<div class="formula">{block}</div>'

    return FORMULA.sub(draw, content)


def on_post_page(output: str, **_: Any) -> str:
    """The page without what mkdocs-jupyter adds to it, which would load MathJax from elsewhere."""
    return MATHJAX.sub("", output)

"""Formulas as MathML, which browsers draw themselves: a hook of MkDocs."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\(?:\((?P<inline>.*?)\\\)|\[(?P<block>.*?)\\\])</\1>', re.S
)


def on_page_content(content: str, **_: Any) -> str:
    """What the page shows, with its formulas drawn."""

    def draw(found: re.Match[str]) -> str:
        text = html.unescape(found["inline"] or found["block"])
        return convert(text, display="inline" if found["inline"] else "block")

    return FORMULA.sub(draw, content)

"""Write a comparison as one self-contained HTML page.

Its content security policy allows its own script alone, and no requests.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: left; white-space: nowrap;
  max-width: 20rem; overflow: hidden; text-overflow: ellipsis; }
thead th { border-bottom: 1px solid; }
td.number { text-align: right; }
.best { font-weight: 700; text-decoration: underline; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.charts { display: grid; gap: 2rem; margin-top: 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(36rem, 100%), 1fr)); }
figure { margin: 0; }
svg { width: 100%; height: auto; }
"""
# Numbers are sorted by what they begin with: a mean before its deviation.
_SCRIPT = """
"use strict";
const body = document.querySelector("tbody");
const heads = [...document.querySelectorAll("thead th")];
heads.forEach((head, at) => {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.onclick = () => {
    const falls = head.ariaSort === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.ariaSort = falls ? "descending" : "ascending";
    const rows = [...body.children];
    const cells = rows.map(row => row.children[at]);
    const isNumber = at === 0 || cells.some(cell => cell.matches(".number"));
    const value = row => isNumber
      ? parseFloat(row.children[at].textContent.replaceAll(",", ""))
      : row.children[at].textContent;
    const missing = row => value(row) !== value(row) || value(row) === "-";
    const order = (a, b) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const rises = isNumber ? value(a) - value(b) :
        value(a).localeCompare(value(b), undefined, {numeric: true});
      return falls ? -rises : rises;
    };
    body.append(...rows.sort(order));
  };
});
"""


def page_of(
    table: str,
    *,
    title: str,
    notes: Sequence[str],
    charts: Sequence[tuple[str, str]],
) -> str:
    """Build the page.

    Args:
        table: An HTML element.
        notes: Paragraphs below the title.
        charts: Title and SVG element of each chart.
    """
    digest = hashlib.sha256(_SCRIPT.encode()).digest()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{base64.b64encode(digest).decode()}'"
    )
    figures = [f"<figure><h2>{escape(name)}</h2>{svg}</figure>" for name, svg in charts]
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
            *(f"<p>{escape(note)}</p>" for note in notes),
            f'<div class="wide">{table}</div>',
            f'<div class="charts">{"".join(figures)}</div>',
            f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
        )
    )

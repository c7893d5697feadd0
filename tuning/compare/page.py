"""Write a comparison as one HTML page that needs nothing else.

Names, params and tags are foreign text: all of it is escaped, and the page's policy
lets no script but its own run, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from tuning.compare.columns import Cell, Column

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5b6475; --line: #d9dde5;
  --back: #ffffff; --stripe: #f5f7fa; --mark: #0a6b3d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8f0; --soft: #9aa4b5;
  --line: #353c49; --back: #14181f; --stripe: #1b212a; --mark: #5fd39a; } }
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  margin: 2rem auto; padding: 0 1.5rem; max-width: 120rem; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
p { color: var(--soft); margin: .3rem 0 1rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: left; white-space: nowrap; }
td.number, th.number { text-align: right; }
thead th { border-bottom: 1px solid var(--line); font-weight: 600; }
tbody tr:nth-child(even) > * { background: var(--stripe); }
tbody th { font-weight: 500; max-width: 20rem; overflow: hidden;
  text-overflow: ellipsis; }
.name { position: sticky; left: 0; background: var(--back); }
td.param { max-width: 14rem; overflow: hidden; text-overflow: ellipsis; }
.best { color: var(--mark); font-weight: 700; }
button { all: unset; cursor: pointer; }
button:hover { text-decoration: underline; }
button:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.charts { display: grid; gap: 1.5rem 2rem; margin-top: 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(36rem, 100%), 1fr)); }
figure { margin: 0; }
svg { width: 100%; height: auto; max-width: 56rem; }
svg text { font-family: system-ui, sans-serif !important; }
"""
_SCRIPT = """
"use strict";
const body = document.querySelector("tbody");
const heads = [...document.querySelectorAll("thead th")];
heads.forEach((head, at) => head.querySelector("button").onclick = () => {
  const falls = head.ariaSort === "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.ariaSort = falls ? "descending" : "ascending";
  const isNumber = head.classList.contains("number");
  const value = row => row.children[at].dataset.value;
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    const missing = (x === undefined) - (y === undefined);
    if (missing || x === undefined) return missing;
    const rises = isNumber ? x - y : x.localeCompare(y, undefined, {numeric: true});
    return falls ? -rises : rises;
  };
  body.append(...[...body.children].sort(order));
});
"""


def page_of(
    columns: Sequence[Column],
    *,
    title: str,
    notes: Sequence[str],
    charts: Sequence[tuple[str, str]],
    best: Sequence[tuple[str, int]],
) -> str:
    """Write the page.

    Args:
        notes: Paragraphs below the title.
        charts: Title and SVG element of each chart.
        best: Columns and the index of the row that is best there.
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
            f'<div class="wide">{_table(columns, best=set(best))}</div>',
            f'<div class="charts">{"".join(figures)}</div>',
            f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
        )
    )


def _table(columns: Sequence[Column], *, best: set[tuple[str, int]]) -> str:
    heads = ['<th class="number"><button>#</button></th>', *map(_head, columns)]
    lines = [f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>"]
    for at in range(len(columns[0].cells)):
        cells = [
            _cell(column.cells[at], column=column, is_best=(column.name, at) in best)
            for column in columns
        ]
        number = f'<td class="number" data-value="{at + 1}">{at + 1}</td>'
        lines.append(f"<tr>{number}{''.join(cells)}</tr>")
    return "\n".join(["<table>", *lines, "</tbody></table>"])


def _head(column: Column) -> str:
    return (
        f"<th{_classes(column)}{_attribute('title', column.note)}>"
        f"<button>{escape(column.name)}</button></th>"
    )


def _cell(cell: Cell, *, column: Column, is_best: bool) -> str:
    tag = 'th scope="row"' if column.name == "name" else "td"
    value = "" if cell.is_missing else _attribute("data-value", str(cell.value))
    note = cell.note or (cell.text if column.is_param else "")
    classes = _classes(column, is_best=is_best)
    title = _attribute("title", note)
    return f"<{tag}{classes}{value}{title}>{escape(cell.text)}</{tag.split()[0]}>"


def _classes(column: Column, *, is_best: bool = False) -> str:
    names = [
        *(["name"] if column.name == "name" else []),
        *(["number"] if column.is_numeric else []),
        *(["param"] if column.is_param else []),
        *(["best"] if is_best else []),
    ]
    return _attribute("class", " ".join(names))


def _attribute(name: str, value: str) -> str:
    return f' {name}="{escape(value)}"' if value else ""

"""One self-contained HTML page for a step's report: no network, readable on a phone. Shared by the steps that write reports.

`page(title, [Section(...)])` gives the page; figures are inline SVG, so that they scale and nothing is fetched.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TONES = ("good", "bad", "warn", "plain")

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --paper: #fff; --back: #f4f6f8;
        --good: #1a7f4b; --bad: #b3372e; --warn: #9a6a00; --plain: #35506e; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 .5rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 1rem 0; overflow-wrap: break-word; }
.lead { font-size: 1.1rem;
        border-left: .4rem solid var(--plain); background: var(--paper); padding: .8rem 1rem; border-radius: .3rem; margin: 1rem 0; }
.lead.good { border-color: var(--good); } .lead.bad { border-color: var(--bad); } .lead.warn { border-color: var(--warn); }
.note { color: var(--soft); font-size: .92rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media (max-width: 40rem) {
  table.stack thead { display: none; }
  table.stack tr { display: block; border-bottom: 1px solid var(--line); padding: .4rem 0; }
  table.stack td, table.stack td.number { display: block; border: 0; padding: .1rem .3rem; text-align: left; white-space: normal; }
  table.stack td[data-label]:not([data-label=""])::before { content: attr(data-label) ": "; color: var(--soft); }
}
figure { margin: .5rem 0; } figure svg { width: 100%; max-width: 46rem; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .92rem; }
.badge { display: inline-block; padding: .05rem .5rem; border-radius: 1rem; color: #fff; background: var(--plain);
         font-size: .85rem; white-space: nowrap; }
.badge.good { background: var(--good); } .badge.bad { background: var(--bad); } .badge.warn { background: var(--warn); }
code { background: var(--back); padding: .05rem .3rem; border-radius: .2rem; font-size: .92em; overflow-wrap: anywhere; }
{{ style | safe }}</style>
</head>
<body><main>
<h1>{{ title }}</h1>
{% if lead %}<p class="lead {{ tone }}">{{ lead }}</p>{% endif %}
{% for section in sections %}<section>
<h2>{{ section.heading }}</h2>
{{ section.html | safe }}
{% if section.note %}<p class="note">{{ section.note }}</p>{% endif %}
</section>
{% endfor %}</main></body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A block of the page. `html` is trusted markup (make it with the helpers below); heading and note are plain text."""

    heading: str
    html: str
    note: str = ""


def page(title: str, sections: Sequence[Section], *, lead: str = "", tone: str = "plain", style: str = "") -> str:
    """The whole page. `lead` is the one sentence to read; `tone` colours it: good, bad, warn or plain. `style`: more CSS, trusted."""
    if tone not in TONES:
        raise ValueError(f"tone is {tone!r}; expected one of {', '.join(TONES)}")
    return Environment(autoescape=True).from_string(_PAGE).render(title=title, sections=sections, lead=lead, tone=tone, style=style)


def paragraph(text: str) -> str:
    return str(Markup("<p>{}</p>").format(text))


def badge(text: str, tone: str) -> Markup:
    """A coloured pill, for use in a table's cell."""
    return Markup('<span class="badge {}">{}</span>').format(tone, text)


def table_html(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, stack: bool = False) -> str:
    """A table that scrolls sideways on a phone, or with `stack` shows each row as a block there: for tables that hold sentences.

    Cells are escaped unless Markup; int and float cells are right-aligned, floats at 4 digits.
    """
    numeric = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(headers))]
    head = "".join(f"<th{_class(number)}>{escape(text)}</th>" for text, number in zip(headers, numeric, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{_class(number)} data-label="{escape(text)}">{_cell(value)}</td>' for value, text, number in zip(row, headers, numeric, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table{_stacked(stack)}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure_html(figure: "Figure", alt: str, caption: str = "") -> str:
    """A matplotlib figure as inline SVG with an accessible name."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": alt}):  # ids that differ between figures of a page and are the same in every run
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s(width|height)=\"[\d.]+pt\"", "", svg, count=2)  # the viewBox stays, so that it scales to the page
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
    return f"<figure>{svg}" + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "") + "</figure>"


def _stacked(stack: bool) -> str:
    return ' class="stack"' if stack else ""


def _class(number: bool) -> str:
    return ' class="number"' if number else ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(escape(value))

"""A self-contained HTML page: headings, key figures, tables and pictures, and no reference outside.

Whatever text comes in is escaped here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from itertools import count

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --panel: #ffffff; --text: #1c2330; --faint: #566072; --line: #d9dee6;
  --mark: #e3efff; --accent: #0b62b8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --panel: #1b212a; --text: #e6eaf0; --faint: #a3aebd; --line: #343d4a;
    --mark: #16334f; --accent: #7fbcff;
  }
  /* Pictures are black on nothing: light and dark change places, hues stay. */
  figure img { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2rem 0 0.5rem; }
p { max-width: 48rem; margin: 0.5rem 0; }
.note, figcaption, caption, footer { color: var(--faint); font-size: 0.9rem; }
dl.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0.75rem; }
dl.key div, figure, .scroll {
  background: var(--panel); border: 1px solid var(--line); border-radius: 0.5rem;
}
dl.key div { padding: 0.75rem 1rem; }
dt { color: var(--faint); font-size: 0.9rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
dd strong { font-size: 1.2rem; font-weight: 600; }
figure { margin: 0.75rem 0; padding: 0.75rem 1rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto 0.5rem; }
.scroll { overflow: auto; max-height: 32rem; margin: 0.75rem 0; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; min-width: min(100%, 40rem); font-size: 0.92rem; }
caption { text-align: left; padding: 0.6rem 0.8rem; }
th, td { padding: 0.3rem 0.8rem; text-align: right; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; }
th { font-weight: 600; }
.text { text-align: left; }
thead th {
  position: sticky; top: 0; vertical-align: bottom;
  background: var(--panel); border-bottom: 2px solid var(--line);
}
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 500; }
tr.marked > * { background: var(--mark); font-weight: 600; }
@media print { .scroll { max-height: none; overflow: visible; } }
"""


class Page:
    """A page that is put together from the top down.

    Parameters
    ----------
    title : str
        Of the window, and the heading.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{escape(title)}</h1>"]
        self._numbers = count(1)

    def section(self, heading: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(heading)}</h2>")

    def text(self, *sentences: str, note: bool = False) -> None:
        """Add a paragraph."""
        kind = ' class="note"' if note else ""
        self._parts.append(f"<p{kind}>{escape(' '.join(sentences))}</p>")

    def key_figures(self, figures: Sequence[tuple[str, str, str]]) -> None:
        """Add the figures to see first: of each its name, its value and a remark."""
        self._parts.append('<dl class="key">')
        for name, value, remark in figures:
            self._parts.append(
                f"<div><dt>{escape(name)}</dt><dd><strong>{escape(value)}</strong></dd>"
                f"<dd>{escape(remark)}</dd></div>"
            )
        self._parts.append("</dl>")

    def table(
        self,
        caption: str,
        headings: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        text_columns: Collection[int] = (0,),
        marked: Collection[int] = (),
    ) -> None:
        """Add a table, whose rows are headed by their first cell.

        Parameters
        ----------
        caption : str
        headings : sequence of str
        rows : sequence of sequence of str
        text_columns : collection of int
            Those that are no numbers.
        marked : collection of int
            Rows to stand out; a cell must say why.
        """
        name = f"table-{next(self._numbers)}"

        def cell(tag: str, column: int, content: str, scope: str = "") -> str:
            kind = ' class="text"' if column in text_columns else ""
            scope = f' scope="{scope}"' if scope else ""
            return f"<{tag}{scope}{kind}>{escape(content)}</{tag}>"

        # A region that scrolls must be reached by the keyboard, and be named.
        self._parts += [
            f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}">',
            f'<table>\n<caption id="{name}">{escape(caption)}</caption>',
            "<thead><tr>"
            + "".join(cell("th", k, heading, "col") for k, heading in enumerate(headings))
            + "</tr></thead>\n<tbody>",
        ]
        for number, row in enumerate(rows):
            kind = ' class="marked"' if number in marked else ""
            cells = [cell("th", 0, row[0], "row")]
            cells += [cell("td", k, content) for k, content in enumerate(row[1:], start=1)]
            self._parts.append(f"<tr{kind}>{''.join(cells)}</tr>")
        self._parts.append("</tbody>\n</table>\n</div>")

    def picture(self, source: str, alternative: str, caption: str) -> None:
        """Add a picture: a data URI, what it shows in words, and a caption."""
        self._parts.append(
            f'<figure><img src="{escape(source)}" alt="{escape(alternative)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def html(self, footer: str) -> str:
        """Return the whole document."""
        return "\n".join(
            [
                "<!DOCTYPE html>",
                '<html lang="en">',
                "<head>",
                '<meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{STYLE}</style>",
                "</head>",
                "<body>",
                "<main>",
                *self._parts,
                f"<footer><p>{escape(footer)}</p></footer>",
                "</main>",
                "</body>",
                "</html>",
                "",
            ]
        )

"""Self-contained pages, light and dark as the reader's system asks: one file, nothing outside is
referred to."""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Iterable
from html import escape

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1f2328;--faint:#646b75;--line:#e6e8eb;
--soft:#f6f7f8}
@media(prefers-color-scheme:dark){
:root{--paper:#16191d;--ink:#e6e8ea;--faint:#98a1ac;--line:#2b3037;--soft:#1d2126}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:900px;margin:0 auto;padding:48px 20px 72px}
h1{font-size:28px;line-height:1.2;margin:0 0 8px}h2{font-size:19px;margin:44px 0 8px}
p{max-width:74ch}
h3{font-size:15px;margin:28px 0 6px}
.lead{color:var(--faint);margin:0 0 20px}.nowrap{white-space:nowrap}
.note{font-size:14px;margin:20px 0 8px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:24px 0}
.facts div{background:var(--soft);border-radius:8px;padding:12px 14px}
.facts b{display:block;font-size:22px;line-height:1.25}
.facts span{display:block;color:var(--faint);font-size:13px;line-height:1.35;margin-top:3px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;margin:16px 0}
dt{color:var(--faint)}
dd{margin:0;font-family:"Cambria Math","STIX Two Math","DejaVu Serif",serif;white-space:pre-wrap}
figure{margin:16px 0 0}figure img{width:100%;height:auto;display:block}
figcaption{color:var(--faint);font-size:14px;max-width:80ch;margin-top:8px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;min-width:100%}
th,td{text-align:right;padding:3px 9px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--faint);font-weight:600}
th:first-child,td:first-child{text-align:left;padding-left:0}
td.gap,th.gap{border-left:1px solid var(--line)}
td.words,th.words{text-align:left;white-space:normal;vertical-align:top}
td.words:first-child{white-space:nowrap}
.under{color:var(--faint);font-size:14px;margin:8px 0 0;max-width:80ch}
.problem{border-left:3px solid #d55e00;margin:8px 0;padding-left:12px}
footer{margin-top:48px;color:var(--faint);font-size:13px;border-top:1px solid var(--line);
padding-top:12px}
code{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.92em}
"""


def page(title: str, parts: Iterable[str], footer: str) -> str:
    """The whole file around `parts` and `footer`, which are HTML already; `title` is text."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        "content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style><main>{''.join(parts)}"
        f"<footer>{footer}</footer></main></html>\n"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Tiles: a number in large type, what it is below."""
    tiles = "".join(f"<div><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in pairs)
    return f"<div class=facts>{tiles}</div>"


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Terms and their formulas."""
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in pairs) + "</dl>"


def figure(title: str, caption: str, light: bytes, dark: bytes, dpi: int | None = None) -> str:
    """A PNG in two themes, inlined; as wide as the page, given its dpi at most 105 pixels an
    inch."""
    day, night = (
        "data:image/png;base64," + base64.b64encode(png).decode() for png in (light, dark)
    )
    width = int.from_bytes(light[16:20], "big")  # PNG: the header's first field
    style = f" style='max-width:{105 * width // dpi}px'" if dpi else ""
    return (
        f"<figure><picture><source media='(prefers-color-scheme: dark)' srcset='{night}'>"
        f"<img src='{day}' alt='{escape(title)}'{style}></picture>"
        f"<figcaption>{inline(caption)}</figcaption></figure>"
    )


def table(
    head: list[str], rows: list[list[str]], *, rule: int | None = None, words: Collection[int] = ()
) -> str:
    """A line before column `rule`; columns in `words` are prose, aligned to the left and
    wrapped."""

    def line(cells: list[str], tag: str) -> str:
        kinds = ["gap" * (j == rule) + "words" * (j in words) for j in range(len(cells))]
        marks = [f" class={kind}" if kind else "" for kind in kinds]
        return (
            "<tr>"
            + "".join(f"<{tag}{m}>{inline(c)}</{tag}>" for c, m in zip(cells, marks, strict=True))
            + "</tr>"
        )

    return (
        "<div class=wide><table>"
        + line(head, "th")
        + "".join(line(row, "td") for row in rows)
        + "</table></div>"
    )


def inline(text: str) -> str:
    """Plain text in which `backticks` mark code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))

"""A small SVG writer for the pictures of docs/models: boxes, arrows, text, in colours that follow the reader's theme.

The card has a background of its own, so that a picture is readable wherever it is put, whatever the theme of the page.
"""

from html import escape
from pathlib import Path

WIDTH = 720
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de } text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .small { font-size: 12px } .note { fill: #59636e; font-size: 12px } .bold { font-weight: 600 }
  .event { fill: #dbeafe; stroke: #2563eb } .query { fill: #fef3c7; stroke: #b45309 } .read { fill: #dcfce7; stroke: #15803d }
  .net { fill: #f3e8ff; stroke: #7e22ce } .off { fill: #f3f4f6; stroke: #9ca3af } .bad { fill: #fee2e2; stroke: #b91c1c }
  .line { fill: none; stroke: #59636e; stroke-width: 1.4 } .faint { stroke-opacity: .35 } .tip { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d } text { fill: #f0f6fc } .note { fill: #9198a1 }
    .event { fill: #16325c; stroke: #60a5fa } .query { fill: #4a3410; stroke: #fbbf24 } .read { fill: #12391f; stroke: #4ade80 }
    .net { fill: #3b1d5c; stroke: #c084fc } .off { fill: #21262d; stroke: #6e7681 } .bad { fill: #4c1618; stroke: #f87171 }
    .line { stroke: #9198a1 } .tip { fill: #9198a1 }
  }
"""
TIP = '<path class="tip" d="M0 0L8 4L0 8z"/>'
TIP = f'<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">{TIP}</marker>'


class Picture:
    """A card of 720 × `height`; `title` is what a screen reader says."""

    def __init__(self, title: str, height: int) -> None:
        self.title, self.height, self.parts = title, height, list[str]()

    def box(self, x: float, y: float, w: float, h: float, label: str = "", kind: str = "off", text: str = "") -> "Picture":
        """A rectangle from its upper left corner, its label in the middle."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4"/>')
        return self.text(x + w / 2, y + h / 2 + 5, label, text) if label else self

    def text(self, x: float, y: float, label: str, kind: str = "", anchor: str = "middle") -> "Picture":
        """`y` is the base line; `kind` any of small, note, bold."""
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(label)}</text>')
        return self

    def note(self, x: float, y: float, label: str, anchor: str = "start") -> "Picture":
        return self.text(x, y, label, "note", anchor)

    def arrow(self, *points: tuple[float, float], tip: bool = True, faint: bool = False) -> "Picture":
        """A line through `points`."""
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        kind, end = "line faint" if faint else "line", ' marker-end="url(#tip)"' if tip else ""
        self.parts.append(f'<path class="{kind}" d="{path}"{end}/>')
        return self

    def row(self, x: float, y: float, labels: list[str], w: float = 52, h: float = 30, gap: float = 12, kind: str = "event") -> list[float]:
        """Boxes side by side; the middles of them."""
        for i, label in enumerate(labels):
            self.box(x + i * (w + gap), y, w, h, label, kind)
        return [x + i * (w + gap) + w / 2 for i in range(len(labels))]

    def bars(self, x: float, y: float, heights: list[float], w: float = 20, gap: float = 6, kind: str = "event") -> list[float]:
        """Bars that stand on `y`; the middles of them."""
        for i, height in enumerate(heights):
            self.box(x + i * (w + gap), y - height, w, height, kind=kind)
        return [x + i * (w + gap) + w / 2 for i in range(len(heights))]

    def save(self, path: Path) -> None:
        card = f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{self.height - 1}" rx="8"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}" role="img">'
        inside = [f"<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>", f"<defs>{TIP}</defs>", card, *self.parts]
        path.write_text("\n".join([head, *inside, "</svg>"]) + "\n", encoding="utf-8")

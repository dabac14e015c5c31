"""Writes the drawings of the documentation as SVG: `python docs/drawings/draw.py`.

Plain shapes and text in a colour that reads on light and dark pages; no library is needed.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
INK, SOFT, FILLS = "#7a7f87", "#a9aeb6", ("#4c8dd6", "#d9822b", "#3f9d63", "#a66bbf")


class Drawing:
    """An SVG under construction.

    Args:
        width, height: in pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="13" '
            f'fill="{INK}">',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        ]

    def box(self, x: float, y: float, w: float, h: float, fill: str = "none") -> None:
        """A rectangle; a filled one is half transparent."""
        look = f'fill="{fill}" fill-opacity="0.35"' if fill != "none" else 'fill="none"'
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="3" stroke="{INK}" {look}/>'
        )

    def text(self, x: float, y: float, text: str, anchor: str = "start", size: int = 13) -> None:
        """One line of text, its baseline at y."""
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{escaped}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A line with a tip."""
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.4" '
            'marker-end="url(#tip)"/>'
        )

    def write(self, name: str) -> None:
        """Saves the file beside this script."""
        (HERE / name).write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")


def paths() -> None:
    """The write path and the run path through the rooms."""
    d = Drawing(1000, 300)
    write = [
        ("source", "published files", "-> dense tensors"),
        ("models", "one block in", "memory at a time"),
        ("calib", "what its experts", "see of the text"),
        ("quantize", "weights ->", "integers, scales"),
        ("codec", "integers ->", "words"),
        ("store", "the compressed", "directory"),
    ]
    d.text(10, 24, "qmoe compress (room: compression)", size=15)
    for i, (name, first, second) in enumerate(write):
        x = 10 + i * 165
        d.box(x, 40, 135, 70, FILLS[i % 4])
        d.text(x + 67, 62, name, "middle", 15)
        d.text(x + 67, 82, first, "middle")
        d.text(x + 67, 99, second, "middle")
        if i:
            d.arrow(x - 28, 75, x - 3, 75)
    run = [
        ("transformers, vLLM", "build the model,", "call the experts"),
        ("inference", "encoded experts in", "their place"),
        ("store", "tables and words,", "checked"),
        ("kernels / codec", "decode inside the", "product: GPU / CPU"),
    ]
    d.text(10, 184, "from_pretrained, generate (room: inference)", size=15)
    for i, (name, first, second) in enumerate(run):
        x = 10 + i * 245
        d.box(x, 200, 205, 70, FILLS[i % 4])
        d.text(x + 102, 222, name, "middle", 15)
        d.text(x + 102, 242, first, "middle")
        d.text(x + 102, 259, second, "middle")
        if i:
            d.arrow(x - 38, 235, x - 3, 235)
    d.write("paths.svg")


def words() -> None:
    """From a matrix to the programs of a GPU: rows, pieces, streams, tiles, segments, programs."""
    d = Drawing(1000, 400)
    d.text(10, 22, "a matrix, its columns by class", size=15)
    for r in range(6):
        for p in range(2):
            d.box(10 + p * 130, 36 + r * 26, 126, 20, FILLS[p])
    d.text(73, 212, "piece 0", "middle")
    d.text(203, 212, "piece 1", "middle")
    d.text(10, 236, "a piece: every P-th coded column, <= 1024")
    d.text(10, 256, "a stream: the code words of one piece of one row,")
    d.text(10, 274, "bit after bit; its start is stored once per run of 64")
    d.arrow(275, 110, 335, 110)
    d.text(345, 22, "words of a stream, read as symbols", size=15)
    for i, (bits, fill) in enumerate(zip((40, 76, 28, 64, 40), (0, 2, 0, 3, 1), strict=True)):
        x = 345 + sum((40, 76, 28, 64, 40)[:i])
        d.box(x, 96, bits - 2, 26, FILLS[fill])
    d.text(345, 146, "a symbol: some zeros, then one weight")
    d.text(345, 166, "(its table is chosen by row class + column class)")
    d.text(345, 200, "on a GPU a stream may be cut into S segments,")
    d.text(345, 218, "so that small layers have enough lanes;")
    d.text(345, 236, "what is stored for it: a bit and a position")
    d.arrow(610, 110, 670, 110)
    d.text(680, 22, "a tile: 32 streams of like length", size=15)
    for lane, cut in enumerate((131, 148, 139, 122, 144, 127, 152, 136)):
        for k in range(5):  # words, cut anywhere
            x, end = 680 + k * 58, 734 + k * 58
            middle = min(max(x, 680 + cut), end)
            for left, right, fill in ((x, middle, FILLS[0]), (middle, end, FILLS[1])):
                if left < right:
                    d.box(left, 36 + lane * 21, right - left, 17, fill)
        d.text(992, 49 + lane * 21, f"{lane if lane < 7 else 31}", "end", 11)
    d.text(680, 222, "word k of lane l lies at first + 32 k + l:")
    d.text(680, 240, "neighbouring lanes read neighbouring words")
    d.text(680, 264, "two colours, two segments, two programs: equal")
    d.text(680, 282, "numbers of groups of symbols in every lane")
    for x, y, line in (
        (10, 320, "matrix: one projection of one expert"),
        (345, 320, "row: one output"),
        (680, 320, "class: half octave of mean |q|"),
        (10, 346, "group: matrices of one shape, one header"),
        (345, 346, "header: their tables"),
        (680, 346, "blob: one matrix"),
        (10, 372, "CPU: streams of several rows, side by side"),
        (345, 372, "GPU: all experts' programs in one launch"),
    ):
        d.text(x, y, line)
    d.write("words.svg")


if __name__ == "__main__":
    paths()
    words()

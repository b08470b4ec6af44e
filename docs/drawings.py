"""The drawings of where hooks lie: ``python docs/drawings.py`` writes ``docs/img/*.svg``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "img"
STREAM_X, NORM_X, NORM_W, BOX_X, BOX_W, ROW = 210, 262, 72, 354, 270, 18
INK, HOOK, FILL, AUDIO = "#1f2933", "#b4530a", "#eef3f8", "#f7d9b8"
STYLE = f"""
text {{ font: 13px sans-serif; fill: {INK} }}
.module {{ font-weight: bold }}
.hook {{ font: 12px monospace; fill: {HOOK} }}
polyline {{ fill: none; stroke: {INK}; stroke-width: 1.5 }}
rect {{ fill: {FILL}; stroke: {INK} }}
circle {{ fill: {HOOK} }}
.plus {{ fill: #fff; stroke: {INK}; stroke-width: 1.5 }}
.audio {{ fill: {AUDIO} }}
.sheet {{ fill: #fff; stroke: none }}
"""

QKV = "hook_q hook_k hook_v"
MIXED = ("hook_attn_scores hook_pattern", "hook_z hook_result")
ATTENTION = (QKV, *MIXED)
ROTARY_ATTENTION = (QKV, "hook_rot_q hook_rot_k (rotary)", *MIXED)
MLP = ("hook_pre", "hook_post")
GATED_MLP = ("hook_pre hook_gate hook_pre_linear (gated)", "hook_post")


class Drawing:
    """Shapes on a white sheet, in the order in which they are drawn."""

    def __init__(self, width: int, title: str):
        self.width, self.height, self.title = width, 0, title
        self.shapes: list[str] = []

    def add(self, shape: str, bottom: float) -> None:
        self.shapes.append(shape)
        self.height = max(self.height, round(bottom) + 16)

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        self.add(f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>', y)

    def line(self, *points: tuple[float, float], arrow: bool = True) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        end = ' marker-end="url(#tip)"' if arrow else ""
        self.add(f'<polyline points="{path}"{end}/>', max(y for _, y in points))

    def box(self, x: float, y: float, w: float, h: float, title: str, names: Sequence[str]) -> None:
        """A module with the hooks inside it."""
        self.add(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5"/>', y + h)
        self.text(x + w / 2, y + 16, title, "module", "middle")
        for row, name in enumerate(names, start=1):
            self.text(x + 10, y + 18 + row * ROW, name, "hook")

    def hook(self, x: float, y: float, name: str, left: bool = True) -> None:
        """A hook on a line."""
        self.add(f'<circle cx="{x}" cy="{y}" r="4.5"/>', y)
        self.text(x + (-11 if left else 11), y + 4, name, "hook", "end" if left else "start")

    def plus(self, x: float, y: float) -> None:
        self.add(f'<circle cx="{x}" cy="{y}" r="8" class="plus"/>', y)
        self.text(x, y + 4.5, "+", "", "middle")

    def svg(self) -> str:
        """The file."""
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
        tip = (
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            f' orient="auto"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
                f"<title>{self.title}</title><style>{STYLE}</style><defs>{tip}</defs>",
                '<rect class="sheet" width="100%" height="100%"/>',
                *self.shapes,
                "</svg>\n",
            ]
        )


# -------------------------------------------------------------------------------- blocks


class BlockDrawing(Drawing):
    """A block: the residual stream runs down on the left, what adds to it stands on the right."""

    def __init__(self, title: str):
        super().__init__(BOX_X + BOX_W + 20, title)
        self.y = 20
        self.text(STREAM_X, self.y, "residual stream", "", "middle")
        self.y += 8

    def down(self, by: int, arrow: bool = False) -> None:
        self.line((STREAM_X, self.y), (STREAM_X, self.y + by), arrow=arrow)
        self.y += by

    def stage(self, name: str) -> None:
        """A stage of the stream, which has a hook."""
        self.down(18)
        self.hook(STREAM_X, self.y, name)
        self.down(14)

    def branch(self, title: str, names: Sequence[str], out: str, norm: str = "") -> None:
        """What reads the stream, behind a norm or not, and adds to it."""
        top, height = self.y, 26 + len(names) * ROW
        if norm:
            self.line((STREAM_X, top + 16), (NORM_X, top + 16))
            self.box(NORM_X, top + 2, NORM_W, 28, norm, ())
        self.line((NORM_X + NORM_W if norm else STREAM_X, top + 16), (BOX_X, top + 16))
        self.box(BOX_X, top, BOX_W, height, title, names)
        joins = top + height + 24
        middle = BOX_X + BOX_W / 2
        self.line((middle, top + height), (middle, joins), (STREAM_X + 8, joins))
        self.hook((STREAM_X + middle) / 2 - 30, joins, "", left=False)
        self.text((STREAM_X + middle) / 2 - 30, joins - 9, out, "hook", "middle")
        self.down(joins - top)
        self.plus(STREAM_X, joins)
        self.y += 8

    def norm(self, name: str) -> None:
        """A norm that the stream itself passes."""
        self.down(10, arrow=True)
        self.box(STREAM_X - 30, self.y, 60, 28, name, ())
        self.y += 28

    def end(self) -> BlockDrawing:
        self.down(16, arrow=True)
        return self


def pre_norm() -> Drawing:
    drawing = BlockDrawing("A block with its norms before attention and MLP")
    drawing.stage("hook_resid_pre")
    drawing.branch("attn", ROTARY_ATTENTION, "hook_attn_out", "ln1")
    drawing.stage("hook_resid_mid")
    drawing.branch("mlp", GATED_MLP, "hook_mlp_out", "ln2")
    drawing.stage("hook_resid_post")
    return drawing.end()


def post_norm() -> Drawing:
    drawing = BlockDrawing("A block that norms the residual stream itself")
    drawing.stage("hook_resid_pre")
    drawing.branch("attn", ATTENTION, "hook_attn_out")
    drawing.stage("hook_resid_mid")
    drawing.norm("ln1")
    drawing.stage("hook_normalized_resid_mid")
    drawing.branch("mlp", MLP, "hook_mlp_out")
    drawing.stage("hook_resid_post")
    drawing.norm("ln2")
    drawing.stage("hook_normalized_resid_post")
    return drawing.end()


def cross_attention() -> Drawing:
    drawing = BlockDrawing("A decoder block that also reads the encoder")
    drawing.stage("hook_resid_pre")
    drawing.branch("attn", ATTENTION, "hook_attn_out", "ln1")
    drawing.stage("hook_resid_mid")
    reads = "cross_attn, keys and values of the encoder"
    drawing.branch(reads, ATTENTION, "hook_cross_attn_out", "ln_cross")
    drawing.stage("hook_resid_mid_cross")
    drawing.branch("mlp", MLP, "hook_mlp_out", "ln2")
    drawing.stage("hook_resid_post")
    return drawing.end()


# -------------------------------------------------------------------------------- the model


def audio_llm() -> Drawing:
    drawing = Drawing(860, "From sound to answer in an audio language model")
    blocks = "blocks.{l}.…"
    stem = ("hook_mel", "hook_conv1", "hook_embed", "hook_pos_embed")
    behind = ("hook_pooled", "ln_final.…", "hook_out")
    drawing.text(85, 20, "sound", "", "middle")
    drawing.box(10, 30, 150, 172, "encoder", (*stem, blocks, *behind))
    drawing.line((160, 116), (210, 116))
    drawing.box(210, 76, 110, 72, "connector", ("hook_in", "hook_out"))
    _merge(drawing, left=390, top=60)
    drawing.box(610, 60, 140, 112, "decoder", ("hook_embed", blocks, *behind[1:]))
    drawing.line((750, 132), (850, 132))
    drawing.text(848, 122, "hook_logits", "hook", "end")
    return drawing


def _merge(drawing: Drawing, left: int, top: int) -> None:
    """Audio embeddings take the places of the placeholders in the prompt."""
    width, is_audio = 20, (False, False, True, True, True, True, False, False)
    drawing.text(left + 80, top - 8, "decoder.hook_audio_embed", "hook", "middle")
    for column in range(4):
        drawing.add(_cell(left + 40 + column * width, top, width, True), top + 20)
        middle = left + 50 + column * width
        drawing.line((middle, top + 20), (middle, top + 62))
    for column, heard in enumerate(is_audio):
        drawing.add(_cell(left + column * width, top + 62, width, heard), top + 82)
    drawing.text(left + 80, top + 100, "decoder.hook_token_embed", "hook", "middle")
    drawing.text(left + 80, top + 120, "text", "", "middle")
    drawing.text(left + 80, top + 138, "with audio in its place", "", "middle")
    drawing.line((320, 116), (370, 116), (370, top + 10), (left + 38, top + 10))
    drawing.line((left + 162, top + 72), (610, top + 72))


def _cell(x: float, y: float, width: float, heard: bool) -> str:
    kind = ' class="audio"' if heard else ""
    return f'<rect x="{x}" y="{y}" width="{width}" height="20"{kind}/>'


DRAWINGS = {
    "audio_llm": audio_llm,
    "pre_norm": pre_norm,
    "post_norm": post_norm,
    "cross_attention": cross_attention,
}


def main() -> None:
    """Write every drawing."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()

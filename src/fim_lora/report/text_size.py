"""The width of text in a picture, and text that fits a width."""

import re

from matplotlib.font_manager import FontProperties, findfont, get_font

# The font is measured at a high resolution, at which the rounding of its glyphs to whole dots does not matter.
_DOTS_PER_INCH = 720


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width in inches, for a font size in points."""
    font = get_font(findfont(FontProperties(weight=weight)))
    font.set_size(size, _DOTS_PER_INCH)
    font.set_text(text, 0.0)
    return float(font.get_width_height()[0]) / 64 / _DOTS_PER_INCH  # in 64ths of a dot


def wrapped(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """Lines of at most this width in inches, broken at spaces and after punctuation, or anywhere if there is none."""
    lines = [""]
    for piece in re.findall(r"[^\s/_.,:-]*[\s/_.,:-]?", text):
        if text_width(lines[-1] + piece, size, weight) <= width:
            lines[-1] += piece
            continue
        lines.append("")
        for character in piece:
            if text_width(lines[-1] + character, size, weight) > width:
                lines.append("")
            lines[-1] += character
    return [line.strip() for line in lines if line.strip()]


def shortened(text: str, longest: int) -> str:
    """The text, or its two ends around an ellipsis if it has more characters."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"

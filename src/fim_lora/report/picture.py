"""`Picture`: a figure of matplotlib that is drawn without pyplot and without a window."""

from io import BytesIO
from os import PathLike
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MARGIN = 0.2
"""Space around the picture, in inches."""

_DOTS_PER_INCH = 150
# The renderer can draw up to 2**16 dots a side.
_MAX_DOTS = 30_000


class Picture(Figure):
    """A figure that notebooks show. Lengths are in inches, so that sizes do not depend on the amount of content."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height))
        FigureCanvasAgg(self)

    def axes_at(self, x: float, y: float, width: float, height: float) -> Axes:
        """New axes by their distance from the left and the top, and their size."""
        whole_width, whole_height = self.get_size_inches()
        bottom = whole_height - y - height
        return self.add_axes((x / whole_width, bottom / whole_height, width / whole_width, height / whole_height))

    def write(self, file: str | PathLike[str] | BytesIO, **options: Any) -> None:
        """Write the picture. The suffix of a path, such as `.png`, `.pdf` or `.svg`, determines the format.

        Raises `OSError` if the file cannot be written, and `ValueError` if the suffix is not a known format.
        """
        dots = min(_DOTS_PER_INCH, _MAX_DOTS / max(self.get_size_inches()))
        self.savefig(file, dpi=dots, bbox_inches="tight", pad_inches=MARGIN, facecolor="white", **options)

    def _repr_png_(self) -> bytes:
        """For a notebook in which no backend of matplotlib has been set up."""
        buffer = BytesIO()
        self.write(buffer, format="png")
        return buffer.getvalue()


def literal(text: str) -> str:
    """Escape the text for matplotlib, which would typeset a part between dollar signs as a formula."""
    return text.replace("$", r"\$")

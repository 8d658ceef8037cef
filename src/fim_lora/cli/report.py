"""`fim-lora report`: one HTML file from the folder of an allocation or a compression."""

from pathlib import Path

from fim_lora_command.errors import CommandError

from ..compression import LoraCompression
from ..ranks.size_curve import SIZE_CURVE_FILE, SizeCurve
from ..report.html_report import html_report
from ..report.title_names import title_names
from ..runtime.atomic import write_text
from .output import REPORT, Result, read_result, require_writable_file, result_folder
from .provenance import provenance_facts, read_provenance


def report(folder: Path, output: Path | None, overwrite: bool) -> None:
    """Write the report of a folder, by default into the folder, and print where it is."""
    folder = result_folder(folder)
    file = folder / REPORT if output is None else output
    result, provenance = read_result(folder), read_provenance(folder)
    require_writable_file(file, overwrite)
    page = html_report(
        result,
        model=title_names(provenance)["model"],
        facts=provenance_facts(provenance),
        provenance=provenance,
        curve=_size_curve(folder, result),
    )
    write_text(file, page, make_folders=True)
    print(f"Written: {file}. Open it in a browser; it needs no network.")


def _size_curve(folder: Path, result: Result) -> SizeCurve | None:
    """The sizes of a compression; `None` for an allocation, and for a folder of an older version."""
    path = folder / SIZE_CURVE_FILE
    if not isinstance(result, LoraCompression) or not path.exists():
        return None
    curve = SizeCurve.load(path)
    if not any(point.ranks == result.ranks for point in curve.points):
        raise CommandError(f"{path} is of another compression than the ranks beside it. Run fim-lora compress again.")
    return curve

"""`fim-lora show`: the summary of a folder that a command wrote. It changes nothing in the folder."""

from pathlib import Path

from .json_output import print_json, result_document
from .output import read_result, result_folder
from .provenance import provenance_facts, read_provenance
from .summary import print_summary


def show(folder: Path, as_json: bool) -> None:
    """Print where a result comes from and its ranks, or all that is in its file."""
    folder = result_folder(folder)
    result, provenance = read_result(folder), read_provenance(folder)
    if as_json:
        print_json(result_document(result, folder, provenance))
    else:
        print_summary(result, provenance_facts(provenance))

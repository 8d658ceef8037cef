"""The options of `fim-lora show`."""

from .options import Json, ResultFolder


def show_command(folder: ResultFolder, as_json: Json = False) -> None:
    """Print an allocation or a compression: where it comes from, and its ranks."""
    from fim_lora.cli.show import show

    show(folder, as_json)

"""The options of `fim-lora show`."""

from .options import ResultFolder


def show_command(folder: ResultFolder) -> None:
    """Print the ranks of an allocation or a compression, and draw its rank map again."""
    from fim_lora.cli.show import show

    show(folder)

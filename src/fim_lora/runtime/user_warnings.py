"""Warnings in the name of the user's own line, however deep in the library they arise."""

import sys
import warnings

_PACKAGE = __name__.partition(".")[0]


class FimLoraWarning(UserWarning):
    """A warning of this package, which its file name does not tell."""


def warn_user(message: str) -> None:
    """Issue a `FimLoraWarning` that shows the line outside of this package from which the call came."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FimLoraWarning, stacklevel=level)

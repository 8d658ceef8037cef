"""Names on the Hub: without a connection they are looked up in its cache at once, instead of waiting for the Hub."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

from fim_lora_command.errors import CommandError

# Seconds. The Hub answers within one, and the libraries wait for half a minute and more, for every file.
_TIMEOUT = 5
_FIRST_SERVER_ERROR = 500

_NOT_IN_THE_CACHE = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)


@contextmanager
def hub_lookup(name: str) -> Iterator[None]:
    """Look `name` up in the cache only, as with `HF_HUB_OFFLINE=1`, if the Hub cannot be reached.

    An error because of this names the cause.
    """
    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _problem(constants.ENDPOINT)
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if problem is not None:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        if problem is None or not any(isinstance(cause, _NOT_IN_THE_CACHE) for cause in _causes(error)):
            raise
        raise CommandError(
            f"{name} cannot be loaded: there is no such file or folder, the cache of the Hub does not have it, and "
            f"{problem}. Correct the name, check the network, or give a local file or folder."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@functools.cache
def _problem(endpoint: str) -> str | None:
    """Why the Hub cannot be used, or `None` if it answers. The session of huggingface_hub uses the user's proxies.

    A gateway that does not reach the Hub answers in its place, with a status on which huggingface_hub tries again for
    half a minute, for every file. Other errors may come from a mirror that has no page at its root.
    """
    try:
        status = get_session().head(endpoint, timeout=_TIMEOUT).status_code
    except Exception:  # the errors of requests or of httpx, depending on the version of huggingface_hub
        return f"{endpoint} cannot be reached"
    return f"{endpoint} cannot be reached (status {status})" if status >= _FIRST_SERVER_ERROR else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

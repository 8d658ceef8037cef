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

_NOT_IN_THE_CACHE = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)


@contextmanager
def hub_lookup(name: str) -> Iterator[None]:
    """Look `name` up in the cache only, as with `HF_HUB_OFFLINE=1`, if the Hub does not answer.

    An error because of this names the cause.
    """
    reachable = not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not reachable:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        if reachable or not any(isinstance(cause, _NOT_IN_THE_CACHE) for cause in _causes(error)):
            raise
        reason = "HF_HUB_OFFLINE is set" if before[0] else f"{constants.ENDPOINT} cannot be reached"
        raise CommandError(
            f"{name} cannot be loaded: there is no such file or folder, the cache of the Hub does not have it, and "
            f"{reason}. Correct the name, or check the connection."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@functools.cache
def _answers(endpoint: str) -> bool:
    """Whether a server answers, with whatever status. The session of huggingface_hub uses the proxies of the user."""
    try:
        get_session().head(endpoint, timeout=_TIMEOUT)
    except Exception:  # the errors of requests or of httpx, depending on the version of huggingface_hub
        return False
    return True


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

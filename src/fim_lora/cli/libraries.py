"""Libraries that a command uses: what they print and ask."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import datasets
import huggingface_hub
import transformers

from .remote_code import no_questions


@contextmanager
def quiet_libraries(show_progress_bars: bool) -> Iterator[None]:
    """Hide log messages of libraries except errors, their progress bars unless `show_progress_bars`, and questions."""
    transformers_log, datasets_log = transformers.utils.logging, datasets.utils.logging
    with ExitStack() as restore:
        restore.enter_context(no_questions())
        restore.callback(transformers_log.set_verbosity, transformers_log.get_verbosity())
        transformers_log.set_verbosity_error()
        hub_log = huggingface_hub.logging
        restore.callback(hub_log.set_verbosity, hub_log.get_verbosity())
        hub_log.set_verbosity_error()
        restore.callback(datasets_log.set_verbosity, datasets_log.get_verbosity())
        datasets_log.set_verbosity(datasets_log.CRITICAL)
        if not show_progress_bars and transformers_log.is_progress_bar_enabled():
            restore.callback(transformers_log.enable_progress_bar)
            transformers_log.disable_progress_bar()
        if not show_progress_bars and not datasets.are_progress_bars_disabled():
            restore.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield

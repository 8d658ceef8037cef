import os
from pathlib import Path

import pytest

# Tests never contact the hub, and never wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Failed assertions in helpers show their values, as failed assertions in tests do.
pytest.register_assert_rewrite("helpers")

# Files and folders whose tests take longest. They come first, so that no worker is left with one of them at the end.
_LONGEST = (
    "runtime/test_compiled_models.py",
    "test_real_model.py",
    "cli/test_command_faults.py",
    "adapter/test_install.py",
    "cli/test_compress_command.py",
    "trainer",
    "runtime",
    "fisher/layers/test_layers_of_transformers.py",
    "ranks/test_allocate.py",
    "test_vision_and_speech.py",
    "report",
)


def pytest_configure(config: pytest.Config) -> None:
    """Turn the package's own warnings into errors: a test expects them with `pytest.warns`.

    pytest imports the class. In pyproject.toml, this would come before the line about the hub above.
    """
    config.addinivalue_line("filterwarnings", "error::fim_lora.runtime.user_warnings.FimLoraWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that take longest first."""
    folder = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(folder)
        return next((place for place, long in enumerate(_LONGEST) if path.is_relative_to(long)), len(_LONGEST))

    items.sort(key=place)

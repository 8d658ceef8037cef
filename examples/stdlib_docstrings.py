"""Write the docstrings of Python's standard library as JSONL: real text that is available on every machine.

Usage: python examples/stdlib_docstrings.py OUTPUT.jsonl
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MIN_CHARACTERS = 400


def docstrings() -> Iterator[str]:
    """Docstrings of modules, classes and functions in the order of the files, which are parsed and not imported.

    Docstrings of fewer than `MIN_CHARACTERS` characters are left out.
    """
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= MIN_CHARACTERS:
                    yield text


def main(output: Path) -> None:
    """Write one JSON object `{"text": ...}` per line. Missing folders are created."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) for text in docstrings()]
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} docstrings written to {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

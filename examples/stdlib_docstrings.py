"""Write the docstrings of Python's standard library as JSONL: real text that every machine has.

Usage: python examples/stdlib_docstrings.py OUTPUT.jsonl
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 400  # characters


def docstrings() -> Iterator[str]:
    """Docstrings of modules, classes and functions, in the order of the files; the code is read, not imported.

    Yields:
        Docstrings of at least `SHORTEST` characters.
    """
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= SHORTEST:
                    yield text


def main(output: Path) -> None:
    """Write one `{"text": ...}` per line.

    Args:
        output: The file; its folder is made.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) for text in docstrings()]
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} docstrings written to {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

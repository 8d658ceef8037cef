"""No file of fim_lora can carry code: the package never unpickles, evaluates or imports the content of a file."""

import ast
from pathlib import Path

import pytest

import fim_lora

SOURCES = [*Path(fim_lora.__file__).parent.rglob("*.py"), Path(fim_lora.__file__).parents[1] / "fim_lora_command.py"]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "code"}
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    "load": {"torch", "yaml", "numpy", "np", "joblib"},
    "unsafe_load": {"yaml"},
    "full_load": {"yaml"},
    "load_all": {"yaml"},
    "import_module": {"importlib"},
    "system": {"os"},
    "popen": {"os"},
    "load_state_dict_from_url": {"hub"},
}


def offences(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES | {"subprocess"})
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES | {"subprocess"}:
            yield node.module
        elif isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle", "shell"}:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.arg
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
            yield node.func.id
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in ATTRIBUTES.get(node.attr, set()):
            yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_way_to_run_what_a_file_says(path):
    assert list(offences(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "yaml.load(text)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "importlib.import_module(name)",
        "import subprocess",
    ],
)
def test_the_check_notices(code):
    assert list(offences(ast.parse(code)))

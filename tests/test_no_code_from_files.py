"""No file of fim_lora can carry code: the package never unpickles, evaluates or imports the content of a file.

`trust_remote_code` is False, or what the user gave as the option of this name, whose default is False. Calls that ask
about code if they are not told get it.
"""

import ast
from pathlib import Path

import pytest

import fim_lora
import fim_lora_command

SOURCES = [
    source for package in (fim_lora, fim_lora_command) for source in Path(package.__file__).parent.rglob("*.py")
]
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
TRUST = "trust_remote_code"
# These ask on the terminal if they do not get `trust_remote_code`; the config of PEFT names no code.
LOADERS, WITHOUT_CODE = {"from_pretrained", "from_config", "load_dataset"}, {"LoraConfig"}


def is_trust_of_the_user(value):
    """Whether a value is False, or a variable or an attribute that hands the option on."""
    if isinstance(value, ast.Constant):
        return value.value is False
    return getattr(value, "id", getattr(value, "attr", None)) == TRUST


def trusts(tree):
    """Every value that the name `trust_remote_code` gets, and calls that leave it out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == TRUST:
            yield node.value
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            yield from (value for key, value in pairs if isinstance(key, ast.Constant) and key.value == TRUST)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (node.value for target in targets if TRUST in (getattr(target, "id", ""), key_of(target)))
        elif isinstance(node, ast.arguments):
            with_default = node.args[len(node.args) - len(node.defaults) :]
            pairs = [
                *zip(with_default, node.defaults, strict=True),
                *zip(node.kwonlyargs, node.kw_defaults, strict=True),
            ]
            yield from (default for argument, default in pairs if argument.arg == TRUST and default is not None)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) in LOADERS:
            by_name = any(keyword.arg in (TRUST, None) for keyword in node.keywords)
            if not by_name and getattr(node.func.value, "id", None) not in WITHOUT_CODE:
                yield node


def key_of(target):
    return getattr(getattr(target, "slice", None), "value", None)


def offences(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES | {"subprocess"})
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES | {"subprocess"}:
            yield node.module
        elif isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "shell"}:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.arg
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
            yield node.func.id
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in ATTRIBUTES.get(node.attr, set()):
            yield f"{node.value.id}.{node.attr}"
    yield from (f"{TRUST} in line {value.lineno}" for value in trusts(tree) if not is_trust_of_the_user(value))


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
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=None)",
        "AutoModel.from_pretrained(name)",
        "load({'trust_remote_code': True})",
        "arguments['trust_remote_code'] = True",
        "def load(name, trust_remote_code=None): pass",
        "def load(*, trust_remote_code=True): pass",
        "trust_remote_code: bool = True",
        "datasets.load_dataset(name)",
        "importlib.import_module(name)",
        "import subprocess",
    ],
)
def test_the_check_notices(code):
    assert list(offences(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "AutoModel.from_pretrained(name, trust_remote_code=options.trust_remote_code)",
        "def load(name, trust_remote_code=False): return AutoModel.from_pretrained(name, **arguments)",
        "LoraConfig.from_pretrained(folder)",
    ],
)
def test_the_check_lets_the_option_pass(code):
    assert list(offences(ast.parse(code))) == []

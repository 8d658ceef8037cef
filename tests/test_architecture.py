"""The rules between the sub-packages, read from their own imports; docs/architecture.md explains them."""

import ast
import sys
from pathlib import Path

import pytest

import fim_lora
import fim_lora_command

PACKAGE = Path(fim_lora.__file__).parent
COMMAND = Path(fim_lora_command.__file__).parent
MAX_BODY_LINES, MAX_FILE_LINES = 40, 400

# Sub-package or module at the top to those that it imports. The list goes from the bottom to the top: each entry
# imports only entries that are listed before it.
ALLOWED_IMPORTS = {
    "config": set(),
    "runtime": set(),
    "fisher": {"runtime"},
    "ranks": {"config", "runtime", "fisher"},
    "adapter": {"config", "runtime", "fisher"},
    "report": {"config", "ranks"},
    "rank_allocation": {"config", "fisher", "ranks", "adapter", "report"},
    "scoring": {"config", "runtime", "fisher", "adapter"},
    "calibration_batch": {"runtime", "fisher", "adapter"},
    "diagonals": {"runtime", "fisher", "adapter"},
    "initialization": {"runtime", "fisher", "adapter", "rank_allocation", "scoring"},
    "spectrum": {"runtime", "fisher", "ranks", "adapter", "report"},
    "compression": {"runtime", "fisher", "ranks", "adapter", "report", "spectrum"},
    "trainer": {
        *("runtime", "fisher", "ranks", "adapter", "rank_allocation", "scoring", "initialization"),
        *("spectrum", "compression"),
    },
    "cli": {
        *("config", "runtime", "ranks", "rank_allocation", "scoring", "report"),
        *("spectrum", "compression"),
    },
    "__main__": set(),
    "__init__": {
        *("config", "runtime", "fisher", "ranks", "adapter"),
        *("rank_allocation", "scoring", "calibration_batch", "diagonals", "initialization"),
        *("spectrum", "compression", "trainer"),
    },
}
WITHOUT_PEFT = ("config", "runtime", "fisher", "ranks")
WITHOUT_TORCH = ("config", "ranks")


# What `cli` may import of the package of the command, which imports `cli` in turn, but only when it runs.
SHARED_WITH_COMMAND = {"fim_lora_command.choices", "fim_lora_command.errors"}


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


SOURCES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
COMMAND_SOURCES = {
    f"fim_lora_command.{path.stem}": ast.parse(path.read_text(encoding="utf-8")) for path in COMMAND.glob("*.py")
}
PACKAGES = {module_of(path.parent / "__init__.py") for path in PACKAGE.rglob("*/__init__.py")}


def package_of(module):
    return module.partition(".")[0]


def imports_of(module):
    """Modules of fim_lora, and modules of other packages, that a module imports anywhere in its code."""
    own, foreign = set(), set()
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            foreign.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            own.update(targets_of(module, node))
    assert not any(package_of(name) == "fim_lora" for name in foreign), f"{module} imports fim_lora by its full name"
    return own, foreign


def targets_of(module, node):
    parts = module.split(".") if module != "__init__" else []
    folder = parts if module in PACKAGES or module == "__init__" else parts[:-1]
    base = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
    for alias in node.names:
        submodule = ".".join([*base, alias.name])
        yield submodule if submodule in SOURCES else ".".join(base) or "__init__"


def reachable_from(module):
    found, waiting = set(), [module]
    while waiting:
        for target in imports_of(waiting.pop())[0] - found:
            found.add(target)
            waiting.append(target)
    return found


def test_the_packages_import_exactly_what_the_list_says():
    edges = {package: set() for package in ALLOWED_IMPORTS}
    for module in SOURCES:
        edges[package_of(module)] |= {package_of(target) for target in imports_of(module)[0]} - {package_of(module)}
    assert edges == ALLOWED_IMPORTS


def test_the_list_goes_downward_only():
    order = list(ALLOWED_IMPORTS)
    for package, targets in ALLOWED_IMPORTS.items():
        upward = {target for target in targets if order.index(target) >= order.index(package)}
        assert upward == set()


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "__init__"])
def test_no_module_imports_itself_in_a_circle(module):
    assert module not in reachable_from(module)


def test_only_cli_imports_the_package_of_the_command():
    for module in SOURCES:
        of_command = {name for name in imports_of(module)[1] if package_of(name) == "fim_lora_command"}
        allowed = {"cli": SHARED_WITH_COMMAND, "__main__": {"fim_lora_command"}}
        assert of_command <= allowed.get(package_of(module), set()), module


def test_the_package_of_the_command_imports_libraries_only_in_functions():
    for module, tree in COMMAND_SOURCES.items():
        for statement in tree.body:
            if isinstance(statement, ast.Import):
                names = {alias.name for alias in statement.names}
            else:
                is_absolute = isinstance(statement, ast.ImportFrom) and statement.level == 0
                names = {statement.module} if is_absolute else set()
            assert {package_of(name) for name in names} <= {*sys.stdlib_module_names, "typer"}, module


def test_the_package_of_the_command_imports_only_cli_of_the_library():
    for module, tree in COMMAND_SOURCES.items():
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
        of_library = {name for name in imported if package_of(name) == "fim_lora"}
        assert all(name.startswith("fim_lora.cli.") for name in of_library), module


@pytest.mark.parametrize(("packages", "library"), [(WITHOUT_PEFT, "peft"), (WITHOUT_TORCH, "torch")])
def test_packages_that_know_nothing_of_a_library(packages, library):
    for module in (module for module in SOURCES if package_of(module) in packages):
        reached = {module, *reachable_from(module)}
        assert {name for one in reached for name in imports_of(one)[1] if package_of(name) == library} == set(), module


def test_only_the_adapter_reaches_inside_of_peft():
    """Other packages may use what `peft` exports, its layer class for annotations, and constants of `peft.utils`."""
    public = {"peft", "peft.utils", "peft.tuners.lora"}
    for module in (module for module in SOURCES if package_of(module) != "adapter"):
        assert {name for name in imports_of(module)[1] if package_of(name) == "peft"} <= public, module


def test_the_reader_of_imports_sees_every_form():
    code = "from . import a\nfrom .b import c\nfrom ..d import e\nimport f.g\nif x:\n    from h import i"
    SOURCES["adapter.probe"] = ast.parse(code)
    try:
        own, foreign = imports_of("adapter.probe")
    finally:
        del SOURCES["adapter.probe"]
    assert (own, foreign) == ({"adapter", "adapter.b", "d"}, {"f.g", "h"})


def body_lines(function):
    """Lines of the body of a function without its docstring; a signature, as that of a typer command, is not in it."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("module", [*SOURCES, *COMMAND_SOURCES])
def test_functions_and_files_are_short(module):
    tree = (SOURCES | COMMAND_SOURCES)[module]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {one.name: body_lines(one) for one in functions if body_lines(one) > MAX_BODY_LINES} == {}
    lines = tree.body[-1].end_lineno if tree.body else 0
    assert lines <= MAX_FILE_LINES


def test_everything_public_is_documented():
    for name in fim_lora.__all__:
        assert sys.modules[fim_lora.__name__].__dict__[name].__doc__

"""What to tell when an import fails."""

# What only the command imports; the extra `cli` of pyproject.toml has it.
_EXTRA = {"datasets", "gguf", "huggingface_hub", "jinja2", "matplotlib", "packaging", "rich", "typer"}
_OWN = ("fim_lora", "fim_lora_command")


def explained(error: ImportError) -> str:
    """In one line, which module is missing, and which one wanted it."""
    while isinstance(error.__cause__, ImportError):
        error = error.__cause__  # libraries that import their modules late raise it again
    message = " ".join(str(error).split())
    if not error.name:
        return message
    importer, missing = _importer(error), error.name.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and missing in _EXTRA and importer.partition(".")[0] in _OWN:
        return f"The command needs {missing}, which is not installed. In a clone of fim-lora: pip install '.[cli]'"
    return f"{message} (imported by {importer}). Install or upgrade {missing}, or the package that imports it."


def _importer(error: ImportError) -> str:
    """The module with the import statement that failed."""
    trace, names = error.__traceback__, [""]
    while trace is not None:
        names.append(str(trace.tb_frame.f_globals.get("__name__", "")))
        trace = trace.tb_next
    return next((name for name in reversed(names) if not name.startswith("importlib")), "")

"""Python code that comes with a model: without `--trust-remote-code` it never runs, and nothing asks about it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, dynamic_module_utils
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from fim_lora_command.errors import CommandError, warn

_GENERATION_CODE = "custom_generate/generate.py"
# A file that cannot be read names no code; loading the model says what is wrong with it.
_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, RecursionError)


@contextmanager
def no_questions() -> Iterator[None]:
    """Make transformers raise where it would ask on the terminal whether to run code.

    It asks for every part of a model that is built from a nested config, because models do not pass
    `trust_remote_code=False` on to their parts.
    """
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def announce_code(name: str, location: str, arguments: Mapping[str, Any]) -> None:
    """Tell which code of a model may run, if any may; the arguments are those of `from_pretrained`."""
    if arguments["trust_remote_code"] and (found := _code_of(location, arguments)):
        warn(f"--trust-remote-code allows {name} to run its Python code: {', '.join(found)}.")


def is_about_code(error: BaseException) -> bool:
    """Whether transformers refused to run code."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def refused_code(name: str, location: str, arguments: Mapping[str, Any]) -> CommandError:
    """The error for a model that needs code of its own."""
    found = ", ".join(_code_of(location, arguments)) or "named in its files"
    if arguments["trust_remote_code"]:
        return CommandError(
            f"{name} needs Python code for a part of the model ({found}), which transformers does not run even with "
            "--trust-remote-code: load the model in Python, and use the library."
        )
    return CommandError(
        f"{name} needs Python code of its own ({found}), which is not run: read the code, and allow it with "
        "--trust-remote-code, or give another model."
    )


def _code_of(location: str, arguments: Mapping[str, Any]) -> list[str]:
    """Classes that the configs name in `auto_map`, such as `modeling.Model` or `owner/name--modeling.Model`."""
    from_hub = {key: value for key, value in arguments.items() if key in ("revision", "gguf_file")}
    references: set[str] = set()
    with suppress(*_UNREADABLE):
        references |= set(_references(PretrainedConfig.get_config_dict(location, **from_hub)[0]))
    from_hub.pop("gguf_file", None)
    with suppress(*_UNREADABLE):
        references |= set(_references(get_tokenizer_config(location, **from_hub)))
    if (Path(location) / _GENERATION_CODE).is_file():
        references.add(_GENERATION_CODE)
    return sorted(references)


def _references(config: object) -> Iterator[str]:
    """The strings in every `auto_map` of nested dictionaries."""
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        yield from _strings(value) if key == "auto_map" else _references(value)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))

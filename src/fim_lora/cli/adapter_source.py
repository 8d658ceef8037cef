"""A trained adapter as it is found: a folder of `save_pretrained` or a name on the Hub, checked without loading it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from fim_lora_command.choices import Task
from fim_lora_command.errors import CommandError, warn

from ..config import changes_base_weight
from ..report.title_names import looks_like_path
from .adapter_config import read_lora_config
from .file_hash import sha256
from .hub import hub_lookup
from .models import PEFT_TASK_TYPES, named
from .output import ADAPTER_CONFIG, ADAPTER_WEIGHTS

PREFIX = "base_model.model."
"""Beginning of the name of every tensor in a file of PEFT."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that a factor may have, by their names in the file."""

_GIVE_AN_ADAPTER = "Give a folder of save_pretrained with a trained LoRA adapter, or its name on the Hub."
_PICKLED_WEIGHTS = "adapter_model.bin"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_DOWNLOADED = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "*token*", "vocab*", "merges.txt", "chat_template*")
# The output layers of the classifiers of transformers.
_HEADS = tuple(f"{PREFIX}{name}.weight" for name in ("score", "classifier", "classifier.out_proj"))


@dataclass(frozen=True)
class AdapterSource:
    """A trained adapter: `name` as given, its folder, its config, and the shape and dtype of each tensor by name."""

    name: str
    folder: Path
    config: LoraConfig
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    @property
    def weights_file(self) -> Path:
        """The file of weights."""
        return self.folder / ADAPTER_WEIGHTS

    @property
    def num_classes(self) -> int | None:
        """Outputs of the classification head that is saved with the adapter; `None` if there is none."""
        return next((self.shapes[name][0] for name in _HEADS if len(self.shapes.get(name, ())) == 2), None)

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer is saved with the adapter, as trainers do."""
        return any((self.folder / name).is_file() for name in _TOKENIZER_FILES)

    def identity(self) -> dict[str, Any]:
        """JSON values that record which adapter was used."""
        return {"name": self.name, "sha256": sha256(self.weights_file)}


def find_adapter(name: str) -> AdapterSource:
    """Read the config and the header of the weights, and refuse what is not a trained LoRA adapter."""
    folder = _folder_of(name)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CommandError(_without_config(name, folder))
    config = read_lora_config(folder, _GIVE_AN_ADAPTER)
    if config.peft_type != "LORA":  # PEFT's config of AdaLoRA is a LoraConfig, too
        raise CommandError(f"{name} is an adapter of type {config.peft_type.value}, not LoRA. {_GIVE_AN_ADAPTER}")
    init = config.init_lora_weights
    if changes_base_weight(init):
        raise CommandError(
            f"{name} was initialized with {init!r}, which changed the base weights by an adapter of its rank. Save it "
            "as plain LoRA with save_pretrained(..., path_initial_model_for_weight_conversion=...) of PEFT, and "
            "compress that."
        )
    if getattr(config, "megatron_config", None):
        raise CommandError(
            f"{name} has a megatron_config, for which PEFT would import a module that the file names: remove it from "
            f"{ADAPTER_CONFIG}."
        )
    _warn_of_unknown_settings(name, folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CommandError(_without_weights(name, folder))
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  not a mapping
            shapes = {key: tuple(one.get_shape()) for key, one in slices.items()}
            dtypes = {key: one.get_dtype() for key, one in slices.items()}
    except SafetensorError as error:
        raise CommandError(f"{folder / ADAPTER_WEIGHTS} is not a safetensors file: {error}.") from error
    source = AdapterSource(name, folder, config, shapes, dtypes)
    _require_sound(source)
    return source


def task_of(source: AdapterSource, given: Task | None) -> Task:
    """The task of the adapter; `given` is that of `--task`, for adapters that do not show it."""
    tasks = {peft_name: cast(Task, name) for name, peft_name in PEFT_TASK_TYPES.items()}
    written = source.config.task_type
    if written is None:
        found = given or _task_of_class(source.config.auto_mapping)
        if found is None:
            raise CommandError(f"{source.name} has no task_type: give --task {' or --task '.join(tasks.values())}.")
        return found
    if written not in tasks:
        raise CommandError(
            f"{source.name} has task_type {written!r}, but the command knows only {' and '.join(tasks)}: "
            "call get_lora_spectrum and compress_lora in Python."
        )
    if given not in (None, tasks[written]):
        raise CommandError(f"{source.name} has task_type {written!r}: leave --task out.")
    return tasks[written]


def _task_of_class(auto_mapping: Any) -> Task | None:
    """The task of the base model's class, which PEFT writes for an adapter without a task_type."""
    name = auto_mapping.get("base_model_class") if isinstance(auto_mapping, dict) else None
    if not isinstance(name, str):
        return None
    if name.endswith("ForSequenceClassification"):
        return "seq-cls"
    return "causal-lm" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def _folder_of(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        if (path.parent / ADAPTER_CONFIG).is_file():
            raise CommandError(f"{name} is one file of an adapter: give its folder, {path.parent}.")
        raise CommandError(f"{name} is not a folder. {_GIVE_AN_ADAPTER}")
    if looks_like_path(name):
        raise CommandError(f"{name}: no such folder. {_GIVE_AN_ADAPTER}")
    try:
        with hub_lookup(name):
            return Path(snapshot_download(name, allow_patterns=list(_DOWNLOADED)))
    except (OSError, ValueError) as error:
        raise CommandError(f"{name} is not a folder, and cannot be loaded from the Hub: {error}") from error


def _without_config(name: str, folder: Path) -> str:
    if (folder / "config.json").is_file():
        return f"{name} is a model, not an adapter. {_GIVE_AN_ADAPTER}"
    inner = min(folder.glob(f"*/{ADAPTER_CONFIG}"), default=None)
    if inner is not None:
        return f"{name} has no {ADAPTER_CONFIG}: give the folder of one adapter, such as {inner.parent}."
    return f"{name} is not an adapter: it has no {ADAPTER_CONFIG}. {_GIVE_AN_ADAPTER}"


def _without_weights(name: str, folder: Path) -> str:
    if (folder / _PICKLED_WEIGHTS).exists():
        return (
            f"{name} has its weights in {_PICKLED_WEIGHTS}, a pickle file, which can hold code and is not read: load "
            f"the adapter with PEFT and save it again, which writes {ADAPTER_WEIGHTS}."
        )
    return f"{name} has no {ADAPTER_WEIGHTS}: train the adapter first, and give the folder of the trained one."


def _require_sound(source: AdapterSource) -> None:
    """Refuse what PEFT would accept: other dtypes, and ranks for which it would use up the memory."""
    for name, dtype in source.dtypes.items():
        if "lora_" in name and dtype not in DTYPES:
            raise CommandError(
                f"{source.name} has {name} as {dtype}: convert the weights to one of {', '.join(DTYPES)}."
            )
    pattern = source.config.rank_pattern
    ranks = [source.config.r, *(pattern.values() if isinstance(pattern, dict) else ())]
    largest = max((size for shape in source.shapes.values() for size in shape), default=0)
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
            raise CommandError(
                f"{source.name} has a rank of {rank!r:.30} in {ADAPTER_CONFIG}, but no tensor of this size. "
                f"{_GIVE_AN_ADAPTER}"
            )


def _warn_of_unknown_settings(name: str, folder: Path) -> None:
    """PEFT ignores settings that it does not know, and the adapter may then be another one."""
    content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    unknown = sorted(content.keys() - LoraConfig.__dataclass_fields__.keys() - {"runtime_config"})
    if unknown:
        warn(f"{name} has settings that this version of PEFT does not know and ignores: {named(unknown)}.")

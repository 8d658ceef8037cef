"""The model and its tokenizer: a Hub id, a local folder or a GGUF file, and what is loaded from it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fim_lora_command.choices import Task
from fim_lora_command.errors import CommandError, warn

from ..report.title_names import looks_like_path
from .file_hash import sha256
from .hub import hub_lookup
from .remote_code import announce_code, is_about_code, refused_code

PEFT_TASK_TYPES = {"causal-lm": "CAUSAL_LM", "seq-cls": "SEQ_CLS"}

_MODEL_CLASSES = {"causal-lm": AutoModelForCausalLM, "seq-cls": AutoModelForSequenceClassification}
_DTYPE_ARGUMENT = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
_MAX_NAMES_SHOWN = 4
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: `name` as given, `location` (Hub id or folder), and the GGUF file in it, if any.

    `revision` is the version on the Hub, if a certain one is needed. `trust_remote_code` allows code of the model to
    run.
    """

    name: str
    location: str
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def pretrained_arguments(self) -> dict[str, Any]:
        """Keyword arguments of every `from_pretrained`; it asks about code if `trust_remote_code` is left out."""
        optional = {"gguf_file": self.gguf_file, "revision": self.revision}
        given = {name: value for name, value in optional.items() if value is not None}
        return given | {"trust_remote_code": self.trust_remote_code}

    def announce_code(self) -> None:
        """Tell which code of the model may run, before it does."""
        if self.trust_remote_code:
            with named_errors(self):
                announce_code(self.name, self.location, self.pretrained_arguments)

    def identity(self, model: Any) -> dict[str, Any]:
        """JSON values that record which model was used; a GGUF file is read again for its hash."""
        return {
            "name": self.name,
            "class": type(model).__name__,
            "revision": getattr(model.config, "_commit_hash", None),
            "sha256": sha256(Path(self.location) / self.gguf_file) if self.gguf_file else None,
        }


def find_model(name: str, trust_remote_code: bool = False) -> ModelSource:
    """Decide whether the name is a GGUF file, a folder or a Hub id, without loading anything."""
    path = Path(name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CommandError(_not_a_model_file(name, path))
        return ModelSource(name, str(path.parent), path.name, trust_remote_code=trust_remote_code)
    if path.is_dir():
        _require_model_folder(name, path)
    elif looks_like_path(name) or path.suffix.lower() == ".gguf":
        raise CommandError(
            f"{name}: no such file or folder. Give the path of a model, or the name of a model on the Hub."
        )
    return ModelSource(name, name, trust_remote_code=trust_remote_code)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer, ready to pad on the right."""
    with named_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.pretrained_arguments)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise CommandError(f"{source.name} has no tokenizer: save one next to the model.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise CommandError(
            f"The tokenizer of {source.name} has neither a padding token nor an end-of-sequence token: "
            "set one of them and save the tokenizer again."
        )
    tokenizer.padding_side = "right"
    return tokenizer


def read_config(source: ModelSource) -> Any:
    """Load the config of the model."""
    with named_errors(source):
        return AutoConfig.from_pretrained(source.location, **source.pretrained_arguments)


def load_model(
    source: ModelSource,
    task: Task,
    dtype: str,
    device: torch.device,
    labels: Sequence[str],
    pad_token_id: int,
    show_progress_bar: bool,
) -> Any:
    """Load the model onto its device, with the classes `labels`, in the order of their ids, for `"seq-cls"`."""
    model, missing = read_model(source, task, dtype, labels, show_progress_bar)
    if task == "causal-lm":
        _require_causal_model(source, model, missing)
    elif missing:
        warn(
            f"{source.name} lacks {len(missing)} weights of this task, which start at random values: {named(missing)}."
        )
    return prepared_model(model, pad_token_id, device)


def _require_causal_model(source: ModelSource, model: Any, missing: Sequence[str]) -> None:
    """Refuse a model whose predictions are random, or see the tokens that they predict: so would be its ranks."""
    if _is_encoder(model):
        raise CommandError(
            f"{source.name} is an encoder ({model.config.model_type}), not a causal language model: give --task "
            "seq-cls and data with text and label, or another model."
        )
    if missing:
        raise CommandError(
            f"{source.name} lacks {len(missing)} weights of a causal language model, whose ranks would follow from "
            f"random values: {named(missing)}. Give the whole model, or --task seq-cls for a classifier, whose head "
            "may be new."
        )


def _is_encoder(model: Any) -> bool:
    """Whether every token sees all others; some architectures are encoders unless their config says otherwise."""
    may_be_encoder = model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return may_be_encoder and not getattr(model.config, "is_decoder", True)


def read_model(
    source: ModelSource, task: Task, dtype: str, labels: Sequence[str], show_progress_bar: bool
) -> tuple[Any, list[str]]:
    """The model on the CPU, and the names of its weights that are not in the checkpoint and have random values."""
    arguments: dict[str, Any] = {
        **source.pretrained_arguments,
        _DTYPE_ARGUMENT: dtype if dtype == "auto" else getattr(torch, dtype),
    }
    if task == "seq-cls":
        arguments |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    model_class: Any = _MODEL_CLASSES[task]
    # No setting hides the progress bar of the conversion from GGUF.
    with named_errors(source), nullcontext() if show_progress_bar else redirect_stderr(StringIO()):
        model, loading = model_class.from_pretrained(source.location, output_loading_info=True, **arguments)
    return model, sorted(loading["missing_keys"])


def prepared_model(model: Any, pad_token_id: int | None, device: torch.device) -> Any:
    """The model on its device, ready for batches that are padded with this token."""
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_token_id
    model.config.use_cache = False
    return model.to(device)


def named(names: Sequence[str]) -> str:
    """The first names of a list, for messages."""
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + (", …" if len(names) > _MAX_NAMES_SHOWN else "")


def default_target_modules(model: Any) -> set[str] | str:
    """PEFT's targets for this architecture, to be saved: another version of PEFT may have other defaults."""
    model_type = model.config.model_type
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if targets is None:
        raise CommandError(
            f"PEFT has no default target modules for the architecture {model_type!r}: "
            "give --target-modules, for example --target-modules all-linear."
        )
    return targets if isinstance(targets, str) else set(targets)


def require_fitting_tokens(model: Any, token_ids: Sequence[Sequence[int]]) -> None:
    """Reject sequences or token ids that are too large for the model, before an index is out of range inside it."""
    longest, largest_id = max(map(len, token_ids)), max(map(max, token_ids))
    positions = _num_positions(model)
    if positions is not None and 0 < positions < longest:
        raise CommandError(
            f"The longest example has {longest} tokens, but the model has {positions} positions: "
            f"give --max-length {positions}."
        )
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if isinstance(vocabulary, int) and largest_id >= vocabulary:
        raise CommandError(
            f"The tokenizer gives token {largest_id}, but the model has embeddings for {vocabulary} tokens: "
            "tokenizer and model do not belong together. Save the model's own tokenizer next to it."
        )


def _num_positions(model: Any) -> int | None:
    """Positions that a sequence can have, or `None` if there is no limit.

    RoBERTa and its relatives number the positions from the one after the index of the padding token, so the first
    embeddings of positions are never used.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(padding, int) and module.num_embeddings == positions:
            return positions - padding - 1
    return positions


@contextmanager
def named_errors(source: ModelSource) -> Iterator[None]:
    """Name the model in errors, because the messages of transformers do not always name it."""
    is_local = Path(source.location).exists()
    with nullcontext() if is_local else hub_lookup(source.name):
        try:
            yield
        except (OSError, ValueError, ImportError) as error:
            if is_about_code(error):
                raise refused_code(source.name, source.location, source.pretrained_arguments) from error
            raise CommandError(f"{source.name} cannot be loaded: {error}") from error


def _not_a_model_file(name: str, file: Path) -> str:
    if (file.parent / "config.json").is_file():
        return f"{name} is one file of a model: give its folder, {file.parent}."
    if file.suffix.lower() in _WEIGHTS:
        return f"{name} holds only weights: give a folder of save_pretrained, with a config.json and a tokenizer."
    return f"{name} is not a model: give a GGUF file, or a folder with a config.json."


def _require_model_folder(name: str, folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise CommandError(f"{name} is an adapter, not a model: give the base model.")
    gguf_file = min(folder.glob("*.gguf"), default=None)
    if gguf_file is not None:
        raise CommandError(f"{name} has no config.json: give the GGUF file itself, such as {gguf_file}.")
    raise CommandError(f"{name} is not a model: the folder has no config.json. Give a folder of save_pretrained.")

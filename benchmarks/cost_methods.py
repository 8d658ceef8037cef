"""The model, the batches and the methods that `cost.py` measures."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast
from unittest.mock import patch

import peft
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fim_lora import (
    FimConfig,
    FimScores,
    LoraSpectrum,
    compress_lora,
    get_fim_scores,
    get_lora_spectrum,
    initialize_lora_fim_ranks,
)
from fim_lora.fisher.gradients.norms import squared_norms
from fim_lora.fisher.layers import attention as attention_layers
from fim_lora.fisher.layers import linear as linear_layers

Batch = dict[str, Tensor]
Run = Callable[[], object]

TEXT_MODULES = (
    "argparse", "collections", "configparser", "datetime", "decimal", "difflib", "email.message", "fractions",
    "functools", "heapq", "itertools", "logging", "mailbox", "optparse", "pathlib", "pickle", "random", "shutil",
    "statistics", "string", "subprocess", "tarfile", "textwrap", "threading", "typing", "unittest", "zipfile",
)  # fmt: skip
"""Modules of the standard library whose docstrings are the default text."""

_STANDARD_DEVIATION_OF_B = 1e-3


# --- Model and batches -------------------------------------------------------------------------------------------


def load_model(source: str, device: torch.device) -> tuple[nn.Module, Any]:
    """Load a causal language model in float32 and its tokenizer from a hub id, a local folder or a GGUF file."""
    path, options = source, {}
    if source.endswith(".gguf"):
        path, options = str(Path(source).parent), {"gguf_file": Path(source).name}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).to(device)
    model.config.use_cache = False  # as in training; the cache would count as memory of the first forward pass
    return model, AutoTokenizer.from_pretrained(path, **options)


def standard_library_text() -> Iterator[str]:
    """The docstrings of `TEXT_MODULES`, of their public members and of the members of their classes."""
    for module_name in TEXT_MODULES:
        module = importlib.import_module(module_name)
        yield from _docstrings(module, module_name)


def _docstrings(owner: Any, module_name: str) -> Iterator[str]:
    if owner.__doc__:
        yield inspect.cleandoc(owner.__doc__)
    for name, member in sorted(vars(owner).items()):
        if name.startswith("_") or getattr(member, "__module__", None) != module_name:
            continue
        if inspect.isclass(member):
            yield from _docstrings(member, module_name)
        elif inspect.isfunction(member) and member.__doc__:
            yield inspect.cleandoc(member.__doc__)


def make_batches(
    tokenizer: Any, data: Path | None, batch_size: int, length: int, batches: int, device: torch.device
) -> list[Batch]:
    """Concatenate the text and cut it, so that every sequence has the same length and no padding.

    Args:
        tokenizer: Tokenizer of the model.
        data: Text file; `None` for docstrings of the standard library.
        batch_size: Sequences in a batch.
        length: Tokens in a sequence.
        batches: Number of batches.
        device: Device of the batches.

    Returns:
        Batches of token ids, mask and labels (batch_size × length).

    Raises:
        ValueError: If the text is too short.
    """
    texts = standard_library_text() if data is None else iter([data.read_text(encoding="utf-8")])
    needed = batches * batch_size * length
    tokens: list[int] = []
    for text in texts:
        if len(tokens) >= needed:
            break
        tokens.extend(tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"])
    if len(tokens) < needed:
        raise ValueError(f"The text has {len(tokens)} tokens, but {needed} are needed: pass a longer text as --data.")
    ids = torch.tensor(tokens[:needed], device=device).reshape(batches, batch_size, length)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x.clone()} for x in ids]


def tiny_batches(batches: list[Batch]) -> list[Batch]:
    """One batch of one short sequence, for the warm-up."""
    return [{name: tensor[:1, :8] for name, tensor in batches[0].items()}]


# --- Methods -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model and its target modules.

    Attributes:
        model: The base model. A run works on a copy of the modules that shares the tensors. The run therefore does not
            change the model, except that its weights become frozen, as every method requires.
        target_modules: Module names, as PEFT's `target_modules`; not "all-linear", which LoRA-GA does not accept.
        rank: LoRA rank.
    """

    model: nn.Module
    target_modules: list[str]
    rank: int

    def copy_of_model(self) -> nn.Module:
        """A copy of the modules that shares the parameters and buffers."""
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, shared)

    def config(self, **options: Any) -> LoraConfig:
        """A LoRA config with the target modules and the rank of the case."""
        return LoraConfig(
            r=self.rank, lora_alpha=2 * self.rank, target_modules=self.target_modules, task_type="CAUSAL_LM", **options
        )

    def adapter(self, **options: Any) -> PeftModel:
        """A copy of the model with a new adapter, in training mode."""
        model: PeftModel = get_peft_model(self.copy_of_model(), self.config(**options))
        return model.train()

    def fim_adapter(self, batches: list[Batch], exact: bool = False) -> PeftModel:
        """An adapter that awaits its ranks from a calibration over as many batches."""
        fim_config = FimConfig(fim_calibration_batches=len(batches), exact=exact)
        return self.adapter(init_lora_weights="fim", fim_config=fim_config)


def resolved_targets(model: nn.Module, target_modules: list[str], rank: int) -> list[str]:
    """Resolve "all-linear" to module names, as PEFT does; other names are returned unchanged."""
    if target_modules != ["all-linear"]:
        return target_modules
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(Case(model, [], rank).copy_of_model(), config)
    return sorted(adapted.peft_config["default"].target_modules)


def number_of_layers(case: Case) -> int:
    """Number of target layers."""
    return len(case.adapter().targeted_module_names)


def forward_backward(model: nn.Module, batches: list[Batch]) -> None:
    """Run a training loop without an optimizer."""
    for batch in batches:
        model(**batch).loss.backward()


def prepare_lora(case: Case, batches: list[Batch]) -> Run:
    """Plain LoRA in training mode: forward and backward passes over the batches."""
    model = case.adapter()
    return lambda: forward_backward(model, batches)


def prepare_upper_half(case: Case, batches: list[Batch]) -> Run:
    """Plain LoRA with twice the rank in the upper half of the blocks: the lower half needs no backward pass."""
    depth = cast(Any, case.model).config.num_hidden_layers
    upper = list(range(depth // 2, depth))
    model = replace(case, rank=2 * case.rank).adapter(layers_to_transform=upper)
    return lambda: forward_backward(model, batches)


def prepare_fim_dataloader(case: Case, batches: list[Batch], exact: bool = False) -> Run:
    """The calibration over a dataloader, on an adapter that awaits its ranks."""
    model = case.fim_adapter(batches, exact)
    return lambda: _calibrate(model, batches)


def _calibrate(model: nn.Module, batches: list[Batch]) -> None:
    get_fim_scores(model, batches, show_progress_bar=False)


def prepare_fim_own_loop(case: Case, batches: list[Batch]) -> Run:
    """The user's own forward and backward passes, observed by the hooks of the adapter."""
    model = case.fim_adapter(batches)
    return lambda: forward_backward(model, batches)


def prepare_spectrum(case: Case, batches: list[Batch]) -> Run:
    """The calibration before a compression, with its decompositions, on an adapter as after a training."""
    model = _as_if_trained(case)
    return lambda: _measure_spectrum(model, batches)


def _as_if_trained(case: Case) -> PeftModel:
    model = case.adapter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, _STANDARD_DEVIATION_OF_B)
    return model


def _measure_spectrum(model: nn.Module, batches: list[Batch]) -> LoraSpectrum:
    return get_lora_spectrum(model, batches, num_batches=len(batches), show_progress_bar=False)


@dataclass
class EvaRun:
    """A run of EVA over the batches that counts the forward passes.

    Attributes:
        model: A model with an adapter that awaits EVA.
        batches: The batches, which EVA cycles through.
        forward_passes: Number of forward passes so far.
    """

    model: PeftModel
    batches: list[Batch]
    forward_passes: int = 0

    def __call__(self) -> None:
        """Cycle through the batches until every component has converged."""
        get_eva_state_dict(self.model, self.batches, forward_fn=self._forward, show_progress_bar=False)

    def _forward(self, model: nn.Module, batch: Batch) -> Any:
        self.forward_passes += 1
        return model(**batch)


def prepare_eva(case: Case, batches: list[Batch]) -> EvaRun:
    """EVA's incremental SVD of the inputs, which cycles through the batches until every component has converged."""
    return EvaRun(case.adapter(init_lora_weights="eva", eva_config=EvaConfig()), batches)


def prepare_lora_ga(case: Case, batches: list[Batch]) -> Run:
    """LoRA-GA's gradients of the full weights, on a model without an adapter."""
    model = case.copy_of_model().train()
    config = case.config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    return lambda: lora.preprocess_loraga(model, config, lambda: forward_backward(model, batches))


def prepare_frozen(case: Case, batches: list[Batch]) -> Run:
    """A calibration without its hooks: forward and backward passes of a frozen model in eval mode.

    The output of the embeddings requires a gradient, because otherwise there would be no graph.
    """
    model: Any = case.copy_of_model().eval()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return lambda: forward_backward(model, batches)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        label: Name in the table.
        prepare: Does the setup, which is not timed, and returns the run.
    """

    label: str
    prepare: Callable[[Case, list[Batch]], Run]


METHODS = {
    "lora": Method("plain LoRA, forward + backward", prepare_lora),
    "lora-upper-half": Method("plain LoRA of twice the rank, upper half", prepare_upper_half),
    "fim-dataloader": Method("FIM calibration, dataloader", prepare_fim_dataloader),
    "fim-own-loop": Method("FIM hooks in a LoRA loop", prepare_fim_own_loop),
    "fim-exact": Method("FIM calibration, dataloader, exact", partial(prepare_fim_dataloader, exact=True)),
    "fim-spectrum": Method("calibration of a trained adapter", prepare_spectrum),
    "eva": Method("EVA until convergence", prepare_eva),
    "lora-ga": Method("LoRA-GA gradients", prepare_lora_ga),
}
"""The methods by name, in the order of the table. The first one is the reference."""

if not hasattr(peft, "LoraGAConfig"):  # the oldest supported PEFT has no LoRA-GA
    del METHODS["lora-ga"]

REFERENCE, EVA, CALIBRATION = "lora", "eva", "fim-dataloader"


# --- Parts of the calibration ------------------------------------------------------------------------------------


@contextmanager
def timed_squared_norms(device: torch.device) -> Iterator[list[float]]:
    """Time every call of `squared_norms`, and yield the list of seconds that is filled during the block.

    On CUDA each call is synchronized, which slows the calibration down: use the sum only as a share of its time.
    """
    seconds: list[float] = []

    def timed(x: Tensor, g: Tensor, **options: Any) -> Tensor:
        synchronize(device)
        start = perf_counter()
        norms = squared_norms(x, g, **options)
        synchronize(device)
        seconds.append(perf_counter() - start)
        return norms

    with patch.object(linear_layers, "squared_norms", timed), patch.object(attention_layers, "squared_norms", timed):
        yield seconds


def prepare_allocation(case: Case, batches: list[Batch], scores: FimScores) -> Run:
    """From given scores to an initialized adapter: allocation, rebuilding of the layers, new config."""
    model = case.fim_adapter(batches)
    return lambda: initialize_lora_fim_ranks(model, fim_scores=scores)


def prepare_truncation(case: Case, batches: list[Batch]) -> Run:
    """From a spectrum to a quarter of the adapter: what it keeps, and the truncation."""
    model = _as_if_trained(case)
    spectrum = _measure_spectrum(model, batches)
    return lambda: compress_lora(model, spectrum, keep=0.25)


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device to finish its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""`fim-lora allocate --scores`: other ranks from the scores of an earlier allocation, without a calibration."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from math import isclose
from pathlib import Path
from typing import Any

from peft import LoraConfig

from fim_lora_command.errors import CommandError

from ..rank_allocation import RankAllocation
from ..ranks.allocation import ALLOCATION_FILE
from ..ranks.compressed import COMPRESSION_FILE
from .export import base_config
from .file_hash import sha256
from .json_output import print_json, result_document
from .output import OUTPUT_FILES, read_result, require_writable, result_folder, write_allocation
from .provenance import now, provenance_facts, read_provenance
from .summary import print_next_step, print_summary

# The fields of `FimConfig` that decide ranks by scores.
_SETTINGS = ("r_min", "r_max", "budget", "score", "score_exponent")


def reallocate(
    folder: Path, settings: LoraConfig, output: Path, overwrite: bool, serving: bool, as_json: bool
) -> None:
    """Allocate again by the scores in `folder`, write the output folder and print the summary.

    `settings` has the new `r`, `lora_alpha` and `fim_config`.
    """
    folder = result_folder(folder)
    require_writable(output, overwrite, OUTPUT_FILES, foreign=COMPRESSION_FILE)
    allocation, config = reallocated(folder, settings, serving)
    provenance = _provenance(folder)
    write_allocation(output, allocation, config, provenance)
    if as_json:
        print_json(result_document(allocation, output, provenance))
        return
    written = {"Written": f"{', '.join(OUTPUT_FILES)} in {output}"}
    print_summary(allocation, provenance_facts(provenance) | written)
    print_next_step(allocation, output)


def reallocated(folder: Path, settings: LoraConfig, serving: bool) -> tuple[RankAllocation, LoraConfig]:
    """The allocation that the same calibration would give with other settings, and its config.

    How the scores were measured and what the adapter is otherwise (`exact`, the number of batches, the initialization,
    the targets) remains as in the folder.
    """
    saved = read_result(folder)
    if not isinstance(saved, RankAllocation):
        raise CommandError(f"{folder} has a compression, not an allocation: it has no scores to allocate by.")
    config = _config_with_all_targets(folder, saved)
    _require_uniform_base(folder, saved, config)
    config.r, config.lora_alpha = settings.r, settings.lora_alpha
    new = {name: getattr(settings.fim_config, name) for name in _SETTINGS}
    config.fim_config = replace(saved.fim_config, **new)
    allocation = RankAllocation.from_scores(saved.scores, config)
    return allocation, allocation.to_lora_config(config, serving=serving)


def _config_with_all_targets(folder: Path, saved: RankAllocation) -> LoraConfig:
    """The config in the folder without its ranks, and with the targets from before layers lost their adapter."""
    config = copy.copy(base_config(folder, saved))
    config.rank_pattern, config.alpha_pattern = {}, {}
    if not saved.dropped_layers or saved.scores.converted_targets is not None:
        return config
    targets = read_provenance(folder).get("target_modules")
    if isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets):
        config.target_modules = set(targets)
    elif isinstance(targets, str):
        config.target_modules = targets
    else:
        raise CommandError(
            f"{folder} has layers of rank 0 and does not record which targets were given, so they cannot get an "
            "adapter again: calibrate again, or call RankAllocation.from_scores in Python with the original config."
        )
    return config


def _require_uniform_base(folder: Path, saved: RankAllocation, config: LoraConfig) -> None:
    """Refuse an allocation that was made in Python with patterns in its config, which its folder no longer has."""
    config = copy.copy(config)
    config.fim_config = saved.fim_config
    again = RankAllocation.from_scores(saved.scores, config)
    alphas_agree = all(
        isclose(again.alphas[name], alpha)
        for name, alpha in saved.alphas.items()
        if again.ranks[name] == saved.ranks[name]
    )
    if again.budget != saved.budget or not alphas_agree:
        raise CommandError(
            f"{folder} was allocated with a rank_pattern or an alpha_pattern in the config, which is not in the "
            "folder: call RankAllocation.from_scores in Python with the original config."
        )


def _provenance(folder: Path) -> Mapping[str, Any]:
    """That of the scores, and how these ranks came from them."""
    reallocated = {
        "scores": str(folder),
        "sha256": sha256(folder / ALLOCATION_FILE),
        "fim-lora": version("fim-lora"),
        "date": now(),
    }
    return {**read_provenance(folder), "reallocated": reallocated}

"""`fim-lora compress`: from a trained adapter and data to a smaller adapter."""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fim_lora_command.errors import CommandError, warn

from ..compression import LoraCompression, compress_lora, measure_sizes
from ..ranks.allocation import ALLOCATION_FILE
from ..ranks.compressed import COMPRESSION_FILE
from ..ranks.size_curve import SIZE_CURVE_FILE, SizeCurve
from ..ranks.sizes import SHOWN_SHARES
from ..report.rank_map import draw_rank_map
from ..report.size_curve import draw_size_curve
from ..report.title_names import title_names
from ..runtime.atomic import staged_files
from ..spectrum import LoraSpectrum, get_lora_spectrum
from .adapter_source import AdapterSource, find_adapter
from .compress_inputs import CompressOptions, Inputs, load_adapted_model, read_inputs
from .json_output import print_json, result_document
from .libraries import quiet_libraries
from .models import named
from .output import ADAPTER_WEIGHTS, COMPRESSED_FILES, RANK_MAP, SIZE_CURVE, require_writable
from .provenance import now
from .run_facts import data_fact, dtype_name, peak_memory, recorded_versions, timed, timed_loading, truncation_fact
from .summary import print_next_step, print_summary
from .trained_adapter import save_adapter

# Besides the chosen size, the loss is measured at this many sizes for the picture.
_NUM_MEASURED_SIZES = 3
# Calibration batches that show whether a classifier is worse than guessing.
_NUM_GUESSED_BATCHES = 8


@dataclass(frozen=True)
class _Outcome:
    """The result, what it was chosen from, the loss at other sizes, and the loss before, if one is known."""

    result: LoraCompression
    spectrum: LoraSpectrum
    measured: Sequence[tuple[int, float]]
    loss_before: float | None


def compress(options: CompressOptions) -> None:
    """Calibrate, compress, write the output folder and print the summary."""
    show_library_bars = sys.stderr.isatty()
    require_writable(options.output, options.overwrite, COMPRESSED_FILES, foreign=ALLOCATION_FILE)
    source = find_adapter(options.adapter)
    if options.output.resolve() == source.folder.resolve():
        raise CommandError(f"{options.output} is the adapter itself, which would be lost: give another --output.")
    seconds: dict[str, float] = {}
    bytes_before = source.weights_file.stat().st_size
    with quiet_libraries(show_library_bars):
        inputs = read_inputs(options, source, seconds)
        with timed_loading(seconds):
            model = load_adapted_model(options, source, inputs, show_library_bars)
        outcome = _compressed(options, model, inputs, seconds)
        provenance = _provenance(options, source, inputs, model)
        bytes_after = _write(options, source, model, outcome, provenance)
    _warn_of_order(inputs, outcome)
    if options.as_json:
        print_json(result_document(outcome.result, options.output, provenance, seconds=seconds))
        return
    facts = _facts(options, source, inputs, model, seconds)
    print_summary(outcome.result, facts, [["adapter file", _size(bytes_before), _size(bytes_after)]])
    print_next_step(outcome.result, options.output)


def _compressed(options: CompressOptions, model: Any, inputs: Inputs, seconds: dict[str, float]) -> _Outcome:
    batches = None if inputs.calibration is None else inputs.calibration.batches
    with timed(seconds, "calibrating"):
        spectrum = get_lora_spectrum(model, batches, num_batches=options.batches)
        loss_before = _loss_of_classifier(model, spectrum, inputs)
    eval_batches = None if inputs.evaluation is None else inputs.evaluation.batches
    losses: list[tuple[int, float]] = []
    with timed(seconds, "compressing" if eval_batches is None else "measuring and compressing"):
        if eval_batches is not None:
            sizes = _sizes_to_measure(options, spectrum)
            losses = measure_sizes(model, spectrum, sizes, eval_batches, r_max=options.r_max)
        result = compress_lora(
            model,
            spectrum,
            **options.size,
            eval_dataloader=eval_batches,
            r_max=options.r_max,
            serving=options.serving,
        )
    if result.loss_before is not None:
        loss_before = result.loss_before
        losses = [(parameters, loss - loss_before) for parameters, loss in losses]
    return _Outcome(result, spectrum, losses, loss_before)


def _loss_of_classifier(model: Any, spectrum: LoraSpectrum, inputs: Inputs) -> float | None:
    """The loss of a classifier on some calibration batches, if the loss before is not measured on evaluation data."""
    if inputs.task != "seq-cls" or inputs.calibration is None or inputs.evaluation is not None:
        return None
    batches = list(islice(inputs.calibration.batches, _NUM_GUESSED_BATCHES))
    with suppress(ValueError):  # a loss that is not finite, which the calibration has left out
        [(_, loss)] = measure_sizes(model, spectrum, [spectrum.num_parameters], batches, show_progress_bar=False)
        return loss
    return None


def _sizes_to_measure(options: CompressOptions, spectrum: LoraSpectrum) -> list[int]:
    """Parameters of adapters besides the chosen one, as far as the options tell its size."""
    total = spectrum.num_parameters
    uniform = sum(layer.parameters_per_rank for layer in spectrum.values())
    chosen = options.size.get("keep", options.size.get("r", 0) * uniform / total)
    shares = [share for share in SHOWN_SHARES if not math.isclose(share, chosen, rel_tol=0.1)]
    return [int(share * total) for share in shares[:_NUM_MEASURED_SIZES]]


def _write(
    options: CompressOptions, source: AdapterSource, model: Any, outcome: _Outcome, provenance: Mapping[str, Any]
) -> int:
    """Write all files, and return the size of the new weights in bytes."""
    with staged_files(options.output) as folder:
        save_adapter(model, source, folder)
        outcome.result.save(folder / COMPRESSION_FILE, **provenance)
        curve = SizeCurve.of(outcome.spectrum, outcome.result, outcome.measured)
        curve.save(folder / SIZE_CURVE_FILE)
        draw_size_curve(curve, folder / SIZE_CURVE, outcome.result)
        draw_rank_map(outcome.result, folder / RANK_MAP, **title_names(provenance))
        return (folder / ADAPTER_WEIGHTS).stat().st_size


def _warn_of_order(inputs: Inputs, outcome: _Outcome) -> None:
    """A classifier that is worse than guessing probably sees its classes in another order than in its training."""
    loss, guessing = outcome.loss_before, math.log(max(len(inputs.classes), 1))
    if inputs.task == "seq-cls" and loss is not None and loss > guessing:
        warn(
            f"The adapter's loss before the compression is {loss:.3g}, more than the {guessing:.3g} of guessing. If "
            f"its training had another order of the classes than {named(inputs.classes)}, replace the labels by "
            "the numbers of its outputs, from 0, and compress again."
        )


def _provenance(options: CompressOptions, source: AdapterSource, inputs: Inputs, model: Any) -> dict[str, Any]:
    calibration, evaluation = inputs.calibration, inputs.evaluation
    return {
        "date": now(),
        "versions": recorded_versions(),
        "adapter": source.identity(),
        "model": inputs.base.identity(model.get_base_model()),
        "data": None if calibration is None else calibration.data.identity(),
        "eval_data": None if evaluation is None else evaluation.data.identity(),
        "task": inputs.task,
        "classes": list(inputs.classes),
        "seed": options.seed,
        "max_length": options.max_length,
        "batch_size": options.batch_size,
        "dtype": dtype_name(model.get_base_model()),
        "device": str(options.device),
    }


def _facts(
    options: CompressOptions, source: AdapterSource, inputs: Inputs, model: Any, seconds: Mapping[str, float]
) -> dict[str, str]:
    base = model.get_base_model()
    facts = {
        "Adapter": source.name,
        "Model": f"{inputs.base.name} ({type(base).__name__}, {dtype_name(base)}, {options.device})",
    }
    for heading, part in (("Data", inputs.calibration), ("Evaluation", inputs.evaluation)):
        if part is not None:
            facts[heading] = f"{data_fact(part.data)}; truncated {truncation_fact(part.examples, options.max_length)}"
    if inputs.classes:
        facts["Classes"] = f"{len(inputs.classes)}, in the order {named(inputs.classes)}"
    return facts | {
        "Time": ", ".join(f"{stage} {duration:.1f} s" for stage, duration in seconds.items()),
        "Peak memory": peak_memory(options.device),
        "Written": f"{', '.join(COMPRESSED_FILES)} in {options.output}",
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"

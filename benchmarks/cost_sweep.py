"""Measure the cost of a calibration by length, batch size, model and number of layers: one run of `cost.py` per point.

    python benchmarks/cost_sweep.py            # measure the points that have no result yet, then print the table
    python benchmarks/cost_sweep.py --print    # print the table only

Every point is a separate process and one JSON file in `results/cost`. All methods of a point are interleaved within
its process, so the ratios of a row come from one run. The weights are random. NF4 needs bitsandbytes. bfloat16
(`--bfloat16`) is for processors with instructions for it; other processors emulate it, many times slower. `--gpu`
measures the points for a GPU instead, which include Llama-3-8B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from cost_shapes import PREFIX

LOOP, LOADER, EXACT, SPECTRUM = "fim-own-loop", "fim-dataloader", "fim-exact", "fim-spectrum"
LORA_GA = "lora-ga"


class Point(NamedTuple):
    """One measurement: a model, its batches and the options of `cost.py`."""

    shape: str
    batch_size: int
    length: int
    batches: int = 1
    methods: tuple[str, ...] = (LOADER, LOOP, SPECTRUM)
    dtype: str = "float32"
    four_bits: bool = False
    repeats: int = 3
    gpu: bool = False

    @property
    def file(self) -> str:
        """File name of the result."""
        precision = "" if self.dtype == "float32" else f"-{self.dtype}"
        variant = f"{precision}{'-nf4' * self.four_bits}{'-gpu' * self.gpu}"
        return f"{self.shape}-b{self.batch_size}-t{self.length}{variant}.json"


_WITH_EXACT = (LOADER, LOOP, EXACT, SPECTRUM)
_WITH_LORA_GA = (LOADER, LOOP, SPECTRUM, LORA_GA)
_WITH_BOTH = (LOADER, LOOP, EXACT, SPECTRUM, LORA_GA)
POINTS = (
    Point("smollm2-135m", 4, 64, 4, _WITH_LORA_GA, repeats=5),
    Point("smollm2-135m", 4, 128, 2, _WITH_LORA_GA, repeats=5),
    Point("smollm2-135m", 4, 256, 1, _WITH_BOTH),
    Point("smollm2-135m", 1, 512, 1, _WITH_BOTH),
    Point("1001-layers", 4, 64, 8, _WITH_LORA_GA),
    Point("smollm2-135m", 4, 64, 2, four_bits=True),
    Point("smollm2-135m", 1, 64, 4),
    Point("smollm2-135m", 16, 64),
    Point("smollm2-360m", 2, 256),
    Point("smollm2-135m", 1, 2048, repeats=2),
    Point("smollm2-135m", 1, 4096, repeats=2),
    Point("smollm2-135m", 4, 512),
    Point("smollm2-1.7b", 1, 256, repeats=2),
    Point("1001-wide-layers", 4, 64),
)
BFLOAT16_POINTS = (
    Point("smollm2-135m", 4, 128, 2, dtype="bfloat16"),
    Point("smollm2-135m", 1, 1024, 1, _WITH_EXACT, "bfloat16"),
    Point("smollm2-135m", 4, 64, 2, dtype="bfloat16", four_bits=True),
)


def _on_gpu(
    shape: str, batch_size: int, length: int, batches: int, *more_methods: str, four_bits: bool = False
) -> Point:
    return Point(
        shape, batch_size, length, batches, (LOADER, LOOP, SPECTRUM, *more_methods), "bfloat16", four_bits, 5, gpu=True
    )


GPU_POINTS = (
    _on_gpu("llama-3-8b", 1, 512, 4, EXACT, LORA_GA),
    _on_gpu("llama-3-8b", 4, 512, 2, EXACT, LORA_GA),
    _on_gpu("llama-3-8b", 1, 4096, 2, EXACT, LORA_GA),
    _on_gpu("llama-3-8b", 16, 64, 4),
    _on_gpu("llama-3-8b", 16, 256, 2),
    _on_gpu("llama-3-8b", 4, 2048, 1),
    _on_gpu("llama-3-8b", 1, 512, 4, four_bits=True),
    _on_gpu("llama-3-8b", 4, 512, 2, four_bits=True),
    _on_gpu("llama-3-8b", 1, 4096, 2, four_bits=True),
    _on_gpu("smollm2-1.7b", 8, 512, 4),
    _on_gpu("smollm2-135m", 8, 128, 8, LORA_GA),
    _on_gpu("smollm2-135m", 8, 1024, 4),
    _on_gpu("1001-layers", 8, 64, 8),
)


def measure(point: Point, folder: Path) -> None:
    """Run `cost.py` for a point. An interrupted run leaves no result."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("cost.py")), PREFIX + point.shape]
    command += ["--batch-size", str(point.batch_size), "--length", str(point.length), "--batches", str(point.batches)]
    command += ["--repeats", str(point.repeats), "--methods", *point.methods, "--no-breakdown"]
    command += ["--dtype", point.dtype, *["--four-bits"] * point.four_bits]
    unfinished = folder / (point.file + ".part")
    subprocess.run([*command, "--json", str(unfinished)], check=True, stdout=subprocess.DEVNULL)
    unfinished.rename(folder / point.file)


def as_markdown(reports: list[dict[str, Any]]) -> str:
    """Format the reports as a Markdown table."""
    lines = [
        "| model | B × T | plain LoRA, s | over the limit | dataloader | own loop | dataloader, exact "
        "| compression | LoRA-GA | extra peak, dataloader | extra peak, own loop "
        "| extra peak, compression | allocation, steps "
        "| truncation, steps |",
        "| --- | --- | " + "---: | " * 12,
    ]
    return "\n".join([*lines, *map(_line, reports)])


def _line(report: dict[str, Any]) -> str:
    rows = {row["method"]: row for row in report["methods"]}
    settings = report["settings"]
    step = statistics.median(rows["lora"]["seconds"]) / settings["batches"]
    cells = [
        _model(settings),
        f"{settings['batch size']} × {settings['length']}",
        f"{step:.3f}" if step < 1 else f"{step:.2f}",
        f"{step / report['limit']['seconds_per_batch']:.2f}",
        *(_ratio(rows.get(method)) for method in (LOADER, LOOP, EXACT, SPECTRUM, LORA_GA)),
        *(_number(rows.get(method, {}).get("extra_peak_ratio")) for method in (LOADER, LOOP, SPECTRUM)),
        _number(report["allocation_seconds"] / step),
        _number(report["truncation_seconds"] / step if "truncation_seconds" in report else None),
    ]
    return "| " + " | ".join(cells) + " |"


def _model(settings: dict[str, Any]) -> str:
    precision = "" if settings["dtype"] == "float32" else f", {settings['dtype']}"
    return f"{settings['model'].removeprefix(PREFIX)}{precision}{', NF4' * settings.get('four bits', False)}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{row['ratio']:.2f} [{min(row['ratios']):.2f}–{max(row['ratios']):.2f}]"


def main() -> None:
    """Measure the points that have no result and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "cost")
    parser.add_argument("--print", action="store_true", help="print the table only")
    parser.add_argument(
        "--bfloat16", action="store_true", help="include points for a processor with bfloat16 instructions"
    )
    parser.add_argument("--gpu", action="store_true", help="measure the points for a GPU instead")
    options = parser.parse_args()
    points = GPU_POINTS if options.gpu else POINTS + BFLOAT16_POINTS * options.bfloat16
    missing = [] if options.print else [point for point in points if not (options.results / point.file).exists()]
    for point in tqdm(missing):
        measure(point, options.results)
    files = [options.results / point.file for point in points]
    print(as_markdown([json.loads(file.read_text()) for file in files if file.exists()]))


if __name__ == "__main__":
    main()

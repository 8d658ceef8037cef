"""The examples of CONTRIBUTING work as they are written: a layer type, a statistic and an export format."""

import __future__

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from fim_lora.fisher.recorder import Recorder
from fim_lora.report import exports
from helpers.documentation import blocks
from helpers.rank_allocations import allocation, config
from helpers.tiny_models import llama, lm_batches

# Annotations of the examples name classes that only a file of the package would import.
_FLAGS = __future__.annotations.compiler_flag


class ScaledLinear(nn.Linear):
    """The layer of the example, from a library that does not exist."""

    def __init__(self, d_in, d_out, scale):
        super().__init__(d_in, d_out, bias=False)
        self.scale = scale

    def forward(self, x):
        return self.scale * super().forward(x)


def example(part):
    """The one Python block of CONTRIBUTING that has this text."""
    [block] = [block for block in blocks("CONTRIBUTING.md", "python") if part in block.code]
    return compile("\n" * block.line + block.code, "CONTRIBUTING.md", "exec", _FLAGS)


@pytest.fixture
def some_library(monkeypatch):
    library = ModuleType("some_library")
    library.ScaledLinear = ScaledLinear
    monkeypatch.setitem(sys.modules, "some_library", library)


def test_the_layer_type(some_library):
    place = "fim_lora.fisher.layers"
    exec(example("def measure_scaled_linear"), {"__package__": place, "__name__": f"{place}.scaled_linear"})
    names = {"__name__": "test_scaled_linear"}
    exec(example("def test_scores_equal_per_example_gradients"), names)
    names["test_scores_equal_per_example_gradients"]()


def test_the_statistic():
    model, batches = llama(), lm_batches()
    names = [name for name, _ in model.named_modules() if name.endswith("v_proj")]
    layers = {name: model.get_submodule(name) for name in names}
    model.requires_grad_(False)
    results = []
    namespace = {"layers": layers, "model": model, "batches": batches, "Recorder": Recorder, "print": results.append}
    exec(example("class LargestGradients"), namespace)
    exec(example("recorder.start(model)"), namespace)
    [measured] = results

    weights = [model.get_submodule(name).weight.requires_grad_() for name in names]
    norms = [[g.norm().item() for g in torch.autograd.grad(model(**batch).loss, weights)] for batch in batches]
    expected = {name: max(values) for name, values in zip(names, zip(*norms, strict=True), strict=True)}
    assert measured == pytest.approx(expected, rel=1e-5)


def test_the_export_format(monkeypatch):
    namespace = dict(vars(exports))
    exec(example("def _markdown"), namespace)
    monkeypatch.setattr(exports, "_EXPORTERS", namespace["_EXPORTERS"])
    result = allocation()
    head, rule, *rows = exports.export(result, config(), "markdown").splitlines()
    assert head.count("|") == rule.count("|") == 3
    assert {row.split("|")[1].strip(): int(row.split("|")[2]) for row in rows} == result.ranks

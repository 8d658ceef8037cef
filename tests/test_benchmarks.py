"""The benchmarks: what decides over their numbers, and that every method keeps within uniform LoRA's size."""

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cost_shapes
import quality
import quality_methods
import quality_tasks
import quality_variants
import report
import tiny_models

BATCHES = [
    {
        "input_ids": torch.randint(1, tiny_models.VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(seed)),
        "attention_mask": torch.ones(4, 6, dtype=torch.long),
        "labels": torch.arange(4) % 3,
    }
    for seed in range(3)
]
TARGETS = quality_tasks.TASKS["banking77"].targets["all-linear"]
STEPS = 20


def setting(seed=0):
    return quality_methods.Setting(tiny_models.bert(), TARGETS, 2, "SEQ_CLS", BATCHES, STEPS, seed)


def run_of(method="uniform", rate=1e-3, seed=0, loss=1.0, test_loss=None, task="gsm8k", **more):
    split = {"loss": loss, "accuracy": 0.5}
    return {
        "run": {
            "task": task, "targets": "all-linear", "rank": 2, "steps": 40,
            "method": method, "learning_rate": rate, "seed": seed,
        },
        "development": split,
        "test": split | {"loss": loss if test_loss is None else test_loss},
        "curve": [[20, 2.0], [40, 1.0]],
        "adapter_parameters": 100,
        "calibration_seconds": 2.0,
        "training_seconds": 40.0,
        **more,
    }  # fmt: skip


# --- Methods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in quality.METHODS if name != quality_methods.UPPER_REFERENCE])
def test_no_method_has_more_parameters_than_uniform_lora(method):
    uniform = quality_methods.adapter_parameters(quality.METHODS["uniform"](setting()))
    assert uniform == sum(
        p.numel() for n, p in quality.METHODS["uniform"](setting()).named_parameters() if "lora_" in n
    )
    model = quality.METHODS[method](setting())
    run = quality.Run("banking77", "all-linear", 2, method, 1e-2, 0, STEPS)
    bench = quality.Bench("", {}, torch.device("cpu"), torch.float32)
    data = iter([BATCHES[step % len(BATCHES)] for step in range(STEPS)])
    assert len(list(bench._train(model, quality_tasks.TASKS["banking77"], run, data))) == STEPS

    assert 0.8 * uniform <= quality_methods.adapter_parameters(model) <= uniform


@pytest.mark.parametrize("method", ["fim-warm-head", "fim-batch-gradients", "fim-spectrum", "lora-ga"])
def test_a_method_leaves_the_weights_of_the_model_and_its_classifier_as_they_were(method):
    before = tiny_models.bert()
    model = quality.METHODS[method](setting()).base_model.model
    assert torch.equal(model.classifier.original_module.weight, before.classifier.weight)
    assert torch.equal(model.classifier.modules_to_save["default"].weight, before.classifier.weight)
    query = model.bert.encoder.layer[0].attention.self.query
    if method != "lora-ga":  # which takes the adapter out of the weight
        assert torch.equal(query.base_layer.weight, before.bert.encoder.layer[0].attention.self.query.weight)


def test_random_ranks_are_those_of_fim_on_other_layers():
    ranks = {}
    for method in ("fim-parameters", "random"):
        model = quality.METHODS[method](setting(seed=1))
        ranks[method] = [
            module.r["default"] for module in model.modules() if isinstance(module, quality_methods.LoraLayer)
        ]
    assert sorted(ranks["random"]) == sorted(ranks["fim-parameters"])
    assert ranks["random"] != ranks["fim-parameters"]


def test_batch_gradients_are_those_of_autograd():
    of = setting()
    names = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]
    model = tiny_models.bert().eval()
    for batch, gradients in zip(BATCHES, quality_variants.batch_gradients(of, names), strict=True):
        weights = [model.get_submodule(name).weight for name in names]
        for name, expected in zip(names, torch.autograd.grad(model(**batch).loss, weights), strict=True):
            torch.testing.assert_close(gradients[name], expected)


def test_greedy_ranks_are_the_best_ones_where_all_ranks_cost_the_same():
    draw = random.Random(0)
    for _ in range(20):
        gains = {name: sorted((draw.random() for _ in range(4)), reverse=True) for name in "abc"}
        limit = 3 * draw.randint(3, 12)
        ranks = quality_variants.greedy_ranks(gains, dict.fromkeys("abc", 3), limit)
        possible = [c for c in itertools.product(range(1, 5), repeat=3) if 3 * sum(c) <= limit]
        best = max(sum(sum(gains[n][:k]) for n, k in zip("abc", c, strict=True)) for c in possible)
        assert sum(sum(gains[name][:rank]) for name, rank in ranks.items()) == pytest.approx(best)


# --- Runs --------------------------------------------------------------------------------------------------------


def test_batches_of_a_run_have_similar_lengths_and_repeat_nothing_within_a_round():
    draw = random.Random(0)
    lengths = [draw.randint(3, 48) for _ in range(640)]
    order = quality_tasks.training_order(lengths, 8, 100, seed=3)
    assert order == quality_tasks.training_order(lengths, 8, 100, seed=3)
    assert order != quality_tasks.training_order(lengths, 8, 100, seed=4)
    assert len(order) == 800
    assert len(set(order[:512])) == 512  # two whole pools of one round

    def padding(indices):
        rows = [[lengths[index] for index in indices[first : first + 8]] for first in range(0, len(indices), 8)]
        return sum(8 * max(row) - sum(row) for row in rows)

    assert padding(order) < padding(draw.sample(range(640), 640)) / 3


def test_a_result_is_never_overwritten(tmp_path):
    path = tmp_path / "folder" / "result.json"
    quality.write(path, {"first": 1})
    with pytest.raises(FileExistsError):
        quality.write(path, {"second": 2})
    assert json.loads(path.read_text()) == {"first": 1}
    assert list(path.parent.iterdir()) == [path]


def test_the_tuned_learning_rate_is_that_of_the_lowest_development_loss(tmp_path):
    run = quality.Run("gsm8k", "all-linear", 2, "uniform", 0.0, 0, 40)
    for rate, loss in ((1e-3, 1.1), (2e-3, 0.9), (4e-3, 1.0)):
        quality.write(tmp_path / replace(run, learning_rate=rate).file, run_of(rate=rate, loss=loss))
    assert quality.tuned_learning_rate(tmp_path, run, [1e-3, 2e-3, 4e-3]) == 2e-3
    with pytest.raises(FileNotFoundError, match="uniform with all of"):
        quality.tuned_learning_rate(tmp_path, run, [1e-3, 8e-3])


# --- Report ------------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_chosen_on_the_development_split_and_the_gain_comes_from_the_test_split():
    results = [run_of(test_loss=2.0)]
    results += [run_of("fim-rank", 1e-3, loss=1.0, test_loss=0.1), run_of("fim-rank", 2e-3, loss=0.8, test_loss=1.5)]
    numbers = report.report(results)["tasks"]["gsm8k, all-linear, r = 2, 40 steps"]["fim-rank"]
    assert numbers["mean_gain"] == pytest.approx(0.5)
    assert report.report(results)["overall"]["fim-rank"]["mean_gain"] == pytest.approx(25)


def test_gains_are_paired_by_seed():
    results = [run_of(seed=seed, loss=seed) for seed in (1, 2, 3)]
    results += [run_of("fim-rank", seed=seed, loss=seed - 0.25) for seed in (2, 3, 4)]
    numbers = report.report(results)["overall"]["fim-rank"]
    assert numbers["runs"] == 2
    assert numbers["mean_loss_gain"] == pytest.approx(0.25)
    assert numbers["loss_ci95"] == pytest.approx([0.25, 0.25])  # the seeds differ, the paired gains do not


def test_more_accuracy_is_a_gain_in_points():
    better = run_of("eva-rho-2", task="sst2")
    better["test"] = {"loss": 1.0, "accuracy": 0.53}
    numbers = report.report([run_of(task="sst2"), better])["tasks"]["sst2, all-linear, r = 2, 40 steps"]
    assert numbers["eva-rho-2"]["mean_gain"] == pytest.approx(3)


def test_the_interval_is_that_of_all_resamples():
    # Of 27 resamples of three values, one has the smallest mean: more than 2.5 %.
    assert report.interval([[1.0, 2.0, 6.0]]) == pytest.approx((1.0, 6.0))
    values = [0.0, 1.0, 2.0, 4.0, 8.0]
    means = sorted(sum(resample) / 5 for resample in itertools.product(values, repeat=5))
    low, high = report.interval([values])
    assert low == pytest.approx(means[round(0.025 * len(means))], abs=0.2)
    assert high == pytest.approx(means[round(0.975 * len(means))], abs=0.2)


def test_steps_to_the_loss_of_uniform_lora_are_interpolated():
    reference = [(20, 2.0), (40, 1.0)]
    assert report.steps_to_reference([(20, 1.5), (40, 0.5)], reference) == pytest.approx(30)
    assert report.steps_to_reference([(20, 0.9), (40, 0.5)], reference) == 20
    assert report.steps_to_reference([(20, 2.0), (40, 1.1)], reference) is None


def test_the_documents_have_every_method_and_a_picture(tmp_path):
    results = [run_of(), run_of("fim-rank", loss=0.9), run_of("random", loss=1.1)]
    report.write_docs(results, tmp_path)
    text = (tmp_path / "evidence_tables.md").read_text()
    assert "| fim-rank | +10.00 [+10.00, +10.00] |" in text
    assert "| fim-rank | 40 | 100% | 2.0 |" in text
    assert (tmp_path / "evidence_gains.png").read_bytes().startswith(b"\x89PNG")


# --- Cost --------------------------------------------------------------------------------------------------------


def test_the_physical_limit_counts_what_torch_counts():
    model = tiny_models.llama(attn_implementation="eager")
    ids = torch.randint(1, tiny_models.VOCABULARY, (2, 30))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids)
    operations = counter.get_flop_counts()["Global"]
    attention = operations[torch.ops.aten.bmm]
    weights = sum(operations.values()) - attention
    # Backward: as much again for weights; for attention, which is causal, three times half of it in all.
    assert cost_shapes.pass_operations(model, 2, 30) == pytest.approx(2 * weights + 1.5 * attention, rel=0.01)


def test_an_unknown_shape_is_named_together_with_those_there_are():
    with pytest.raises(ValueError, match=r"no shape 'gpt-5'.*smollm2-135m"):
        cost_shapes.random_model("gpt-5", torch.device("cpu"))

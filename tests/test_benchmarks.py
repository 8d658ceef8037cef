"""The benchmarks: what decides over their numbers, and that every method keeps within uniform LoRA's size."""

import argparse
import copy
import itertools
import json
import math
import operator
import pathlib
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import cost_shapes
import intervals
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


def run_of(method="uniform", rate=1e-3, seed=0, loss=1.0, test_loss=None, task="gsm8k", rank=2, **more):
    split = {"loss": loss, "accuracy": 0.5}
    return {
        "run": {
            "task": task, "targets": "all-linear", "rank": rank, "steps": 40,
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
    bench = quality.Bench("", {}, torch.device("cpu"))
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


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tiny_models.bert().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["uniform", "fim-rank", "lora_B-gradient", "eva-rho-2", "adalora", "lora-ga"])
def test_what_is_trained_is_in_float32_and_the_rest_as_asked(method, dtype, saved_bert):
    task = quality_tasks.TASKS["banking77"]
    model = quality_tasks.load_model(task, saved_bert, 3, 0, torch.device("cpu"), dtype)
    adapted = quality.METHODS[method](replace(setting(), model=model))
    for copied in (adapted, copy.deepcopy(adapted)):
        trained = {name: p for name, p in copied.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert all("lora_" in name or "classifier" in name for name in trained)
        assert copied.base_model.model.bert.embeddings.word_embeddings.weight.dtype == dtype
        output = copied(**BATCHES[0])
        output.loss.backward()
        assert output.logits.dtype == torch.float32
        assert copied.base_model.model.classifier.modules_to_save["default"].weight.grad.abs().sum() > 0


def test_a_classifier_is_warmed_up_in_float32_whatever_the_precision_of_the_model(saved_bert):
    task = quality_tasks.TASKS["banking77"]
    model = quality_tasks.load_model(task, saved_bert, 3, 0, torch.device("cpu"), torch.bfloat16)
    before = model.classifier.weight.detach().clone()
    with quality_variants.warm_head(replace(setting(), model=model)):
        assert model.classifier.weight.dtype == torch.float32
        assert not torch.equal(model.classifier.weight, before)
    assert torch.equal(model.classifier.weight, before)


def test_results_in_another_precision_have_a_folder_and_a_setting_of_their_own():
    run = quality.Run("sst2", "all-linear", 2, "fim-parameters-1/2", 1e-3, 0, 120)
    assert str(run.file) == "sst2/all-linear-r2-120steps/fim-parameters-1_2-lr0.001-seed0.json"
    half = replace(run, dtype="bfloat16")
    assert str(half.file) == "sst2/all-linear-r2-120steps-bfloat16/fim-parameters-1_2-lr0.001-seed0.json"
    names = [str(report.setting_of({"run": asdict(of)})) for of in (run, half)]
    assert names == ["sst2, all-linear, r = 2, 120 steps", "sst2, all-linear, r = 2, 120 steps, bfloat16"]
    assert report.setting_of(run_of()) == report.Setting("gsm8k", "all-linear", 2, 40, "float32")


def shuffle_with_the_most_parameters(ranks, costs, limit, draw):
    fitting = []
    for _ in range(2000):
        shuffled = list(ranks)
        draw.shuffle(shuffled)
        fitting.append((sum(map(operator.mul, shuffled, costs)), shuffled))
    size, best = max((pair for pair in fitting if pair[0] <= limit), key=lambda pair: pair[0])
    return next(shuffled for parameters, shuffled in fitting if parameters == size), best


def test_of_shuffles_that_fit_random_ranks_are_the_first_with_the_most_parameters():
    draw = random.Random(5)
    for seed in range(5):
        ranks, costs = [draw.randint(1, 8) for _ in range(8)], [draw.choice([48, 64, 96]) for _ in range(8)]
        limit = sum(map(operator.mul, ranks, costs)) + 40
        expected, _ = shuffle_with_the_most_parameters(ranks, costs, limit, random.Random(seed))
        names = "abcdefgh"
        chosen = quality_methods.ranks_on_other_layers(
            dict(zip(names, ranks, strict=True)), dict(zip(names, costs, strict=True)), limit, random.Random(seed)
        )
        assert list(chosen.values()) == expected


@given(
    st.lists(st.tuples(st.integers(1, 8), st.sampled_from([48, 50, 64, 96, 300])), min_size=2, max_size=30), st.data()
)
@settings(max_examples=40, deadline=None)
def test_random_ranks_are_the_same_ranks_within_the_limit_that_the_ranks_themselves_keep(layers, data):
    # At most by one rank of one layer above the least that any order has, which a shuffle rarely finds.
    least = sum(
        map(operator.mul, sorted(rank for rank, _ in layers), sorted((cost for _, cost in layers), reverse=True))
    )
    limit = least + data.draw(st.integers(0, 50))
    names = [f"layer{index}" for index in range(len(layers))]
    ranks = {name: rank for name, (rank, _) in zip(names, layers, strict=True)}
    costs = {name: cost for name, (_, cost) in zip(names, layers, strict=True)}
    chosen = quality_methods.ranks_on_other_layers(ranks, costs, limit, random.Random(0))
    assert sorted(chosen.values()) == sorted(ranks.values())
    assert least <= sum(chosen[name] * costs[name] for name in names) <= limit


def test_random_ranks_of_many_unequal_layers_are_near_the_limit():
    draw = random.Random(0)
    names = [f"layer{index}" for index in range(210)]
    costs = {name: draw.choice([768, 1152, 2112]) for name in names}
    ranks = {name: 1 if costs[name] > 768 else 3 for name in names}
    limit = sum(ranks[name] * costs[name] for name in names) + 2000
    chosen = quality_methods.ranks_on_other_layers(ranks, costs, limit, random.Random(0))
    # The smallest swap changes two ranks between layers that differ by 384.
    assert limit - 2 * 384 < sum(chosen[name] * costs[name] for name in names) <= limit
    assert chosen != ranks


def test_random_ranks_that_fit_nowhere_are_an_error():
    with pytest.raises(RuntimeError, match=r"\[1, 2\] of 2 layers .*b, a.* 10 parameters"):
        quality_methods.ranks_on_other_layers({"a": 1, "b": 2}, {"a": 10, "b": 20}, 10, random.Random(0))


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


@pytest.mark.parametrize(
    ("best", "known", "extra_rates", "run", "chosen"),
    [
        (2.2e-3, {}, 4, [1e-3, 2e-3, 4e-3], 2e-3),
        (9e-3, {}, 4, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3], 8e-3),
        (0.6e-3, {}, 4, [1e-3, 2e-3, 4e-3, 0.5e-3, 0.25e-3], 0.5e-3),
        (1.0, {}, 4, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3], 64e-3),
        (1.0, {}, 0, [1e-3, 2e-3, 4e-3], 4e-3),
        (9e-3, {2e-3, 8e-3}, 4, [1e-3, 4e-3, 16e-3], 8e-3),
        (1.0, {8e-3, 16e-3}, 3, [1e-3, 2e-3, 4e-3, 32e-3], 32e-3),
    ],
)
def test_a_learning_rate_is_looked_for_beyond_the_end_of_the_grid(best, known, extra_rates, run, chosen):
    tried = []

    def loss_of(rate):
        tried.append(rate)
        return abs(math.log(rate / best))

    losses = {rate: abs(math.log(rate / best)) for rate in known}
    assert quality.tuned_rate(losses, [1e-3, 2e-3, 4e-3], extra_rates, loss_of) == chosen
    assert tried == run


def test_a_learning_rate_that_diverged_is_not_the_best():
    losses = {1e-3: 1.0, 2e-3: math.nan, 4e-3: math.nan}
    assert report.best_rate(losses) == 1e-3
    assert report.best_rate({2e-3: math.nan, 1e-3: math.inf, 4e-3: 5.0}) == 4e-3


def options_of(folder, *more):
    return quality.parsed(
        ["--data", "", "--results", str(folder), "--tasks", "gsm8k", "--targets", "all-linear", "--steps", "40", *more]
    )


class Maker:
    """Makes results whose loss is the lowest at a learning rate of the method, and notes for which runs."""

    best = {"uniform": 2e-3, "fim-rank": 16e-3}  # noqa: RUF012

    def __init__(self):
        self.made = []

    def __call__(self, run, tuning):
        self.made.append((run.method, run.learning_rate, run.seed, tuning))
        loss = abs(math.log(run.learning_rate / self.best[run.method]))
        return run_of(run.method, run.learning_rate, run.seed, loss) | {"run": asdict(run)}


def test_every_method_is_tuned_on_the_first_seed_and_run_with_its_best_rate_on_the_others(tmp_path):
    options = options_of(tmp_path, "--ranks", "2", "--methods", "uniform", "fim-rank", "--seeds", "3", "1", "2")
    tuning = [("uniform", rate, 3, True) for rate in (1e-3, 2e-3, 4e-3, 8e-3)]
    tuning += [("fim-rank", rate, 3, True) for rate in (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)]
    rest = [
        (method, rate, seed, False) for seed in (1, 2) for method, rate in (("uniform", 2e-3), ("fim-rank", 16e-3))
    ]

    maker = Maker()
    quality.run_all(argparse.Namespace(**vars(options) | {"tuning_only": True}), quality.Results(tmp_path, maker))
    assert maker.made == tuning
    quality.run_all(options, quality.Results(tmp_path, maker))
    assert maker.made == tuning + rest
    quality.run_all(options, quality.Results(tmp_path, maker))
    assert maker.made == tuning + rest

    for file in tmp_path.rglob("fim-rank-lr0.004-*.json"):
        file.unlink()
    quality.run_all(options, quality.Results(tmp_path, maker))
    assert maker.made == [*tuning, *rest, ("fim-rank", 4e-3, 3, True)]


def test_the_names_of_methods_that_begin_alike_are_told_apart(tmp_path):
    results = quality.Results(tmp_path, Maker())
    run = quality.Run("sst2", "attention", 2, "fim-parameters", 0.0, 0, 40)
    for method, rate, seed in (
        ("fim-parameters", 1e-3, 0),
        ("fim-parameters-1/2", 2e-3, 0),
        ("fim-parameters", 4e-3, 1),
    ):
        other = replace(run, method=method, learning_rate=rate, seed=seed)
        quality.write(tmp_path / other.file, run_of(method, rate, seed, loss=rate))
    assert results.known_losses(run) == {1e-3: 1e-3}
    assert results.known_losses(replace(run, method="fim-parameters-1/2")) == {2e-3: 2e-3}


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_shares_have_whole_methods_and_all_of_them_once(parts, tmp_path):
    dealt = []
    for part in range(1, parts + 1):
        for runs in quality.shared_settings(options_of(tmp_path, "--share", f"{part}/{parts}")):
            assert len({run.file.parent for run in runs}) == 1
            dealt += runs
    assert len(dealt) == len(set(dealt)) == 2 * len(quality_methods.METHODS)
    assert {(run.learning_rate, run.seed) for run in dealt} == {(0.0, 0)}


def test_a_single_seed_is_no_tuning_alone(tmp_path):
    maker = Maker()
    options = options_of(tmp_path, "--ranks", "2", "--methods", "uniform", "--seeds", "7")
    quality.run_all(options, quality.Results(tmp_path, maker))
    assert {(seed, tuning) for _, _, seed, tuning in maker.made} == {(7, False)}


def test_the_quick_grid_needs_no_other_option_and_gives_way_to_those_given():
    options = quality.parsed(["--data", "folder", "--quick"])
    assert options.results.name == "quality-quick"
    assert (options.tasks, options.steps, options.seeds) == (["banking77"], 60, [0, 1])
    assert set(options.methods) <= set(quality.METHODS)
    assert quality.parsed(["--data", "folder", "--quick", "--steps", "5"]).steps == 5
    assert quality.parsed(["--data", "folder"]).results.name == "quality"


# --- Answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reference", "correct"),
    [
        ("so 3 + 4 = 7\n#### 7", "7 it is\n#### 7", True),
        ("#### $1,234.00.", "#### 1234", True),
        ("#### 12.50", "#### 12.5", True),
        ("#### 100", "#### 10", False),
        ("#### -5", "#### 5", False),
        ("#### -$5", "#### -5", True),
        ("the answer is 7", "#### 7", False),
        ("#### none", "#### 7", False),
        ("#### 7\n#### 8", "#### 7", True),
    ],
)
def test_an_answer_is_correct_if_its_number_is(text, reference, correct):
    assert quality_tasks.is_correct(text, reference) == correct


class TokensAsNumber:
    """Decodes tokens into one number."""

    pad_token_id, eos_token_id = 0, 1

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return ["#### 1" + "".join(f"{token:02d}" for token in row.tolist() if token > 1) for row in rows]


def greedy_answer(model, prompt):
    """One token after the other, without padding and cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + quality_tasks.MOST_NEW_TOKENS and (len(ids) == len(prompt) or ids[-1] != 1):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return torch.tensor(ids[len(prompt) :])


def test_answers_are_the_greedy_ones_of_each_question_on_its_own(monkeypatch):
    monkeypatch.setattr(quality_tasks, "MOST_NEW_TOKENS", 8)
    model = tiny_models.llama().eval()
    model.config.use_cache = False
    tokenizer = TokensAsNumber()
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16], [17]]
    references = tokenizer.batch_decode([greedy_answer(model, prompt) for prompt in prompts], skip_special_tokens=True)
    references[1] += "9"
    examples = [
        quality_tasks.Example(prompt, [-100] * len(prompt), prompt, reference)
        for prompt, reference in zip(prompts, references, strict=True)
    ]
    found = quality_tasks.exact_match(model, examples, tokenizer, 3, torch.device("cpu"))
    assert found == 0.75


# --- Report ------------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_chosen_on_the_development_split_and_the_gain_comes_from_the_test_split():
    results = [run_of(test_loss=2.0)]
    results += [run_of("fim-rank", 1e-3, loss=1.0, test_loss=0.1), run_of("fim-rank", 2e-3, loss=0.8, test_loss=1.5)]
    numbers = report.report(results)["settings"]["gsm8k, all-linear, r = 2, 40 steps"]["fim-rank"]
    assert numbers["mean_gain"] == pytest.approx(0.5)
    assert report.report(results)["overall"]["fim-rank"]["mean_gain"] == pytest.approx(25)


def test_gains_are_paired_by_seed():
    results = [run_of(seed=seed, loss=seed) for seed in range(1, 7)]
    results += [run_of("fim-rank", seed=seed, loss=seed - 0.25) for seed in range(2, 8)]
    numbers = report.report(results)["overall"]["fim-rank"]
    assert numbers["runs"] == 5
    assert numbers["mean_loss_gain"] == pytest.approx(0.25)
    assert numbers["loss_ci95"] == pytest.approx([0.25, 0.25])  # the seeds differ, the paired gains do not


def test_the_learning_rate_is_the_best_one_of_the_first_seed_however_many_seeds_it_has():
    results = [run_of(rate=rate, seed=3, loss=loss) for rate, loss in ((1e-3, 1.0), (2e-3, 0.8), (4e-3, 0.9))]
    # Seeds that would choose otherwise, but were run with one rate only; the smaller of them is not the first either.
    results += [run_of(rate=1e-3, seed=seed, loss=0.1) for seed in (1, 2, 4, 5, 6)]
    results += [run_of(rate=2e-3, seed=1, loss=5.0)]
    chosen = report.chosen_runs(results)["uniform"]
    assert sorted(chosen) == [1, 3]
    assert {run["run"]["learning_rate"] for run in chosen.values()} == {2e-3}


def test_of_seeds_with_equally_many_learning_rates_the_smallest_is_the_first():
    results = [run_of(rate=rate, seed=seed, loss=rate if seed else -rate) for rate in (1e-3, 2e-3) for seed in (0, 1)]
    assert report.sweeps_of(results)["uniform"].best == 2e-3


def test_methods_with_few_seeds_have_no_interval_and_are_named():
    results = [run_of(seed=seed, loss=1.0) for seed in range(7)]
    results += [run_of("fim-rank", seed=seed, loss=0.9) for seed in range(5)]
    results += [run_of("random", seed=seed, loss=1.1) for seed in range(4)]
    results += [run_of("lora-ga", loss=1.25), run_of("eva-rho-2", loss=1.125)]
    content = report.report(results)
    name = "gsm8k, all-linear, r = 2, 40 steps"
    assert set(content["settings"][name]) == set(content["overall"]) == {"uniform", "fim-rank"}
    text = report.as_markdown(content)
    assert "Tuned on one seed only: eva-rho-2 (-0.125), lora-ga (-0.250)." in text
    assert "On 4 seeds only: random (-0.100)." in text
    assert "| lora-ga" not in text


def test_a_method_with_its_best_rate_at_an_end_is_named():
    losses = {1e-3: 1.0, 2e-3: 0.8, 4e-3: 0.9}
    results = [run_of(rate=rate, loss=loss) for rate, loss in losses.items()]
    results += [run_of("random", rate, loss=loss) for rate, loss in losses.items() if rate < 4e-3]
    results += [run_of("inverse", rate=1e-3)]
    content = report.report(results)
    assert content["not_tuned"] == {"gsm8k, all-linear, r = 2, 40 steps": ["inverse", "random"]}
    assert "is at an end of those that were run: inverse, random." in report.as_markdown(content)


def test_where_all_have_two_seeds_two_are_enough():
    results = [
        run_of(method, seed=seed, loss=loss) for method, loss in (("uniform", 1), ("random", 2)) for seed in (0, 1)
    ]
    results += [run_of("fim-rank", loss=0.5)]
    assert set(report.report(results)["overall"]) == {"uniform", "random"}


def test_the_overall_table_says_over_how_many_settings_a_mean_is():
    results = [run_of(rank=rank) for rank in (2, 8)]
    results += [run_of("fim-rank", loss=0.9), run_of("fim-rank", loss=0.8, rank=8), run_of("random", loss=0.5, rank=8)]
    content = report.report(results)
    assert {method: numbers["settings"] for method, numbers in content["overall"].items()} == {
        "uniform": 2, "fim-rank": 2, "random": 1,
    }  # fmt: skip
    assert content["overall"]["fim-rank"]["mean_gain"] == pytest.approx(15)
    rows = [line for line in report.as_markdown(content).splitlines() if line.startswith("| ")][2:5]
    assert [row.split(" | ")[0] for row in rows] == ["| fim-rank", "| uniform", "| random"]
    assert "| 1.000 | 2 | 1 | 2 |" in rows[1]
    assert "| 1.000 | 1 | 1 | 1 |" in rows[2]


def test_overall_every_task_counts_once_however_many_settings_it_has():
    results = [run_of(rank=rank) for rank in (2, 8)] + [run_of(task="sst2")]
    results += [run_of("random", loss=0.9), run_of("random", loss=0.7, rank=8), run_of("random", task="sst2")]
    content = report.report(results)
    assert content["tasks"]["gsm8k"]["random"]["mean_gain"] == pytest.approx(0.2)
    assert content["tasks"]["sst2"]["random"]["mean_gain"] == pytest.approx(0)
    assert content["overall"]["random"]["mean_gain"] == pytest.approx(10)


def test_settings_of_a_task_share_their_seeds():
    # What one setting gains at a seed, the other loses: the mean of both has no spread.
    results = [run_of(seed=seed, rank=rank) for seed in range(5) for rank in (2, 8)]
    results += [run_of("random", seed=seed, loss=0.5 + seed / 10) for seed in range(5)]
    results += [run_of("random", seed=seed, loss=0.9 - seed / 10, rank=8) for seed in range(5)]
    assert report.report(results)["tasks"]["gsm8k"]["random"]["ci95"] == pytest.approx([0.3, 0.3])


def test_more_accuracy_is_a_gain_in_points():
    better = run_of("eva-rho-2", task="sst2")
    better["test"] = {"loss": 1.0, "accuracy": 0.53}
    numbers = report.report([run_of(task="sst2"), better])["settings"]["sst2, all-linear, r = 2, 40 steps"]
    assert numbers["eva-rho-2"]["mean_gain"] == pytest.approx(3)


def test_the_interval_is_that_of_all_resamples():
    values = [0.0, 1.0, 2.0, 4.0, 8.0]
    means = sorted(sum(resample) / 5 for resample in itertools.product(values, repeat=5))
    low, high = intervals.interval([values])
    # Of five values t is 2.776 and a bootstrap too narrow by sqrt(4 / 5): 0.00096 of the resamples are below.
    assert low == pytest.approx(means[round(0.00096 * len(means))], abs=0.2)
    assert high == pytest.approx(means[-1 - round(0.00096 * len(means))], abs=0.2)
    assert intervals.interval([[1.0]]) == (1.0, 1.0)


@pytest.mark.parametrize("groups", [1, 3])
def test_intervals_of_five_seeds_cover_the_mean_as_often_as_they_say(groups, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 4_000)
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(500):
        low, high = intervals.interval(generator.normal(size=(groups, 5)).tolist())
        covered += low <= 0 <= high
    assert 0.91 <= covered / 500 <= 0.98


def curve_of(*losses):
    return {"curve": [[20 * (place + 1), loss] for place, loss in enumerate(losses)]}


def speeds(*runs):
    return report.speeds_of([run_of(**curve_of(2.0, 1.0)), *runs])


def test_steps_to_the_loss_of_uniform_lora_are_interpolated():
    assert speeds(run_of("random", **curve_of(1.5, 0.5)))["random"].steps == pytest.approx(30)
    assert speeds(run_of("random", **curve_of(0.9, 0.5)))["random"].steps == 20


def test_a_seed_that_never_gets_there_counts_as_the_whole_training(tmp_path):
    results = [run_of(seed=seed, **curve_of(2.0, 1.0)) for seed in (0, 1)]
    results += [run_of("random", seed=0, **curve_of(1.0, 0.5)), run_of("random", seed=1, **curve_of(2.0, 1.1))]
    results += [run_of("inverse", seed=seed, **curve_of(2.0, 1.1)) for seed in (0, 1)]
    found = report.speeds_of(results)
    assert found["random"] == (40, 30, 1, 2, 2.0)
    report.write_docs(results, tmp_path)
    text = (tmp_path / "evidence_tables.md").read_text()
    assert "| random | ≥ 30 | 1 of 2 | 2.0 |" in text
    assert "| inverse | – | 0 of 2 | 2.0 |" in text


def test_curves_are_compared_up_to_the_last_step_that_all_have():
    found = speeds(run_of("random", **curve_of(1.5, 0.5, 0.1)), run_of("inverse", **curve_of(3.0, 2.0, 0.9)))
    assert {speed.end for speed in found.values()} == {40}
    assert found["random"].steps == pytest.approx(30)
    assert found["inverse"].reached == 0


def test_times_on_a_gpu_are_not_compared():
    on_gpu = {"environment": {"gpu": "NVIDIA H200"}}
    assert report.speeds_of([run_of(**on_gpu)])["uniform"].before is None
    assert report.speeds_of([run_of()])["uniform"].before == 2


def test_the_learning_rate_table_says_what_half_and_twice_the_best_cost(tmp_path):
    losses = {1e-3: 1.0, 2e-3: 0.8, 4e-3: 0.75, 8e-3: 0.9}
    results = [run_of(rate=rate, loss=loss, test_loss=2 * loss) for rate, loss in losses.items()]
    results += [run_of(rate=4e-3, seed=1, loss=9.0), run_of("fim-rank", rate=8e-3, loss=0.5)]
    report.write_docs(results, tmp_path)
    text = (tmp_path / "evidence_tables.md").read_text()
    assert "| method | 0.001 | 0.002 | 0.004 | 0.008 | at half the best | at twice the best |" in text
    assert "| uniform | 2.000 | 1.600 | 1.500 | 1.800 | +0.100 | +0.300 |" in text
    assert "| fim-rank | – | – | – | 0.500 | – | – |" in text


def sized(method, rank, loss, parameters, seeds=5):
    return [
        run_of(method, seed=seed, loss=loss + seed - 2, rank=rank, adapter_parameters=parameters, task="sst2")
        for seed in range(seeds)
    ]


def test_parameters_for_a_loss_are_interpolated_in_their_logarithm(tmp_path):
    results = sized("uniform", 2, 10, 1000) + sized("uniform", 4, 8, 2000) + sized("uniform", 8, 6, 4000)
    # At 1000 and 4000 parameters one nat above and one below: in the middle of the logarithms, at 2000.
    results += sized("fim-rank", 2, 7, 1000) + sized("fim-rank", 8, 5, 4000)
    results += sized("adalora", 2, 6, 1000) + sized("adalora", 4, 5, 2000) + sized("inverse", 2, 5, 1000)
    results += sized("random", 2, 9, 1000) + sized("random", 8, 7, 4000)
    results += sized("lora-ga", 2, 1, 10, seeds=1)
    sizes = report.sizes_of(results)["sst2, all-linear, 40 steps"]
    assert sizes["uniform"][8] == (4000, (4, 5, 6, 7, 8), 0.5)
    assert (sizes["uniform"][8].loss, sizes["uniform"][8].error) == (6, pytest.approx(math.sqrt(2.5 / 5)))
    assert report.parameters_to_reach([(1000, 7), (4000, 5)], 6) == pytest.approx(2000)

    report.write_docs(results, tmp_path)
    text = (tmp_path / "evidence_tables.md").read_text()
    assert "| uniform | 10.000 (50.0 %) | 8.000 (50.0 %) | 6.000 (50.0 %) | 4,000 | 100% |" in text
    assert "| fim-rank | 7.000 (50.0 %) | – | 5.000 (50.0 %) | 2,000 | 50% [50%, 50%] |" in text
    assert "| adalora | 6.000 (50.0 %) | 5.000 (50.0 %) | – | ≤ 1,000 | ≤ 25% [≤ 25%, 25%] |" in text
    assert "inverse" not in sizes  # one rank is no line
    assert "| random | 9.000 (50.0 %) | – | 7.000 (50.0 %) | – | – |" in text
    assert "lora-ga" not in sizes
    assert (tmp_path / "evidence_parameters.png").read_bytes().startswith(b"\x89PNG")


def test_the_share_of_parameters_has_the_spread_of_the_seeds():
    # Uniform LoRA has the loss 6 at every seed; the method needs 1000 parameters at one seed and 4000 at another.
    reference = report.Size(4000, (6.0, 6.0), 0.5)
    small, large = report.Size(1000, (6, 8), 0.5), report.Size(4000, (4, 6), 0.5)
    low, high = report.share_of_parameters([small, large], reference)
    assert (low, high) == (pytest.approx(0.25), pytest.approx(1))
    never = [report.Size(parameters, (7.0, 7.0), 0.5) for parameters in (1000, 4000)]
    assert report.share_of_parameters(never, reference) == (math.inf, math.inf)


def test_two_ranks_are_no_curve():
    assert report.sizes_of(sized("uniform", 2, 10, 1000) + sized("uniform", 4, 8, 2000)) == {}


def test_precisions_are_not_compared_with_each_other():
    half = run_of("fim-rank", loss=0.5)
    half["run"]["dtype"] = "bfloat16"
    reference = run_of(loss=0.75)
    reference["run"]["dtype"] = "bfloat16"
    settings = report.report([run_of(), run_of("fim-rank", loss=0.9), reference, half])["settings"]
    assert settings["gsm8k, all-linear, r = 2, 40 steps"]["fim-rank"]["mean_loss_gain"] == pytest.approx(0.1)
    half_precision = settings["gsm8k, all-linear, r = 2, 40 steps, bfloat16"]
    assert half_precision["fim-rank"]["mean_loss_gain"] == pytest.approx(0.25)


def test_exact_matches_are_the_mean_over_the_seeds_that_have_them(tmp_path):
    results = [run_of(seed=seed) for seed in range(3)]
    for result, share in zip(results[1:], (0.25, 0.5), strict=True):
        result["test"] |= {"exact_match": share, "exact_match_examples": 32}
    report.write_docs([*results, *(run_of("random", seed=seed) for seed in range(3))], tmp_path)
    text = (tmp_path / "evidence_tables.md").read_text()
    table = text[text.index("### Exact match: gsm8k") :]
    assert "| uniform | 37.5% | 64 | 2 |" in table
    assert "random" not in table


def test_the_documents_have_every_method_and_a_picture(tmp_path):
    results = [run_of(), run_of("fim-rank", loss=0.9), run_of("random", loss=1.1)]
    results += [run_of(rank=8), run_of(rank=4), run_of("fim-rank", loss=0.9, rank=4)]
    report.write_docs(results, tmp_path)
    text = (tmp_path / "evidence_tables.md").read_text()
    assert "| fim-rank | +10.00 [+10.00, +10.00] |" in text
    assert "| fim-rank | 40 | 1 of 1 | 2.0 |" in text
    assert "### Exact match" not in text
    assert (tmp_path / "evidence_gains.png").read_bytes().startswith(b"\x89PNG")


def test_the_results_of_the_project_are_read_whatever_their_age():
    results = report.read_results(pathlib.Path(report.__file__).parent / "results" / "quality")
    assert any("dtype" not in result["run"] for result in results)
    content = report.report(results)
    assert {"mean_gain", "ci95", "params_ratio", "runs"} <= content["overall"]["fim-rank"].keys()
    assert "banking77, all-linear, r = 2, 120 steps" in content["settings"]
    assert {"banking77", "sst2", "gsm8k"} <= content["tasks"].keys()


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


def test_another_reference_is_compared_with_seed_by_seed_where_it_was_run():
    runs = [run_of(method, seed=seed, test_loss=loss + 0.1 * seed) for seed in range(5)
            for method, loss in (("uniform", 3.0), ("random", 2.5), ("fim-rank", 2.25))]  # fmt: skip
    elsewhere = [run_of(method, seed=seed, rank=8) for seed in range(5) for method in ("uniform", "fim-rank")]
    content = report.report(runs + elsewhere, "random")
    (only,) = content["settings"].values()
    assert only["fim-rank"]["mean_loss_gain"] == pytest.approx(0.25)
    assert only["uniform"]["loss_ci95"] == pytest.approx([-0.5, -0.5])
    assert len(report.report(runs + elsewhere)["settings"]) == 2

"""The adapters of the compared methods: size, precision, ranks on random layers, and what they leave unchanged."""

import copy
import operator
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quality_methods
import quality_results
import quality_tasks
import quality_training
import quality_variants
from helpers import tiny_models
from helpers.benchmark_runs import CALIBRATION_BATCHES, STEPS, tiny_setting
from helpers.own_warnings import FEWER_BATCHES


@FEWER_BATCHES
@pytest.mark.parametrize(
    "method", [name for name in quality_training.METHODS if name != quality_methods.UPPER_REFERENCE]
)
def test_no_method_has_more_parameters_than_uniform_lora(method):
    uniform = quality_methods.adapter_parameters(quality_training.METHODS["uniform"](tiny_setting()))
    assert uniform == sum(
        p.numel() for n, p in quality_training.METHODS["uniform"](tiny_setting()).named_parameters() if "lora_" in n
    )
    model = quality_training.METHODS[method](tiny_setting())
    run = quality_results.Run("banking77", "all-linear", 2, method, 1e-2, 0, STEPS)
    bench = quality_training.Bench("", {}, torch.device("cpu"))
    data = iter([CALIBRATION_BATCHES[step % len(CALIBRATION_BATCHES)] for step in range(STEPS)])
    assert len(list(bench._train(model, quality_tasks.TASKS["banking77"], run, data))) == STEPS

    assert 0.8 * uniform <= quality_methods.adapter_parameters(model) <= uniform


@pytest.mark.parametrize("method", ["fim-warm-head", "fim-batch-gradients", "fim-spectrum", "lora-ga"])
def test_a_method_leaves_the_weights_of_the_model_and_its_classifier_as_they_were(method):
    before = tiny_models.bert()
    model = quality_training.METHODS[method](tiny_setting()).base_model.model
    assert torch.equal(model.classifier.original_module.weight, before.classifier.weight)
    assert torch.equal(model.classifier.modules_to_save["default"].weight, before.classifier.weight)
    query = model.bert.encoder.layer[0].attention.self.query
    if method != "lora-ga":  # LoRA-GA subtracts the initial adapter from the weight
        assert torch.equal(query.base_layer.weight, before.bert.encoder.layer[0].attention.self.query.weight)


def test_random_ranks_are_those_of_fim_on_other_layers():
    ranks = {}
    for method in ("fim-parameters", "random"):
        model = quality_training.METHODS[method](tiny_setting(seed=1))
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
    adapted = quality_training.METHODS[method](replace(tiny_setting(), model=model))
    for copied in (adapted, copy.deepcopy(adapted)):
        trained = {name: p for name, p in copied.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert all("lora_" in name or "classifier" in name for name in trained)
        assert copied.base_model.model.bert.embeddings.word_embeddings.weight.dtype == dtype
        output = copied(**CALIBRATION_BATCHES[0])
        output.loss.backward()
        assert output.logits.dtype == torch.float32
        assert copied.base_model.model.classifier.modules_to_save["default"].weight.grad.abs().sum() > 0


def test_a_classifier_is_warmed_up_in_float32_whatever_the_precision_of_the_model(saved_bert):
    task = quality_tasks.TASKS["banking77"]
    model = quality_tasks.load_model(task, saved_bert, 3, 0, torch.device("cpu"), torch.bfloat16)
    before = model.classifier.weight.detach().clone()
    with quality_variants.warm_head(replace(tiny_setting(), model=model)):
        assert model.classifier.weight.dtype == torch.float32
        assert not torch.equal(model.classifier.weight, before)
    assert torch.equal(model.classifier.weight, before)


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
    # The limit exceeds the smallest number of parameters of any order by 50 at most, which a shuffle rarely meets.
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
    # The smallest change swaps ranks that differ by 2 between layers whose costs differ by 384.
    assert limit - 2 * 384 < sum(chosen[name] * costs[name] for name in names) <= limit
    assert chosen != ranks


def test_random_ranks_that_fit_nowhere_are_an_error():
    with pytest.raises(RuntimeError, match=r"\[1, 2\] of 2 layers .*b, a.* 10 parameters"):
        quality_methods.ranks_on_other_layers({"a": 1, "b": 2}, {"a": 10, "b": 20}, 10, random.Random(0))

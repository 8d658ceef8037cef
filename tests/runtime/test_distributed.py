"""Two processes against one process over all data, and against the unsharded model."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from fim_lora import get_fim_scores, initialize_lora_fim_ranks
from helpers import several_processes
from helpers.own_warnings import FEWER_BATCHES
from helpers.several_processes import ALL, EVEN, TARGETS, base, config
from helpers.tiny_models import names_of, per_example_scores, token_batch
from helpers.torchrun import NUM_PROCESSES, assert_same_scores, outcome, results_of, torchrun
from helpers.trainers import allocate, sft_trainer


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder with the results of all cases and processes. The cases share one start, because it takes seconds."""
    return results_of("helpers.several_processes", tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone():
    """One process over all data."""
    return get_fim_scores(base(), ALL, config(), show_progress_bar=False)


def test_one_process_over_all_data_equals_autograd(alone):
    for name, values in per_example_scores(base(), ALL, names_of(base(), *TARGETS)).items():
        assert alone[name].mean == pytest.approx(values.mean().item(), rel=1e-6)
        assert alone[name].standard_error == pytest.approx(values.std().item() / len(values) ** 0.5, rel=1e-6)


ADAPTED = ["dataloader", "dataloader_of_one_process_only", "own_loop_in_ddp", "own_loop_of_one_process_only"]
SCORED = [
    "plain_model_in_ddp",
    "fsdp2",
    "fsdp2_of_one_process_only",
    "fsdp2_with_adapter",
    "fsdp1",
    "fsdp1_in_several_units",
    "fsdp1_with_adapter",
]


@pytest.mark.parametrize("case", ADAPTED)
def test_processes_agree_with_one_over_all_data(results, alone, case):
    first, second = outcome(results, case)
    assert first == second  # ranks, scores, and every new weight
    assert_same_scores(first["scores"], alone)
    assert first["ranks"] == initialize_lora_fim_ranks(get_peft_model(base(), config()), fim_scores=alone).ranks


@pytest.mark.parametrize("case", SCORED)
def test_wrapped_and_sharded_models_have_the_scores_of_the_whole(results, alone, case):
    first, second = outcome(results, case)
    assert first == second
    assert_same_scores(first, alone)


@FEWER_BATCHES
@pytest.mark.parametrize("case", ["fsdp2_of_every_layer_type", "fsdp1_of_every_layer_type"])
def test_layers_of_every_type_when_sharded(results, case):
    model, batches = several_processes.Various().double(), several_processes.various_batches(range(4))
    config = several_processes.various_config(parameters=case.startswith("fsdp2"))
    whole = get_fim_scores(model, batches, config, show_progress_bar=False)
    assert len(whole) == (7 if case.startswith("fsdp2") else 4)
    for found in outcome(results, case):
        assert_same_scores(found, whole)


def test_parameters_that_cannot_be_seen_are_not_left_out(results):
    for hidden, flat in outcome(results, "parameters_that_fsdp1_hides"):
        for error in (hidden, flat):
            assert error.startswith("ValueError: FullyShardedDataParallel flattens the parameters")
        assert "no parameter 'experts.up'" in hidden
        assert "PEFT says: Conv1d" in flat


def test_batches_dealt_out_by_accelerate(results):
    pairs = [[token_batch(1, 10, seed=seed) for seed in (first, first + 1)] for first in range(0, 8, 2)]
    batches = [{key: torch.cat([one[key] for one in pair]) for key in pair[0]} for pair in pairs]
    first, second = outcome(results, "accelerate")
    assert first == second
    assert_same_scores(first["scores"], get_fim_scores(base(), batches, config(), show_progress_bar=False))


def test_a_trainer_of_trl(results, tmp_path):
    first, second = outcome(results, "trainer_of_trl")
    assert first == second
    allocation = allocate(sft_trainer(tmp_path, unequal=True))
    # Two processes of two examples each take half the batches. Four are requested, so each process reads all it has.
    assert first["ranks"] == allocation.ranks
    assert_same_scores(first["scores"], allocation.scores, relative=1e-4)
    assert first["trained"] != {name: first["weights"][name] for name in first["weights"]}


def test_resuming_where_only_the_first_process_sees_the_allocation(results):
    first, second = outcome(results, "resuming_on_computers_of_their_own")
    assert (first["files"], second["files"]) == (["fim_allocation.json"], [])
    for result in (first, second):
        assert result["resumed"] == first["first"]
    assert first["missing"].startswith("FileNotFoundError")
    assert second["missing"].startswith("RuntimeError: Process 0 failed")
    assert first["different"].startswith("RuntimeError: Process 1 failed")
    assert second["different"].startswith("ValueError: The config gives other ranks than")


def test_random_numbers_on_the_way_are_the_same(results):
    outcome(results, "pissa_draws_the_same_numbers")


@pytest.mark.parametrize("case", ["training_in_ddp_afterwards", "fsdp2_from_scores_to_training"])
def test_training_afterwards_averages_the_gradients_of_all(results, case):
    first, second = outcome(results, case)
    assert first == second
    ranks = {name.removeprefix("base_model.model."): rank for name, rank in first["ranks"].items()}
    assert len(set(ranks.values())) > 1
    model = get_peft_model(base(), lora_config_with(ranks))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.tensor(first["weights"][name], dtype=parameter.dtype)
    (sum(model(**share[0]).loss for share in EVEN) / NUM_PROCESSES).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == set(first["gradients"])
    for name, gradient in gradients.items():
        torch.testing.assert_close(torch.tensor(first["gradients"][name], dtype=gradient.dtype), gradient)


def lora_config_with(ranks):
    plain = config(awaits=False)
    plain.rank_pattern = ranks
    plain.alpha_pattern = {name: plain.lora_alpha * rank / plain.r for name, rank in ranks.items()}
    return plain


def test_a_calibration_does_not_stop_fsdp2_from_training_the_adapter(results):
    for trained in outcome(results, "fsdp2_leaves_what_is_trained"):
        assert trained
        assert all("lora_" in name for name in trained)


def test_adapters_that_cannot_be_resized_are_refused(results):
    for fsdp2, fsdp1, ddp in outcome(results, "an_adapter_that_is_sharded"):
        for error in (fsdp2, fsdp1):
            assert "'model.layers.0.self_attn.q_proj' is sharded" in error
            assert "to_lora_config" in error
        assert "wrapped in DistributedDataParallel" in ddp
        assert "model.module" in ddp


def test_layers_that_are_split_are_refused(results):
    for errors in outcome(results, "tensor_parallelism"):
        for error in errors:
            assert error.startswith("ValueError: Layer 'model.layers.")
            assert "Tensor parallelism is not supported" in error


def test_no_process_waits_for_one_that_failed(results, alone):
    first, second = outcome(results, "failures_before_the_allocation")
    data, memory, empty, unseen, different, missing = second["errors"]
    assert data == "OSError: the disk of process 1 is gone"
    assert memory == "OutOfMemoryError: out of memory in process 1"
    assert first["errors"][0] == f"RuntimeError: Process 1 failed, so all stop. Its error: {data}"
    assert first["errors"][1] == f"RuntimeError: Process 1 failed, so all stop. Its error: {memory}"
    assert first["errors"][2:4] == [empty, unseen]
    assert "yielded no batch" in empty
    assert "No calibration batch was seen" in unseen
    assert "same `fim_scores`" in first["errors"][4]
    assert "same `fim_scores`" in different
    assert "lacks 1 of 6 target layers" in missing
    assert first["errors"][5] == f"RuntimeError: Process 1 failed, so all stop. Its error: {missing}"
    assert first["weights"] == second["weights"]
    assert_same_scores(first["scores"], alone)


def test_a_failure_while_layers_are_rebuilt_leaves_no_trace_anywhere(results, alone):
    first, second = outcome(results, "a_failure_while_layers_are_rebuilt")
    assert second["error"] == "MemoryError: process 1 is full"
    assert "Process 1 failed" in first["error"]
    assert first["weights"] == second["weights"]
    assert_same_scores(first["scores"], alone)


def test_a_failure_inside_a_pass_that_needs_all_ends_all():
    finished = torchrun("helpers.several_processes", "--failing-inside-fsdp2")
    assert finished.returncode != 0
    assert "out of memory in process 1" in finished.stderr


def test_every_case_is_looked_at():
    source = Path(__file__).read_text()
    assert not [name for name in several_processes.CASES if f'"{name}"' not in source]

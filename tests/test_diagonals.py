"""`get_fim_diagonals` on whole models, with adapters, in several processes, and after failures."""

import copy
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fim_lora import (
    FimDiagonals,
    get_fim_diagonals,
    get_fim_scores,
    initialize_lora_fim_ranks,
)
from helpers import diagonals_in_processes
from helpers.adapters import fim_model, hooks_of, logits, randomize
from helpers.diagonals import assert_diagonals, diagonals_of_batches, diagonals_of_examples
from helpers.proportional import proportional
from helpers.single_layers import by_row, under_autocast
from helpers.tiny_models import bert, class_batch, gpt2, llama, lm_batches, names_of, t5, token_batch
from helpers.torchrun import NUM_PROCESSES, results_of

TARGETS = ("q_proj", "v_proj", "down_proj")


def diagonals_of(model, batches, parameters=None, **options):
    options = {"num_batches": len(batches), "show_progress_bar": False} | options
    return get_fim_diagonals(model, batches, parameters, **options)


BATCHES = [token_batch(4, 10, seed=0), token_batch(1, 7, seed=1), token_batch(3, 12, seed=2)]


@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_language_models_equal_autograd(make):
    """Padded examples, batches of different sizes, and `Conv1D`, whose weight is transposed."""
    names = [name for name in names_of(make(), "_proj", "c_attn", "c_fc", ".wi", ".q") if "encoder" not in name][:4]
    found = diagonals_of(make(), BATCHES, names)
    assert list(found) == names
    assert_diagonals(found, diagonals_of_batches(make(), BATCHES, names))
    assert (found.num_batches, found.num_examples) == (3, 8)


def test_all_layers_of_a_classifier_equal_autograd():
    """The embedding of positions is read once for all examples, so each batch has one example."""
    batches = [class_batch(1, 10, seed=seed) for seed in range(5)]
    found = diagonals_of(bert(), batches)
    names = list(found)
    assert {"bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings", "classifier"} <= set(names)
    assert_diagonals(found, diagonals_of_batches(bert(), batches, names))


def test_means_of_the_diagonals_are_the_scores():
    config = LoraConfig(
        target_modules="all-linear",
        init_lora_weights="fim",
        fim_config=proportional(fim_calibration_batches=3, exact=True),
    )
    scores = get_fim_scores(llama(), BATCHES, config, show_progress_bar=False)
    found = diagonals_of(llama(), BATCHES, list(scores))
    for name, score in scores.items():
        assert found[name].mean().item() == pytest.approx(score.mean, rel=1e-5)


def test_tied_weights_have_the_diagonal_of_each_use_with_a_warning():
    batches = [token_batch(1, 9, seed=seed) for seed in range(3)]
    tied = llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"2 layers share their weight.*\['model.embed_tokens', 'lm_head'\]"):
        found = diagonals_of(tied, batches)
    untied = llama(tie_word_embeddings=False)
    untied.load_state_dict(copy.deepcopy(tied.state_dict()))
    truth = diagonals_of_batches(untied, batches, ["model.embed_tokens", "lm_head"])
    assert_diagonals({name: found[name] for name in truth}, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    names = names_of(llama(), *TARGETS)
    truth = diagonals_of_batches(llama(), BATCHES, names)
    found = diagonals_of(llama().to(dtype), BATCHES, names)
    under = diagonals_of(llama(), BATCHES, names, forward_fn=under_autocast(torch.bfloat16))
    for name in names:
        for one in (found, under):
            assert one[name].dtype == torch.float32
            similarity = F.cosine_similarity(one[name].flatten().double(), truth[name].flatten(), dim=0).item()
            assert similarity > 0.999, name
            assert one[name].sum().item() == pytest.approx(truth[name].sum().item(), rel=0.05), name


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_devices(device):
    found = diagonals_of(llama(), BATCHES, ["lm_head"], device=device)
    assert found["lm_head"].device.type == "cpu"
    assert found == diagonals_of(llama(), BATCHES, ["lm_head"])


def test_trained_adapters_are_disabled():
    model = get_peft_model(llama(), LoraConfig(target_modules=list(TARGETS)))
    randomize(model)
    before = logits(model)
    assert not torch.equal(before, logits(llama()))
    names = names_of(llama(), "_proj", "embed_tokens")
    found = diagonals_of(model, BATCHES, names)
    assert found == diagonals_of(llama(), BATCHES, names)
    assert torch.equal(logits(model), before)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        diagonals_of(model, BATCHES, names)


def test_offloaded_and_checkpointed_models(tmp_path):
    names = names_of(llama(), *TARGETS, "lm_head", "embed_tokens")
    expected = diagonals_of(llama(), BATCHES, names)
    offloaded = disk_offload(llama(), tmp_path, execution_device=torch.device("cpu"))
    assert offloaded.lm_head.weight.device.type == "meta"
    checkpointed = llama(use_cache=False)
    for place, layer in enumerate(checkpointed.model.layers):
        checkpointed.model.layers[place] = checkpoint_wrapper(layer)  # that of transformers is off in eval mode
    for model in (offloaded, checkpointed):
        assert_diagonals(diagonals_of(model, BATCHES, names), {name: expected[name].double() for name in names})


def test_ranks_from_saved_diagonals_equal_those_from_scores(tmp_path):
    model = fim_model(exact=True)
    targets = model.targeted_module_names
    diagonals_of(model, lm_batches(), targets).save(tmp_path / "diagonals.safetensors")
    found = initialize_lora_fim_ranks(model, fim_scores=FimDiagonals.load(tmp_path / "diagonals.safetensors"))
    other = fim_model(exact=True)
    expected = initialize_lora_fim_ranks(other, lm_batches(), show_progress_bar=False)
    assert found.ranks == expected.ranks
    assert len(set(found.ranks.values())) > 1
    with pytest.raises(ValueError, match="names 1 layers that the adapter does not target"):
        initialize_lora_fim_ranks(fim_model(), fim_scores=diagonals_of(llama(), lm_batches(), [*targets, "lm_head"]))


def test_batches_without_a_finite_loss_are_left_out():
    """Also if the loss is infinite and all gradients are finite."""

    def forward_fn(model, batch):
        batch = dict(batch)
        offset = batch.pop("offset", 0.0)
        return model(**batch).loss + offset

    first, second, third = BATCHES
    unlabeled = second | {"labels": torch.full_like(second["labels"], -100)}
    for broken in (unlabeled, second | {"offset": math.inf}):
        with pytest.warns(UserWarning, match="1 of 3 calibration batches .* left out in all layers"):
            found = diagonals_of(llama(), [first, broken, third], ["lm_head"], forward_fn=forward_fn)
        expected = diagonals_of(llama(), [first, third], ["lm_head"])
        assert torch.equal(found["lm_head"], expected["lm_head"])
        assert (found.num_batches, found.num_skipped_batches, found.num_examples) == (3, 1, 7)


def test_fewer_batches_than_asked_for():
    with pytest.warns(UserWarning, match="The dataloader yielded 3 batches"):
        found = diagonals_of(llama(), BATCHES, ["lm_head"], num_batches=5)
    assert found == diagonals_of(llama(), BATCHES, ["lm_head"])
    assert diagonals_of(llama(), BATCHES, ["lm_head"], num_batches=1) == diagonals_of(
        llama(), BATCHES[:1], ["lm_head"]
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_batches": 0}, ValueError, "num_batches must be a positive integer, got 0"),
        ({"num_batches": 2.0}, ValueError, "got 2.0"),
        ({"num_batches": True}, ValueError, "got True"),
        ({"parameters": ["lm_heads"]}, ValueError, "such as 'lm_head'"),
        ({"parameters": "lm_head"}, TypeError, "must be a list of names"),
        ({"forward_fn": lambda model, batch: model(**batch).logits}, ValueError, "it must be a scalar"),
        ({"forward_fn": lambda model, batch: None}, TypeError, "returned a NoneType"),
        ({"device": "nowhere"}, RuntimeError, "nowhere"),
    ],
)
def test_arguments_are_checked(options, error, message):
    model = llama().train()
    with pytest.raises(error, match=message):
        diagonals_of(model, BATCHES, **({"parameters": ["lm_head"]} | options))
    assert model.training
    assert hooks_of(model) == []


def state_of(model):
    return (
        {name: (id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        {name: p.detach().clone() for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: getattr(module, "_disable_adapters", None) for name, module in model.named_modules()},
        len(hooks_of(model)),
    )


def test_neither_a_call_nor_an_exception_leaves_a_trace():
    model = fim_model().train()  # it awaits its ranks, so it has hooks of its own
    model.base_model.model.model.layers[0].eval()
    before = state_of(model)

    def breaking(batches):
        yield from batches[:1]
        raise OSError("the disk is gone")

    def out_of_memory(model, batch):
        if len(batch["input_ids"]) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return model(**batch)

    def broken_backward(model, batch):
        output = model(**batch)
        output.logits.register_hook(lambda gradient: operator.truediv(1, 0))
        return output

    def unchanged():
        after = state_of(model)
        values, expected = after[1], before[1]
        return all(torch.equal(values[name], expected[name]) for name in expected) and (
            [*after[:1], *after[2:]] == [*before[:1], *before[2:]]
        )

    with pytest.raises(OSError, match="the disk is gone"):
        get_fim_diagonals(model, breaking(BATCHES), show_progress_bar=False)
    assert unchanged()
    with pytest.raises(torch.OutOfMemoryError):
        diagonals_of(model, BATCHES, forward_fn=out_of_memory)
    assert unchanged()
    with pytest.raises(ZeroDivisionError):
        diagonals_of(model, BATCHES, forward_fn=broken_backward)
    assert unchanged()
    names = names_of(llama(), *TARGETS)
    assert diagonals_of(model, BATCHES, names) == diagonals_of(llama(), BATCHES, names)
    assert unchanged()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of("helpers.diagonals_in_processes", tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("kind", diagonals_in_processes.WRAPPERS)
@pytest.mark.parametrize("shares", diagonals_in_processes.SHARES)
def test_processes_agree_with_one_over_all_data(results, shares, kind):
    """With FSDP, a process that has run out of batches takes part in those of the other and does not count them."""
    model = diagonals_in_processes.Model().double()
    examples = [example for batch in diagonals_in_processes.BATCHES for example in by_row(batch)]
    names = ["embedding", "first", "second"]
    truth = diagonals_of_examples(model, examples, names)
    for rank in range(NUM_PROCESSES):
        found = FimDiagonals.load(results / f"{shares} {kind} {rank}")
        assert_diagonals(found, truth, rtol=1e-9, atol=1e-12)
        assert (found.num_batches, found.num_examples) == (4, 10)


def test_processes_with_different_names_fail_together(results):
    for rank in range(NUM_PROCESSES):
        assert "Process 1 measures other layers than process 0" in (results / f"error {rank}").read_text()

"""Ranks from the eFIM, directions from every initialization that PEFT offers."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fim_lora import RankAllocation, allocate_ranks, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.config import changes_base_weight
from helpers.adapters import fim_lora_config, fim_model, logits, lora_layers, randomize, state_of
from helpers.proportional import proportional
from helpers.rank_allocations import allocation as allocation_by_hand
from helpers.rank_allocations import config as config_by_hand
from helpers.stock_peft import require_equal_outputs
from helpers.tiny_models import eva_batches, gpt2, llama, lm_batches

INITIALIZATIONS = [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_8", "olora", "eva"]
FROM_BASE_WEIGHT = ["pissa", "pissa_niter_8", "olora"]


def allocated(init, base=None, seed=5, **options):
    model = fim_model(base, init_lora_weights=init, score_exponent=0.5, **options)
    torch.manual_seed(seed)
    return model, initialize_lora_fim_ranks(model, eva_batches(), show_progress_bar=False)


# PEFT's OLoRA does not handle the transposed weights of GPT-2.
@pytest.mark.parametrize(
    ("make", "init"),
    [(make, init) for make in (llama, gpt2) for init in INITIALIZATIONS if (make, init) != (gpt2, "olora")],
)
def test_ranks_are_fims_and_the_output_is_what_peft_promises(make, init):
    targets = ("q_proj", "v_proj", "down_proj") if make is llama else ("c_attn", "c_fc")
    model, allocation = allocated(init, make(), target_modules=targets, lora_alpha=12)
    step = 2 if init == "orthogonal" else 1
    ranks = allocate_ranks(
        allocation.scores.means,
        8,
        score_exponent=0.5,
        shapes=allocation.scores.shapes,
        rank_steps=dict.fromkeys(allocation.scores, step),
    )
    assert allocation.ranks == ranks
    assert len(set(ranks.values())) > 1
    assert sum(ranks.values()) == 8 * len(ranks)
    for name, layer in lora_layers(model).items():
        assert layer.r["default"] == layer.lora_A["default"].weight.shape[0] == ranks[name]
        assert layer.scaling["default"] == pytest.approx(12 / 8)
    assert model.peft_config["default"].init_lora_weights == (True if init == "eva" else init)
    difference = (logits(model) - logits(make())).abs().max()
    if init is False:
        assert difference > 0.01
    else:
        assert difference < 2e-4
    weight, before = (
        layer.get_base_layer().weight if hasattr(layer, "get_base_layer") else layer.weight
        for layer in (lora_layers(model)[next(iter(ranks))], make().get_submodule(next(iter(ranks))))
    )
    assert torch.equal(weight, before) == (init not in FROM_BASE_WEIGHT)


@pytest.mark.parametrize("init", [init for init in INITIALIZATIONS if init != "eva"])
def test_weights_are_those_of_stock_peft_at_these_ranks(init):
    model, allocation = allocated(init, use_dora=init is True)
    config = LoraConfig(
        r=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern=allocation.rank_pattern,
        alpha_pattern=allocation.alpha_pattern,
        init_lora_weights=init,
        use_dora=init is True,
    )
    # The same state of the random numbers as before fim_lora builds its layers.
    stock_model = llama()
    torch.manual_seed(5)
    stock_model = get_peft_model(stock_model, config)
    expected = dict(stock_model.state_dict())
    assert expected.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("init", [init for init in INITIALIZATIONS if init != "pissa_niter_8"])
def test_a_saved_adapter_gives_equal_outputs_in_stock_peft(tmp_path, init):
    model, _ = allocated(init, task_type="CAUSAL_LM")
    randomize(model)
    require_equal_outputs(model, logits(model), tmp_path, 1e-3)


@pytest.mark.parametrize("init", FROM_BASE_WEIGHT)
def test_conversion_to_plain_lora(tmp_path, init):
    """PEFT's documented way to share an adapter that was taken out of the base weights."""
    model, _ = allocated(init, task_type="CAUSAL_LM")
    config = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    config.init_lora_weights = init
    randomize(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "plain").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-3)


class Mixed(nn.Module):
    """A linear layer before a convolution, for which PEFT has no PiSSA."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.convolution = nn.Linear(6, 6), nn.Conv1d(4, 5, 3)

    def forward(self, x):
        return self.convolution(torch.tanh(self.linear(x))).square().mean()


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_what_peft_refuses_leaves_model_and_base_weights_as_they_were(init):
    model = get_peft_model(
        Mixed(),
        LoraConfig(
            r=2,
            target_modules=["linear", "convolution"],
            init_lora_weights="fim",
            fim_config=proportional(fim_calibration_batches=1, init_lora_weights=init),
        ),
    )
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.peft_config["default"])
    with pytest.raises(ValueError, match="Unknown initialization"):
        initialize_lora_fim_ranks(model, [torch.randn(3, 4, 6)], show_progress_bar=False)
    assert model.peft_config["default"] == config
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.base_model.model.linear.r == {"default": 2}


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora", "orthogonal"])
@pytest.mark.parametrize("chosen_later", [False, True])
def test_embeddings_are_refused_before_anything_is_changed(init, chosen_later):
    """PEFT would silently give them the default initialization."""
    base, targets = llama(), ("q_proj", "embed_tokens")
    message = f"init_lora_weights='{init}' for layer 'model.embed_tokens', an embedding"
    if not chosen_later:
        before = [(name, id(module)) for name, module in base.named_modules()]
        with pytest.raises(ValueError, match=message):
            fim_model(base, target_modules=targets, init_lora_weights=init)
        assert [(name, id(module)) for name, module in base.named_modules()] == before
        return
    model = fim_model(base, target_modules=targets)
    model.peft_config["default"].fim_config.init_lora_weights = init
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        initialize_lora_fim_ranks(model, iter(lambda: pytest.fail("data was read"), None), show_progress_bar=False)
    assert state_of(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_failure_in_the_middle_puts_base_weights_back():
    model = fim_model(gpt2(), target_modules=("c_attn", "c_fc"), init_lora_weights="olora")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"c_attn.*weights of a wrong shape.*init_lora_weights='olora'"):
        initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_odd_base_ranks_are_refused_for_orthogonal():
    model = fim_model(init_lora_weights="orthogonal", r=7)
    with pytest.raises(ValueError, match="rank_pattern"):
        initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)


# PEFT's preparation of CorDA and its LoftQ need libraries that this project does not install.
@pytest.mark.parametrize("init", [*INITIALIZATIONS, "OLoRA", "lora_ga"])
def test_the_names_of_the_initializations_that_change_base_weights(init):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    before = model[0].weight.detach().clone()
    eva_config = peft.EvaConfig() if init == "eva" else None
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=init, eva_config=eva_config)
    if init == "lora_ga":
        of_peft = pytest.importorskip("peft.tuners.lora.loraga")
        config.lora_ga_config = peft.LoraGAConfig()
        of_peft.preprocess_loraga(model, config, lambda: model(torch.randn(64, 8)).square().mean().backward())
    after = get_peft_model(model, config).base_model.model[0].base_layer.weight
    assert changes_base_weight(init) == (not torch.equal(after, before))


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga"])
def test_servers_cannot_change_base_weights(init):
    base_config = config_by_hand()
    base_config.init_lora_weights = init
    with pytest.raises(ValueError, match=f"'{init}' changes the base weights, which a server does not do"):
        allocation_by_hand().to_lora_config(base_config, serving=True)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_servers_cannot_take_an_adapter_out_of_the_base_weights(init):
    model, allocation = allocated(init)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        allocation.to_lora_config(model.peft_config["default"], serving=True)


def test_other_trainers_get_the_initialization_in_the_config():
    config = fim_lora_config(init_lora_weights="gaussian")
    scores = get_fim_scores(llama(), lm_batches(), config, show_progress_bar=False)
    plain = RankAllocation.from_scores(scores, config).to_lora_config(config)
    assert plain.init_lora_weights == "gaussian"
    assert torch.equal(logits(get_peft_model(llama(), plain)), logits(llama()))

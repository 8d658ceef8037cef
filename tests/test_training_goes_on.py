"""`compress_lora(..., optimizer=optimizer)` in a loop of one's own: what the optimizer knows afterward."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn

from fim_lora import compress_lora, get_lora_spectrum
from helpers.adapters import logits, lora_layers
from helpers.tiny_models import llama, lm_batches
from helpers.trained_adapters import fill

RANK, KEPT, BETAS = 6, 4, (0.8, 0.95)
BATCHES = lm_batches(5)


def adapter(zeros=RANK - KEPT, orthogonal=False, **options):
    """A trained adapter in float64, in which some components of every layer are zero in B."""
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=9, target_modules=["q_proj", "down_proj"], **options)
    model = get_peft_model(llama().double(), config)
    fill(model)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            b[:, RANK - zeros :] = 0
            if orthogonal:
                sizes = torch.linspace(2, 1, RANK, dtype=torch.float64)
                a.copy_(torch.linalg.qr(a.mT).Q.mT)
                b.copy_(torch.linalg.qr(b).Q * sizes)
    return model


def trained_parameters(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def frozen_steps(model, optimizer):
    """Steps at the learning rate 0: the optimizer collects gradients at one point."""
    for batch in BATCHES:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def cut(model, optimizer, batches=BATCHES, **size):
    with torch.no_grad():
        spectrum = get_lora_spectrum(model, batches, num_batches=batches and len(batches), show_progress_bar=False)
    parameters = sum(layer.parameters_per_component * KEPT for layer in spectrum.values())
    size = size or {"keep": parameters / spectrum.num_parameters}
    return compress_lora(model, spectrum, optimizer=optimizer, **size)


def gradients_by_batch(model, parameters):
    return [torch.autograd.grad(model(**batch).loss, parameters) for batch in BATCHES]


def average(values, beta):
    """Adam's running average from zero."""
    total = torch.zeros_like(values[0])
    for value in values:
        total = beta * total + (1 - beta) * value
    return total


# --- Adam ---


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_the_first_moment_is_the_average_of_gradients_of_the_new_factors(kind, options):
    """The dropped components are zero, so the gradients at the new factors are those of the same function."""
    model = adapter(**options)
    before = logits(model)
    optimizer = kind(trained_parameters(model), lr=0.0, betas=BETAS)
    frozen_steps(model, optimizer)
    # Without data the components of zero are the ones that go; with data they may be worth more than harmful ones.
    assert set(cut(model, optimizer, batches=None).ranks.values()) == {KEPT}
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)

    parameters = trained_parameters(model)
    gradients = gradients_by_batch(model.eval(), parameters)
    for parameter, of_batches in zip(parameters, zip(*gradients, strict=True), strict=True):
        state = optimizer.state[parameter]
        assert state["step"] == len(BATCHES)
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        expected = average(of_batches, BETAS[0])
        torch.testing.assert_close(state["exp_avg"], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        assert (state["exp_avg_sq"] >= 0).all()


def test_adam_goes_on_as_if_it_had_trained_the_new_factors():
    """If A and B are orthogonal, each component is a row of A and a column of B, up to factors.

    Then each moment has one source, and the state must be that of an Adam that saw the gradients of the new factors:
    where a row is multiplied by c, its gradient is divided by c.
    """
    model = adapter(zeros=0, orthogonal=True)
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=0.0, betas=BETAS, amsgrad=True)
    frozen_steps(model, optimizer)
    whole = copy.deepcopy(model)
    assert set(cut(model, optimizer, batches=None).ranks.values()) == {KEPT}

    parameters = trained_parameters(whole)
    gradients = gradients_by_batch(whole.eval(), parameters)
    for number, (old, new) in enumerate(zip(parameters, trained_parameters(model), strict=True)):
        dimension = 0 if len(new) == KEPT else 1
        rows, ratios = sources(old.detach().movedim(dimension, 0), new.detach().movedim(dimension, 0))
        shape = (-1, 1) if dimension == 0 else (1, -1)
        twin = nn.Parameter(new.detach().clone())
        adam = torch.optim.AdamW([twin], lr=0.0, betas=BETAS, amsgrad=True)
        for of_batch in gradients:
            twin.grad = of_batch[number].index_select(dimension, rows) / ratios.reshape(shape)
            adam.step()
        for key, expected in adam.state[twin].items():
            torch.testing.assert_close(optimizer.state[new][key], expected, rtol=1e-4, atol=1e-12)


def sources(old, new):
    """For each new row, the old one of the same direction, and the factor between them."""
    cosines = nn.functional.normalize(new) @ nn.functional.normalize(old).mT
    torch.testing.assert_close(cosines.abs().amax(1), torch.ones(len(new), dtype=new.dtype), rtol=0, atol=1e-5)
    rows = cosines.abs().argmax(1)
    return rows, (new * old[rows]).sum(1) / old[rows].square().sum(1)


# Made in the test, because another test may reset the state that all accelerators share.
WRAPPERS = {
    "plain": lambda optimizer: optimizer,
    "prepared": lambda optimizer: Accelerator(cpu=True).prepare(optimizer),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_steps_after_the_cut_are_those_of_an_optimizer_with_that_state(wrap):
    """The optimizer goes on with its groups, parameters and state, prepared by Accelerate or not."""
    model = adapter()
    parameters = trained_parameters(model)
    groups = [{"params": parameters[::2], "lr": 0.01}, {"params": parameters[1::2], "lr": 0.02, "weight_decay": 0.1}]
    optimizer = wrap(torch.optim.AdamW(groups))
    for batch in BATCHES:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert cut(model, optimizer, keep=0.2).dropped_layers
    inner = getattr(optimizer, "optimizer", optimizer)
    left = trained_parameters(model)
    assert all(any(one is other for other in parameters) for one in left)
    assert [[id(one) for one in group["params"]] for group in inner.param_groups] == [
        [id(one) for one in half if any(one is other for other in left)]
        for half in (parameters[::2], parameters[1::2])
    ]
    assert {id(one) for one in inner.state} == {id(one) for one in left}

    # The same steps on a copy, with an optimizer that gets the state as a checkpoint.
    twin = copy.deepcopy(model)
    names = {id(weight): name for name, weight in model.named_parameters()}
    weights = dict(twin.named_parameters())
    groups = [group | {"params": [weights[names[id(one)]] for one in group["params"]]} for group in inner.param_groups]
    other = torch.optim.AdamW(groups)
    other.load_state_dict(copy.deepcopy(inner.state_dict()))
    start = [weight.detach().clone() for weight in left]
    for one, its_optimizer in ((model, optimizer), (twin, other)):
        for batch in BATCHES:
            one(**batch).loss.backward()
            its_optimizer.step()
            its_optimizer.zero_grad()
    torch.testing.assert_close(trained_parameters(model), trained_parameters(twin), rtol=1e-9, atol=1e-12)
    assert not any(torch.equal(old, new) for old, new in zip(start, left, strict=True))


def test_parameters_that_had_no_step():
    model = adapter()
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=0.01)
    cut(model, optimizer)
    assert not optimizer.state
    model(**BATCHES[0]).loss.backward()
    optimizer.step()


# --- Other optimizers, and errors ---


def test_other_optimizers_lose_the_state_of_resized_parameters():
    model = adapter(modules_to_save=["lm_head"])
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.0, momentum=0.9)
    frozen_steps(model, optimizer)
    head = next(weight for name, weight in model.named_parameters() if "modules_to_save" in name)
    momentum = optimizer.state[head]["momentum_buffer"].clone()
    resized = 2 * len(lora_layers(model))
    with pytest.warns(UserWarning, match=f"The state of SGD cannot be carried over .* dropped for {resized} param"):
        cut(model, optimizer)
    assert list(optimizer.state) == [head]
    assert torch.equal(optimizer.state[head]["momentum_buffer"], momentum)
    model(**BATCHES[0]).loss.backward()
    optimizer.step()


def test_an_optimizer_without_state_gives_no_warning():
    model = adapter()
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    frozen_steps(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cut(model, optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", torch.optim.AdamW])
def test_what_is_not_an_optimizer(optimizer):
    model = adapter()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"pass a torch\.optim\.Optimizer"):
        cut(model, optimizer)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# --- The function ---


def test_a_training_goes_on_without_a_jump():
    """The dropped components are zero, and learn little until the cut, because their A is small."""
    runs = []
    for is_cut in (False, True):
        model = adapter()
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_A["default"].weight[KEPT:] *= 1e-3
        optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-3)
        losses = []
        for step in range(10):
            if is_cut and step == 5:
                assert set(cut(model, optimizer, batches=None).ranks.values()) == {KEPT}
            loss = model(**BATCHES[step % len(BATCHES)]).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        runs.append(losses)
    whole, with_cut = runs
    assert with_cut[:5] == whole[:5]
    assert with_cut == pytest.approx(whole, rel=1e-3)
    assert with_cut != whole
    assert whole[5] < 0.99 * whole[0]

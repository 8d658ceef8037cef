"""`get_lora_spectrum`: components and their worth against dense matrices and per-example gradients in float64."""

import copy
import math
import warnings
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fim_lora import compress_lora, get_lora_spectrum, initialize_lora_fim_ranks
from fim_lora.spectrum import DAMPING, MAX_BATCHES
from helpers.adapters import hooks_of, logits, lora_layers
from helpers.every_layer_type import NAMES, batches, every_type
from helpers.llama_calibration import fim_model
from helpers.own_warnings import NOT_FINITE
from helpers.single_layers import under_autocast
from helpers.tiny_models import llama, lm_batches, token_batch
from helpers.trained_adapters import (
    components_of,
    core_gradients_of,
    deltas_of,
    fill,
    in_float64,
    keep_call,
    lora_layers_of,
    losses_of_rows,
    losses_of_tokens,
    matrices_of,
    parts_of,
    spectrum_of,
    trained,
)


def assert_same_spectrum(found, expected, rtol=1e-4):
    """The same saliencies, and the same predictions, which do not depend on signs and on ties."""
    assert list(found) == list(expected)
    assert (found.num_batches, found.num_examples) == (expected.num_batches, expected.num_examples)
    assert found.terms_per_example == expected.terms_per_example
    for name, layer in expected.items():
        scale = max(layer.saliencies)
        np.testing.assert_allclose(
            found[name].saliencies, layer.saliencies, rtol=rtol, atol=1e-5 * scale, err_msg=name
        )
        np.testing.assert_allclose(found[name].squared_norms, layer.squared_norms, rtol=10 * rtol, atol=1e-5)
        np.testing.assert_allclose(
            found[name].gains, layer.gains, rtol=rtol, atol=1e-4 * max(map(abs, layer.gains)), err_msg=name
        )
    for share in (0.5, 0.2):
        kept = expected.keep(int(share * expected.num_parameters))
        assert found.predict(kept) == pytest.approx(expected.predict(kept), rel=10 * rtol)


# --- Without data ---


def test_without_data_the_components_are_the_singular_value_decomposition_of_every_part():
    model = every_type(torch.float64)
    spectrum = get_lora_spectrum(model, None)
    assert list(spectrum) == list(lora_layers_of(model))
    assert set(spectrum) == set(NAMES)
    for name, layer in lora_layers_of(model).items():
        squares = 0.0
        for part, delta in enumerate(deltas_of(layer)):
            u, values, vt = torch.linalg.svd(delta, full_matrices=False)
            rank = spectrum[name].num_components
            squares += values[:rank].square().numpy()
            for count in range(rank + 1):
                truncated = (u[:, :count] * values[:count]) @ vt[:count]
                found = components_of(layer, spectrum[name], list(range(count)))[part]
                torch.testing.assert_close(found, truncated, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(spectrum[name].squared_norms, squares, rtol=1e-5)
        np.testing.assert_allclose(spectrum[name].saliencies, squares, rtol=1e-5)
        assert spectrum[name].gates is None
        assert spectrum[name].standard_errors is None
    assert not spectrum.with_data
    assert "without data" in spectrum.criterion
    assert spectrum.criterion in str(spectrum)
    assert spectrum.predict(spectrum.keep(0)) is None


def test_shapes_and_costs_are_those_of_peft():
    model = every_type()
    entries = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
    spectrum = get_lora_spectrum(model, None)
    assert spectrum.num_parameters == entries
    assert spectrum.ranks == dict.fromkeys(NAMES, 4)
    for name, layer in lora_layers_of(model).items():
        size = 4 // spectrum[name].rank_step
        assert spectrum[name].left.shape == (len(matrices_of(layer)), size, size)
        assert spectrum[name].scaling == 1.5


# --- With data ---


def weight_gradients(model, data):
    """Layer name to the gradients of its weight, one for each example, and to the sums `Σ x xᵀ` and `Σ g gᵀ`."""
    layers = lora_layers(model)
    weights = {name: layer.get_base_layer().weight.requires_grad_() for name, layer in layers.items()}
    gradients = {name: [] for name in layers}
    inputs, outputs = (dict.fromkeys(layers, 0.0) for _ in range(2))
    for loss in losses_of_tokens(model, data):
        seen = {name: [] for name in layers}
        handles = [layer.register_forward_hook(partial(keep_call, seen[name])) for name, layer in layers.items()]
        model.zero_grad()
        loss(model).backward()
        for handle in handles:
            handle.remove()
        for name, weight in weights.items():
            gradients[name].append(weight.grad.clone())
            for x, y in seen[name]:
                inputs[name] = inputs[name] + x.detach().flatten(0, 1).T @ x.detach().flatten(0, 1)
                outputs[name] = outputs[name] + y.grad.flatten(0, 1).T @ y.grad.flatten(0, 1)
    return {name: torch.stack(found) for name, found in gradients.items()}, inputs, outputs


class Truth(NamedTuple):
    """Of one layer: dense components, gradients of their gates for every example, and their gains."""

    components: torch.Tensor
    gates: torch.Tensor
    gains: torch.Tensor

    @property
    def values(self):
        """Half the mean squared gradient of the gate, per loss term, and the gain."""
        return self.gates.square().mean(0) / 2 / TERMS + self.gains

    @property
    def order(self):
        return self.values.argsort(descending=True)


SIZES = (4, 2, 5, 3)
WHOLE = SIZES[0] + SIZES[2]
TERMS = 90 / 14  # labels per example, without the first one, which nothing predicts


def dense_truth(model, data):
    """Layer name to its truth, without anything of size r × r.

    The metric is `Σ g gᵀ` and `Σ x xᵀ`, damped by the identity. The gate of a component D has the gradient
    `⟨G_t, D⟩`, with `G_t` the gradient of the summed loss of example t with respect to the weight. Every second batch
    is seen by a model whose adapter has a quarter of its scaling.
    """
    model = in_float64(model)
    gradients, inputs, outputs = weight_gradients(model, data[::2])
    scaled = in_float64(model)
    for layer in lora_layers(scaled).values():
        layer.scaling["default"] /= 4
    gradients_when_scaled, _, _ = weight_gradients(scaled, data[1::2])
    truth = {}
    for name, layer in lora_layers(model).items():
        ((a, b),) = matrices_of(layer)
        b = layer.scaling["default"] * b
        metrics = [
            metric + DAMPING * torch.trace(factor @ metric @ factor.T) / factor.square().sum() * torch.eye(len(metric))
            for metric, factor in ((outputs[name], b.T), (inputs[name], a))
        ]
        roots = [root_of(metric) for metric in metrics]
        u, values, vt = torch.linalg.svd(roots[0] @ b @ a @ roots[1])
        rank = len(a)
        left, right = torch.linalg.inv(roots[0]) @ u[:, :rank], vt[:rank] @ torch.linalg.inv(roots[1])
        components = torch.einsum("ok,k,ki->koi", left, values[:rank], right)
        gates, when_scaled = (
            torch.einsum("toi,koi->tk", one[name], components) for one in (gradients, gradients_when_scaled)
        )
        truth[name] = Truth(components, gates, -when_scaled.mean(0) / TERMS)
    return truth


def root_of(metric):
    values, vectors = torch.linalg.eigh(metric)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@pytest.fixture(scope="module")
def measured():
    """A model in float32, its spectrum, and the dense truth in float64."""
    data = [token_batch(size, 10, seed=seed) for seed, size in enumerate(SIZES)]
    assert sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in data) == round(TERMS * sum(SIZES))
    model = trained(llama(), alpha_pattern={"v_proj": 9})
    return model, spectrum_of(model, data), dense_truth(model, data), data


def test_components_are_those_of_the_dense_decomposition_in_the_metric_of_the_fisher_information(measured):
    model, spectrum, truth, _ = measured
    for name, true in truth.items():
        layer = lora_layers(model)[name]
        for number, place in enumerate(true.order.tolist()):
            (found,) = components_of(layer, spectrum[name], [number])
            expected = true.components[place]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_saliencies_are_half_the_squared_gradients_of_gates_per_loss_term(measured):
    _, spectrum, truth, _ = measured
    assert spectrum.terms_per_example == TERMS
    assert (spectrum.num_batches, spectrum.num_examples, spectrum.num_skipped_batches) == (4, sum(SIZES), 0)
    assert spectrum.num_scaled_examples == sum(SIZES) - WHOLE
    for name, true in truth.items():
        by_example = (true.gates.square() / TERMS / 2)[:, true.order]
        np.testing.assert_allclose(spectrum[name].saliencies, by_example.mean(0), rtol=1e-3)
        errors = by_example.std(0) / math.sqrt(WHOLE)
        np.testing.assert_allclose(spectrum[name].standard_errors, errors, rtol=2e-3)


def test_gains_are_the_mean_gradients_of_gates_where_the_adapter_has_a_quarter_of_its_scaling(measured):
    _, spectrum, truth, _ = measured
    for name, true in truth.items():
        gains = true.gains[true.order].numpy()
        np.testing.assert_allclose(spectrum[name].gains, gains, rtol=1e-3, atol=1e-4 * abs(gains).max())
        np.testing.assert_allclose(spectrum[name].priorities, true.values[true.order], rtol=1e-3, atol=1e-5)


def test_gains_of_every_layer_type():
    """The gates of a component's parts are one gate, with the summed gradient."""
    model, data = every_type(torch.float64), batches()
    spectrum = spectrum_of(model, data)
    scaled = every_type(torch.float64)
    for layer in lora_layers_of(scaled).values():
        for part in parts_of(layer):
            part.scaling["default"] /= 4
    cores = core_gradients_of(scaled, lora_layers_of(scaled), losses_of_rows(data[1::2]))
    for name, layer in spectrum.items():
        left, right = (torch.from_numpy(one).double() for one in (layer.left, layer.right))
        # The core of the scaled adapter has a quarter of the gradient.
        expected = -4 * torch.einsum("pij,tpik,pjk->j", left, cores[name], right) / len(cores[name])
        np.testing.assert_allclose(layer.gains, expected, rtol=1e-4, atol=1e-5 * expected.abs().max(), err_msg=name)


def test_one_batch_gives_no_gains_and_the_order_by_saliencies_and_norms():
    spectrum = spectrum_of(trained(llama()), lm_batches(1))
    assert (spectrum.num_batches, spectrum.num_scaled_examples) == (1, 0)
    for layer in spectrum.values():
        assert layer.gains is None
        expected = np.sqrt(np.multiply(layer.saliencies, layer.squared_norms))
        np.testing.assert_allclose(layer.priorities, expected, rtol=1e-6)
        assert layer.priorities == sorted(layer.priorities, reverse=True)


def test_the_scaling_is_restored_also_after_an_exception():
    model = trained(llama())
    seen = []

    def failing(model, batch):
        seen.append({layer.scaling["default"] for layer in lora_layers(model).values()})
        if len(seen) == 4:
            raise KeyError("four")
        return model(**batch).loss

    with pytest.raises(KeyError, match="four"):
        spectrum_of(model, lm_batches(5), forward_fn=failing)
    assert seen == [{1.5}, {0.375}, {1.5}, {0.375}]
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {1.5}


@pytest.mark.parametrize("share", [0.8, 0.5, 0.2, 0.0])
def test_the_predicted_increase_is_the_second_order_expansion(measured, share):
    _, spectrum, truth, _ = measured
    kept = spectrum.keep(int(share * spectrum.num_parameters))
    total = torch.zeros(WHOLE, dtype=torch.float64)
    for name, true in truth.items():
        dropped = [place for number, place in enumerate(true.order) if number not in kept[name]]
        total += true.gates[:, dropped].sum(1)
    by_example = total**2 / 2 / TERMS - total / TERMS
    prediction = spectrum.predict(kept)
    assert prediction.increase == pytest.approx(by_example.mean().item(), rel=1e-3, abs=1e-6)
    assert prediction.standard_error == pytest.approx((by_example.std() / math.sqrt(WHOLE)).item(), rel=1e-3)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.05])
def test_the_largest_values_per_parameter_are_kept(measured, share):
    """A component of larger value than one that is kept is dropped only if there was no room for it."""
    _, spectrum, truth, _ = measured
    values = {}
    for name, true in truth.items():
        per_parameter = (true.values / spectrum.costs[name]).sort(descending=True).values
        values |= {(name, number): value for number, value in enumerate(per_parameter.tolist())}
    budget = int(share * spectrum.num_parameters)
    kept = {(name, number) for name, numbers in spectrum.keep(budget).items() for number in numbers}
    assert kept
    for component, value in values.items():
        lowest = min(values[one] for one in kept)
        if component not in kept and value > lowest + 1e-3 * abs(lowest):
            before = sum(spectrum.costs[one[0]] for one in kept if values[one] > value)
            assert before + spectrum.costs[component[0]] > budget


def test_a_spectrum_of_every_layer_type_in_float32_is_that_in_float64():
    found, expected = (spectrum_of(every_type(dtype), batches()) for dtype in (torch.float32, torch.float64))
    assert_same_spectrum(found, expected, rtol=1e-3)


def test_the_base_weights_of_an_attention_stay():
    """PEFT merges the adapter into them in every pass, with rounding."""
    model = every_type(torch.bfloat16, ["attention", "linear"])
    data = [{"ids": batch["ids"]} for batch in batches(range(6))]
    spectrum_of(model, data[:2])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spectrum_of(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def skipping(numbers):
    """A forward function whose loss is not finite in these batches."""
    count = iter(range(100))
    return lambda model, batch: model(**batch).loss * (math.nan if next(count) in numbers else 1.0)


@NOT_FINITE
def test_batches_of_one_kind_that_are_all_skipped():
    model = trained(llama())
    with (
        pytest.warns(UserWarning, match="ordered by saliency and norm"),
        pytest.warns(UserWarning, match="2 of 4 calibration batches"),
    ):
        spectrum = spectrum_of(model, lm_batches(4), forward_fn=skipping({1, 3}))
    assert (spectrum.num_batches, spectrum.num_skipped_batches, spectrum.num_scaled_examples) == (4, 2, 0)
    assert all(layer.gains is None for layer in spectrum.values())
    with pytest.raises(RuntimeError, match="All 2 calibration batches that ran with the adapter as it is"):
        spectrum_of(model, lm_batches(4), forward_fn=skipping({0, 2}))
    with pytest.warns(UserWarning, match="1 of 4 calibration batches"):
        spectrum = spectrum_of(model, lm_batches(4), forward_fn=skipping({2}))
    assert (spectrum.num_examples, spectrum.num_scaled_examples) == (12, 8)
    assert len(spectrum["model.layers.0.self_attn.q_proj"].gates) == 4


def test_warnings_show_the_line_of_the_user():
    with pytest.warns(UserWarning, match="yielded 2 batches") as caught:
        get_lora_spectrum(trained(llama(1)), lm_batches(2), num_batches=5, show_progress_bar=False)
    (warning,) = [one for one in caught if "yielded 2 batches" in str(one.message)]
    assert warning.filename == __file__
    with pytest.warns(UserWarning, match="1 of 3 calibration batches") as caught:
        spectrum_of(trained(llama(1)), lm_batches(3), forward_fn=skipping({2}))
    (warning,) = [one for one in caught if "1 of 3 calibration batches" in str(one.message)]
    assert warning.filename == trained.__code__.co_filename


def test_nothing_of_the_model_changes():
    model = trained(llama()).train()
    model.get_base_model().model.layers[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, config = [one.training for one in model.modules()], copy.deepcopy(model.peft_config["default"].__dict__)
    flags = [one.requires_grad for one in model.parameters()]
    spectrum = spectrum_of(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [one.training for one in model.modules()] == modes
    assert [one.requires_grad for one in model.parameters()] == flags
    assert all(one.grad is None for one in model.parameters())
    assert model.peft_config["default"].__dict__ == config
    assert not hooks_of(model)
    assert spectrum_of(model) == spectrum
    assert spectrum != get_lora_spectrum(model, None)


def test_dropout_takes_no_part():
    assert spectrum_of(trained(llama(), lora_dropout=0.5).train()) == spectrum_of(trained(llama()))


class TwoClasses(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 2)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.last(torch.tanh(self.first(x))), labels)}


def test_ranks_above_the_number_of_outputs_are_worth_nothing():
    """The update of a layer with two outputs has rank 2, so only two of its eight components are needed."""
    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(8, 6, generator=generator), "labels": torch.randint(2, (8,), generator=generator)}]
    model = trained(TwoClasses(), target_modules=["first", "last"], r=8)
    update = deltas_of(lora_layers(model)["last"])[0]
    for spectrum in (spectrum_of(model, data), get_lora_spectrum(model, None)):
        layer = spectrum["last"]
        assert max(layer.saliencies[2:]) < 1e-6 * layer.saliencies[1]
        torch.testing.assert_close(components_of(lora_layers(model)["last"], layer, [0, 1])[0], update)
        copied = copy.deepcopy(model)
        needed = 2 * layer.parameters_per_rank + 6 * spectrum["first"].parameters_per_rank
        result = compress_lora(copied, spectrum, keep=needed / spectrum.num_parameters)
        assert result.ranks["last"] == 2
        torch.testing.assert_close(deltas_of(lora_layers(copied)["last"])[0], update)


# --- The prediction against the measured loss ---


class Classifier(nn.Module):
    """A model whose training converges in a second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x, labels):
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return {"loss": nn.functional.cross_entropy(self.last(h), labels)}


def trained_classifier():
    """An adapter at the minimum of the loss of a model whose labels are drawn from its own predictions.

    There the empirical Fisher information is the Hessian in expectation.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    model = get_peft_model(Classifier(), LoraConfig(r=4, lora_alpha=4, target_modules=["first", "second"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                # Components of very different sizes, so that there are small ones to drop.
                sizes = torch.tensor([1.0, 0.3, 0.05, 0.01])
                random = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.7 * random * (sizes[:, None] if "lora_A" in name else 1.0))
    x = torch.randn(8192, 8, generator=generator)
    logits = []
    with torch.no_grad():
        handle = model.get_base_model().last.register_forward_hook(lambda *args: logits.append(args[-1]))
        model(x=x, labels=torch.zeros(len(x), dtype=torch.long))
        handle.remove()
    labels = torch.multinomial(logits[0].softmax(1), 1, generator=generator)[:, 0]
    data = [{"x": one, "labels": label} for one, label in zip(x.split(256), labels.split(256), strict=True)]
    return model.eval(), data


def test_small_cuts_cost_what_was_predicted():
    model, data = trained_classifier()
    spectrum = spectrum_of(model, data)
    increases = []
    for share in (7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8):
        copied = copy.deepcopy(model)
        # On the same examples, only two errors are left: that of the Fisher information of N = 4096 examples, about
        # N^-½ = 2 %, against the Hessian, and the higher orders, which grow with the increase.
        result = compress_lora(copied, spectrum, keep=share, eval_dataloader=data[::2], show_progress_bar=False)
        increases.append(result.loss_increase)
        assert result.loss_increase == pytest.approx(result.predicted.increase, rel=0.15)
    assert increases == sorted(increases)
    assert increases[-1] > 100 * increases[0] > 0


# --- How many batches ---


class Counting:
    def __init__(self, data):
        self.data, self.read = data, 0

    def __iter__(self):
        for batch in self.data:
            self.read += 1
            yield batch


def counted(model, data, **options):
    counting = Counting(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        spectrum = get_lora_spectrum(model, counting, show_progress_bar=False, **options)
    assert spectrum.num_batches <= counting.read <= spectrum.num_batches + 1
    return spectrum


def test_batches_are_read_until_two_halves_agree():
    model = trained(llama(1))
    same = [token_batch(2, 8, seed=0)] * 20
    assert counted(model, same).num_batches == 4  # two for each half, as it is and scaled
    alternating = [token_batch(2, 8, seed=seed) for seed in range(200)]
    spectrum = counted(model, alternating)
    assert spectrum.num_batches in (4, 8, 16, 32, MAX_BATCHES)
    # Two halves that never agree: all batches of one are without the second layer's input.
    assert counted(model, alternating, num_batches=3).num_batches == 3
    assert counted(model, alternating[:3]).num_batches == 3  # no warning about fewer batches


def test_halves_that_never_agree_end_at_the_limit():
    class Two(nn.Module):
        """The batches of one half depend on one layer only, those of the other half on the other."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, which):
            y = self.one(x) if which[0] == 0 else self.two(x)
            return {"loss": y.square().sum(1).mean()}

    model = trained(Two(), target_modules=["one", "two"])
    generator = torch.Generator().manual_seed(0)
    data = [
        {"x": torch.randn(2, 6, generator=generator), "which": torch.tensor([number // 2 % 2, 0])}
        for number in range(100)
    ]
    assert counted(model, data).num_batches == MAX_BATCHES


def test_too_few_batches_are_a_warning_where_a_number_was_asked_for():
    with pytest.warns(UserWarning, match="yielded 2 batches, but 5 were asked for"):
        get_lora_spectrum(trained(llama(1)), lm_batches(2), num_batches=5, show_progress_bar=False)


# --- Conditions ---


def checkpointed(model, kind):
    """The blocks of the model recompute their activations, also in eval mode."""
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: isinstance(module, LlamaDecoderLayer)
    )
    return model


@pytest.mark.parametrize("kind", [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])
def test_gradient_checkpointing(kind):
    model = trained(llama())
    expected = spectrum_of(model)
    model.config.use_cache = False  # a block that runs twice would fill it twice
    model = checkpointed(model, kind)
    if kind == CheckpointImpl.REENTRANT:
        model.enable_input_require_grads()
    found = spectrum_of(model)
    assert_same_spectrum(found, expected)
    result = compress_lora(model, found, keep=0.5)
    assert result == compress_lora(trained(llama()), expected, keep=0.5)


def test_gradient_checkpointing_of_transformers_stays_switched_on():
    model = trained(llama()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert spectrum_of(model) == spectrum_of(trained(llama()))
    assert model.is_gradient_checkpointing


def assert_equal_in_another_order(found, expected, noise):
    """Components of nearly the same worth may change places."""
    for field in ("saliencies", "gains"):
        values = sorted(getattr(expected, field))
        tolerance = noise * max(map(abs, values))
        np.testing.assert_allclose(sorted(getattr(found, field)), values, rtol=0.2, atol=tolerance, err_msg=field)


def test_autocast():
    model = trained(llama())
    exact = spectrum_of(model)
    found = spectrum_of(model, forward_fn=under_autocast(torch.bfloat16))
    for name, layer in exact.items():
        # The noise of a forward and backward pass in bfloat16.
        assert_equal_in_another_order(found[name], layer, 0.03)
    with torch.autocast("cpu", torch.bfloat16):
        around = spectrum_of(model)
    assert_same_spectrum(around, found, rtol=1e-2)


def test_float32_adapters_in_a_bfloat16_model():
    model = trained(llama().bfloat16())
    assert {layer.lora_A["default"].weight.dtype for layer in lora_layers(model).values()} == {torch.float32}
    found, exact = spectrum_of(model), spectrum_of(trained(llama()))
    for name, layer in exact.items():
        assert_equal_in_another_order(found[name], layer, 0.04)
    # The weights are the same, so the components without data are.
    assert get_lora_spectrum(model, None) == get_lora_spectrum(trained(llama()), None)


def test_an_adapter_saved_in_half_precision_is_the_same_when_it_is_loaded_in_float32():
    half = get_peft_model(llama().bfloat16(), LoraConfig(r=4, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    for layer in lora_layers(half).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    spectrum = get_lora_spectrum(half, None)
    wide = copy.deepcopy(half).float()
    result = compress_lora(wide, spectrum, keep=0.5)
    assert result.ranks == compress_lora(half, spectrum, keep=0.5).ranks


def dispatched(folder):
    model = llama()
    model.config.use_cache = False
    places = {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "norm": "cpu", "rotary_emb": "cpu"}
    device_map = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "disk"}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder)


def test_an_adapter_of_offloaded_base_weights(tmp_path):
    model, offloaded = (fim_model(base, r=4) for base in (llama(), dispatched(tmp_path)))
    for one in (model, offloaded):
        initialize_lora_fim_ranks(one, lm_batches(2), show_progress_bar=False)
        fill(one)
    assert offloaded.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.device.type == "meta"
    spectrum = spectrum_of(offloaded)
    assert_same_spectrum(spectrum, spectrum_of(model))
    result = compress_lora(offloaded, spectrum, keep=0.5)
    assert result == compress_lora(model, spectrum, keep=0.5)
    torch.testing.assert_close(logits(offloaded), logits(model))
    assert len(result.dropped_layers) > 0


def test_an_adapter_that_peft_loads_into_a_dispatched_model(tmp_path):
    model = trained(llama())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(dispatched(tmp_path / "weights"), tmp_path / "adapter")
    spectrum = spectrum_of(loaded)
    assert spectrum == spectrum_of(model)
    assert compress_lora(loaded, spectrum, keep=0.5) == compress_lora(model, spectrum, keep=0.5)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_offloaded_experts_and_attention():
    """They run again in the backward pass, after their weights have been dropped."""
    expected = spectrum_of(every_type(names=["attention", "experts.up", "linear"]), batches())
    model = every_type(names=["attention", "experts.up", "linear"])
    base = model.get_base_model()
    for module in (base.linear.base_layer, base.old_linear):
        cpu_offload(module, execution_device=torch.device("cpu"))
    assert base.linear.base_layer.weight.device.type == "meta"
    assert_same_spectrum(spectrum_of(model, batches()), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models(in_place):
    torch.compiler.reset()
    plain, model = trained(llama(1)), trained(llama(1))
    inner = model
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = model(**token_batch()).logits
    torch.testing.assert_close(before, logits(plain))
    spectrum = spectrum_of(model)
    assert spectrum == spectrum_of(plain)
    result = compress_lora(model, spectrum, keep=0.4)
    assert result == compress_lora(plain, spectrum, keep=0.4)
    with torch.no_grad():
        torch.testing.assert_close(model(**token_batch()).logits, logits(plain), rtol=1e-5, atol=1e-5)
    assert inner.peft_config["default"].r == max(result.ranks.values())
    torch.compiler.reset()

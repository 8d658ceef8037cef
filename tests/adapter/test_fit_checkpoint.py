"""Checkpoints with smaller ranks than the model into which they are loaded."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from fim_lora import compress_lora, get_lora_spectrum
from fim_lora.adapter.fit_checkpoint import fit_to_checkpoints, stop_fitting
from helpers.adapters import ranks_in
from helpers.every_layer_type import MODULES, NAMES, EveryType, every_type, outputs
from helpers.trained_adapters import b_of, lora_layers_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, about the model


def narrow(keep, names=NAMES, **options):
    """An adapter after a cut."""
    model = every_type(names=names, **options)
    return model, compress_lora(model, get_lora_spectrum(model, None), keep=keep)


def weights_of(model):
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


def load(model, other):
    return set_peft_model_state_dict(model, get_peft_model_state_dict(other))


@pytest.mark.parametrize(
    ("names", "keep", "options"),
    [
        (NAMES, 0.7, {}),
        (NAMES, 0.7, {"use_rslora": True}),
        (NAMES, 0.7, {"alpha_pattern": {"linear": 3}, "rank_pattern": {"linear": 6}}),
        (MODULES, 0.2, {}),
    ],
)
def test_the_model_becomes_that_of_the_checkpoint(names, keep, options):
    expected, compression = narrow(keep, names, **options)
    assert len(set(compression.ranks.values())) > 1
    assert bool(compression.dropped_layers) == (keep < 0.5)
    model = every_type(names=names, **options)
    parameters = weights_of(model)
    fit_to_checkpoints(model, "default")
    loaded = load(model, expected)
    assert not loaded.unexpected_keys
    assert not any("lora_" in key for key in loaded.missing_keys)
    assert torch.equal(outputs(model), outputs(expected))
    assert ranks_in(model) == ranks_in(expected)
    assert model.peft_config["default"].to_dict() == expected.peft_config["default"].to_dict()
    for name, weight in weights_of(model).items():
        assert weight is parameters[name]
        assert weight.requires_grad
        assert torch.equal(weight, weights_of(expected)[name])
    # And again, now that the shapes fit.
    load(model, expected)
    assert torch.equal(outputs(model), outputs(expected))


def test_without_fitting_pytorch_refuses_the_checkpoint():
    expected, _ = narrow(0.7)
    model = every_type()
    fit_to_checkpoints(model, "default")
    stop_fitting(model, "default")
    stop_fitting(model, "default")
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(model, expected)


def test_a_copy_of_the_model_fits_itself():
    expected, _ = narrow(0.7)
    model = every_type()
    fit_to_checkpoints(model, "default")
    ranks = ranks_in(model)
    twin = copy.deepcopy(model)
    load(twin, expected)
    assert torch.equal(outputs(twin), outputs(expected))
    assert ranks_in(model) == ranks


def test_an_optimizer_forgets_the_removed_layers():
    expected, compression = narrow(0.2, MODULES)
    model = every_type(names=MODULES)
    before = weights_of(model)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    fit_to_checkpoints(model, "default", optimizer)
    load(model, expected)
    assert compression.dropped_layers
    left = weights_of(model)
    assert [id(one) for one in optimizer.param_groups[0]["params"]] == [
        id(one) for name, one in before.items() if name in left
    ]


@pytest.mark.parametrize("what", ["base", "other adapter", "nothing"])
def test_a_state_dict_without_the_adapter_changes_nothing(what):
    model = every_type(names=MODULES)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    fit_to_checkpoints(model, "default")
    before = copy.deepcopy(model.state_dict())
    ranks = ranks_in(model)
    state = {
        "base": {name: value for name, value in before.items() if "lora_" not in name},
        "other adapter": {name: value + 1 for name, value in before.items() if ".other" in name},
        "nothing": {},
    }[what]
    model.load_state_dict(state, strict=False)
    assert ranks_in(model) == ranks
    for name, value in model.state_dict().items():
        assert torch.equal(value, state.get(name, before[name]))


@pytest.mark.parametrize(
    ("model", "checkpoint", "message"),
    [
        (
            lambda: narrow(0.7)[0],
            every_type,
            r"has rank 4 for layer '\w+', but the model has rank \d: it was saved before the adapter was cut",
        ),
        (
            lambda: narrow(0.2, MODULES)[0],
            lambda: every_type(names=MODULES),
            r"has (rank|weights) .*, but the model has .*: it was saved before the adapter was cut",
        ),
        (
            lambda: every_type(names=["linear"]),
            lambda: every_type(names=["linear", "convolution"]),
            r"has weights '[\w.]+convolution[\w.]+', but the model has no adapter there",
        ),
    ],
)
def test_a_checkpoint_that_is_larger_is_refused(model, checkpoint, message):
    model, checkpoint = model(), checkpoint()
    fit_to_checkpoints(model, "default")
    before, expected = copy.deepcopy(model.state_dict()), outputs(model)
    with pytest.raises(ValueError, match=message) as raised:
        load(model, checkpoint)
    assert "PeftModel.from_pretrained" in str(raised.value)
    torch.testing.assert_close(weights_of(model), {name: before[name] for name in weights_of(model)}, rtol=0, atol=0)
    torch.testing.assert_close(outputs(model), expected)


def test_one_of_two_parameters_of_a_module_has_lost_its_adapter(tmp_path):
    """Both wrappers are nested, and the weights of the one that is left are stored under one name."""
    names = ["experts.up", "experts.down"]
    expected = every_type(names=names)
    with torch.no_grad():
        b_of(lora_layers_of(expected)["experts.up"]).zero_()
    result = compress_lora(expected, get_lora_spectrum(expected, None), keep=0.4)
    assert result.dropped_layers == ["experts.up"]
    model = every_type(names=names)
    fit_to_checkpoints(model, "default")
    with pytest.raises(ValueError, match=r"only some of the parameters \['experts.down', 'experts.up'\]"):
        load(model, expected)
    expected.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(EveryType(), tmp_path, is_trainable=True).eval()
    fit_to_checkpoints(again, "default")
    load(again, expected)
    assert torch.equal(outputs(again), outputs(expected))

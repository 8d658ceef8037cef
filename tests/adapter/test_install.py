"""What importing fim_lora changes in PEFT, and what it does not change."""

import dataclasses
import inspect
import pickle
import sys
import textwrap
import typing
import warnings

import peft
import pytest
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner

import fim_lora
from fim_lora import FimConfig
from fim_lora.adapter.install import install
from helpers.fork_server import run_in_fork
from helpers.tiny_models import llama

BEFORE = """
import sys, warnings
warnings.simplefilter("ignore")
assert not {"peft", "fim_lora"} & set(sys.modules)
"""


def python(code):
    """Runs code in a process that has imported neither PEFT nor fim_lora, and returns its output."""
    status, output = run_in_fork(
        BEFORE + textwrap.dedent(code), "torch", "transformers", "accelerate", variables=(("PYTHONHASHSEED", "0"),)
    )
    assert status == 0, output
    return output


def test_names_can_be_imported_from_everywhere():
    from peft.tuners.lora.fim import FimConfig as FimConfigOfPeft

    for module in (fim_lora, peft, peft.tuners.lora, sys.modules["peft.tuners.lora.fim"]):
        assert module.FimConfig is FimConfig is FimConfigOfPeft
        assert module.initialize_lora_fim_ranks is fim_lora.initialize_lora_fim_ranks
        assert module.get_fim_scores is fim_lora.get_fim_scores


@pytest.mark.parametrize(
    "order",
    [
        "import fim_lora\nfrom peft import LoraConfig, get_peft_model",
        "from peft import LoraConfig, get_peft_model\nimport fim_lora",
    ],
)
def test_order_of_imports(order):
    code = """
from peft.tuners.lora.fim import FimConfig, initialize_lora_fim_ranks
import torch
model = torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 9))
fim_config = FimConfig(fim_calibration_batches=1)
config = LoraConfig(r=2, init_lora_weights="fim", fim_config=fim_config, target_modules=["0", "1"])
model = get_peft_model(model, config)
model(torch.ones(3, 9)).mean().backward()
print(sum(initialize_lora_fim_ranks(model).ranks.values()))
"""
    assert python(order + code).strip() == "4"


def test_the_import_does_not_load_the_trainer_of_transformers():
    output = python("""
        import peft
        before = "transformers.trainer" in sys.modules
        import fim_lora
        print(before, "transformers.trainer" in sys.modules)
    """)
    assert output.strip() == "False False"


def test_the_field():
    fields = {field.name: field for field in dataclasses.fields(LoraConfig)}
    assert fields["fim_config"].default is None
    assert list(inspect.signature(LoraConfig).parameters)[-1] == "fim_config"
    config = LoraConfig(init_lora_weights="fim", fim_config={"r_max": 12, "fim_calibration_batches": 2})
    assert config.fim_config == FimConfig(r_max=12, fim_calibration_batches=2)
    assert config == LoraConfig(init_lora_weights="fim", fim_config=config.fim_config)
    assert config != LoraConfig(init_lora_weights="fim")
    assert "fim_config=FimConfig(fim_calibration_batches=2" in repr(config)
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, r=4).fim_config == config.fim_config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LoraConfig(init_lora_weights="fim").fim_config == FimConfig()
    with pytest.raises(TypeError, match="`fim_config` must be a FimConfig, a dict or None, got 3"):
        LoraConfig(fim_config=3)
    with pytest.warns(UserWarning, match="`fim_config` specified but will be ignored when .* is not 'fim'"):
        LoraConfig(fim_config=FimConfig())


def test_the_annotations_can_be_resolved():
    # A derived config resolves the annotations of its bases, too.
    for config_class in (LoraConfig, AdaLoraConfig):
        assert typing.get_type_hints(config_class)["fim_config"] == FimConfig | None
    assert inspect.signature(LoraConfig).parameters["fim_config"].annotation == FimConfig | None


def test_the_signature_of_a_method_is_that_of_peft():
    assert inspect.signature(peft.LoraModel.inject_adapter) == inspect.signature(BaseTuner.inject_adapter)


def test_derived_configs_are_what_they_were():
    config = AdaLoraConfig(total_step=10, target_modules=["q_proj"])
    assert "fim_config" not in {field.name for field in dataclasses.fields(config)}
    assert "fim_config" not in config.to_dict()
    model = get_peft_model(llama(), config)
    assert not any(module._forward_hooks for module in model.modules())
    # PEFT accepts any word as the initialization of AdaLoRA, and would ignore this one.
    with pytest.raises(ValueError, match=r'AdaLoraConfig has no init_lora_weights="fim".* Use LoraConfig'):
        AdaLoraConfig(total_step=10, target_modules=["q_proj"], init_lora_weights="fim")


def test_mixed_adapters_are_refused_by_name():
    model = llama()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r'"fim", which get_peft_model\(\.\.\., mixed=True\) cannot create'):
        get_peft_model(model, LoraConfig(init_lora_weights="fim", target_modules=["q_proj"]), mixed=True)
    assert {name: type(module) for name, module in model.named_modules()} == before
    mixed = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ValueError, match="Adapter 'other' has init_lora_weights=\"fim\""):
        mixed.add_adapter("other", LoraConfig(init_lora_weights="fim", target_modules=["q_proj"]))


CONFIGS = """
import dataclasses, json, sys, tempfile, pathlib
from peft import AdaLoraConfig, EvaConfig, IA3Config, LoraConfig, get_peft_model
import torch
configs = [
    LoraConfig(),
    LoraConfig(r=3, target_modules=["0"], rank_pattern={"0": 2}, use_rslora=True),
    LoraConfig(init_lora_weights="gaussian", target_modules="all-linear", use_dora=True),
    LoraConfig("CAUSAL_LM", target_modules="0"),
    LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.5), target_modules=["0"]),
    AdaLoraConfig(total_step=10, target_modules=["0"]),
    IA3Config(target_modules=["0"], feedforward_modules=[]),
]
for config in configs:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        print(pathlib.Path(folder, "adapter_config.json").read_bytes())
    print(repr(config), sorted(config.to_dict()), hash(type(config)) != 0)
for config in configs[1:3]:
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    print({name: value.sum().item() for name, value in model.state_dict().items()})
    print([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()])
    print(sorted(vars(model.base_model.model)))
try:
    LoraConfig(nonsense=1)
except TypeError as error:
    print(error)
"""


def test_nothing_changes_for_other_configs():
    """Bytes written, representation, weights and hooks, in a process without fim_lora and in one with it."""
    stock = python(CONFIGS)
    assert stock == python("import fim_lora\n" + CONFIGS)
    assert len(stock) > 3000


@pytest.mark.parametrize(
    ("options", "bounds", "message"),
    [
        ({"r": 16}, {"r_max": 8}, "r is 16, above r_max=8 of `fim_config`: raise r_max or lower it"),
        ({"r": 2}, {"r_min": 3}, "r is 2, below r_min=3 of `fim_config`: lower r_min or raise it"),
        ({"rank_pattern": {"q_proj": 9}}, {"r_max": 8}, r"rank_pattern\['q_proj'\] is 9, above r_max=8"),
    ],
)
def test_ranks_beyond_the_bounds_are_refused_when_the_config_is_made(options, bounds, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(init_lora_weights="fim", fim_config=FimConfig(**bounds), **options)


def test_installing_again_changes_nothing():
    changed = (LoraConfig, peft.tuners.lora.LoraModel, peft.tuners.lora.LoraLayer, peft.tuners.MixedModel)
    before = [dict(vars(one)) for one in changed]
    install({"FimConfig": None})
    assert [dict(vars(one)) for one in changed] == before
    assert peft.FimConfig is FimConfig
    # Reloading the module, as notebooks do, changes nothing either.
    output = python("""
        import importlib, fim_lora, fim_lora.adapter.install
        from peft import LoraConfig
        before = LoraConfig.__init__, LoraConfig.to_dict
        importlib.reload(fim_lora.adapter.install)
        importlib.reload(fim_lora)
        print(before == (LoraConfig.__init__, LoraConfig.to_dict))
    """)
    assert output.strip() == "True"


@pytest.mark.parametrize(
    "shipped",
    [
        "sys.modules['peft.tuners.lora.fim'] = types.ModuleType('peft.tuners.lora.fim')",
        "LoraConfig.__dataclass_fields__['fim_config'] = dataclasses.field(default=None)",
    ],
)
def test_a_fim_initialization_of_peft_itself_is_left_alone(shipped):
    output = python(f"""
        import dataclasses, sys, types
        import peft
        from peft import LoraConfig
        {shipped}
        before = dict(vars(LoraConfig)), dict(vars(peft.LoraModel)), dict(vars(peft.tuners.lora))
        try:
            import fim_lora
        except ImportError as error:
            print(error)
        print(before == (dict(vars(LoraConfig)), dict(vars(peft.LoraModel)), dict(vars(peft.tuners.lora))))
        print(hasattr(peft, "FimConfig"))
    """)
    message, unchanged, added = output.strip().splitlines()
    assert f"PEFT {peft.__version__} has its own `fim` initialization" in message
    assert (unchanged, added) == ("True", "False")

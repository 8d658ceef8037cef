"""The code of README and docs runs as it is written, with small models and files under the names it uses."""

import re
import shlex

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from typer.main import get_command

import fim_lora
from fim_lora.config import FimConfig
from fim_lora_command import main
from fim_lora_command.app import app
from helpers.diffusion import noisy_latents, unet
from helpers.documentation import (
    ROOT,
    allocated,
    awaiting_config,
    awaiting_model,
    blocks,
    classified_sentences,
    classifier,
    load_model,
    pages,
    run_page,
    small_adapter,
    small_model,
    text_batches,
    text_dataset,
    trained_model,
    write_data,
)
from helpers.trained_adapters import fill

# TRL trains without a GPU only if it is told so.
SMALL = {"max_steps=500": "max_steps=50, use_cpu=True, report_to='none'"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("documentation"))


@pytest.fixture(scope="module")
def adapter(model):
    return small_adapter(model, model.parent)


@pytest.fixture
def run(model, adapter, tmp_path, monkeypatch):
    """Run a page in a new folder that has the data files."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)

    def run(page, make_names=dict):
        replacements = SMALL | {"HuggingFaceTB/SmolLM2-135M": str(model), "ADAPTER": str(adapter)}
        return run_page(page, replacements, make_names)

    return run


def size(folder):
    """Number of adapter parameters in a folder, read from its file alone."""
    return sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())


def test_readme(run, tmp_path):
    names = run("README.md")
    assert 0 < size(tmp_path / "small") <= size(tmp_path / "adapter") / 2
    # The script has trained, so B is not zero.
    assert all(weight.any() for name, weight in names["model"].named_parameters() if "lora_B" in name)


def test_getting_started(run, model, adapter, tmp_path):
    (tmp_path / "adapter").symlink_to(adapter)
    names = run("docs/getting_started.md", lambda: {"base_model": load_model(model), "dataloader": text_batches()})
    assert 0 < size(tmp_path / "small") <= size(adapter) / 2
    assert names["model"].peft_config["default"].rank_pattern


def test_before_training(run, model):
    names = run(
        "docs/before.md",
        lambda: {
            "base_model": load_model(model),
            "calibration_loader": text_batches(),
            "model": awaiting_model(model),
        },
    )
    assert names["lora_config"].r == 4
    assert names["allocation"].num_batches == FimConfig().fim_calibration_batches


def trained_names(model, adapter):
    trained, dataloader = trained_model(model, adapter), text_batches()
    optimizer = torch.optim.AdamW(parameter for parameter in trained.parameters() if parameter.requires_grad)
    spectrum = fim_lora.get_lora_spectrum(trained, dataloader, num_batches=2, show_progress_bar=False)
    return {"model": trained, "dataloader": dataloader, "optimizer": optimizer, "spectrum": spectrum}


def test_during_training(run, model, adapter):
    data = {"dataset": text_dataset(), "classifier": classifier(model), "classified_sentences": classified_sentences()}
    names = run("docs/during.md", lambda: trained_names(model, adapter) | data)
    assert names["callback"].cut_at_step == 10  # a fifth of the steps
    assert names["callback"].compression.num_parameters < names["callback"].compression.num_parameters_before


def test_after_training(run, model, adapter, tmp_path):
    run("docs/compression.md", lambda: trained_names(model, adapter))
    assert 0 < size(tmp_path / "small") <= size(adapter) / 2


def test_training_guide(run, model):
    # tests/runtime/test_distributed.py has sharded models, which need several processes; here the model is whole.
    def names():
        base_model = load_model(model)
        return {
            "base_model": base_model,
            "sharded_base_model": base_model,
            "config": awaiting_config(),
            "dataset": text_dataset(),
            "loader": DataLoader(text_batches(), batch_size=None),
            "unet": unet(),
            "dataloader": [noisy_latents(seed) for seed in range(8)],
        }

    run("docs/training.md", names)


def test_serving(run, model, tmp_path):
    def names():
        adapted, allocation = allocated(model)
        fill(adapted)
        return {"model": adapted, "allocation": allocation, "folder": tmp_path / "served"}

    names = run("docs/serving.md", names)
    served = LoraConfig.from_pretrained(tmp_path / "served")
    config = names["model"].peft_config["default"]
    assert served.r == config.r == max(names["allocation"].ranks.values())
    scalings = {layer.scaling["default"] for layer in names["model"].modules() if isinstance(layer, LoraLayer)}
    assert scalings == {config.lora_alpha / config.r}


def test_command_line(run, tmp_path):
    run("docs/command_line.md")
    assert (tmp_path / "ranks.csv").read_text().startswith("layer,")


def test_reports(run, adapter, tmp_path):
    # The page begins with a folder of fim-lora compress.
    assert main(["compress", str(adapter), "--data", "train.jsonl", "--keep", "0.5", "--output", "small"]) == 0
    run("docs/report.md")
    assert (tmp_path / "report.html").read_bytes() == (tmp_path / "small" / "report.html").read_bytes()


def test_single_elements(run, model):
    names = run("docs/diagonals.md", lambda: {"model": load_model(model), "dataloader": text_batches()})
    zeros = [float((names["model"].get_submodule(name).weight == 0).float().mean()) for name in names["diagonals"]]
    assert zeros == pytest.approx([0.3] * len(zeros), abs=0.01)


RUN_HERE = {
    "README.md",
    "docs/before.md",
    "docs/command_line.md",
    "docs/compression.md",
    "docs/diagonals.md",
    "docs/during.md",
    "docs/getting_started.md",
    "docs/report.md",
    "docs/serving.md",
    "docs/training.md",
}


def test_no_page_with_code_is_forgotten():
    """CONTRIBUTING has a test of its own."""
    with_code = {page for page in pages() if list(blocks(page, "python"))}
    commands = {page for page, words in shell_commands() if words[0] == "fim-lora"}
    assert with_code | commands == RUN_HERE | {"CONTRIBUTING.md"}


def shell_commands():
    for page in pages():
        for block in blocks(page, "sh"):
            yield from ((page, words) for words, _ in block.commands)


def test_other_commands_name_files_and_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, words in shell_commands():
        while "=" in words[0]:  # a variable of the environment
            words = words[1:]
        place = f"{page}: {shlex.join(words)}"
        program = words[0].removeprefix(".venv/bin/")
        if program == "make":
            assert set(words[1:]) <= targets, place
        elif program == "python" and words[1:3] != ["-m", "pip"]:
            files = [word for word in words if word.startswith(("tests/", "benchmarks/", "examples/"))]
            assert files, place
            assert all((ROOT / file).exists() for file in files), place
        else:
            assert program in ("fim-lora", "python", "pre-commit"), place


def test_options_in_the_text_exist():
    command = get_command(app)
    commands = (command, *command.commands.values())
    known = {option for one in commands for parameter in one.params for option in parameter.opts}
    for page in ("README.md", "docs/command_line.md", "docs/compression.md", "docs/report.md", "docs/serving.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for code in re.findall(r"`([^`\n]+)`", text):
            if code.startswith(("-", "fim-lora ")):
                assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", code)) <= known | {"--help"}, f"{page}: {code}"


def test_the_table_of_fim_config_has_every_field_and_its_default():
    text = (ROOT / "docs/fim_config.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE))
    assert {name: eval(default, {}) for name, default in rows.items()} == vars(FimConfig())


def test_the_api_page_has_every_public_name():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    rendered = {name.split(".")[-1] for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    assert rendered >= set(fim_lora.__all__)
    table = text.split("## Before training")[0]
    assert set(fim_lora.__all__) <= set(re.findall(r"`(\w+)`", table))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120

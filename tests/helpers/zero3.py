"""What `test_zero3.py` runs with torchrun: a model sharded by DeepSpeed's ZeRO-3, on the CPU."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from fim_lora import compress_lora, get_lora_spectrum
from helpers import several_processes, spectra_in_processes
from helpers.trained_adapters import trained

OPTIONS = {
    "train_micro_batch_size_per_gpu": 1,
    # Otherwise small weights are not sharded.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def main(folder):
    deepspeed.init_distributed(dist_backend="gloo")
    rank = dist.get_rank()
    model = several_processes.base().float()
    engine, *_ = deepspeed.initialize(
        model=model, config=OPTIONS, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    assert {tuple(parameter.shape) for parameter in model.parameters()} == {(0,)}
    config = several_processes.config()
    result = {
        "module": several_processes.scores(engine.module, several_processes.SHARES[rank], config),
        "engine": several_processes.scores(engine, several_processes.ONE_HAS_NONE[rank], config),
    }
    # Every parameter is trained afterwards.
    loss = engine(**several_processes.EVEN[rank][0]).loss
    engine.backward(loss)
    result["without_gradient"] = [
        name for name, parameter in model.named_parameters() if deepspeed.utils.safe_get_full_grad(parameter) is None
    ]
    result["spectrum"] = spectrum_of_adapter(rank)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


def adapter():
    return trained(several_processes.base().float())


def spectrum_of_adapter(rank):
    """The spectrum of a sharded adapter, and why it cannot be truncated."""
    model = adapter()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=OPTIONS, optimizer=torch.optim.SGD(weights, lr=0.1))
    assert {tuple(parameter.shape) for parameter in model.parameters()} == {(0,)}
    spectrum = spectra_in_processes.spectrum(engine, several_processes.SHARES[rank])
    without_data = get_lora_spectrum(engine, None)
    error = several_processes.error_of(lambda: compress_lora(model, spectrum, keep=0.5))
    return {"measured": spectrum.to_dict(), "without_data": without_data.to_dict(), "error": error}


if __name__ == "__main__":
    main(sys.argv[1])

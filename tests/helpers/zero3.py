"""What `test_zero3.py` runs with torchrun: a model sharded by DeepSpeed's ZeRO-3, on the CPU."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from helpers import several_processes

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
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])

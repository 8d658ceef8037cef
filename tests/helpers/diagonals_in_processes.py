"""What `test_diagonals.py` runs with torchrun: every case in every process. The results go to files."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fim_lora import get_fim_diagonals
from fim_lora.fisher import diagonal
from helpers.single_layers import WIDTH, batches_of, floats
from helpers.torchrun import end_process

# Unequal sizes and unequal numbers. The first process has more.
BATCHES = [batch for size in (3, 4, 2, 1) for batch in batches_of(floats(5, WIDTH), batch_size=size, count=1)]
SHARES = {"unequal": [BATCHES[:3], BATCHES[3:]], "one has none": [BATCHES, []]}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x, target):
        x = x.double() + self.embedding((x[..., 0] * 10).long() % 7)
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return {"loss": (x - target[:, None, None]).square().flatten(1).sum(1).mean()}


def sharded(model):
    for layer in (model.embedding, model.first, model.second):
        fully_shard(layer)
    return fully_shard(model)


def flattened(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp1": flattened, "fsdp2": sharded}


def diagonals_of(model, batches):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The dataloader yielded")
        return get_fim_diagonals(model, batches, num_batches=4, show_progress_bar=False)


def error_of_different_names(rank):
    try:
        get_fim_diagonals(Model().double(), BATCHES, [["first"], ["second"]][rank], show_progress_bar=False)
    except RuntimeError as error:
        return str(error)
    return None


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    diagonal.MAX_TEMPORARY_BYTES = 3 * WIDTH * 8  # the processes exchange three rows at a time of some layers
    for name, shares in SHARES.items():
        for kind, wrap in WRAPPERS.items():
            diagonals_of(wrap(Model().double()), shares[rank]).save(Path(folder, f"{name} {kind} {rank}"))
    Path(folder, f"error {rank}").write_text(str(error_of_different_names(rank)))
    end_process()


if __name__ == "__main__":
    main(sys.argv[1])

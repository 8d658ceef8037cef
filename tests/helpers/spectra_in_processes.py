"""What `test_spectrum_distributed.py` runs with torchrun: every case in every process. The results go to files."""

import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fim_lora import compress_lora, get_lora_spectrum
from fim_lora.fisher.evaluation import mean_loss
from helpers.every_layer_type import batches, every_type
from helpers.several_processes import (
    ALL,
    EVEN,
    ONE_HAS_NONE,
    SHARES,
    breaking,
    error_of,
    loss_that_fails_once,
    sharded,
)
from helpers.tiny_models import llama
from helpers.torchrun import run_cases
from helpers.trained_adapters import trained

CASES = {}
# Everything but the attention: PEFT registers its weights a second time, which FSDP2 refuses.
SHARDED_TYPES = ["embedding", "convolution", "linear", "experts.up", "experts.down"]


def case(function):
    CASES[function.__name__] = function
    return function


def adapter():
    return trained(llama().double())


def spectrum(model, data, num_batches=4):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The dataloader yielded")
        return get_lora_spectrum(model, data, num_batches=num_batches, show_progress_bar=False)


def weights(model):
    return {name: value.tolist() for name, value in model.named_parameters() if "lora_" in name}


@case
def shares(rank):
    return spectrum(adapter(), SHARES[rank]).to_dict()


@case
def ddp(rank):
    return spectrum(DistributedDataParallel(adapter()), SHARES[rank]).to_dict()


@case
def one_has_none(rank):
    return spectrum(adapter(), ONE_HAS_NONE[rank]).to_dict()


@case
def fsdp2(rank):
    return spectrum(sharded(adapter()), SHARES[rank]).to_dict()


@case
def fsdp2_one_has_none(rank):
    return spectrum(sharded(adapter()), ONE_HAS_NONE[rank]).to_dict()


@case
def fsdp2_without_data(rank):
    return get_lora_spectrum(sharded(adapter()), None).to_dict()


def sharded_types():
    model = every_type(torch.float64, SHARDED_TYPES)
    base = model.get_base_model()
    for unit in (base.embedding, base.convolution, base.linear, base.experts):
        fully_shard(unit)
    fully_shard(base)
    return model


@case
def fsdp2_of_every_layer_type(rank):
    return spectrum(sharded_types(), batches([[0, 1], [2]][rank])).to_dict()


@case
def automatic_number_of_batches(rank):
    return spectrum(adapter(), [SHARES[0][0]] * 20, num_batches=None).to_dict()


@case
def compressed(rank):
    model = adapter()
    found = spectrum(model, SHARES[rank])
    torch.manual_seed(100 + rank)  # another seed in every process
    result = compress_lora(model, found, keep=0.4, eval_dataloader=SHARES[rank], show_progress_bar=False)
    return {
        "result": result.to_dict(),
        "weights": weights(model),
        "loss": mean_loss(model, SHARES[rank], show_progress_bar=False),
    }


@case
def compressed_to_a_measured_loss(rank):
    model = adapter()
    found = spectrum(model, SHARES[rank])
    result = compress_lora(
        model, found, max_loss_increase=0.2, eval_dataloader=iter(SHARES[rank]), show_progress_bar=False
    )
    return {"result": result.to_dict(), "weights": weights(model)}


@case
def other_sizes(rank):
    model = adapter()
    found = get_lora_spectrum(model, None)
    before = weights(model)
    error = error_of(lambda: compress_lora(model, found, keep=(0.5, 0.25)[rank]))
    return {"error": error, "unchanged": weights(model) == before}


@case
def sharded_adapters(rank):
    model = sharded(adapter())
    found = spectrum(model, SHARES[rank])
    flattened = FullyShardedDataParallel(adapter(), device_id=torch.device("cpu"), use_orig_params=True)
    loss = mean_loss(model, EVEN[rank], show_progress_bar=False)
    return {
        "errors": [
            error_of(lambda: compress_lora(model, found, keep=0.5)),
            error_of(lambda: spectrum(flattened, SHARES[rank])),
        ],
        "loss": loss,
    }


@case
def failures(rank):
    model = adapter()
    before = weights(model)
    found = spectrum(model, SHARES[rank])
    quiet = {"show_progress_bar": False}
    broken = lambda: compress_lora(  # noqa: E731
        model, found, keep=0.5, eval_dataloader=breaking(ALL, rank), **quiet
    )
    errors = [
        error_of(lambda: spectrum(model, breaking(ALL, rank))),
        error_of(
            lambda: get_lora_spectrum(model, EVEN[rank], num_batches=2, forward_fn=loss_that_fails_once(rank), **quiet)
        ),
        error_of(broken),
        error_of(
            lambda: compress_lora(
                model,
                found,
                max_loss_increase=0.1,
                eval_dataloader=ALL,
                forward_fn=loss_that_fails_once(rank),
                **quiet,
            )
        ),
    ]
    layer = model.get_base_model().model.layers[1].self_attn.v_proj
    if rank == 1:
        layer.update_layer = lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError("process 1 is full"))
    errors.append(error_of(lambda: compress_lora(model, found, keep=0.7)))
    layer.__dict__.pop("update_layer", None)
    assert weights(model) == before
    compress_lora(model, found, keep=0.4)
    return {"errors": errors, "weights": weights(model)}


def main(folder):
    dist.init_process_group("gloo")
    run_cases(folder, CASES)


if __name__ == "__main__":
    main(sys.argv[1])

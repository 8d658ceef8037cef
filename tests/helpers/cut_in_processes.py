"""What `test_callback_in_processes.py` and `test_data_parallel.py` run with torchrun, in every process."""

import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fim_lora import FimCompressionCallback
from fim_lora.runtime.data_parallel import DataParallelFinder, rebuild_reducer
from helpers.tiny_models import llama, token_batch
from helpers.torchrun import run_cases
from helpers.wide_trainers import CUT, adapter_weights, compressed_on, trainer_of, wide_model

# Each process has its share, of examples of one length: the mean over processes is that over all examples.
SHARES = [[token_batch(2, 10, seed=10 * rank + i, shortest=10) for i in range(4)] for rank in range(2)]
WAYS = {
    "default": {},
    "unused parameters": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "small buckets": {"bucket_cap_mb": 0.0005},
    "communication hook": {},
}
TRAININGS = {
    "default": {},
    "no unused parameters": {"ddp_find_unused_parameters": False},
    "accumulated": {"gradient_accumulation_steps": 2, "max_steps": 8},
    "checkpointed": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": False,
    },
}
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def joined(index):
    return {key: torch.cat([share[index][key] for share in SHARES]) for key in SHARES[0][0]}


def trained(folder, batch_size, **options):
    """The end of a training with the callback, in float64."""
    callback = FimCompressionCallback(**CUT)
    model = wide_model(llama().double())
    trainer = trainer_of(
        folder, [callback], model, per_device_train_batch_size=batch_size, save_strategy="no", **options
    )
    trainer.train()
    return callback.compression.ranks, adapter_weights(model)


def gradients_after_the_cut(model, wrapper, batches):
    """Gradients of two passes after the cut: the first with the buckets in a guessed order, the second in the real."""
    found = []
    for batch in batches[2:]:
        wrapper(**batch).loss.backward()
        found.append({name: p.grad.tolist() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    return found


def cut_model():
    """A model of random components, of which some layers lose all."""
    return wide_model(llama().double(), filled=True)


def wrapped(model, way):
    wrapper = DistributedDataParallel(model, **WAYS[way])
    if way == "communication hook":
        wrapper.register_comm_hook(None, fp16_compress_hook)
    return wrapper


def passes_before(model, wrapper, batches):
    for batch in batches[:2]:
        wrapper(**batch).loss.backward()
        model.zero_grad()


@case
def trainings(rank):
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, options in TRAININGS.items():
            ranks, weights = trained(folder, 2, **options)
            found[name] = [ranks, {key: weight.tolist() for key, weight in weights.items()}]
    return found


@case
def gradients(rank):
    found = {}
    for way in WAYS:
        model = cut_model()
        wrapper = wrapped(model, way)
        finder = DataParallelFinder(model)
        passes_before(model, wrapper, SHARES[rank])
        assert finder.found is wrapper
        compressed_on(model, SHARES[rank][:1], r=1)
        rebuild_reducer(wrapper)
        found[way] = gradients_after_the_cut(model, wrapper, SHARES[rank])
    return found


@case
def wrapped_again(rank):
    """What a loop of one's own does."""
    model = cut_model()
    wrapper = wrapped(model, "default")
    passes_before(model, wrapper, SHARES[rank])
    compressed_on(model, SHARES[rank][:1], r=1)
    wrapper = wrapped(model, "default")
    return gradients_after_the_cut(model, wrapper, SHARES[rank])


def main(folder, *cases):
    dist.init_process_group("gloo")
    warnings.simplefilter("ignore")
    run_cases(folder, {name: CASES[name] for name in cases})


if __name__ == "__main__":
    main(*sys.argv[1:])

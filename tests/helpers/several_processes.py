"""What `test_distributed.py` runs with torchrun: every case in every process. The results go to files."""

import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fim_lora import RankAllocation, get_fim_scores, initialize_lora_fim_ranks
from helpers.mixtures import Experts, Router
from helpers.proportional import proportional
from helpers.single_layers import WIDTH
from helpers.tiny_models import llama, token_batch
from helpers.torchrun import run_cases
from helpers.trainers import allocate, plain_trainer, sft_trainer

# Unequal sizes and unequal numbers. The first process has more.
SHARES = [[token_batch(3, 10, seed=0), token_batch(4, 8, seed=1), token_batch(2, 12, seed=2)], [token_batch(seed=3)]]
ALL = [batch for share in SHARES for batch in share]
# The batches in the order in which two processes read them, so that one process scales the adapter for the same ones.
IN_TURNS = [SHARES[0][0], SHARES[1][0], *SHARES[0][1:]]
ONE_HAS_NONE = [ALL, []]
EVEN = [ALL[:2], ALL[2:]]
TARGETS = ["q_proj", "v_proj", "down_proj"]
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def config(awaits=True, **options):
    fim = {"init_lora_weights": "fim", "fim_config": proportional(fim_calibration_batches=4, **options)}
    return LoraConfig(r=4, target_modules=TARGETS, **(fim if awaits else {}))


def base():
    return llama().double()


def scores(model, batches, adapter=None, forward_fn=None):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The dataloader yielded")
        return get_fim_scores(model, batches, adapter, forward_fn=forward_fn, show_progress_bar=False).to_dict()


def result_of(model, allocation):
    weights = {name: value.tolist() for name, value in model.state_dict().items() if "lora_" in name}
    return {"scores": allocation.scores.to_dict(), "ranks": allocation.ranks, "weights": weights}


def initialize(model, batches=None, **options):
    torch.manual_seed(100 + dist.get_rank())  # another seed in every process
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The dataloader yielded")
        return initialize_lora_fim_ranks(model, batches, show_progress_bar=False, **options)


def error_of(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def state_of(model):
    return {
        "tensors": {name: value.tolist() for name, value in model.state_dict().items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "config": str(model.peft_config["default"].__dict__),
    }


def sharded(model):
    for layer in (module for module in model.modules() if isinstance(module, LlamaDecoderLayer)):
        fully_shard(layer)
    return fully_shard(model)


# --- Each process on its share ---


@case
def dataloader(rank):
    model = get_peft_model(base(), config())
    return result_of(model, initialize(model, SHARES[rank]))


@case
def dataloader_of_one_process_only(rank):
    model = get_peft_model(base(), config())
    return result_of(model, initialize(model, ONE_HAS_NONE[rank]))


@case
def own_loop_in_ddp(rank):
    model = get_peft_model(base(), config())
    wrapped = DistributedDataParallel(model)
    for batch in EVEN[rank]:
        wrapped(**batch).loss.backward()
    return result_of(model, initialize(model))


@case
def own_loop_of_one_process_only(rank):
    model = get_peft_model(base(), config())
    for batch in ONE_HAS_NONE[rank]:
        model(**batch).loss.backward()
    return result_of(model, initialize(model))


@case
def accelerate(rank):
    """Accelerate distributes the batches: the same ones as in one process, in another order."""
    accelerator = Accelerator(cpu=True)
    examples = [{key: value[0] for key, value in token_batch(1, 10, seed=seed).items()} for seed in range(8)]
    model = get_peft_model(base(), config())
    wrapped, loader = accelerator.prepare(model, DataLoader(examples, batch_size=2))
    for batch in loader:
        accelerator.backward(wrapped(**batch).loss)
    return result_of(model, initialize(accelerator.unwrap_model(wrapped)))


@case
def plain_model_in_ddp(rank):
    return scores(DistributedDataParallel(base()), SHARES[rank], config())


@case
def pissa_draws_the_same_numbers(rank):
    model = get_peft_model(base().float(), config(init_lora_weights="pissa_niter_2"))
    initialize(model, SHARES[rank])
    torch.testing.assert_close(
        model.base_model.model.state_dict(), same_everywhere(model.base_model.model.state_dict())
    )


def same_everywhere(tensors):
    carrier = [tensors]
    dist.broadcast_object_list(carrier, src=0)
    return carrier[0]


@case
def training_in_ddp_afterwards(rank):
    model = get_peft_model(base(), config())
    initialize(model, SHARES[rank])
    return gradients_of_a_step(DistributedDataParallel(model), model, rank)


def gradients_of_a_step(wrapped, model, rank):
    """Gradients that the wrapper averages over the processes, and the weights they belong to."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    wrapped(**EVEN[rank][0]).loss.backward()
    return {
        "ranks": {name: module.r["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")},
        "weights": {name: full(p) for name, p in model.named_parameters() if "lora_" in name},
        "gradients": {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None},
    }


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()


@case
def trainer_of_trl(rank):
    """TRL exchanges its metrics between processes inside its loss, and divides it by the tokens of all of them."""
    trainer = sft_trainer(Path(tempfile.gettempdir()) / "fim-lora-several-processes", True, save_strategy="no")
    allocation = allocate(trainer)
    result = result_of(trainer.model, allocation)
    trainer.train()
    trained = {name: p.tolist() for name, p in trainer.model.named_parameters() if "lora_" in name}
    return result | {"trained": trained}


@case
def resuming_on_computers_of_their_own(rank):
    """Each process has its own folder, and only that of process 0 has the allocation."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/run/checkpoint-2"

        def resumed(path, **options):
            # Of other weights: a calibration instead of the file would give other scores.
            trainer = plain_trainer(f"{folder}/again", config(**options))
            with torch.no_grad():
                trainer.model.get_base_model().lm_head.weight.mul_(2)
            return allocate(trainer, resume_from_checkpoint=path).to_dict()

        first = allocate(plain_trainer(f"{folder}/run", config())).to_dict()
        files = [path.name for path in Path(folder).rglob("*.json")]
        found = resumed(checkpoint)
        different = error_of(lambda: resumed(checkpoint, **({} if rank == 0 else {"r_max": 4})))
        missing = error_of(lambda: resumed(f"{folder}/nothing/checkpoint-2"))
    return {"first": first, "files": files, "resumed": found, "different": different, "missing": missing}


# --- Sharded models ---


@case
def fsdp2(rank):
    return scores(sharded(base()), SHARES[rank], config())


@case
def fsdp2_of_one_process_only(rank):
    return scores(sharded(base()), ONE_HAS_NONE[rank], config())


@case
def fsdp2_with_adapter(rank):
    return scores(sharded(get_peft_model(base(), config(awaits=False))), SHARES[rank])


@case
def fsdp2_leaves_what_is_trained(rank):
    model = sharded(get_peft_model(base(), config(awaits=False)))
    scores(model, SHARES[rank])
    model(**SHARES[rank][0]).loss.backward()
    return sorted(name for name, parameter in model.named_parameters() if parameter.grad is not None)


def in_fsdp1(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


@case
def fsdp1(rank):
    return scores(in_fsdp1(base()), SHARES[rank], config())


@case
def fsdp1_in_several_units(rank):
    units = ModuleWrapPolicy([LlamaDecoderLayer])
    model = in_fsdp1(base(), auto_wrap_policy=units, use_orig_params=True)
    return scores(model, ONE_HAS_NONE[rank], config())


@case
def fsdp1_with_adapter(rank):
    units = ModuleWrapPolicy([LlamaDecoderLayer])
    model = get_peft_model(base(), config(awaits=False))
    return scores(in_fsdp1(model, auto_wrap_policy=units, use_orig_params=True), SHARES[rank])


class Various(nn.Module):
    """A layer of every type."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.router, self.experts = Router(3), Experts(3)

    def forward(self, ids):
        x = self.convolution(self.embedding(ids).mT).mT
        x = self.linear(x + self.attention(x, x, x, need_weights=False)[0])
        hidden = x.flatten(0, 1)
        logits, weights, index = self.router(hidden)
        y = self.experts(hidden, index, weights) + logits.sum(-1, keepdim=True)
        return {"loss": y.square().flatten(1).sum(1).mean()}


def various_config(parameters=True):
    return LoraConfig(
        r=2,
        target_modules=["embedding", "convolution", "attention", "linear"],
        target_parameters=["experts.up", "experts.down", "router.weight"] if parameters else None,
    )


def various_batches(seeds):
    return [{"ids": torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(seed))} for seed in seeds]


def scores_of_various(model, seeds, parameters=True):
    return scores(model, various_batches(seeds), various_config(parameters))


@case
def fsdp2_of_every_layer_type(rank):
    model = Various().double()
    for unit in (model.embedding, model.convolution, model.attention, model.linear, model.router, model.experts):
        fully_shard(unit)
    return scores_of_various(fully_shard(model), [[0, 1, 2], [3]][rank])


@case
def fsdp1_of_every_layer_type(rank):
    return scores_of_various(in_fsdp1(Various().double()), [[0, 1, 2], [3]][rank], parameters=False)


@case
def parameters_that_fsdp1_hides(rank):
    models = in_fsdp1(Various()), in_fsdp1(Various(), use_orig_params=True)
    return [error_of(lambda: scores_of_various(model, [0])) for model in models]  # noqa: B023


@case
def fsdp2_from_scores_to_training(rank):
    found = get_fim_scores(sharded(base()), EVEN[rank], config(), show_progress_bar=False)
    torch.manual_seed(7)  # the same weights in all processes, as FSDP requires
    model = get_peft_model(base(), RankAllocation.from_scores(found, config()).to_lora_config(config()))
    return gradients_of_a_step(sharded(model), model, rank)


@case
def an_adapter_that_is_sharded(rank):
    model = sharded(get_peft_model(base(), config()))
    two = in_fsdp1(get_peft_model(base(), config()), use_orig_params=True)
    ddp = DistributedDataParallel(get_peft_model(base(), config()))
    return [error_of(lambda: initialize(one, SHARES[rank])) for one in (model, two, ddp)]  # noqa: B023


@case
def tensor_parallelism(rank):
    mesh = init_device_mesh("cpu", (2,))
    errors, columns = [], ColwiseParallel()
    for target in ("up_proj", "down_proj"):
        model = base()
        for layer in model.model.layers:
            parallelize_module(
                layer.mlp, mesh, {"up_proj": columns, "gate_proj": columns, "down_proj": RowwiseParallel()}
            )
        errors.append(error_of(lambda: scores(model, ALL, LoraConfig(target_modules=[target]))))  # noqa: B023
    return errors


# --- Failures of one process ---


def breaking(batches, rank):
    yield batches[0]
    if rank == 1:
        raise OSError("the disk of process 1 is gone")
    yield from batches[1:]


def loss_that_fails_once(rank):
    def forward(model, batch):
        if rank == 1:
            raise torch.OutOfMemoryError("out of memory in process 1")
        return model(**batch)

    return forward


@case
def failures_before_the_allocation(rank):
    model = get_peft_model(base(), config())
    model.eval()
    before = state_of(model)
    errors = [
        error_of(lambda: initialize(model, breaking(ALL, rank))),
        error_of(lambda: initialize(model, EVEN[rank], forward_fn=loss_that_fails_once(rank))),
        error_of(lambda: initialize(model, [])),
        error_of(lambda: initialize(model)),
        error_of(lambda: initialize(model, fim_scores={name: 1.0 + rank * i for i, name in enumerate(names())})),
        error_of(lambda: initialize(model, fim_scores=dict.fromkeys(names()[rank:], 1.0))),
    ]
    assert state_of(model) == before
    # No process waits for another one, and no process is a collective call behind.
    return {"errors": errors} | result_of(model, initialize(model, SHARES[rank]))


def names():
    return [f"model.layers.{i}.{'mlp' if t == 'down_proj' else 'self_attn'}.{t}" for i in range(2) for t in TARGETS]


@case
def a_failure_while_layers_are_rebuilt(rank):
    model = get_peft_model(base(), config())
    before = state_of(model)
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    if rank == 1:
        layer.update_layer = lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError("process 1 is full"))
    error = error_of(lambda: initialize(model, SHARES[rank]))
    layer.__dict__.pop("update_layer", None)
    assert state_of(model) == before
    return {"error": error} | result_of(model, initialize(model, SHARES[rank]))


def failing_inside_fsdp2(rank):
    get_fim_scores(
        sharded(base()), EVEN[rank], config(), forward_fn=loss_that_fails_once(rank), show_progress_bar=False
    )


def main(argument):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if argument == "--failing-inside-fsdp2":
        failing_inside_fsdp2(rank)
        return
    run_cases(argument, CASES)


if __name__ == "__main__":
    main(sys.argv[1])

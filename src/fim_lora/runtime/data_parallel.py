"""`DistributedDataParallel` around a model whose parameters change their shapes while it trains."""

from typing import Any
from weakref import ref

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from .wrappers import unwrap


class DataParallelFinder:
    """Finds the `DistributedDataParallel` around a model, the next time that it is called.

    A model does not know its wrapper, and code that is given only the model, such as a callback of a trainer, cannot
    ask for it. So a hook on all modules watches for the call, and is removed by the first one.

    Args:
        model: The model inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self.found: DistributedDataParallel | None = None
        self._handle = register_module_forward_pre_hook(self._look_at)

    def stop(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def _look_at(self, module: nn.Module, args: Any) -> None:
        model, inside = self._model(), unwrap(module)
        if model is None:
            self.stop()
        elif isinstance(inside, DistributedDataParallel) and unwrap(inside.module) is model:
            self.found = inside
            self.stop()


def rebuild_reducer(wrapper: DistributedDataParallel) -> None:
    """Let the wrapper synchronize the gradients of the parameters that its module has now.

    The wrapper builds its buckets for the parameters and shapes of its construction. Loading its own pickled state
    builds them anew, and changes nothing else. Every process has to call this, between a backward pass and the next
    forward pass. Raises `RuntimeError` if the wrapper does not use the default process group.
    """
    communication_hooks = list(wrapper._comm_hooks)
    wrapper.__setstate__(wrapper.__getstate__())
    if wrapper.static_graph:
        # PyTorch synchronizes at the end of the first backward pass with a static graph, which is to come again.
        wrapper._static_graph_delay_allreduce_enqueued = False
    wrapper._comm_hooks = []
    for hook, state in communication_hooks:
        wrapper.register_comm_hook(state, hook)

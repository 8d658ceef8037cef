"""LoRA ranks from the empirical Fisher information, as an ordinary PEFT adapter.

Importing this package teaches PEFT the initialisation `"fim"`: `LoraConfig(init_lora_weights="fim",
fim_config=FimConfig(...))`.
"""

from importlib.metadata import version as _version

from .allocation import allocate_ranks
from .config import FimConfig
from .initialization import get_fim_scores, initialize_lora_fim_ranks
from .json_files import InvalidFileError
from .peft_integration import install as _install
from .rank_allocation import RankAllocation
from .scores import FimScores, LayerScore
from .trainer import initialize_lora_fim_ranks_for_trainer

__version__ = _version("fim-lora")

__all__ = [
    "FimConfig",
    "FimScores",
    "InvalidFileError",
    "LayerScore",
    "RankAllocation",
    "allocate_ranks",
    "get_fim_scores",
    "initialize_lora_fim_ranks",
    "initialize_lora_fim_ranks_for_trainer",
]

_install(
    {
        "FimConfig": FimConfig,
        "get_fim_scores": get_fim_scores,
        "initialize_lora_fim_ranks": initialize_lora_fim_ranks,
    }
)

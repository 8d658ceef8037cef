"""LoRA ranks from the empirical Fisher information, as an ordinary PEFT adapter.

Importing this package teaches PEFT the initialization `"fim"`: `LoraConfig(init_lora_weights="fim",
fim_config=FimConfig(...))`.
"""

from importlib.metadata import version as _version

from .adapter.install import install as _install
from .calibration_batch import calibration_batch
from .compression import LoraCompression, compress_lora
from .config import FimConfig
from .diagonals import get_fim_diagonals
from .fisher.fim_diagonals import FimDiagonals
from .fisher.layers import register_layer_type
from .fisher.saliency import obd_saliency
from .fisher.scores import FimScores, LayerScore
from .initialization import initialize_lora_fim_ranks
from .rank_allocation import RankAllocation
from .ranks.allocate import allocate_ranks
from .runtime.checked_json import InvalidFileError
from .scoring import get_fim_scores
from .spectrum import LoraSpectrum, get_lora_spectrum
from .trainer.callback import FimCompressionCallback
from .trainer.initialize import initialize_lora_fim_ranks_for_trainer

__version__ = _version("fim-lora")

__all__ = [
    "FimCompressionCallback",
    "FimConfig",
    "FimDiagonals",
    "FimScores",
    "InvalidFileError",
    "LayerScore",
    "LoraCompression",
    "LoraSpectrum",
    "RankAllocation",
    "allocate_ranks",
    "calibration_batch",
    "compress_lora",
    "get_fim_diagonals",
    "get_fim_scores",
    "get_lora_spectrum",
    "initialize_lora_fim_ranks",
    "initialize_lora_fim_ranks_for_trainer",
    "obd_saliency",
    "register_layer_type",
]

_install(
    {
        "FimConfig": FimConfig,
        "get_fim_scores": get_fim_scores,
        "initialize_lora_fim_ranks": initialize_lora_fim_ranks,
    }
)

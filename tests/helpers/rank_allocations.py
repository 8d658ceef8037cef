"""An allocation of six layers whose scores fall with the depth."""

from peft import LoraConfig

from fim_lora import FimScores, LayerScore, RankAllocation
from helpers.proportional import proportional

SHAPES = {"q_proj": (64, 64), "v_proj": (32, 64)}
SCORES = FimScores(
    {
        f"model.layers.{depth}.self_attn.{kind}": LayerScore(10.0**-depth * (1 + place), 0.01, 16, shape)
        for depth in range(3)
        for place, (kind, shape) in enumerate(SHAPES.items())
    },
    num_batches=4,
    num_skipped_batches=1,
)


def config(**options):
    options = {"fim_config": proportional()} | options
    return LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights="fim", **options)


def allocation(**options):
    return RankAllocation.from_scores(SCORES, config(**options))

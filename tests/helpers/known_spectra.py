"""A small spectrum and a compression whose numbers are known, with a layer of two parts and other costs."""

import numpy as np

from fim_lora import LoraCompression, LoraSpectrum
from fim_lora.ranks.sizes import Prediction
from fim_lora.ranks.spectrum import LayerSpectrum

# Parameters of one rank, ranks in one component, components.
LAYERS = {"layers.0.q_proj": (4, 1, 3), "layers.0.conv": (6, 2, 2), "layers.1.q_proj": (4, 1, 2), "head": (10, 1, 2)}
EXAMPLES = 8


def layer_spectrum(place, parameters_per_rank, rank_step, size, examples=EXAMPLES, scaled=0):
    random = np.random.default_rng(place)
    parts = rank_step
    return LayerSpectrum(
        shape=(12, 20),
        parameters_per_rank=parameters_per_rank,
        rank_step=rank_step,
        scaling=1.5,
        fingerprint=f"{place:032x}",
        left=random.normal(size=(parts, size, size)).astype(np.float32),
        right=random.normal(size=(parts, size, size)).astype(np.float32),
        gates=random.normal(size=(examples, size)).astype(np.float32) if examples else None,
        squared_norms=np.abs(random.normal(size=size)).astype(np.float32),
        gains=random.normal(size=size).astype(np.float32) if scaled else None,
    )


def known_spectrum(examples=EXAMPLES, scaled=0):
    layers = {
        name: layer_spectrum(place, *numbers, examples, scaled) for place, (name, numbers) in enumerate(LAYERS.items())
    }
    counts = (3, 1, examples + scaled, 5.5, scaled) if examples else ()
    return LoraSpectrum(layers, "default", *counts)


def known_compression(**changes):
    names = list(LAYERS)
    fields = {
        "ranks": dict(zip(names, (2, 2, 0, 1), strict=True)),
        "ranks_before": dict(zip(names, (3, 4, 2, 2), strict=True)),
        "alphas": dict(zip(names, (3, 3, 3, 1.5), strict=True)),
        "parameters_per_rank": {name: numbers[0] for name, numbers in LAYERS.items()},
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": False,
        "size": ("keep", 0.5),
        "r_max": None,
        "criterion": "Fisher information of 8 examples in 3 batches",
        "predicted": Prediction(0.25, 0.125),
        "loss_before": 1.5,
        "loss_after": 1.75,
    }
    return LoraCompression(**(fields | changes))

"""Spectra and compressions without a model: layers with random components, in the order of their saliency."""

import numpy as np

from fim_lora import LoraCompression, LoraSpectrum
from fim_lora.ranks.spectrum import LayerSpectrum

LAYERS = [f"model.layers.{depth}.{kind}_proj" for depth in range(4) for kind in "qkv"]


def spectrum(names=LAYERS, rank=4, examples=6, terms=5.0, norm=1.0, shape=(20, 30)):
    """A spectrum of `examples` examples, or without data for 0. `norm` scales the squared norms."""
    generator = np.random.default_rng(0)
    layers = {}
    for name in names:
        scale = generator.uniform(0.1, 1) * 0.3 ** np.arange(rank)
        gates = (generator.normal(size=(examples, rank)) * scale).astype(np.float32)
        order = np.argsort(-np.square(gates).mean(0)) if examples else np.arange(rank)
        eye = np.eye(rank, dtype=np.float32)[None]
        layers[name] = LayerSpectrum(
            shape=shape,
            parameters_per_rank=sum(shape),
            rank_step=1,
            scaling=1.0,
            fingerprint="0" * 32,
            left=eye,
            right=eye,
            gates=gates[:, order] if examples else None,
            squared_norms=(norm * np.square(scale)).astype(np.float32),
        )
    return LoraSpectrum(layers, "default", *((2, 0, examples, terms) if examples else ()))


def compression(of, share=0.5, r_max=None, loss_before=None, loss_after=None):
    """What `compress_lora` returns for this share of the parameters."""
    kept = of.keep(int(share * of.num_parameters), r_max=r_max)
    ranks = of.ranks_of(kept)
    return LoraCompression(
        ranks=ranks,
        ranks_before=of.ranks,
        alphas={name: max(rank, 1) for name, rank in ranks.items()},
        parameters_per_rank={name: layer.parameters_per_rank for name, layer in of.items()},
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        use_rslora=False,
        size=("keep", share),
        r_max=r_max,
        criterion=of.criterion,
        predicted=of.predict(kept),
        loss_before=loss_before,
        loss_after=loss_after,
    )

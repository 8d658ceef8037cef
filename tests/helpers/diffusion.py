"""A tiny diffusion model, and batches for it."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel


def unet():
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    sizes = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16)}
    attention = {"cross_attention_dim": 12, "attention_head_dim": 4, "norm_num_groups": 4}
    return UNet2DConditionModel(down_block_types=down, up_block_types=up, layers_per_block=1, **sizes, **attention)


def noisy_latents(seed):
    """A batch with noise and timesteps that are drawn before the forward pass."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 2, 2, 8, 8, generator=generator)
    timesteps = torch.randint(0, 10, (2,), generator=generator)
    noisy = DDPMScheduler(num_train_timesteps=10).add_noise(latents, noise, timesteps)
    context = torch.randn(2, 5, 12, generator=generator)
    return {"noisy": noisy, "noise": noise, "timesteps": timesteps, "context": context}

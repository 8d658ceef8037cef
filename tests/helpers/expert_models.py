"""Tiny models of transformers with experts and routers."""

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from helpers.tiny_models import VOCABULARY

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def mixtral(**options):
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **COMMON, **options))


def qwen_moe():
    torch.manual_seed(0)
    options = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**COMMON, **options))


def qwen3_moe():
    torch.manual_seed(0)
    options = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 6}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **options))


def olmoe():
    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(num_experts=4, **COMMON))

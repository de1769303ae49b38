"""Tiny random models of many architectures, and inputs for them."""

from copy import deepcopy
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 128
IMAGE_TOKEN = 127

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": False}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MIXTURE = {"num_experts_per_tok": 2}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
SEQUENCE = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}

# name -> (model class, config)
MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**GROUPED)),
    "llama-tied": (tf.LlamaForCausalLM, tf.LlamaConfig(**{**GROUPED, "tie_word_embeddings": True})),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**GROUPED, head_dim=16)),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**GROUPED, sliding_window=8)),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig(**{**GROUPED, "tie_word_embeddings": True}, head_dim=16, **SLIDING),
    ),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4)),
    "opt": (
        tf.OPTForCausalLM,
        tf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
    ),
    "falcon": (
        tf.FalconForCausalLM,
        tf.FalconConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    ),
    "bert-mlm": (tf.BertForMaskedLM, tf.BertConfig(**TEXT)),
    "bert-classes": (tf.BertForSequenceClassification, tf.BertConfig(**TEXT)),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig(**VISION, num_labels=10)),
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig(**GROUPED, **MIXTURE, num_local_experts=4)),
    "qwen3-moe": (
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig(**GROUPED, **MIXTURE, head_dim=16, num_experts=4, moe_intermediate_size=32),
    ),
    "gpt-oss": (
        tf.GptOssForCausalLM,
        tf.GptOssConfig(**GROUPED, **MIXTURE, head_dim=16, num_local_experts=4, **SLIDING),
    ),
    "mamba": (
        tf.MambaForCausalLM,
        tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=32),
    ),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config(**SEQUENCE, feed_forward_proj="gated-gelu")),
    "llava": (
        tf.LlavaForConditionalGeneration,
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=64),
            text_config=tf.LlamaConfig(**GROUPED),
            image_token_id=IMAGE_TOKEN,
            image_seq_length=16,
            vision_feature_layer=-1,
        ),
    ),
    "llama4": (  # its experts do not follow the interface that the others share
        tf.Llama4ForCausalLM,
        tf.Llama4TextConfig(
            **GROUPED,
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=2,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
        ),
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    return kind(deepcopy(config)).eval().to(dtype)  # quantizing a model writes into its config


def inputs(name: str, rows: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """A batch of model inputs; for the vision-language model: of text and images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, 16, 16, generator=generator)
    if name == "vit":
        return {"pixel_values": images}
    ids = torch.randint(0, 120, (rows, 12), generator=generator)
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :6].clone()}
    if name == "llava":
        return {"input_ids": torch.cat([torch.full((rows, 16), IMAGE_TOKEN), ids], 1), "pixel_values": images}
    return {"input_ids": ids}


@torch.no_grad()
def logits(model: PreTrainedModel, name: str) -> Tensor:
    """The model's logits on its standard inputs."""
    out: Tensor = model(**inputs(name)).logits
    return out


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    """Whether two models hold the same tensors under the same names."""
    of_a, of_b = a.state_dict(), b.state_dict()
    return of_a.keys() == of_b.keys() and all(torch.equal(t, of_b[k]) for k, t in of_a.items())

"""Tiny random models, one a domain: enough to see whether a method keeps its contracts, never how good it is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from hf_quant.stages.sampler import Batch

VOCABULARY = 96
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 64}
IMAGES: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 4}
PATCHES = 16
IMAGE_TOKEN = VOCABULARY - 1


@dataclass(frozen=True, slots=True)
class Subject:
    """A tiny random model and calibration data for it.

    Attributes:
        domain: which of `method.DOMAINS` it stands for.
        make: builds a model of so many blocks, in float32.
        batch: model inputs, drawn from a generator.
    """

    domain: str
    make: Callable[[int], nn.Module]
    batch: Callable[[torch.Generator], Batch]

    def model(self, blocks: int = 2) -> nn.Module:
        """The same model every time, whatever the global generator holds, and without moving it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make(blocks).eval()

    def data(self) -> list[Batch]:
        """Two micro-batches."""
        return [self.batch(torch.Generator().manual_seed(seed)) for seed in (1, 2)]

    @torch.no_grad()
    def output(self, model: nn.Module) -> Tensor:
        """What the model says of the first micro-batch."""
        return answer(model, self.data()[0])

    def load(self, folder: Path) -> nn.Module:
        """A saved model of this kind, by the stock call, in float32."""
        kind: Any = type(self.model())
        model: nn.Module = kind.from_pretrained(folder, **{_dtype_word(kind): torch.float32}).eval()
        return model


def answer(model: nn.Module, batch: Batch) -> Tensor:
    """Logits, or the sample of a diffusion model."""
    out = model(**batch)
    found: Tensor = out.logits if hasattr(out, "logits") else out.sample
    return found


def _dtype_word(kind: type) -> str:
    return "dtype" if issubclass(kind, tf.PreTrainedModel) else "torch_dtype"


def _ids(generator: torch.Generator, rows: int = 4, tokens: int = 32) -> Tensor:
    return torch.randint(0, IMAGE_TOKEN, (rows, tokens), generator=generator)


def _text(generator: torch.Generator) -> Batch:
    return {"input_ids": _ids(generator)}


def _image(generator: torch.Generator) -> Batch:
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)}


def _image_and_text(generator: torch.Generator) -> Batch:
    ids = torch.cat([torch.full((4, PATCHES), IMAGE_TOKEN), _ids(generator, 4, 16)], 1)
    return {"input_ids": ids, **_image(generator)}


def _noise(generator: torch.Generator) -> Batch:
    return {
        "hidden_states": torch.randn(4, 4, 8, 8, generator=generator),
        "timestep": torch.randint(0, 1000, (4,), generator=generator),
        "class_labels": torch.randint(0, 10, (4,), generator=generator),
    }


def _llama(blocks: int) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_hidden_layers=blocks))


def _vit(blocks: int) -> tf.PreTrainedModel:
    return tf.ViTForImageClassification(tf.ViTConfig(**IMAGES, num_hidden_layers=blocks))


def _mixtral(blocks: int) -> tf.PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, **experts, num_hidden_layers=blocks))


def _mamba(blocks: int) -> tf.PreTrainedModel:
    sizes = {"hidden_size": 64, "num_hidden_layers": blocks, "state_size": 8, "time_step_rank": 32}
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=VOCABULARY, **sizes))


def _llava(blocks: int) -> tf.PreTrainedModel:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**IMAGES, num_hidden_layers=blocks, projection_dim=64),
        text_config=tf.LlamaConfig(**TEXT, num_hidden_layers=blocks),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )
    return tf.LlavaForConditionalGeneration(config)


def _dit(blocks: int) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": blocks, "num_embeds_ada_norm": 10}
    model: nn.Module = DiTTransformer2DModel(in_channels=4, sample_size=8, **sizes)
    return model


SUBJECTS = {
    "llm": Subject("llm", _llama, _text),
    "vit": Subject("vit", _vit, _image),
    "moe": Subject("moe", _mixtral, _text),
    "mamba": Subject("mamba", _mamba, _text),
    "vlm": Subject("vlm", _llava, _image_and_text),
    "diffusion": Subject("diffusion", _dit, _noise),
}

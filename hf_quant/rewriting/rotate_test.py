"""Rotating a stream, heads and inputs changes nothing, in float64, or is refused before a weight is touched."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
)

from hf_quant.errors import UnsupportedModel
from hf_quant.hadamard import Hadamard
from hf_quant.plugins.transforms.quarot import RandomHadamard, residual_rotation
from hf_quant.rewriting.anatomy import examine, probe_of
from hf_quant.rewriting.rotate import rotate_whole
from hf_quant.sites import find_blocks
from hf_quant.stages.transform import Anatomy, Loss, Rotations

IDS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
LLAMA = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "llama, tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama, biased": LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**LLAMA),
    "gemma": GemmaConfig(**LLAMA),
    "gpt2": GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64),
    "opt": OPTConfig(
        vocab_size=96, hidden_size=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=48,
        max_position_embeddings=64, pad_token_id=0,
    ),
}  # fmt: skip


class Norm64(nn.Module):
    """An RMSNorm that computes in float64; transformers' own compute in float32, whatever the model's type."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.weight, self.one = like.weight, float("Gemma" in type(like).__name__)
        self.eps = getattr(like, "variance_epsilon", None) or like.eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.one + self.weight)


def model_of(config: Any) -> nn.Module:
    """Random, in float64, with gains and biases that are not those of a fresh model."""
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if isinstance(config, BertConfig) else AutoModelForCausalLM
    model: nn.Module = auto.from_config(config, dtype=torch.float64).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.3, 1.5) if "norm" in name or "ln_" in name else nn.init.normal_(parameter)
    for name, module in list(model.named_modules()):
        if "RMSNorm" in type(module).__name__:
            model.set_submodule(name, Norm64(module))
    return model


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_nothing_changes(name: str) -> None:
    model = model_of(copy.deepcopy(CONFIGS[name]))
    before, weights = model(IDS).logits, {k: v.clone() for k, v in model.state_dict().items()}
    for heads_online in (False, True):  # the second rotation on top of the first
        rotate_whole(model, find_blocks(model), RandomHadamard(heads_online), [], seed=3)
        assert (model(IDS).logits - before).abs().max() < 1e-10 * before.abs().max()
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, weights[k])]
    assert all(
        k in changed for k in weights if k.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight"))
    )
    assert model.config.tie_word_embeddings is False


def test_the_head_of_a_tied_model_gets_a_matrix_of_its_own() -> None:
    model = model_of(copy.deepcopy(CONFIGS["llama, tied"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rotate_whole(model, find_blocks(model), RandomHadamard(), [], seed=3)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.all_tied_weights_keys == {}


def test_the_anatomy_of_a_llama() -> None:
    model = model_of(CONFIGS["llama, biased"])
    anatomy = examine(model, find_blocks(model), probe_of(model, [])).anatomy()
    layers = [f"model.layers.{i}" for i in range(2)]
    assert (anatomy.width, anatomy.centered) == (48, False)
    assert anatomy.heads == {f"{n}.self_attn.o_proj": (2, 16) for n in layers}
    assert anatomy.inner == {
        f"{n}.{leaf}": k for n in layers for leaf, k in (("self_attn.o_proj", 64), ("mlp.down_proj", 80))
    }


def test_a_rotation_for_centering_norms_keeps_the_ones() -> None:
    R = residual_rotation(Anatomy(width=40, centered=True, heads={}, inner={}), seed=1)
    ones = torch.ones(40).double()
    assert (R @ R.T - torch.eye(40)).abs().max() < 1e-12
    assert (ones @ R - ones).abs().max() < 1e-12
    assert R.abs().max(1).values.mean() < 0.6  # a channel is spread over the others


class Adaptive(nn.Module):
    """A diffusion transformer's block: scale and shift, made of a condition, stand between norm and layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.condition = nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 32)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale, shift = self.condition(hidden_states.mean(1, keepdim=True)).chunk(2, -1)
        return hidden_states + self.down(torch.relu(self.up(self.norm(hidden_states) * (1 + scale) + shift)))


class Diffusion(nn.Module):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Adaptive() for _ in range(2)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


BERT = BertConfig(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize(
    ("make", "batches", "reason"),
    [
        (lambda: model_of(Gemma2Config(**LLAMA)), [], "post-norms"),
        (lambda: model_of(BERT), [], "cannot be rotated"),
        (lambda: Diffusion().double(), [{"hidden_states": torch.randn(1, 5, 16).double()}], "adaptive"),
        (lambda: Diffusion().double(), [], "pass calibration data"),
    ],
    ids=["norms after the writers", "norms in the stream", "adaptive norms", "nothing to run it on"],
)
def test_what_cannot_be_rotated_is_refused_untouched(make: Any, batches: Any, reason: str) -> None:
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match=reason):
        rotate_whole(model, find_blocks(model), RandomHadamard(), batches, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Queries:
    """Rotates the input of nothing that exists."""

    learns = False

    def rotate(self, anatomy: Anatomy, loss: Loss, seed: int) -> Rotations:
        return Rotations(heads={"model.layers.0.self_attn.q_proj": torch.eye(16)}, online={"lm_head": Hadamard(16)})


def test_only_what_may_be_rotated_can_be() -> None:
    """Rotary embeddings: queries and keys commute with rotations of pairs only, so they are no heads to rotate."""
    model = model_of(CONFIGS["qwen3"])
    with pytest.raises(UnsupportedModel, match="q_proj"):
        rotate_whole(model, find_blocks(model), Queries(), [], seed=0)

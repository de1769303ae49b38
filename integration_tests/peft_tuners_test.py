"""Every tuner of the pinned PEFT on a quantized base, with no import but PEFT's own: trains, saves, loads, turns off.

Tuners that do not change a linear layer (prompts, tokens, norms, side networks) must leave ours working; those that
PEFT cannot put on any quantized layer are listed with the reason.
"""

import copy
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_quant
from hf_quant import QuantConfig
from hf_quant.runtime.linear import QuantLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, about its own defaults

IDS = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def float_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def llama(method: str = "rtn", **arguments) -> nn.Module:
    model = float_llama()
    given = {"bits": 4, "group_size": 32} | arguments
    config = QuantConfig(method, **{k: v for k, v in given.items() if v is not None})
    data = None if config.quantizer().data_free else IDS.repeat(4, 2)
    hf_quant.quantize(model, config, data=data, progress=False)
    return model


VIRTUAL = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
# Tuners that read their arguments from the task, or whose defaults are for wider layers than these.
ARGUMENTS = {
    "ADALORA": {"total_step": 10, "target_modules": LINEARS},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "task_type": "CAUSAL_LM"},
    "C3A": {"block_size": 32, "target_modules": LINEARS},
    "CARTRIDGE": VIRTUAL,
    "LN_TUNING": {"target_modules": ["input_layernorm"], "task_type": "CAUSAL_LM"},
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "P_TUNING": {**VIRTUAL, "encoder_hidden_size": 16},
    "ROAD": {"group_size": 32, "target_modules": LINEARS},
    "SHIRA": {"r": 4, "target_modules": LINEARS},
    "TRAINABLE_TOKENS": {"token_indices": IDS[0, :2].tolist(), "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 32, "num_vectors": 8, "target_modules": LINEARS},
    "WAVEFT": {"n_frequency": 64, "target_modules": LINEARS},
}
LEFT_OUT = {
    "GLORA": "PEFT asks for the exact type nn.Linear, so no quantized layer of any library will do",
    "CPT": "PEFT's model class for it looks for attributes that a Llama model of this transformers lacks",
    "POLY": "needs task ids in the batch; its layer is a LoRA a task",
    "MULTITASK_PROMPT_TUNING": "needs task ids in the batch; it touches no linear layer",
    "SHADOW": "trains a second network beside the base, which it asks for another config",
    "XLORA": "mixes LoRA adapters that lie in folders; it makes none itself",
    "ARROW": "routes between LoRA adapters; it makes none itself",
}


def config_of(kind: str):
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    return cls(**ARGUMENTS.get(kind, {"target_modules": LINEARS, "task_type": "CAUSAL_LM"}))


def loss(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


KINDS = [t.value for t in PEFT_TYPE_TO_CONFIG_MAPPING if t.value not in LEFT_OUT]
NO_WEIGHTS = ("PROMPT", "P_TUNING", "PREFIX", "CARTRIDGE", "LN_TUNING", "TRAINABLE", "ADAPTION")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tuner_trains_saves_and_loads_back(kind: str, tmp_path: Path) -> None:
    base = llama()
    plain = copy.deepcopy(base)
    untouched = plain(IDS).logits
    torch.manual_seed(0)  # PEFT 0.19 draws ADAMSS's subspaces from the global generator, when it loads again too
    tuned = get_peft_model(base, config_of(kind))
    if not any(kind.startswith(n) or n in kind for n in NO_WEIGHTS):
        layer = tuned.base_model.model.model.layers[0].mlp.up_proj
        assert isinstance(layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.base_layer, QuantLinear)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    loss(tuned).backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in trained)
    optimizer.step()
    tuned.eval()
    with torch.no_grad():
        want = tuned(input_ids=IDS).logits
        with tuned.disable_adapter():
            assert torch.equal(tuned(input_ids=IDS).logits, untouched)
        tuned.save_pretrained(tmp_path)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
        assert torch.equal(loaded(input_ids=IDS).logits, want)


@pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="some that we leave out came with PEFT 0.21")
def test_what_is_left_out_is_known_to_this_peft() -> None:
    known = {t.value for t in PEFT_TYPE_TO_CONFIG_MAPPING} | {"ARROW"}
    assert set(LEFT_OUT) <= known

"""Two processes hold half of every quantized layer each, by the model's own plan, and compute what one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import hf_quant
from hf_quant import QuantConfig

ROOT = Path(__file__).resolve().parents[1]
WORKER = """
import sys, torch
import hf_quant
from hf_quant.errors import UnsupportedModel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

results = {}
for name in ("llama", "mixtral", "refused"):
    path = sys.argv[1] + "/" + name
    try:
        config = DistributedConfig(tp_plan="auto", tp_size=2)
        model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
    except UnsupportedModel as error:
        results[name] = str(error)
        continue
    with torch.no_grad():
        logits = model(torch.arange(24).reshape(2, 12)).logits
    attention = model.model.layers[0].self_attn
    sizes = [tuple(m.qweight.to_local().shape) for m in (attention.q_proj, attention.o_proj)]
    model.save_pretrained(path + "-again")
    results[name] = {"logits": logits, "sizes": sizes}
try:
    quantization = hf_quant.QuantConfig("rtn", bits=4, group_size=16)
    AutoModelForCausalLM.from_pretrained(
        sys.argv[1] + "/float", distributed_config=config, quantization_config=quantization
    )
except UnsupportedModel as error:
    results["float"] = str(error)
if torch.distributed.get_rank() == 0:
    torch.save(results, sys.argv[1] + "/results.pt")
torch.distributed.destroy_process_group()
"""
SIZES = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
IDS = torch.arange(24).reshape(2, 12)


MODELS = {
    "llama": (LlamaConfig(**SIZES), 16),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=3), 16),
    "refused": (LlamaConfig(**SIZES), 64),  # o_proj has 64 columns: one group, which two ranks cannot share
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The three models saved, and what two processes made of them: launched once, as starting them takes longest."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name, (config, group_size) in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / "float")
        hf_quant.quantize(model, QuantConfig("rtn", bits=4, group_size=group_size), progress=False)
        model.save_pretrained(folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    done = subprocess.run(
        [*command, str(folder / "worker.py"), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_ranks_compute_what_one_does(folder, name):
    result = torch.load(folder / "results.pt")[name]
    want = AutoModelForCausalLM.from_pretrained(folder / name)(IDS).logits
    assert result["sizes"] == [(32, 8), (64, 4)]  # half of the rows of q, half of the columns of o
    torch.testing.assert_close(result["logits"], want, atol=1e-5, rtol=1e-5)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder / f"{name}-again")(IDS).logits, want)


def test_a_group_that_would_be_cut_is_refused(folder):
    message = torch.load(folder / "results.pt")["refused"]
    assert "o_proj cannot be cut into 2 for tensor parallelism (rowwise)" in message
    assert "smaller group_size" in message


def test_quantizing_a_model_that_is_cut_is_refused(folder):
    """Each rank would quantize its own part of a matrix, and not the groups that one process sees."""
    assert "quantize it in one process" in torch.load(folder / "results.pt")["float"]

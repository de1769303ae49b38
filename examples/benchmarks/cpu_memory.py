"""Resident memory of a model on CPU: the same Llama-shaped weights in bfloat16 and packed, each in its own process.

A process imports everything, runs a tiny model, and notes its resident size; then it loads the model, runs a forward,
and notes how much it grew, and the most it grew on the way. Weights are random: bytes do not depend on their values.

    python examples/benchmarks/cpu_memory.py > examples/benchmarks/results/cpu_memory.json
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_quant
from hf_quant import QuantConfig
from hf_quant.running.resources import Peak, release_freed, versions

# The embedding and the head are 4 % of the weights and stay as they are, as in Llama-2-7B.
SIZES = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 12, "vocab_size": 3072}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
TINY = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
MODELS = {"bf16": None, "W4 g128": 4, "W8 rows": 8}


def resident() -> int:
    """Bytes that the process has in memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def config(bits: int) -> QuantConfig:
    return QuantConfig("rtn", bits=bits, group_size=128 if bits < 8 else -1, symmetric=bits == 8)


def forward(model: torch.nn.Module) -> None:
    with torch.inference_mode():
        model(torch.arange(16)[None])


def child(folder: str) -> None:
    tiny = LlamaForCausalLM(LlamaConfig(**TINY, **HEADS)).bfloat16()
    hf_quant.quantize(tiny, config(4))
    forward(tiny)
    release_freed()
    before, peak = resident(), Peak(torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    release_freed()
    loaded = resident() - before
    forward(model)
    release_freed()
    grown = {"loaded": loaded, "after_a_forward": resident() - before, "peak": peak.bytes() - before}
    print(json.dumps({**grown, "kernels": sorted({row.kernel for row in hf_quant.explain(model)})}))


def measure(rounds: int = 3) -> dict:
    torch.manual_seed(0)
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as root:
        plain = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).bfloat16()
        plain.save_pretrained(f"{root}/bf16")
        del plain
        for name, bits in MODELS.items():
            folder = f"{root}/{name}"
            if bits is not None:
                packed = AutoModelForCausalLM.from_pretrained(
                    f"{root}/bf16", dtype=torch.bfloat16, quantization_config=config(bits)
                )
                packed.save_pretrained(folder)
                del packed
            command = [sys.executable, __file__, folder]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(rounds)]
            sizes = {k: int(statistics.median(r[k] for r in runs)) for k in ("loaded", "after_a_forward", "peak")}
            on_disk = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
            rows[name] = {"on_disk": on_disk, **sizes, "kernels": runs[0]["kernels"]}
    used = {k: v for k, v in versions().items() if k in ("python", "torch", "transformers")}
    capability = torch.backends.cpu.get_cpu_capability()
    return {"machine": {"cpu": capability, "system": platform.system(), **used}, "shape": SIZES, "bytes": rows}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(sys.argv[1])
    else:
        print(json.dumps(measure(), indent=1))

"""Quantize a trained language model to 4 bits, measure it, save it, load it back in a fresh process, generate text."""

import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from hf_quant import QuantConfig
from hf_quant.measure.evaluate import evaluate

HERE = Path(__file__).resolve().parent
ORIGINAL = HERE / "models" / "tiny-lm"  # 5.2M parameters, trained on the Python documentation
OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "out/tiny-lm-gptq-4bit")

config = QuantConfig("gptq", bits=4, group_size=64, calibration=HERE / "data" / "tiny_calib.npy")
model = AutoModelForCausalLM.from_pretrained(ORIGINAL, quantization_config=config)

measured = evaluate(model, reference=ORIGINAL, data=HERE / "data" / "tiny_test.npy", window=256)
model.save_pretrained(OUT)

print(f"""
tiny-lm with GPTQ at 4 bits, on {measured.tokens:,} held-out tokens:
  true bits per weight      {measured.bits_per_weight:.2f}  (scales and zero points counted)
  perplexity                {measured.perplexity:.2f}  (full precision: {measured.reference_perplexity:.2f})
  KL to full precision      {measured.kl:.4f} nats a token
  same most likely token    {measured.top1:.1f} %

Saved to {OUT}. Loaded back by plain transformers in a new process:""")
sys.stdout.flush()
subprocess.run([sys.executable, HERE / "load_and_generate.py", OUT], check=True)

"""Train a LoRA on a 2-bit language model with PEFT and transformers, save it, and load both back without an import.

python examples/train_adapter.py                         # tiny-lm, in this repository
python examples/train_adapter.py MODEL TOKENS.npy OUT    # any language model, and token ids [n, S] of its tokenizer
"""

import sys
from pathlib import Path

import numpy as np
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_quant
from hf_quant import QuantConfig
from hf_quant.measure.evaluate import evaluate

HERE = Path(__file__).resolve().parent
TINY = (HERE / "models" / "tiny-lm", HERE / "data" / "tiny_calib.npy", "out/tiny-lm-adapter")
MODEL, TOKENS, OUT = map(Path, sys.argv[1:] or TINY)

ids = np.load(TOKENS).astype(np.int64)
test, train = np.split(ids, [len(ids) // 8])
config = QuantConfig("gptq", bits=2, group_size=64, calibration=train)
base = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
base.save_pretrained(OUT / "base")
before = evaluate(base, MODEL, test, window=ids.shape[1])

base = hf_quant.prepare_for_training(AutoModelForCausalLM.from_pretrained(OUT / "base"))
model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
rows = [{"input_ids": row, "labels": row} for row in train]
how = TrainingArguments(str(OUT), max_steps=30, learning_rate=1e-3, save_strategy="no", report_to=[])
Trainer(model, how, train_dataset=rows).train()
model.save_pretrained(OUT)  # an ordinary PEFT folder, which names the quantized model as its base

after = evaluate(AutoPeftModelForCausalLM.from_pretrained(OUT), MODEL, test, window=ids.shape[1])
print(f"perplexity {before.perplexity:.2f} at {before.bits_per_weight:.2f} true bits")
print(f"with the LoRA in {OUT} {after.perplexity:.2f} (full precision: {before.reference_perplexity:.2f})")

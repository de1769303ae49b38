"""Load a saved quantized model and generate text: no import of hf_quant, only transformers."""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(Path(__file__).resolve().parent / "models" / "tiny-lm")

prompt = tokenizer("The function returns a list of", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=30, do_sample=False, pad_token_id=tokenizer.eos_token_id or 0)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))

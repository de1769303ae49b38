"""One timed run of our gptq: model folder, token ids, bits, group size -> a line of JSON. Run by gptq_speed.py."""

import json
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import hf_quant

folder, ids, out, bits, group_size = sys.argv[1:6]
rows = torch.from_numpy(np.load(ids).astype(np.int64))
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
config = hf_quant.QuantConfig("gptq", bits=int(bits), group_size=int(group_size))
began, worked = time.perf_counter(), time.process_time()
hf_quant.quantize(model, config, data=rows)
times = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
model.save_pretrained(out)
versions = {"hf-quant": hf_quant.__version__, **{name: version(name) for name in ("torch", "transformers")}}
print(json.dumps(times | {"versions": versions, "threads": torch.get_num_threads(), "config": repr(config)}))

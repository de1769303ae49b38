"""One timed run of GPTQModel's gptq: model folder, token ids, bits, group size -> a line of JSON. Needs gptqmodel."""

import json
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig

folder, ids, out, bits, group_size = sys.argv[1:6]
rows = [
    {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
    for row in torch.from_numpy(np.load(ids).astype(np.int64))
]
config = QuantizeConfig(bits=int(bits), group_size=int(group_size))
model = GPTQModel.load(folder, config, device="cpu")
began, worked = time.perf_counter(), time.process_time()
model.quantize(rows, batch_size=1)
times = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
model.save(out)
versions = {name: version(name) for name in ("gptqmodel", "torch", "transformers")}
kept = {
    name: getattr(config, name)
    for name in ("bits", "group_size", "sym", "desc_act", "act_group_aware", "true_sequential")
}
print(json.dumps(times | {"versions": versions, "threads": torch.get_num_threads(), "config": str(kept)}))

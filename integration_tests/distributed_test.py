"""Data-parallel calibration: two gloo processes merge their statistics to the bytes that one process gets."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_quant.config import QuantConfig
from hf_quant.pipeline_test import same, small_llama, state
from hf_quant.stages.sampler import Batch

IDS = torch.randint(0, 97, (32, 24), generator=torch.Generator().manual_seed(0))


def quantized(method: str) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    model = small_llama(layers=2)
    batches: list[Batch] = [{"input_ids": IDS[i : i + 8]} for i in range(0, len(IDS), 8)]
    arguments = {} if method == "int8-default" else {"bits": 3, "group_size": 16}
    config = QuantConfig(method, **arguments)
    config.quantizer().quantize(model, config.job(data=batches, progress=False))
    return state(model)


def worker(rank: int, meeting: str, method: str, out: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(quantized(method), f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["gptq", "gptaq", "awq", "int8-default"])
def test_two_processes_give_the_bytes_of_one(method: str, tmp_path: Path) -> None:
    mp.start_processes(  # forked: the imports are done already
        worker, (str(tmp_path / "meet"), method, str(tmp_path / "out")), nprocs=2, start_method="fork"
    )
    alone = quantized(method)
    for rank in (0, 1):
        assert same(torch.load(tmp_path / f"out.{rank}"), alone), f"rank {rank} differs from one process"

"""Data-parallel calibration and training: two gloo processes come to what one process comes to."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import hf_quant
from hf_quant.config import QuantConfig
from hf_quant.errors import UnsupportedSpec
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


def trained(folder: Path | None, batch_size: int = 4) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    torch.set_num_threads(1)
    model = small_llama(layers=2)
    given = {"bits": 3, "group_size": 16, "rank": 4, "steps": 4, "lr": 0.05, "run_dir": folder}
    rows = [*IDS[:15].split(1), *IDS[15:, :16].split(1)]  # of two lengths: the processes get unlike numbers of tokens
    batches: list[Batch] = [{"input_ids": row} for row in rows]
    report = hf_quant.finetune(model, QuantConfig("lr-qat", batch_size=batch_size, **given), batches, progress=False)
    return {n: t.float() for n, t in state(model).items()}, report.training


def trainee(rank: int, meeting: str, out: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    with pytest.raises(UnsupportedSpec, match="started by torchrun"):
        trained(None)
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # as torchrun does
    with pytest.raises(UnsupportedSpec, match="batch_size=3 cannot be shared by 2 processes"):
        trained(None, 3)
    torch.save(trained(Path(f"{out}.run")), f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of DDP, which looks for parameters that got no gradient
@pytest.mark.filterwarnings("ignore:.broadcast_buffers. is deprecated")  # the Trainer knows no other name
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """The same batches, whatever the number of processes, and gradients that are means over all of their tokens."""
    mp.start_processes(trainee, (str(tmp_path / "meet"), str(tmp_path / "out")), nprocs=2, start_method="fork")
    alone, told = trained(None)
    (first, counted), (second, _) = (torch.load(tmp_path / f"out.{rank}") for rank in (0, 1))
    assert same(first, second)
    assert counted["tokens"] == told["tokens"]
    assert abs(counted["first_loss"] - told["first_loss"]) < 1e-5 * told["first_loss"]
    assert sorted(p.name for p in (tmp_path / "out.run" / "training").iterdir()) == ["checkpoint-4"]
    for name, tensor in alone.items():
        assert float((first[name] - tensor).abs().mean()) < 1e-3 * float(tensor.abs().mean()) + 1e-6, name


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_training_is_not_sharded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(UnsupportedSpec, match=rf"{kind}.*plain data parallelism"):
        trained(None)

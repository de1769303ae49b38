"""Data-parallel calibration, training and sharded training: two gloo processes come to what one process comes to."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant.config import QuantConfig
from hf_quant.errors import UnsupportedSpec
from hf_quant.learning import training
from hf_quant.pipeline_test import same, small_llama, state
from hf_quant.stages.sampler import Batch

IDS = torch.randint(0, 97, (32, 24), generator=torch.Generator().manual_seed(0))
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


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
    given = {"bits": 3, "group_size": 16, "rank": 4, "block_steps": 0, "steps": 4, "lr": 0.05, "run_dir": folder}
    rows = [*IDS[:15].split(1), *IDS[15:, :16].split(1)]  # of two lengths: the processes get unlike numbers of tokens
    batches: list[Batch] = [{"input_ids": row} for row in rows]
    report = hf_quant.finetune(model, QuantConfig("lr-qat", batch_size=batch_size, **given), batches, progress=False)
    if folder is not None and dist.get_rank() == 0:
        model.save_pretrained(f"{folder}.saved")
    return {n: t.float() for n, t in state(model).items()}, report.training


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    return trained(None)


def as_launched(rank: int) -> None:
    """What torchrun tells its processes."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ |= {name: str(value) for name, value in given.items()}


def agree(out: Path, alone: tuple[dict[str, torch.Tensor], dict[str, float]]) -> dict[str, float]:
    """Both processes have the same model, and it is what one process trains; what was measured."""
    tensors, told = alone
    (first, counted), (second, _) = (torch.load(f"{out}.{rank}") for rank in (0, 1))
    assert same(first, second)
    assert counted["tokens"] == told["tokens"]
    assert abs(counted["first_loss"] - told["first_loss"]) < 1e-5 * told["first_loss"]
    assert sorted(p.name for p in Path(f"{out}.run", "training").iterdir()) == ["checkpoint-4"]
    for name, tensor in tensors.items():
        assert float((first[name] - tensor).abs().mean()) < 1e-3 * float(tensor.abs().mean()) + 1e-6, name
    again = AutoModelForCausalLM.from_pretrained(f"{out}.run.saved")
    assert same({n: t.float() for n, t in state(again).items()}, first)
    return counted


def trainee(rank: int, meeting: str, out: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    with pytest.raises(UnsupportedSpec, match="started by torchrun"):
        trained(None)
    as_launched(rank)
    with pytest.raises(UnsupportedSpec, match="batch_size=3 cannot be shared by 2 processes"):
        trained(None, 3)
    torch.save(trained(Path(f"{out}.run")), f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of DDP, which looks for parameters that got no gradient
@pytest.mark.filterwarnings("ignore:.broadcast_buffers. is deprecated")  # the Trainer knows no other name
def test_two_processes_train_what_one_trains(
    alone: tuple[dict[str, torch.Tensor], dict[str, float]], tmp_path: Path
) -> None:
    """The same batches, whatever the number of processes, and gradients that are means over all of their tokens."""
    mp.start_processes(trainee, (str(tmp_path / "meet"), str(tmp_path / "out")), nprocs=2, start_method="fork")
    agree(tmp_path / "out", alone)


class CutOff(Exception):
    pass


def sharding(rank: int, meeting: str, out: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    as_launched(rank)
    os.environ |= FSDP2 | {"ACCELERATE_TORCH_DEVICE": "cpu"}
    # accelerate reads these of processes with accelerators alone: two with GPUs, but for the device and its library
    PartialState._prepare_backend = lambda *_args, **_kwargs: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    step = training._Steps.on_optimizer_step

    def cut_off(steps: training._Steps, *args: Any, **kwargs: Any) -> None:
        step(steps, *args, **kwargs)
        tree, shards = steps.trainer.model, [p for p in steps.trainer.model.parameters() if isinstance(p, DTensor)]
        assert len(shards) == len(list(tree.parameters()))  # all of them
        if len(steps.trainer.history) == 3:
            raise CutOff

    training._Steps.on_optimizer_step = cut_off  # type: ignore[method-assign]
    with pytest.raises(CutOff):
        trained(Path(f"{out}.run"))
    training._Steps.on_optimizer_step = step  # type: ignore[method-assign]
    torch.save(trained(Path(f"{out}.run")), f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.broadcast_buffers. is deprecated")
def test_two_processes_share_out_what_one_trains(
    alone: tuple[dict[str, torch.Tensor], dict[str, float]], tmp_path: Path
) -> None:
    """FSDP's second version: cut off after three steps and resumed, the same; each keeps half of Adam's state."""
    mp.start_processes(sharding, (str(tmp_path / "meet"), str(tmp_path / "out")), nprocs=2, start_method="fork")
    counted, (_, told) = agree(tmp_path / "out", alone), alone
    assert counted["trained"] == told["trained"]
    assert counted["optimizer_bytes"] < 0.55 * told["optimizer_bytes"]


REFUSED = [
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "flat vector.*--fsdp_version 2"),
    (FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "--fsdp_cpu_ram_efficient_loading false"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed steps on copies.*--use_fsdp"),
]


@pytest.mark.parametrize(("given", "what"), REFUSED)
def test_what_training_cannot_run_under(given: dict[str, str], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedSpec, match=what):
        trained(None)

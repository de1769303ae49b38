"""Data-parallel calibration, training and sharded training: two gloo processes come to what one process comes to."""

import gc
import json
import os
import shutil
import warnings
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled

import hf_quant
from hf_quant.config import QuantConfig
from hf_quant.errors import CalibrationError, UnsupportedSpec
from hf_quant.learning import training
from hf_quant.learning.shards import whole
from hf_quant.pipeline_test import same, small_llama, state
from hf_quant.plugins.training.lr_qat import LrQatFake
from hf_quant.running import distributed
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


def alike(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    with pytest.raises(CalibrationError, match="2 processes cannot share 1 micro-batches"):
        hf_quant.quantize(
            small_llama(layers=1), QuantConfig("gptq", group_size=16), data=[{"input_ids": IDS}], progress=False
        )
    dist.destroy_process_group()


def test_one_batch_is_too_few_for_two_processes(tmp_path: Path) -> None:
    """Told in both, so that neither waits for what the other will not send."""
    mp.start_processes(alike, (str(tmp_path / "meet"),), nprocs=2, start_method="fork")


LR_QAT = {"bits": 3, "group_size": 16, "rank": 4, "block_steps": 0, "steps": 4, "lr": 0.05}


def trained(
    folder: Path | None,
    batch_size: int = 4,
    method: str = "lr-qat",
    given: dict[str, Any] = LR_QAT,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    torch.set_num_threads(1)
    model = small_llama(layers=2).to(dtype)
    rows = [*IDS[:15].split(1), *IDS[15:, :16].split(1)]  # of two lengths: the processes get unlike numbers of tokens
    batches: list[Batch] = [{"input_ids": row} for row in rows]
    config = QuantConfig(method, batch_size=batch_size, run_dir=folder, **given)
    report = hf_quant.finetune(model, config, batches, progress=False)
    if folder is not None and distributed.is_first():
        model.save_pretrained(f"{folder}.saved")
    return {n: t.float() for n, t in state(model).items()}, report.training


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    return trained(None)


def as_launched(rank: int) -> None:
    """What torchrun tells its processes."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ |= {name: str(value) for name, value in given.items()}


def near(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    for name, tensor in others.items():
        assert float((tensors[name] - tensor).abs().mean()) < 1e-3 * float(tensor.abs().mean()) + 1e-6, name


def agree(out: Path, alone: tuple[dict[str, torch.Tensor], dict[str, float]]) -> dict[str, float]:
    """Both processes have the same model, and it is what one process trains; what was measured."""
    tensors, told = alone
    (first, counted), (second, _) = (torch.load(f"{out}.{rank}") for rank in (0, 1))
    assert same(first, second)
    assert counted["tokens"] == told["tokens"]
    assert abs(counted["first_loss"] - told["first_loss"]) < 1e-5 * told["first_loss"]
    assert sorted(p.name for p in Path(f"{out}.run", "training").iterdir()) == ["checkpoint-4"]
    near(first, tensors)
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


OTHERS = {  # ranks and sizes that two processes cannot share evenly are among them
    "lsq": {"bits": 3, "group_size": 16, "steps": 3},
    "qlora": {"bits": 3, "group_size": 16, "rank": 3, "steps": 3},
    "l4q": {"bits": 3, "group_size": 16, "rank": 3, "steps": 3},
    "qa-lora": {"bits": 3, "group_size": 16, "rank": 2, "steps": 3},
}
PUT_BACK = LR_QAT | {"lr_scale": 3.0}  # step sizes fall below what is allowed in the first steps


def others() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]]:
    told = {method: trained(None, method=method, given=given) for method, given in OTHERS.items()}
    return told | {"float16": trained(None, dtype=torch.float16)}


@pytest.fixture(scope="module")
def each_alone() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]]:
    return {"lr-qat": trained(None, given=PUT_BACK), **others()}


def by_deepspeed(rank: int, meeting: str, out: str, stage: int) -> None:
    as_launched(rank)
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    warnings.simplefilter("ignore")  # of DeepSpeed, which uses names that torch calls old
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    PartialState._prepare_backend = lambda *_args, **_kwargs: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})  # small ones, too
    config = {"zero_optimization": zero, "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
    Path(f"{out}.{rank}.json").write_text(json.dumps(config))
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = f"{out}.{rank}.json"
    from deepspeed.utils import safe_get_full_fp32_param

    step, lowest, trees = training._Steps.on_optimizer_step, [], []

    def cut_off(steps: training._Steps, *args: Any, **kwargs: Any) -> None:
        step(steps, *args, **kwargs)
        trees.append(ref(steps.trainer.model))
        shared = [p for p in steps.trainer.model.parameters() if hasattr(p, "ds_id") and not p.numel()]
        assert len(shared) == (len(list(steps.trainer.model.parameters())) if stage == 3 else 0)  # all of them
        for student in steps.trainer.students.values():
            ratio = student.fake.ratio
            assert torch.equal(safe_get_full_fp32_param(ratio), whole(ratio))
            lowest.append(float(whole(ratio).min()))
        if len(steps.trainer.history) == 3 and len(trees) == 3:
            raise CutOff

    training._Steps.on_optimizer_step = cut_off  # type: ignore[method-assign]
    with pytest.raises(CutOff):
        trained(Path(f"{out}.run"), given=PUT_BACK)
    assert min(lowest) == pytest.approx(0.1)
    if rank == 0:
        shutil.copytree(f"{out}.run", f"{out}.cut")
    torch.save(trained(Path(f"{out}.run"), given=PUT_BACK), f"{out}.{rank}")
    training._Steps.on_optimizer_step = step  # type: ignore[method-assign]
    gc.collect()
    assert stage == 3 or trees[-1]() is None
    assert not is_deepspeed_zero3_enabled()  # transformers would share out models that are loaded from then on
    torch.save(others(), f"{out}.others.{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed (pip install deepspeed)")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_what_one_process_trains(
    stage: int, each_alone: dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]], tmp_path: Path
) -> None:
    """Cut off after three steps and resumed; values that are put back after a step are those that it steps on."""
    given = (str(tmp_path / "meet"), str(tmp_path / "out"), stage)
    mp.start_processes(by_deepspeed, given, nprocs=2, start_method="fork")
    counted, (_, told) = agree(tmp_path / "out", each_alone["lr-qat"]), each_alone["lr-qat"]
    assert counted["trained"] == told["trained"]
    assert counted["optimizer_bytes"] < 0.55 * told["optimizer_bytes"]
    resumed, _ = trained(tmp_path / "out.cut", given=PUT_BACK)  # by one process, without DeepSpeed
    near(resumed, each_alone["lr-qat"][0])
    (first, second) = (torch.load(tmp_path / f"out.others.{rank}") for rank in (0, 1))
    for name, (tensors, measured) in first.items():
        one, told = each_alone[name]
        assert same(tensors, second[name][0])
        assert measured["tokens"] == told["tokens"]
        near(tensors, one)


REFUSED = [
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "flat vector.*--fsdp_version 2"),
    (FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "--fsdp_cpu_ram_efficient_loading false"),
]
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(("given", "what"), REFUSED)
def test_what_training_cannot_run_under(given: dict[str, str], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedSpec, match=what):
        trained(None)


def test_deepspeed_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedSpec, match="not installed: pip install deepspeed, or use FSDP"):
        trained(None)


CONFIGURED = [
    ({}, {"bf16": {"enabled": True}}, "mixed precision rounds what is learned.*--mixed_precision no"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"fp16": {"enabled": "auto"}}, "load the model in bfloat16"),
    ({}, {"optimizer": {"type": "AdamW"}}, "take optimizer out of DeepSpeed's config"),
    ({"LOCAL_RANK": None}, {}, "by DeepSpeed needs them started by torchrun or accelerate launch"),
]


@pytest.mark.parametrize(("given", "config", "what"), CONFIGURED)
def test_what_deepspeed_cannot_be_configured_to(
    given: dict[str, str | None],
    config: dict[str, Any],
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "find_spec", lambda name: name)
    (tmp_path / "config.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **config}))
    for name, value in (
        DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "config.json")} | given
    ).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedSpec, match=what):
        trained(None)


def test_what_deepspeed_cannot_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "find_spec", lambda name: name)
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(LrQatFake, "before_step", lambda fake: None)
    with pytest.raises(UnsupportedSpec, match=r"LrQatFake changes gradients before a step.*train with FSDP"):
        trained(None)
    model, config = small_llama(layers=1), QuantConfig("lsq", bits=4, group_size=16)
    model.get_input_embeddings().weight.ds_id = 0
    with pytest.raises(UnsupportedSpec, match=r"shared out by DeepSpeed when it was loaded.*--zero3_init_flag false"):
        hf_quant.finetune(model, config, [{"input_ids": IDS}], progress=False)

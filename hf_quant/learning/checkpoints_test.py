"""A training that is killed, or has no room left, while it writes a checkpoint goes on from the one before."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import RunError
from hf_quant.learning.training import _Trainer
from hf_quant.report import Report
from hf_quant.testing.subjects import SUBJECTS


class _KilledError(BaseException):
    pass


def run(model: nn.Module, folder: Path) -> Report:
    config = QuantConfig("lr-qat", block_steps=0, bits=3, group_size=32, rank=2, steps=3, run_dir=folder)
    return hf_quant.finetune(model, config, SUBJECTS["llm"].data(), progress=False)


def test_a_checkpoint_that_is_not_whole_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, errors = _Trainer._save_optimizer_and_scheduler, [_KilledError(), OSError(28, "No space left")]

    def cut(self: _Trainer, folder: str) -> None:
        if self.state.global_step == 2:
            raise errors.pop(0)
        write(self, folder)

    models = [SUBJECTS["llm"].model(1) for _ in range(3)]
    with monkeypatch.context() as patched:
        patched.setattr(_Trainer, "_save_optimizer_and_scheduler", cut)
        with pytest.raises(_KilledError):
            run(models[0], tmp_path / "cut")
        with pytest.raises(RunError, match="disk is full"):
            run(models[0], tmp_path / "cut")
    resumed, whole = run(models[1], tmp_path / "cut"), run(models[2], tmp_path / "whole")
    assert resumed.training["last_loss"] == whole.training["last_loss"]
    ours, theirs = (model.state_dict() for model in models[1:])
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [p.name for p in (tmp_path / "cut" / "training").iterdir()] == ["checkpoint-3"]
    (tmp_path / "cut" / "training" / "checkpoint-3" / "rounding.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="checkpoint-3 is damaged"):
        run(models[0], tmp_path / "cut")


def test_what_is_set_for_the_process_and_for_modules_stays(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True, mixed_precision="bf16"), SUBJECTS["llm"].model(1).train()
    model.get_submodule("model.norm").eval()
    try:
        run(model, tmp_path)
        assert Accelerator(cpu=True).mixed_precision == accelerator.mixed_precision == "bf16"
    finally:
        accelerator.state._reset_state(reset_partial_state=True)
    assert [n for n, m in model.named_modules() if not m.training] == ["model.norm"]

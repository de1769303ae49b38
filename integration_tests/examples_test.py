"""The short programs of `examples` run, on a tiny model or pipeline in place of theirs."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline

import hf_quant
from hf_quant.diffusion.drawing_test import unet_pipeline
from hf_quant.pipeline_test import small_llama
from hf_quant.testing.bench import EXAMPLES


def test_quantize_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = EXAMPLES / "quantize_pipeline.py"
    assert len(program.read_text().splitlines()) < 40
    unet_pipeline().save_pretrained(tmp_path / "full")
    monkeypatch.setattr(sys, "argv", [str(program), str(tmp_path / "full"), str(tmp_path / "four")])
    runpy.run_path(str(program), run_name="__main__")
    printed = capsys.readouterr().out
    assert "8 pictures from equal noise" in printed
    assert (tmp_path / "four" / "pictures.png").read_bytes().startswith(b"\x89PNG")
    again = DiffusionPipeline.from_pretrained(tmp_path / "four")
    assert f"true bits per weight      {hf_quant.true_bits(again.unet):.2f}" in printed
    assert hf_quant.true_bits(again.unet) < 8


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # the Trainer's default
def test_train_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = EXAMPLES / "train_adapter.py"
    small_llama(layers=2).save_pretrained(tmp_path / "full")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 97, (32, 16)).astype(np.uint16))
    monkeypatch.setattr(sys, "argv", [str(program), *(str(tmp_path / n) for n in ("full", "ids.npy", "out"))])
    runpy.run_path(str(program), run_name="__main__")
    said = r"perplexity ([\d.]+) at (\d\.\d+) true bits\nwith the LoRA in \S+ ([\d.]+)"
    printed = re.search(said, capsys.readouterr().out)
    assert printed is not None
    before, bits, after = map(float, printed.groups())
    assert bits < 4
    assert after != before
    assert (tmp_path / "out" / "adapter_config.json").is_file()

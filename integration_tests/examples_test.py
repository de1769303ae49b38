"""The short programs of `examples` run, on a tiny pipeline in place of theirs."""

import runpy
import sys
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

import hf_quant
from hf_quant.diffusion.drawing_test import unet_pipeline
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

"""Quantize the network of a diffusion pipeline to 4 bits, save it, and draw from equal noise before and after.

python examples/quantize_pipeline.py                                    # handwritten digits, in this repository
python examples/quantize_pipeline.py PIPELINE OUT "a red cube" ...      # any pipeline of diffusers, and prompts
"""

import sys
from pathlib import Path

import hf_quant
from hf_quant import QuantConfig
from hf_quant.diffusion.loading_pipeline import load_pipeline
from hf_quant.measure.evaluate_pipeline import evaluate_pipeline

MODELS = Path(__file__).resolve().parent / "models"
SOURCE = sys.argv[1] if len(sys.argv) > 1 else str(MODELS / "digits-dit")
OUT = Path(sys.argv[2] if len(sys.argv) > 2 else "out/digits-dit-4bit")

drawn = {"prompts": sys.argv[3:]} if len(sys.argv) > 3 else {}
if Path(SOURCE).resolve() == MODELS / "digits-dit":
    drawn = {"class_labels": range(10), "guidance": 1.5}

pipeline = load_pipeline(SOURCE)
config = QuantConfig(
    "mse-clip", bits=4, group_size=32, allow=["*"]
)  # layers that groups of 32 do not fit stay as they are
hf_quant.quantize(pipeline, config, pictures=8, **drawn)
pipeline.save_pretrained(OUT)  # with a card, a report, and pictures.png: full precision above 4 bits

found = evaluate_pipeline(OUT, SOURCE, images=8, **drawn)
print(f"""
{OUT}, {found.images} pictures from equal noise:
  true bits per weight      {found.bits_per_weight:.2f}  (scales and zero points counted)
  PSNR to full precision    {found.psnr:.1f} dB
  SQNR of the network       {found.sqnr[0]:.1f} dB at t = {found.timesteps[0]:.0f}, {found.sqnr[-1]:.1f} dB at the end
  seconds per image         {found.seconds_per_image:.2f}  (full precision: {found.reference_seconds_per_image:.2f})

The pictures: {OUT / "pictures.png"}""")

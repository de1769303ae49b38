"""The bench: small models that were really trained, which lie in the repository with their data (`examples/`).

| name | what | judged by |
|---|---|---|
| tiny-lm | language model; with `outliers=True` it has the outlier channels of large ones | KL of the next token |
| tiny-moe | language model with 8 experts, 2 a token | KL of the next token |
| tiny-mamba | state-space language model | KL of the next token |
| digits-vit | vision transformer, handwritten digits | KL of the class |
| digits-unet, digits-dit | diffusion pipelines, handwritten digits | SQNR a step, error of the picture |
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.testing.diffusion import DiffusionJudge
from hf_quant.testing.judge import Judge

LENGTH, WINDOWS = 256, 16
LANGUAGE = ("tiny-lm", "tiny-moe", "tiny-mamba")
DIFFUSION = ("digits-unet", "digits-dit")
EXAMPLES = Path(__file__).parents[2] / "examples"


def judge_on(name: str, bench: Path = EXAMPLES) -> Judge:
    """The judge of a model that answers with logits.

    Raises:
        ConfigError: no such model, or no bench there.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    path = _folder(name, bench, (*LANGUAGE, "digits-vit"))
    if name == "digits-vit":
        stored = np.load(bench / "data" / "digits.npz")
        calibration, held_out = pictures(stored["calib"]), pictures(stored["test"])
        return Judge(path, AutoModelForImageClassification, calibration, held_out, "pixel_values", samples=32)
    first, stream, more = (
        torch.from_numpy(np.load(bench / "data" / f"tiny_{part}.npy").astype(np.int64))
        for part in ("calib", "test", "train")
    )
    every = stream.numel() // LENGTH // WINDOWS  # windows from all over the held-out text
    windows = stream[: stream.numel() // LENGTH * LENGTH].reshape(-1, LENGTH)[::every][:WINDOWS]
    return Judge(path, AutoModelForCausalLM, torch.cat([first, more])[:, :LENGTH], windows)


def diffusion_judge_on(name: str, bench: Path = EXAMPLES) -> DiffusionJudge:
    """The judge of a diffusion pipeline.

    Raises:
        ConfigError: no such model, or no bench there.
    """
    return DiffusionJudge(_folder(name, bench, DIFFUSION))


def pictures(digits: np.ndarray) -> Tensor:
    """Digits `[n, 8, 8]` of 0 .. 16 -> what digits-vit was trained on, `[n, 3, 32, 32]` in about -1 .. 1."""
    x = torch.from_numpy(digits).float()[:, None] / 8 - 1
    return F.interpolate(x, size=32, mode="bicubic", align_corners=False).expand(-1, 3, -1, -1).contiguous()


def _folder(name: str, bench: Path, known: tuple[str, ...]) -> Path:
    if name not in known:
        raise ConfigError(f"the bench has no {name!r} here; it has: {', '.join(known)}")
    path = bench / "models" / name
    if not path.is_dir():
        raise ConfigError(
            f"no folder {path}: the bench lies in hf-quant's repository, not in the package; clone it and name its "
            "folder `examples` (pytest --bench=CHECKOUT/examples)"
        )
    return path

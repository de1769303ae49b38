"""PTQ4DM: where calibration data comes from matters."""

import pytest
import torch

import hf_quant
from hf_quant import QuantConfig
from hf_quant.diffusion.drawing import Drawing, backbone
from hf_quant.testing.diffusion import DiffusionJudge

SAMPLES = 64


def error(
    judge: DiffusionJudge, bits: int, seed: int, data: list[dict[str, torch.Tensor]] | None, samples: int = SAMPLES
) -> float:
    """Noise-to-signal ratio of the prediction, the mean over the steps; `data` None: the method's own."""
    pipeline = judge.pipeline()
    config = QuantConfig("ptq4dm", bits=bits, samples=samples, seed=seed)
    if data is None:
        hf_quant.quantize(pipeline, config, pictures=0, progress=False)
    else:
        hf_quant.quantize(backbone(pipeline), config, data=data, progress=False)
    ratios = torch.tensor(judge.compare(pipeline)[0])
    return float((10 ** (-ratios / 10)).mean())


def other_data(judge: DiffusionJudge, seed: int, noised: bool) -> list[dict[str, torch.Tensor]]:
    """Images noised forward to timesteps drawn evenly, or noise alone."""
    generator = torch.Generator().manual_seed(seed)
    pipeline = judge.pipeline()
    t = torch.randint(0, 1000, (SAMPLES,), generator=generator)
    x = torch.randn(SAMPLES, 1, 16, 16, generator=generator)
    if noised:
        drawing = Drawing(steps=judge.steps)
        images = drawing.draw(pipeline, range(SAMPLES), torch.Generator().manual_seed(500 + seed))
        x = pipeline.scheduler.add_noise(images.permute(0, 3, 1, 2) * 2 - 1, x, t)
    return [{"sample": a, "timestep": b} for a, b in zip(x.split(16), t.split(16), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("noised", "reproduced"), [(True, False), (False, True)])
def test_claim_against_other_calibration_data(
    noised: bool,
    reproduced: bool,
    diffusion_judges,  # type: ignore[no-untyped-def]
    claims,  # type: ignore[no-untyped-def]
) -> None:
    """Beside images noised forward it is no better here: on digits both cover what the network will see."""
    judge, what = diffusion_judges("digits-unet"), "images noised forward" if noised else "noise alone"
    claims.order(
        "ptq4dm",
        f"error of the predicted noise below that after calibration on {what}, w8a8, digits-unet",
        ours=[error(judge, 8, seed, None) for seed in range(3)],
        theirs=[error(judge, 8, seed, other_data(judge, seed, noised)) for seed in range(3)],
        reproduced=reproduced,
    )


def test_claim_it_adds_little(diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    found = error(diffusion_judges("digits-unet"), 8, 0, None, samples=20)
    claims.invariant(
        "ptq4dm",
        "error of the predicted noise below 0.2 % of its energy, 20 samples, w8a8, digits-unet",
        found < 0.002,
        {"error": found},
    )

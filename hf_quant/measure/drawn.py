"""What is kept of the batches that two pipelines drew, and what is made of it.

A batch is a JSON object: `ours` and `theirs` (None without a reference) each `{seconds, classes, features}`, seconds a
picture, and of every picture the class and the features that a classifier read (None without one); `squares`, the mean
squared error of every picture; `steps`, for every call of the network `[t, |e - e_q|^2, |e|^2, |x - x_q|^2, values]`
(`[t]` alone without a reference).
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_quant.measure.picture_metrics import decibels, frechet_distance

Batches = Sequence[dict[str, Any]]
READINGS = (
    "accuracy",
    "reference_accuracy",
    "agreement",
    "frechet_to_reference",
    "frechet_to_data",
    "reference_frechet_to_data",
)


def distances(batches: Batches) -> dict[str, Any]:
    """SQNR and drift at every timestep, in the order of denoising; error of the pictures."""
    sums: dict[float, Tensor] = {}
    for batch in batches:
        for t, *parts in batch["steps"]:
            sums[t] = sums.get(t, 0) + torch.tensor(parts, dtype=torch.float64)
    found: dict[str, Any] = {"timesteps": tuple(sums)}
    if batches[0]["theirs"] is None:
        return found | dict.fromkeys(("sqnr", "trajectory", "picture_mse", "psnr", "psnr_error"))
    squares = torch.tensor([s for batch in batches for s in batch["squares"]], dtype=torch.float64)
    psnr_B = decibels(squares)
    return found | {
        "sqnr": tuple(float(decibels(noise / signal.clamp_min(1e-300))) for noise, signal, _, _ in sums.values()),
        "trajectory": tuple(float(drift / values) for _, _, drift, values in sums.values()),
        "picture_mse": float(squares.mean()),
        "psnr": float(psnr_B.mean()),
        "psnr_error": float(psnr_B.std()) / math.sqrt(len(squares)) if len(squares) > 1 else None,
    }


def readings(batches: Batches, labels: Sequence[int] | None, data_BF: Tensor | None) -> dict[str, Any]:
    """What the classifier reads in them, beside the classes they were drawn of and the features of real pictures."""
    found: dict[str, Any] = dict.fromkeys(READINGS)
    if batches[0]["ours"]["classes"] is None:
        return found
    mine, features_BF = _read(batches, "ours")
    wanted = None if labels is None else torch.tensor(labels)
    if wanted is not None:
        found["accuracy"] = _percent(mine == wanted)
    if data_BF is not None:
        found["frechet_to_data"] = frechet_distance(features_BF, data_BF)
    if batches[0]["theirs"] is None:
        return found
    full, reference_BF = _read(batches, "theirs")
    found["agreement"] = _percent(mine == full)
    found["frechet_to_reference"] = frechet_distance(features_BF, reference_BF) if len(mine) > 1 else None
    if wanted is not None:
        found["reference_accuracy"] = _percent(full == wanted)
    if data_BF is not None:
        found["reference_frechet_to_data"] = frechet_distance(reference_BF, data_BF)
    return found


def per_image(batches: Batches, side: str) -> float:
    """Seconds: the median over batches."""
    return float(statistics.median(batch[side]["seconds"] for batch in batches))


def _read(batches: Batches, side: str) -> tuple[Tensor, Tensor]:
    classes = [c for batch in batches for c in batch[side]["classes"]]
    features = [f for batch in batches for f in batch[side]["features"]]
    return torch.tensor(classes), torch.tensor(features)


def _percent(right_B: Tensor) -> float:
    return 100 * float(right_B.double().mean())

"""Metrics of pictures: PSNR, what a classifier reads, and the Fréchet distance in its features (arXiv:1706.08500).

PSNR = -10 log10 mean (x - y)^2,    values in 0 .. 1
d^2((m1, C1), (m2, C2)) = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_quant.errors import CalibrationError, UnsupportedModel

LEAST = 1e-20  # squared error of equal pictures: 200 dB, not infinity
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BATCH = 64


def decibels(noise: Tensor) -> Tensor:
    """`-10 log10 noise`, 200 at most."""
    return -10 * noise.double().clamp_min(LEAST).log10()


def squared_errors(pictures_BHWC: Tensor, reference_BHWC: Tensor) -> Tensor:
    """`[B]`, the mean over a picture's values."""
    return (pictures_BHWC.double() - reference_BHWC.double()).square().flatten(1).mean(1)


def psnr(pictures_BHWC: Tensor, reference_BHWC: Tensor) -> Tensor:
    """`[B]` in dB."""
    return decibels(squared_errors(pictures_BHWC, reference_BHWC))


def frechet_distance(x_BF: Tensor, y_BF: Tensor) -> float:
    """Between the Gaussians of two sets of features; in float64. Fewer samples than features bias it upwards.

    Raises:
        CalibrationError: fewer than 2 samples in a set.
    """
    if min(len(x_BF), len(y_BF)) < 2:
        raise CalibrationError("a Fréchet distance needs 2 pictures on each side; draw more images")
    (m1, C1), (m2, C2) = ((v.double().mean(0), torch.cov(v.double().T)) for v in (x_BF, y_BF))
    values, vectors = torch.linalg.eigh(C1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ C2 @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float((m1 - m2).square().sum() + C1.trace() + C2.trace() - 2 * crossed))


@dataclass(frozen=True)
class Classifier:
    """An image classifier of transformers.

    Attributes:
        model: gives logits.
        processor: prepares pictures for it; None: they are resized to its `image_size` and scaled to -1 .. 1.
    """

    model: nn.Module
    processor: Any = None

    @classmethod
    def load(cls, given: nn.Module | str | Path) -> "Classifier":
        """From a folder or Hub id, in float32, with the processor beside it.

        Raises:
            CheckpointError: nothing there.
            UnsupportedModel: no image classifier.
        """
        if isinstance(given, nn.Module):
            return cls(given.eval())
        from hf_quant.loading import load_model, load_processor

        loaded = cls(load_model(given, dtype=torch.float32), load_processor(given))
        loaded.head  # noqa: B018  refused before anything is drawn
        return loaded

    @property
    def classes(self) -> int:
        """How many it tells apart."""
        return int(getattr(getattr(self.model, "config", None), "num_labels", 0))

    @property
    def head(self) -> nn.Module:
        """The layer that makes logits of features.

        Raises:
            UnsupportedModel: there is none.
        """
        found = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == self.classes]
        if not found or "Classification" not in type(self.model).__name__:
            raise UnsupportedModel(f"{type(self.model).__name__} is no image classifier with a linear head")
        return found[-1]

    @torch.no_grad()
    def read(self, pictures_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """The class `[B]` of each picture, and what its head sees `[B, F]`."""
        features: list[Tensor] = []
        classes: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, args: features.append(args[0].flatten(1).cpu()))
        device = next(self.model.parameters()).device
        try:
            for part in pictures_BHWC.split(BATCH):
                classes.append(self.model(pixel_values=self._prepared(part).to(device)).logits.argmax(-1).cpu())
        finally:
            handle.remove()
        return torch.cat(classes), torch.cat(features)

    def _prepared(self, pictures_BHWC: Tensor) -> Tensor:
        config: Any = self.model.config
        channels = getattr(config, "num_channels", 3)
        if pictures_BHWC.shape[-1] != channels:
            pictures_BHWC = pictures_BHWC.mean(-1, keepdim=True).expand(-1, -1, -1, channels)
        if self.processor is not None:
            bytes_BHWC = (pictures_BHWC.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            ready: Tensor = self.processor(images=list(bytes_BHWC), return_tensors="pt")["pixel_values"]
            return ready
        x_BCHW = pictures_BHWC.float().permute(0, 3, 1, 2)
        return F.interpolate(x_BCHW * 2 - 1, size=config.image_size, mode="bicubic", align_corners=False)


def read_pictures(folder: str | Path) -> Tensor:
    """The pictures of a folder as `[n, H, W, C]` in 0 .. 1, by name, all scaled to the size of the first.

    Raises:
        CalibrationError: none there.
    """
    import numpy as np
    from PIL import Image

    files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise CalibrationError(f"{folder} holds no pictures ({' '.join(SUFFIXES)})")
    first = Image.open(files[0]).convert("RGB").size
    read = [np.asarray(Image.open(p).convert("RGB").resize(first)) for p in files]
    return torch.from_numpy(np.stack(read)).float() / 255

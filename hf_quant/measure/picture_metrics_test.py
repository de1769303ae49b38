"""PSNR, classifiers and the Fréchet distance, against formulas and another library's square root of a matrix."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn

from hf_quant.errors import CalibrationError, UnsupportedModel
from hf_quant.measure.picture_metrics import Classifier, frechet_distance, psnr, read_pictures
from hf_quant.testing.bench import EXAMPLES

VIT = EXAMPLES / "models" / "digits-vit"


def test_psnr() -> None:
    x = torch.zeros(3, 2, 2, 1)
    y = torch.stack([torch.full((2, 2, 1), v) for v in (0.1, 1.0, 0.0)])
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 0.0, 200.0]).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("samples", "features"), [(200, 5), (4, 9)])
def test_frechet_distance_is_the_papers(samples: int, features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(samples, features, generator=generator, dtype=torch.float64) * s + s for s in (1, 3))
    (m1, C1), (m2, C2) = ((v.mean(0).numpy(), np.cov(v.numpy().T)) for v in (x, y))
    crossed = scipy.linalg.sqrtm(C1 @ C2 + 1e-13 * np.eye(features)).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(C1 + C2 - 2 * crossed)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x))


def test_too_few_samples() -> None:
    with pytest.raises(CalibrationError, match="2 pictures"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))


def test_the_classifier_reads_held_out_digits() -> None:
    """8 x 8 pixels of grey, as the pipelines draw them, resized and spread over three channels here."""
    digits = np.load(EXAMPLES / "data" / "digits.npz")
    read, features = Classifier.load(VIT).read(torch.from_numpy(digits["test"][:100]).float()[..., None] / 16)
    assert (read.numpy() == digits["test_labels"][:100]).mean() > 0.95
    assert features.shape == (100, 128)


def test_a_processor_beside_the_classifier_is_used(tmp_path: Path) -> None:
    from transformers import ViTForImageClassification, ViTImageProcessorPil

    model = ViTForImageClassification.from_pretrained(VIT, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    ViTImageProcessorPil(size={"height": 32, "width": 32}, **half).save_pretrained(tmp_path)
    pictures = torch.randint(256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(0)) / 255
    loaded = Classifier.load(tmp_path)
    assert loaded.processor is not None
    torch.testing.assert_close(loaded.read(pictures)[1], Classifier.load(VIT).read(pictures)[1], rtol=1e-3, atol=1e-3)


def test_no_classifier() -> None:
    with pytest.raises(UnsupportedModel, match="no image classifier"):
        Classifier(nn.Linear(2, 2)).head  # noqa: B018
    with pytest.raises(UnsupportedModel, match="no image classifier"):
        Classifier.load(EXAMPLES / "models" / "tiny-lm")


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    for name, value, size in (("b.png", 255, 4), ("a.png", 51, 6)):
        Image.fromarray(np.full((size, size), value, np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    read = read_pictures(tmp_path)
    assert read.shape == (2, 6, 6, 3)
    assert read[:, 0, 0, 0].tolist() == pytest.approx([0.2, 1.0])
    with pytest.raises(CalibrationError, match="no pictures"):
        read_pictures(tmp_path / "no")

"""The bench: its models are trained, and the judges tell a good quantization from a bad one."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_quant.errors import ConfigError
from hf_quant.testing import DiffusionJudge, Judge
from hf_quant.testing.bench import EXAMPLES, judge_on

Judges = Callable[[str], Judge]
CONVOLUTIONS = ["*conv*", "*sampler*"]


def perplexity(judge: Judge) -> float:
    log_p = judge.expected[:, :-1]
    return math.exp(-float(log_p.gather(-1, judge.test[:, 1:, None]).mean()))


@pytest.mark.parametrize(("name", "limit"), [("tiny-lm", 36), ("tiny-moe", 75), ("tiny-mamba", 90)])
def test_language_models_are_trained(judges: Judges, name: str, limit: float) -> None:
    assert perplexity(judges(name)) < limit


def test_the_vision_model_reads_digits_it_has_not_seen(judges: Judges, request: pytest.FixtureRequest) -> None:
    labels = np.load(request.config.getoption("bench") / "data" / "digits.npz")["test_labels"]
    read = judges("digits-vit").expected.argmax(-1)
    assert (read == torch.from_numpy(labels)).float().mean() > 0.97


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-mamba", "digits-vit"])
def test_fewer_bits_move_a_model_further(judges: Judges, name: str) -> None:
    judge = judges(name)
    eight, three = (judge.kl("rtn", bits=b, group_size=32) for b in (8, 3))
    assert 0 < eight < 0.1 * three
    assert judge.top1("rtn", bits=8, group_size=32) > judge.top1("rtn", bits=3, group_size=32)
    assert judge.kl("rtn", bits=3, group_size=32) == three
    assert len(judge.measured) == 2, "kept, not measured again"


@pytest.mark.parametrize("name", ["digits-unet", "digits-dit"])
def test_diffusion_judges_tell_bits_apart(diffusion_judges: Callable[[str], DiffusionJudge], name: str) -> None:
    judge = diffusion_judges(name)
    calls, answers, pictures = judge.expected
    assert len(calls) == len(answers) == judge.steps
    assert pictures.std() > 0.1
    # guidance runs every picture twice
    assert len(calls[0]["timestep"]) == len(pictures) * (2 if name == "digits-dit" else 1)
    common = {"group_size": 32, "allow": CONVOLUTIONS}
    eight, four = (judge.sqnr("rtn", bits=b, **common) for b in (8, 4))
    assert all(a > b + 10 for a, b in zip(eight, four, strict=True)), "6 dB a bit"
    assert judge.trajectory("rtn", bits=8, **common) < 0.1 * judge.trajectory("rtn", bits=4, **common)


def test_a_package_beside_a_checkout_is_tested_as_contributing_says(tmp_path: Path) -> None:
    """The checkout has a conftest.py of its own, which pytest reads when it takes the bench's folder for tests."""
    said = (EXAMPLES.parent / "CONTRIBUTING.md").read_text()
    (command,) = re.findall(r"then: pytest (.*)", said)
    (checkout := tmp_path / "checkout").mkdir()
    (checkout / "examples").symlink_to(EXAMPLES)
    (mine := tmp_path / "mine").mkdir()
    for folder in (checkout, mine):
        (folder / "conftest.py").write_text('pytest_plugins = ["hf_quant.testing.fixtures"]\n')
    (mine / "my_test.py").write_text("def test_judge(judges):\n    assert judges('tiny-lm').path.is_dir()\n")
    arguments = [sys.executable, "-m", "pytest", "-q", *command.replace("CHECKOUT", str(checkout)).split()]
    ran = subprocess.run(arguments, cwd=mine, capture_output=True, text=True, check=False)
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr


def test_three_seeds_have_disjoint_data(judges: Judges) -> None:
    rows = [{tuple(r.tolist()) for r in judges("tiny-lm").data(seed)} for seed in range(3)]
    assert len(set.union(*rows)) == sum(map(len, rows)) == 48


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no 'tiny-vlm'"):
        judge_on("tiny-vlm")
    with pytest.raises(ConfigError, match="not in the package"):
        judge_on("tiny-lm", tmp_path)

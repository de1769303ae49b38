"""A pytest plugin: `pytest_plugins = ["hf_quant.testing.fixtures"]` in the `conftest.py` at the root of your tests."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

from hf_quant.testing.bench import EXAMPLES, diffusion_judge_on, judge_on
from hf_quant.testing.claims import Claims
from hf_quant.testing.diffusion import DiffusionJudge
from hf_quant.testing.judge import Judge


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--claims FOLDER` runs claim tests alone and keeps what they measure; `--bench FOLDER` has the trained models."""
    group = parser.getgroup("hf-quant")
    group.addoption("--claims", type=Path, default=None, metavar="FOLDER", help="run claims, keep them as JSON there")
    group.addoption("--bench", type=Path, default=EXAMPLES, metavar="FOLDER", help="`examples` of hf-quant's checkout")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `--claims`, a test that takes no `claims` is not run."""
    if config.getoption("claims") is not None:
        others = [item for item in items if "claims" not in getattr(item, "fixturenames", ())]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="session")
def claims(request: pytest.FixtureRequest) -> Claims:
    """Checks the claims of papers, see `hf_quant.testing.claims`."""
    return Claims(request.config.getoption("claims"))


@pytest.fixture(scope="session")
def judges(request: pytest.FixtureRequest) -> Callable[[str], Judge]:
    """Name of a trained model -> its `Judge`, the same one all session: `judges("tiny-moe").kl("gptq", bits=3)`."""
    return cache(partial(judge_on, bench=request.config.getoption("bench")))


@pytest.fixture(scope="session")
def judge(judges: Callable[[str], Judge]) -> Judge:
    """The `Judge` of the trained language model tiny-lm."""
    return judges("tiny-lm")


@pytest.fixture(scope="session")
def diffusion_judges(request: pytest.FixtureRequest) -> Callable[[str], DiffusionJudge]:
    """Name of a diffusion pipeline -> its `DiffusionJudge`: `diffusion_judges("digits-dit").sqnr("rtn", bits=4)`."""
    return cache(partial(diffusion_judge_on, bench=request.config.getoption("bench")))

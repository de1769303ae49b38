"""A pytest plugin: `pytest_plugins = ["hf_quant.testing.fixtures"]` in the `conftest.py` at the root of your tests."""

from collections import defaultdict
from collections.abc import Callable, Generator
from functools import cache, partial
from pathlib import Path

import pytest

from hf_quant.testing.bench import EXAMPLES, diffusion_judge_on, judge_on
from hf_quant.testing.claims import Claims, read
from hf_quant.testing.diffusion import DiffusionJudge
from hf_quant.testing.judge import Judge
from hf_quant.testing.sources import fingerprint

FAILED, UP_TO_DATE = pytest.StashKey[bool](), pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--claims FOLDER` runs claim tests alone and keeps what they measure; `--bench FOLDER` has the trained models."""
    group = parser.getgroup("hf-quant")
    group.addoption("--claims", type=Path, default=None, metavar="FOLDER", help="run claims, keep them as JSON there")
    group.addoption("--bench", type=Path, default=EXAMPLES, metavar="FOLDER", help="`examples` of hf-quant's checkout")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `--claims`, only tests that take `claims` are run, those whose claims are older than their source."""
    folder = config.getoption("claims")
    if folder is None:
        return
    measured: dict[str, set[str]] = defaultdict(set)
    for path in sorted(folder.glob("*.json")):
        for claim in read(path):
            measured[claim.test].add(claim.source)
    source = cache(fingerprint)
    claiming = [item for item in items if "claims" in getattr(item, "fixturenames", ())]
    run = [item for item in claiming if measured[item.nodeid] != {source(item.path)}]
    config.stash[UP_TO_DATE] = len(claiming) - len(run)
    chosen = set(run)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = run


@pytest.hookimpl(trylast=True)
def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """How many tests need not be run."""
    done = config.stash.get(UP_TO_DATE, 0)
    return [f"claims as new as their source, not measured again: {done} tests"] if done else []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Nothing left to measure is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash.get(UP_TO_DATE, 0):
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember which tests failed, for `claims`."""
    report = yield
    if not report.passed:
        item.stash[FAILED] = True
    return report


@pytest.fixture
def claims(request: pytest.FixtureRequest) -> Generator[Claims, None, None]:
    """Checks the claims of papers, see `hf_quant.testing.claims`."""
    checked = Claims(request.config.getoption("claims"), request.node.nodeid)
    yield checked
    if checked.folder is not None and not request.node.stash.get(FAILED, False):
        checked.finish(fingerprint(request.node.path))


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

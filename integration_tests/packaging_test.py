"""The package as users get it: from a wheel, as an editable install, and from a checkout without any install."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]
METHODS_AND_FORMATS = """
import hf_quant, json
from hf_quant.formats import formats
print(json.dumps([[m.id for m in hf_quant.list_methods()], sorted(formats()), hf_quant.__file__]))
"""


def environment(folder: Path) -> Path:
    """A virtual environment with the libraries of this one and no hf-quant, not even an editable one; its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # a path in a .pth file is searched, but .pth files found there (an editable install has one) are not run
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("environment"))


def run(
    python: Path, code: str, *, cwd: Path, path: Sequence[Path] = (), env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter whose only extra search path is `path`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_QUANT", "TORCH_DEVICE"))}
    clean |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1", **(env or {})}
    # -P: the current folder is not on the search path unless `path` names it
    return subprocess.run([python, "-P", "-c", code], cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)


def output(
    python: Path, code: str, *, cwd: Path, path: Sequence[Path] = (), env: Mapping[str, str] | None = None
) -> str:
    """What `code` prints; it must succeed."""
    done = run(python, code, cwd=cwd, path=path, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_of_the_source(to: Path) -> Path:
    """What git would give a user, without the leftovers of earlier builds."""
    for name in ("hf_quant", "plugins", "kernels"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "hf_quant_autoload.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = copy_of_the_source(tmp_path_factory.mktemp("source"))
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", *OFFLINE, "--wheel-dir", folder, source], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True)
    return target


def expected_modules() -> set[str]:
    found = {"hf_quant_autoload.py"}
    for top, prefix in (("hf_quant", ""), ("plugins", "hf_quant/"), ("kernels", "hf_quant/")):
        for file in (ROOT / top).rglob("*.py"):
            if file.parent == ROOT / "kernels" / "bench":  # scripts of the repository
                continue
            if not file.name.endswith("_test.py") and file.name != "conftest.py":
                found.add(prefix + file.relative_to(ROOT).as_posix())
    return found


def test_the_oldest_versions_allowed_are_those_that_make_test_lowest_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [d for extra, names in project["optional-dependencies"].items() if extra != "all" for d in names]
    bounds = {d.split(";")[0].strip().replace(">=", "==") for d in project["dependencies"] + extras}
    pins = {line for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if not line.startswith("#")}
    assert pins == bounds


def test_the_wheel_holds_every_module_no_test_and_nothing_else_at_top_level(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n for n in names if n.endswith(".py")} == expected_modules()
    assert {n.split("/")[0] for n in names} == {"hf_quant", "hf_quant_autoload.py", "hf_quant-0.1.0.dist-info"}
    data = {f.relative_to(ROOT).as_posix() for f in (ROOT / "hf_quant").rglob("*.jinja")}
    named = [f for pattern in ("*/README.md", "*/*.cpp", "*/*.h") for f in (ROOT / "kernels").glob(pattern)]
    data |= {"hf_quant/" + f.relative_to(ROOT).as_posix() for f in named}
    assert {"hf_quant/py.typed", "hf_quant-0.1.0.dist-info/licenses/LICENSE", *data} <= set(names)


def test_the_wheel_works_outside_the_repository(python: Path, installed: Path, tmp_path: Path) -> None:
    here = json.loads(output(python, METHODS_AND_FORMATS, path=[ROOT], cwd=ROOT))
    methods, formats, file = json.loads(output(python, METHODS_AND_FORMATS, path=[installed], cwd=tmp_path))
    assert Path(file).is_relative_to(installed)
    assert (methods, formats) == (here[0], here[1])
    assert "rtn" in methods
    assert "int-group/1" in formats


def test_an_editable_install_follows_the_source(python: Path, tmp_path: Path) -> None:
    """Also for a method file, and a family of methods, that did not exist when it was installed."""
    source = copy_of_the_source(tmp_path / "source")
    interpreter = environment(tmp_path / "environment")
    subprocess.run([*PIP, "--python", interpreter, "install", *OFFLINE, "--editable", source], check=True)

    family = source / "plugins" / "made_up"
    family.mkdir()
    (family / "__init__.py").touch()
    (family / "made_up.py").write_text(
        "from hf_quant.method import Paper, method\nfrom hf_quant.recipe import Recipe\n"
        "from hf_quant.spec import int_spec\n"
        "@method('made-up', paper=Paper(None, 'x'), domains={'llm'}, claim='none')\n"
        "def made_up(bits: int = 4) -> Recipe:\n    return Recipe(weights=int_spec(bits))\n"
    )
    methods, formats, file = json.loads(output(interpreter, METHODS_AND_FORMATS, cwd=tmp_path))
    assert Path(file).is_relative_to(source)
    assert {"made-up", "rtn"} <= set(methods)
    assert "int-group/1" in formats
    leaks = "import importlib.util as u; print([n for n in ('kernels', 'plugins', 'setup') if u.find_spec(n)])"
    assert output(interpreter, leaks, cwd=tmp_path) == output(python, leaks, cwd=tmp_path)


def test_a_checkout_on_the_path_does_not_hide_the_package_named_kernels(python: Path, tmp_path: Path) -> None:
    """Hugging Face's `kernels` is imported by transformers and bitsandbytes; ours is only a folder of that name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    code = "import hf_quant, hf_quant.kernels, kernels; print(kernels.theirs, hf_quant.__file__)"
    printed = output(python, code, path=[ROOT, tmp_path], cwd=tmp_path)
    assert printed.split() == ["True", str(ROOT / "hf_quant" / "__init__.py")]


def test_importing_costs_little_and_brings_no_method(python: Path, installed: Path, tmp_path: Path) -> None:
    """Processor time beyond the libraries, so that other work on the machine does not count; the best of up to three.

    With `transformers.modeling_utils` imported before, `import hf_quant` registers at once: its dearest case.
    """
    code = """
import sys, time, torch, transformers.modeling_utils
before = time.process_time()
import hf_quant
print(time.process_time() - before, *[m for m in sys.modules if m.startswith("hf_quant.plugins")])
"""
    times = []
    while len(times) < 3 and min(times, default=1) >= 0.3:
        seconds, *plugins = output(
            python, code, path=[installed], cwd=tmp_path, env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        ).split()
        times.append(float(seconds))
        assert plugins == []
    assert min(times) < 0.3


def test_what_import_torch_runs_takes_under_two_milliseconds(python: Path, installed: Path, tmp_path: Path) -> None:
    code = """
import statistics, sys, time, torch
def once():
    for name in [m for m in sys.modules if m.partition('.')[0] in ('hf_quant', 'hf_quant_autoload')]:
        del sys.modules[name]
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith('hf_quant')]
    start = time.perf_counter()
    import hf_quant_autoload
    hf_quant_autoload.install()
    return time.perf_counter() - start
times = [once() for _ in range(21)]
assert 'hf_quant._autoload' in sys.modules
print(statistics.median(times), *[m for m in sys.modules if m.startswith('hf_quant.')])
"""
    seconds, *loaded = output(python, code, path=[installed], cwd=tmp_path).split()
    assert float(seconds) < 0.002
    assert loaded == ["hf_quant._autoload"]


REGISTERED = """
import transformers.quantizers.auto, diffusers.quantizers.auto
for auto in transformers.quantizers.auto, diffusers.quantizers.auto:
    print("hf_quant" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING and "hf_quant" in auto.AUTO_QUANTIZER_MAPPING)
"""


def test_registration_needs_no_import_of_ours(python: Path, installed: Path, tmp_path: Path) -> None:
    assert output(python, "import torch" + REGISTERED, path=[installed], cwd=tmp_path) == "True\nTrue\n"


def test_registration_when_the_registry_is_what_imports_torch(python: Path, installed: Path, tmp_path: Path) -> None:
    """Then torch, and so we, are imported half-way through it; every model's module comes later."""
    code = "import transformers.quantizers.auto as auto, transformers.modeling_utils\n"
    code += "print('hf_quant' in auto.AUTO_QUANTIZER_MAPPING)"
    assert output(python, code, path=[installed], cwd=tmp_path) == "True\n"


def test_it_can_be_switched_off_and_an_import_still_registers(python: Path, installed: Path, tmp_path: Path) -> None:
    code = f"import sys, torch{REGISTERED}print('hf_quant' in sys.modules)\nimport hf_quant{REGISTERED}"
    printed = output(python, code, path=[installed], cwd=tmp_path, env={"HF_QUANT_AUTOLOAD": "0"})
    assert printed.split() == ["False", "False", "False", "True", "True"]


@pytest.mark.parametrize("broken", ["raises", "gone"])
def test_a_broken_installation_never_breaks_torch(python: Path, installed: Path, tmp_path: Path, broken: str) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    if broken == "gone":
        shutil.rmtree(site / "hf_quant")
    else:
        (site / "hf_quant" / "__init__.py").write_text("raise RuntimeError('half installed')\n")
    code = "import torch; print(torch.ones(1).item())"
    done = run(python, code, path=[site], cwd=tmp_path, env={"PYTHONWARNINGS": "error"})
    assert (done.returncode, done.stdout) == (0, "1.0\n")
    assert "hf_quant could not be imported" in done.stderr

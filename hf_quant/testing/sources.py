"""Sources: the files that say what a test measures, as a fingerprint: older claims are measured anew."""

import ast
import inspect
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import hf_quant.plugins
from hf_quant.method import list_methods

METHODS = "hf_quant.plugins"


def fingerprint(test: Path) -> str:
    """Of a test file, the method beside it, fixtures beside it, and the methods that these import, near and far.

    For a test of another package, which may lie anywhere: of all methods that other packages bring, too. The loop, the
    formats and the baselines that a test only names are not part of it.
    """
    told = sha256()
    for path in covered(test):
        told.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return told.hexdigest()[:16]


def covered(test: Path) -> list[Path]:
    """The files that a fingerprint is of."""
    beside = (test, test.with_name(test.name.replace("_test.py", ".py")), test.with_name("conftest.py"))
    todo, seen = [p for p in beside if p.is_file()], set[Path]()
    brought: dict[str, Path] = {}
    if not any(test.resolve().is_relative_to(Path(root).resolve()) for root in hf_quant.plugins.__path__):
        builds = [m.build for m in list_methods() if not m.build.__module__.startswith("hf_quant.")]
        brought = {build.__module__: Path(inspect.getfile(build)) for build in builds}
    todo += brought.values()
    packages = tuple({name.partition(".")[0] for name in brought})
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += _methods_in(path, packages)
    return sorted(seen)


def _methods_in(path: Path, packages: tuple[str, ...]) -> Iterator[Path]:
    """The files under `hf_quant.plugins`, and in these packages, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [f"{names[0]}.{a.name}" if names else a.name for a in node.names]
        for name in names:
            if name.startswith(METHODS + "."):
                inner = name.removeprefix(METHODS + ".").replace(".", "/") + ".py"
                yield from (p for root in hf_quant.plugins.__path__ if (p := Path(root) / inner).is_file())
            elif name.partition(".")[0] in packages:
                yield from _file_of(name)


def _file_of(name: str) -> Iterator[Path]:
    """Of a module; none for what is imported from one."""
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:  # its parent is no package
        return
    if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
        yield Path(spec.origin)

"""Sources: the files that say what a test measures, as a fingerprint: older claims are measured anew."""

import ast
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import hf_quant.plugins

METHODS = "hf_quant.plugins"


def fingerprint(test: Path) -> str:
    """Of a test file, the method beside it, fixtures beside it, and the methods that these import, near and far.

    The loop, the formats and the baselines that a test only names are not part of it.
    """
    told = sha256()
    for path in covered(test):
        told.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return told.hexdigest()[:16]


def covered(test: Path) -> list[Path]:
    """The files that a fingerprint is of."""
    beside = (test, test.with_name(test.name.replace("_test.py", ".py")), test.with_name("conftest.py"))
    todo, seen = [p for p in beside if p.is_file()], set[Path]()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += _methods_in(path)
    return sorted(seen)


def _methods_in(path: Path) -> Iterator[Path]:
    """The files under `hf_quant.plugins` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [f"{names[0]}.{a.name}" if names else a.name for a in node.names]
        for name in names:
            if name.startswith(METHODS + "."):
                inner = name.removeprefix(METHODS + ".").replace(".", "/") + ".py"
                yield from (p for root in hf_quant.plugins.__path__ if (p := Path(root) / inner).is_file())

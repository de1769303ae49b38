"""The rules of CONTRIBUTING.md that a machine can check, read from the source without importing it."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def is_test(path: Path) -> bool:
    return path.name.endswith("_test.py") or path.name == "conftest.py"


def sources(*folders: str) -> list[Path]:
    found = [p for f in folders for p in sorted((ROOT / f).rglob("*.py")) if not is_test(p)]
    assert found, f"no source under {folders}"
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ("hf_quant", *parts) if parts[0] in ("plugins", "kernels") else parts
    return ".".join(package).removesuffix(".__init__")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def type_checking_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree: ast.AST, *, run_at_import: bool) -> Iterator[ast.AST]:
    """Every node, or only those outside functions and outside `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if run_at_import and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or type_checking_only(node)):
            continue
        yield node
        yield from nodes(node, run_at_import=run_at_import)


def imports(path: Path, *, run_at_import: bool = False) -> set[str]:
    """Dotted names a file imports: `from a import b` counts as both `a` and `a.b`."""
    names: set[str] = set()
    for node in nodes(tree_of(path), run_at_import=run_at_import):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def under(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


# Each may import those before it. What is not in the list (sites, report, runtime's values, ...) is judged below.
ARROWS = ["errors", "grids", "spec", "qtensor", "stats", "stages", "recipe", "loop", "pipeline"]


def rank(name: str) -> int | None:
    return next((i for i, layer in enumerate(ARROWS) if under(name, f"hf_quant.{layer}")), None)


def test_values_know_nothing_of_stages_and_stages_nothing_of_the_loop() -> None:
    wrong = []
    for path in sources("hf_quant"):
        mine = rank(module_name(path))
        if mine is None:
            continue
        for name in sorted(imports(path, run_at_import=True)):
            theirs = rank(name)
            if theirs is not None and (theirs > mine or under(name, "hf_quant.integrations", "hf_quant.cli")):
                wrong.append(f"{module_name(path)} imports {name}")
    assert wrong == []


def test_the_core_imports_no_method_and_no_format() -> None:
    wrong = []
    for path in sources("hf_quant"):
        for name in sorted(imports(path)):
            if name.startswith(("hf_quant.plugins.", "hf_quant.kernels.")):
                wrong.append(f"{module_name(path)} imports {name}")
    assert wrong == []


# What a format may know: values, the contract of formats, and the definition of q(x).
KERNELS_MAY_IMPORT = (
    "hf_quant.errors",
    "hf_quant.formats",
    "hf_quant.grids",
    "hf_quant.hadamard",
    "hf_quant.kernels",
    "hf_quant.products",
    "hf_quant.qtensor",
    "hf_quant.runtime.activation",
    "hf_quant.spec",
)


def test_kernels_know_values_and_the_format_contract_only() -> None:
    """The bench is what runs layers and models on them, so it may know those."""
    wrong = []
    for path in (p for p in sources("kernels") if not under(module_name(p), "hf_quant.kernels.bench")):
        for name in sorted(imports(path)):
            if under(name, "hf_quant") and not under(name, *KERNELS_MAY_IMPORT) and name != "hf_quant.runtime":
                wrong.append(f"{module_name(path)} imports {name}")
            if under(name, "transformers", "diffusers", "peft"):
                wrong.append(f"{module_name(path)} imports {name}")
    assert wrong == []


def test_methods_know_stages_and_values_and_no_library_around_them() -> None:
    wrong = []
    for path in sources("plugins"):
        for name in sorted(imports(path)):
            if under(name, "hf_quant.integrations", "hf_quant.cli", "transformers", "diffusers", "peft"):
                wrong.append(f"{module_name(path)} imports {name}")
    assert wrong == []


def test_loading_needs_no_method() -> None:
    """Nothing that runtime or checkpoint imports, near or far, is a stage, a method, a recipe or the loop."""
    files = {module_name(p): p for p in sources("hf_quant")}
    reached: dict[str, str] = {n: n for n in files if under(n, "hf_quant.runtime", "hf_quant.checkpoint")}
    todo = list(reached)
    while todo:
        name = todo.pop()
        for other in imports(files[name], run_at_import=True) & files.keys() - reached.keys():
            reached[other] = f"{reached[name]} -> {other}"
            todo.append(other)
    forbidden = [f"hf_quant.{m}" for m in ("stages", "plugins", "method", "recipe", "loop", "pipeline", "config")]
    assert [way for name, way in sorted(reached.items()) if under(name, *forbidden)] == []


def test_no_public_function_swallows_keyword_arguments() -> None:
    """Frameworks pass the integrations what they like, and a config's makers a method's arguments; else no `**`."""
    wrong = []
    for path in sources("hf_quant", "plugins", "kernels"):
        if under(module_name(path), "hf_quant.integrations", "hf_quant.config", "hf_quant.testing"):
            continue
        classes = [n for n in nodes(tree_of(path), run_at_import=True) if isinstance(n, ast.ClassDef)]
        classes = [n for n in classes if not n.name.startswith("_")]
        for node in (n for scope in (tree_of(path), *classes) for n in scope.body):  # a nested function is nobody's API
            public = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
            if public and node.args.kwarg is not None:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert wrong == []


def registered_papers(path: Path) -> list[str | None]:
    """The first argument of every `Paper(...)` that is passed to `@method` in the file."""
    papers: list[str | None] = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Paper":
            first = node.args[0] if node.args else next(k.value for k in node.keywords if k.arg == "arxiv")
            assert isinstance(first, ast.Constant), f"{path}: the arXiv number of a Paper is a literal"
            papers.append(first.value)
    return papers


def method_files() -> list[Path]:
    return [p for p in sources("plugins") if registered_papers(p)]


def test_every_method_file_names_its_paper() -> None:
    """The module docstring holds `arXiv:<number>` or `arXiv <number>` for each paper in the file."""
    wrong = []
    for path in method_files():
        header = ast.get_docstring(tree_of(path)) or ""
        papers = [p for p in registered_papers(path) if p is not None]
        missing = [
            p
            for p in papers
            if not re.fullmatch(r"\d{4}\.\d{4,5}", p) or not re.search(rf"arXiv[: ]{re.escape(p)}\b", header)
        ]
        wrong += [f"{path.relative_to(ROOT)}: {p}" for p in missing]
    assert wrong == []


def test_every_method_file_and_every_format_has_its_test_beside_it() -> None:
    """The claim of the paper; the bytes of the format. Being registered brings the common suites on top."""
    files = [*method_files(), *(ROOT / "kernels").glob("*/format.py")]
    assert [str(p.relative_to(ROOT)) for p in files if not p.with_name(f"{p.stem}_test.py").is_file()] == []


def code_lines(path: Path) -> int:
    """Lines that are neither blank nor only a comment."""
    return sum(1 for line in path.read_text().splitlines() if line.strip() and not line.strip().startswith("#"))


@pytest.mark.parametrize(("folder", "limit"), [("hf_quant", 300), ("plugins", 150), ("kernels", 400)])
def test_files_hold_one_idea(folder: str, limit: int) -> None:
    long = {str(p.relative_to(ROOT)): code_lines(p) for p in sources(folder) if code_lines(p) > limit}
    assert long == {}, f"more than {limit} lines of code: which of its ideas can stand alone?"


def test_no_top_level_package_shadows_another() -> None:
    """With an `__init__.py`, `kernels/` would hide Hugging Face's package of that name from whoever stands here."""
    assert [str(p) for f in ("plugins", "kernels") for p in (ROOT / f).glob("*.py") if not is_test(p)] == []


def test_a_public_name_is_never_also_a_module() -> None:
    """Importing `hf_quant.x` sets the attribute `x` of the package: a function of that name would then be gone."""
    tree = tree_of(ROOT / "hf_quant" / "__init__.py")
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    public = set(ast.literal_eval(lists[0]))
    modules = {p.stem for p in (ROOT / "hf_quant").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert public & modules == set()

"""In a source checkout implementations live in <repo>/plugins and <repo>/kernels; in a wheel they are subfolders."""

from pathlib import Path


def source_dir(name: str) -> list[str]:
    """The extra search path of `hf_quant.<name>`: one folder in a checkout, none in an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    folder = root / name
    return [str(folder)] if (root / "pyproject.toml").is_file() and folder.is_dir() else []

"""A process that has hf-quant and none of its methods: what was saved must load and compute the same there.

It answers one request a line on stdin with one line on stdout, so that its imports are paid for once.
"""

import importlib.abc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

HIDDEN = "hf_quant.plugins"
ROOT = Path(__file__).parents[2]


class Stranger(AbstractContextManager["Stranger"]):
    """Starts the process when it is first asked something."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def verdict(self, folder: Path, kind: type) -> dict[str, Any]:
        """Load the model in `folder/model` and compare its output on `folder/said.safetensors` with what lies there.

        Returns:
            `{"equal": bool}` or `{"error": text}`.
        """
        import torch

        if self._process is None:
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hf_quant.testing.stranger"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"folder": str(folder), "module": kind.__module__, "kind": kind.__name__}
        self._process.stdin.write(json.dumps({**asked, "threads": torch.get_num_threads()}) + "\n")
        self._process.stdin.flush()
        answered: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "the process ended"}')
        return answered

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.communicate()  # closes its stdin, at which it ends


class _Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == HIDDEN or fullname.startswith(HIDDEN + "."):
            raise ImportError(f"{fullname} is not installed here")


def _judge(folder: Path, module: str, kind: str, threads: int) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    from hf_quant.testing.subjects import answer

    torch.set_num_threads(threads)
    said = load_file(folder / "said.safetensors")
    expected = said.pop("@output")
    loader = getattr(importlib.import_module(module), kind)
    word = "dtype" if module.startswith("transformers") else "torch_dtype"
    model = loader.from_pretrained(folder / "model", **{word: torch.float32}).eval()
    with torch.no_grad():
        return {"equal": torch.equal(answer(model, said), expected)}


def _serve() -> None:
    sys.meta_path.insert(0, _Hide())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    for line in sys.stdin:
        try:
            request = json.loads(line)
            answer = _judge(Path(request.pop("folder")), **request)
            if HIDDEN in sys.modules:
                answer = {"error": f"{HIDDEN} was imported"}
        except Exception as error:  # told to whoever asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()

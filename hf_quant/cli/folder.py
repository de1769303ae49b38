"""An output folder that is either not there or complete.

Work goes to OUT.partial beside it, one process at a time; OUT is the last rename. What is left in OUT.partial after an
interruption is what the same command needs to go on.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from hf_quant.errors import RunError, is_full
from hf_quant.running.locks import hold

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
OWN = (
    "README.md",
    "config.json",
    "report.json",
    "report.html",
    "layers.png",
    "bits.png",
)  # written anew for the output


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where a command works until its output is whole.

    Attributes:
        model: becomes the output folder. Of the same name, because cards say it.
        run: finished blocks, see `run_dir.RunDir`.
        evaluation: finished batches, see `evaluate.evaluate`.
    """

    model: Path
    run: Path
    evaluation: Path


@contextmanager
def output_folder(given: Path) -> Iterator[Workplace]:
    """A place to work in; `model` in it becomes the output folder when the block ends well, all else is dropped then.

    Raises:
        RunError: the output is there and not empty, cannot be written, the disk is full, or another run writes to it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            "a command is one process, and this is one of several: have torchrun or accelerate launch a script that "
            "calls hf_quant.quantize or hf_quant.finetune"
        )
    out = Path(os.path.abspath(given.expanduser()))
    partial = out.with_name(out.name + ".partial")
    try:
        _require_free(out)
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {given}: {error.strerror}") from None
    work = Workplace(partial / out.name, partial / f"{out.name}.run", partial / f"{out.name}.evaluation.jsonl")
    done = False
    with hold(partial):
        try:
            _require_free(out)  # again: the run that held the lock may have finished meanwhile
            shutil.rmtree(work.model, ignore_errors=True)
            yield work
            _flush(work.model)
            work.model.replace(out)
            done = True
        except (OSError, SafetensorError) as error:
            raise RunError(_explain(given, error)) from error
        finally:
            shutil.rmtree(work.model, ignore_errors=True)
            if done or not any(work.run.glob("*.safetensors")):  # else a run goes on from its finished blocks
                shutil.rmtree(partial, ignore_errors=True)


def _require_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; name a folder that is new or empty")
    if out.is_dir() and any(out.iterdir()):
        raise RunError(f"{out} is not empty; name another folder, or delete it first")


def _flush(folder: Path) -> None:
    """Bytes first, the rename after them: a power cut leaves no hollow files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _explain(out: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if is_full(error):
        return f"cannot write {out}: the disk is full ({text}); free some room and give the same command again"
    return f"cannot write {out}: {text}"


def copy_side_files(source: Path, target: Path) -> None:
    """Everything beside the weights that makes a model usable: tokenizer, processor, templates, licence."""
    for path in sorted(source.iterdir()):
        side = path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHTS)
        if side and path.name not in OWN and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)

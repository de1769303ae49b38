"""Single files of diffusers: packed layers in one are refused, as only the config.json beside them says what they are.

Diffusers has no hook there. Left alone it takes the file for an original checkpoint, and fails while it renames its
tensors, or later on layers that were left empty.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from hf_quant.errors import NotSupported

MODULES = ("single_file_utils", "single_file_model", "single_file")  # where it is defined, and who may have imported it
NAME = "load_single_file_checkpoint"


def _refusing(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(load)
    def load_single_file_checkpoint(path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        checkpoint = load(path, *args, **kwargs)
        if packed := next((key for key in checkpoint if key.endswith(".qweight")), None):
            raise NotSupported(
                f"{path} holds packed layers ({packed.removesuffix('.qweight')}, ...), and a single file does not say "
                "how they are packed: load the folder that it was saved in, with from_pretrained"
            )
        return checkpoint

    return load_single_file_checkpoint


for _name in MODULES:
    _module = sys.modules.get(f"diffusers.loaders.{_name}")
    _load = getattr(_module, NAME, None)
    if _load is not None and not hasattr(_load, "__wrapped__"):
        setattr(_module, NAME, _refusing(_load))

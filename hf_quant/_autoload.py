"""Registration without an import: our integrations load right after the registries they register with.

Standard library only, and it never raises: it runs inside other people's imports.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# module of a library -> our module that registers with that library when imported
INTEGRATIONS = {
    "transformers.quantizers.auto": "hf_quant.integrations.transformers",
    "diffusers.quantizers.auto": "hf_quant.integrations.diffusers",
    "diffusers.pipelines.pipeline_utils": "hf_quant.integrations.pipelines",
    "diffusers.loaders.single_file_utils": "hf_quant.integrations.single_file",
    # When transformers' registry is what imports torch, it is half-way through by the time we run; this comes later.
    "transformers.modeling_utils": "hf_quant.integrations.transformers",
    "peft.tuners.lora.model": "hf_quant.integrations.peft",
    "peft.peft_model": "hf_quant.integrations.adapters",
}


def install() -> None:
    """Register now with every library that is already imported, and with the others as soon as they are."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for trigger in INTEGRATIONS:
        spec = getattr(sys.modules.get(trigger), "__spec__", None)
        if spec is not None and not getattr(spec, "_initializing", False):
            _register(trigger)


def _register(trigger: str) -> None:
    try:
        importlib.import_module(INTEGRATIONS[trigger])
    except Exception as error:  # a broken hf_quant must not break `import transformers`
        logging.getLogger("hf_quant").warning("hf_quant could not register with %s: %r", trigger, error)


class _Finder(MetaPathFinder):
    """Finds only the modules above, through the other finders, and wraps their loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in INTEGRATIONS:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ThenRegister(spec.loader)
                return spec
        return None


class _ThenRegister(Loader):
    """Loads as the wrapped loader does, gives the module back to it, then registers."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        _register(module.__name__)

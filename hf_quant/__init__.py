"""A plug-in library of quantization methods for Hugging Face models.

Importing this package costs under 2 ms: public names are loaded when first used, methods when one is asked for.
"""

import importlib
from typing import TYPE_CHECKING

from hf_quant import _autoload

__version__ = "0.1.0"

_PUBLIC = {
    "QuantConfig": "hf_quant.config",
    "Report": "hf_quant.report",
    "dequantize": "hf_quant.api",
    "estimate": "hf_quant.api",
    "explain": "hf_quant.runtime.explain",
    "finetune": "hf_quant.api",
    "collect_statistics": "hf_quant.integrations.merging",
    "initialize_adapter": "hf_quant.integrations.initializing",
    "list_methods": "hf_quant.method",
    "merge_adapter": "hf_quant.integrations.merging",
    "prepare_for_training": "hf_quant.integrations.peft",
    "quantize": "hf_quant.api",
    "true_bits": "hf_quant.ledger",
    "tune": "hf_quant.tuning",
    "unmerge_adapter": "hf_quant.integrations.merging",
}

__all__ = [
    "QuantConfig",
    "Report",
    "collect_statistics",
    "dequantize",
    "estimate",
    "explain",
    "finetune",
    "initialize_adapter",
    "list_methods",
    "merge_adapter",
    "prepare_for_training",
    "quantize",
    "true_bits",
    "tune",
    "unmerge_adapter",
]

if TYPE_CHECKING:
    from hf_quant.api import dequantize as dequantize
    from hf_quant.api import estimate as estimate
    from hf_quant.api import finetune as finetune
    from hf_quant.api import quantize as quantize
    from hf_quant.config import QuantConfig as QuantConfig
    from hf_quant.integrations.initializing import initialize_adapter as initialize_adapter
    from hf_quant.integrations.merging import collect_statistics as collect_statistics
    from hf_quant.integrations.merging import merge_adapter as merge_adapter
    from hf_quant.integrations.merging import unmerge_adapter as unmerge_adapter
    from hf_quant.integrations.peft import prepare_for_training as prepare_for_training
    from hf_quant.ledger import true_bits as true_bits
    from hf_quant.method import list_methods as list_methods
    from hf_quant.report import Report as Report
    from hf_quant.runtime.explain import explain as explain
    from hf_quant.tuning import tune as tune


def __getattr__(name: str) -> object:
    """Load a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_quant' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_autoload.install()

"""Is bitsandbytes there, and does it load?"""

import importlib
from functools import cache


@cache
def why_not() -> str | None:
    """None when bitsandbytes can be imported, else the reason why not."""
    try:
        importlib.import_module("bitsandbytes")
    except ModuleNotFoundError:
        return "bitsandbytes is not installed (pip install 'hf-quant[bnb]')"
    except (ImportError, OSError, RuntimeError) as error:  # a build for another CUDA version, for example
        return f"bitsandbytes does not load here: {error}"
    return None

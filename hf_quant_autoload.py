"""What torch calls at the end of `import torch` (entry point group `torch.backends`): it imports hf_quant for the user.

A module of its own, outside the package, because an exception here would make `import torch` fail: nothing in
hf_quant, not even its absence, may do that. `HF_QUANT_AUTOLOAD=0` turns it off; `import hf_quant` then does the same.
"""

import os


def install() -> None:
    """Import hf_quant, which costs under 2 ms and registers it once transformers or diffusers is imported."""
    if os.environ.get("HF_QUANT_AUTOLOAD", "1") == "0":
        return
    try:
        import hf_quant  # noqa: F401
    except Exception as error:  # a broken installation is reported, and torch goes on
        import logging

        logging.getLogger("hf_quant").warning("hf_quant could not be imported: %r", error)

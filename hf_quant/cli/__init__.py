"""The command line `hf-quant`: one file a command, nothing heavy imported before it is needed.

Exit codes: 0 done, 1 an error of ours (one line on stderr), 2 a command line that cannot be read, 130 interrupted.
"""

import json
import logging
import os
import sys
import warnings

from hf_quant.errors import HfQuantError


def main() -> None:
    """Run the command line and exit."""
    from hf_quant.cli.app import app

    _quiet()
    try:
        app()
    except HfQuantError as error:
        _fail(type(error).__name__, str(error))
    except OSError as error:  # ours are caught where they are understood; this is the rest, still without a traceback
        _fail(type(error).__name__, str(error))


def _quiet() -> None:
    """Libraries' advice is not for the person at the command line; their errors are. No bars where nobody looks."""
    warnings.simplefilter("ignore")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _fail(kind: str, message: str) -> None:
    line = " ".join(message.split())
    sys.stderr.write(f"error: {line}\n")
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": {"type": kind, "message": line}}) + "\n")
    sys.exit(1)

"""The errors a user can meet. Each message says what is wrong, where, and what to do about it."""


class HfQuantError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(HfQuantError, ValueError):
    """A `QuantConfig` (or a method argument) is not valid; raised at construction."""


class UnsupportedModel(HfQuantError, ValueError):
    """The model holds something that cannot be quantized as asked; raised before work begins."""


class UnsupportedSpec(HfQuantError, ValueError):
    """A (spec, format), (spec, solver) or (method, unit) pair cannot work; raised at plan time."""


class CalibrationError(HfQuantError, ValueError):
    """The calibration data is empty, too short, not text of this tokenizer, or never reaches a site."""


class CheckpointError(HfQuantError, RuntimeError):
    """A saved model is truncated, corrupt, of an unknown format, or of a newer version."""


class RunError(HfQuantError, RuntimeError):
    """A run cannot start or go on: output not writable, locked by another run, or the disk is full."""


class PluginError(HfQuantError, RuntimeError):
    """A stage of a method broke the contract of its protocol; whoever wrote it is to mend it."""


class NotSupported(HfQuantError, NotImplementedError):
    """This method does not offer what was asked (for example fine-tuning)."""


def is_full(error: Exception) -> bool:
    """Whether a file could not be written for want of room."""
    return any(sign in str(error) for sign in ("No space left", "Disk quota", "File too large"))

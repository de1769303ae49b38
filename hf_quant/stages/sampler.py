"""Sampler: which data calibrates? Turns what a user passes into micro-batches of model inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_quant.errors import UnsupportedModel

# Keyword arguments of the model's forward. Names that begin with "@" are kept from it: tags of the tokens that only
# statistics and losses read, `[]`, `[B]` or `[B, S]` ("@weight", "@modality"; "timestep" is an argument and a tag).
Batch = dict[str, Tensor]


def model_inputs_of(batch: Batch) -> dict[str, Any]:
    """What the model's forward is given of a batch; a name "a.b" is the entry b of its argument a, a dict."""
    given: dict[str, Any] = {}
    for name, value in batch.items():
        argument, _, entry = name.partition(".")
        if entry:
            given.setdefault(argument, {})[entry] = value
        elif not name.startswith("@"):
            given[name] = value
    return given


def token_tags(batch: Batch, names: Sequence[str], tokens: int) -> dict[str, Tensor]:
    """Tags of a batch, one value a token (`[T]`): a tag of a sample holds for all its tokens."""
    found = {n: batch["@" + n] if "@" + n in batch else batch[n] for n in names}
    return {n: tag.reshape(-1).repeat_interleave(tokens // tag.numel()) for n, tag in found.items()}


class Sampler(Protocol):
    """Draws calibration batches."""

    def sample(self, data: Any, processor: Any, seed: int, model: nn.Module) -> list[Batch]:  # noqa: ANN401
        """Micro-batches, the same for the same model, data and seed; diffusion samplers run the model.

        Raises:
            CalibrationError: empty, too short, or not of this model's vocabulary.
        """


def made_up(model: nn.Module, samples: int, length: int, seed: int) -> Batch:
    """Random inputs of the right form: tokens of the vocabulary, or pixels.

    Raises:
        UnsupportedModel: what the model takes is not known here.
    """
    config, generator = getattr(model, "config", None), torch.Generator().manual_seed(seed)
    main = getattr(model, "main_input_name", None)
    if main == "input_ids" and (vocabulary := getattr(config, "vocab_size", 0)):
        return {main: torch.randint(vocabulary, (samples, length), generator=generator)}
    if main == "pixel_values" and (size := getattr(config, "image_size", 0)):
        pixels = torch.randn(samples, getattr(config, "num_channels", 3), size, size, generator=generator)
        return _as_the_model_reads({main: pixels}, model)
    raise UnsupportedModel(f"{type(model).__name__}: its layers are found by running it; pass calibration data")


def _as_the_model_reads(batch: Batch, model: nn.Module) -> Batch:
    """Pixels and sounds, which processors give in float32, in the type of the model's weights."""
    main = getattr(model, "main_input_name", None)
    if main not in batch or not batch[main].is_floating_point():
        return batch
    return batch | {main: batch[main].to(next(p.dtype for p in model.parameters() if p.is_floating_point()))}


@dataclass(frozen=True, slots=True)
class MadeUp:
    """For methods that need no data but run the model: random inputs (see `made_up`), unless data is given."""

    samples: int = 16
    length: int = 64

    def sample(self, data: Any, processor: Any, seed: int, model: nn.Module) -> list[Batch]:  # noqa: ANN401
        """See `Sampler.sample`."""
        if data is not None:
            return TextSampler(samples=self.samples).sample(data, processor, seed, model)
        batch = made_up(model, self.samples, self.length, seed)
        parts = {name: tensor.split(8) for name, tensor in batch.items()}
        return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]


@dataclass(frozen=True, slots=True)
class TextSampler:
    """`samples` sequences of `length` tokens from texts, a datasets.Dataset, a path, or token ids `[n, S]`.

    Ids are taken as they are (first `samples` rows, cut to `length`). Texts are tokenized, joined by the end-of-text
    token and cut into windows, of which `samples` are drawn with the seed. No window is longer than the model takes.
    A list of dicts of tensors (images, or ids with a mask) passes through, each dict one micro-batch, or several where
    it holds padding, which is cut off; rows of a dataset keep their labels and masks.
    """

    samples: int = 128
    length: int = 512
    batch_size: int = 8

    def sample(
        self,
        data: Any,  # noqa: ANN401
        processor: Any,  # noqa: ANN401
        seed: int,
        model: nn.Module | None = None,
    ) -> list[Batch]:
        """See `Sampler.sample`."""
        from hf_quant.data.calibration import check_inputs, context_length, model_inputs

        length = min(self.length, (context_length(model) if model is not None else None) or self.length)
        batches = model_inputs(data, processor, self.samples, length, seed, self.batch_size, model)
        if model is None:
            return batches
        check_inputs(batches, model)
        return [_as_the_model_reads(batch, model) for batch in batches]

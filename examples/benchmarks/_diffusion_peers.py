"""Networks that another backend of diffusers quantizes while they are loaded: `from_pretrained(quantization_config=)`.

Each peer at the settings that it has; W and A are bits of weights and of what they are multiplied with, A16 meaning
that inputs stay what they are. None of them sees data, and torchao, quanto and bitsandbytes leave convolutions as they
are, which is most of a U-Net: the column of bytes says how much of a network was quantized at all.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch

from hf_quant.diffusion.drawing import backbone, name_of_backbone
from hf_quant.diffusion.loading_pipeline import load_pipeline, with_network

GROUP = 32  # the widest that divides every layer of digits-unet and digits-dit


def torchao(name: str, *, grouped: str = "", **given: Any) -> Any:  # noqa: ANN401
    """`grouped`: the argument that takes how many weights share a scale."""
    from torchao import quantization

    if grouped:
        given |= {"weight_dtype": torch.int4, grouped: quantization.PerGroup(GROUP)}
    return diffusers.TorchAoConfig(getattr(quantization, name)(**given))


def sdnq(bits: int, *, rounds_inputs: bool) -> Any:  # noqa: ANN401
    """Every layer of any size, convolutions included; not compiled, which would take longer than all the rest."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
    from sdnq import SDNQConfig

    return SDNQConfig(
        weights_dtype=f"int{bits}",
        quant_conv=True,
        use_quantized_matmul=rounds_inputs,
        use_quantized_matmul_conv=rounds_inputs,
        quantized_matmul_dtype="int8" if rounds_inputs else None,
        minimum_allowed_numel=0,
        minimum_allowed_channel_size=1,
        add_skip_keys=False,
        quantization_device="cpu",
        return_device="cpu",
    )


def bitsandbytes(bits: int) -> Any:  # noqa: ANN401
    """LLM.int8 and NF4."""
    if bits == 8:
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return diffusers.BitsAndBytesConfig(load_in_4bit=True, **how)


DISTRIBUTIONS = {"torchao": "torchao", "quanto": "optimum-quanto", "bitsandbytes": "bitsandbytes", "sdnq": "sdnq"}
PACKAGES = {"torchao": "torchao", "quanto": "optimum.quanto", "bitsandbytes": "bitsandbytes", "sdnq": "sdnq"}
PEERS: dict[str, dict[str, Callable[[], Any]]] = {
    "torchao": {
        "W8A16": lambda: torchao("Int8WeightOnlyConfig"),
        "W4A16": lambda: torchao("IntxWeightOnlyConfig", grouped="granularity"),
        "W8A8": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
        "W4A8": lambda: torchao("Int8DynamicActivationIntxWeightConfig", grouped="weight_granularity"),
    },
    "quanto": {"W8A16": lambda: diffusers.QuantoConfig("int8"), "W4A16": lambda: diffusers.QuantoConfig("int4")},
    "bitsandbytes": {"W8A8": lambda: bitsandbytes(8), "W4A16": lambda: bitsandbytes(4)},
    "sdnq": {
        "W8A16": lambda: sdnq(8, rounds_inputs=False),
        "W4A16": lambda: sdnq(4, rounds_inputs=False),
        "W8A8": lambda: sdnq(8, rounds_inputs=True),
        "W4A8": lambda: sdnq(4, rounds_inputs=True),
    },
}


def offers(peer: str, setting: str) -> bool:
    """Whether it is installed and has the setting."""
    try:
        return setting in PEERS[peer] and find_spec(PACKAGES[peer]) is not None
    except ModuleNotFoundError:  # the parent of a package with a dot
        return False


def quantized(peer: str, setting: str, folder: Path) -> Any:  # noqa: ANN401
    """The pipeline of a folder with its network quantized by a peer, in float32 where it computes in floats."""
    pipeline = load_pipeline(folder)
    network = type(backbone(pipeline)).from_pretrained(
        folder,
        subfolder=name_of_backbone(pipeline),
        torch_dtype=torch.float32,
        quantization_config=PEERS[peer][setting](),
    )
    return with_network(pipeline, network.eval())

"""Who else multiplies by low-bit weights on CPUs: torch's own operators, and libraries where they are installed.

Each takes tokens in the type that it is fastest in, made before anything is timed, and one thread. What an entry gives
for random weights is checked against the float product: a contender that computes something else is not reported.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GROUP = 128
Call = Callable[[], object]
Bind = Callable[[Tensor], Call]  # bfloat16 tokens [T, K] -> what is timed, which returns y_TN


@dataclass(frozen=True, slots=True)
class Peer:
    """A product with weights made of `W_NK` float32.

    Attributes:
        name: in the tables.
        weights: bits of a weight.
        inputs: bits that a token's value keeps in the product.
        make: `W_NK` -> `Bind`.
        package: whose version is noted; None: torch.
    """

    name: str
    weights: int
    inputs: int
    make: Callable[[Tensor], Bind]
    package: str | None = None


def _prepacked(W_NK: Tensor) -> Bind:
    """The bf16 product of a compiled and frozen model."""

    def bind(x_TK: Tensor) -> Call:
        packed = torch.ops.mkldnn._reorder_linear_weight(W_NK.bfloat16(), len(x_TK))
        return lambda: torch.ops.mkldnn._linear_pointwise(x_TK, packed, None, "none", [], "")

    return bind


def _grouped(W_NK: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes `-top .. top` and scales `[N, K / GROUP]`."""
    blocks = W_NK.unflatten(1, (-1, GROUP))
    scale = blocks.abs().amax(-1) / top
    return (blocks / scale[..., None]).round().flatten(1).int(), scale


def _rows(W_NK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and scales `[N]`."""
    scale = W_NK.abs().amax(1) / 127
    return (W_NK / scale[:, None]).round().to(torch.int8), scale


def _int4pack(W_NK: Tensor) -> Bind:
    codes, scale = _grouped(W_NK, 7)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes + 8, 2)
    ranges = torch.stack((scale.T, torch.zeros_like(scale.T)), -1).bfloat16().contiguous()
    return lambda x: lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, ranges)


def _int8pack(W_NK: Tensor) -> Bind:
    codes, scale = _rows(W_NK)
    scale = scale.bfloat16()
    return lambda x: lambda: torch.ops.aten._weight_int8pack_mm(x, codes, scale)


def _onednn(W_NK: Tensor) -> Bind:
    """int8 times int8 with one scale for all tokens, found in each call."""
    codes, scale = _rows(W_NK)
    zeros = torch.zeros(len(codes), dtype=torch.int32)

    def bind(x_TK: Tensor) -> Call:
        packed = torch.ops.onednn.qlinear_prepack(codes, list(x_TK.shape))

        def call() -> Tensor:
            step = float(x_TK.abs().amax()) / 127
            x_int = (x_TK * (1 / step)).round_().add_(128).to(torch.uint8)  # signed ones have no fast path
            y_TN: Tensor = torch.ops.onednn.qlinear_pointwise(
                x_int, step, 128, packed, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )
            return y_TN

        return call

    return bind


def _linear_dynamic(W_NK: Tensor) -> Bind:
    codes, scale = _rows(W_NK)
    zeros = torch.zeros(len(codes), dtype=torch.int64)
    weight = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight, None)

    def bind(x_TK: Tensor) -> Call:
        x_float = x_TK.float()
        return lambda: torch.ops.quantized.linear_dynamic(x_float, packed)

    return bind


def _linear(W_NK: Tensor) -> nn.Linear:
    layer = nn.Linear(W_NK.shape[1], W_NK.shape[0], bias=False)
    layer.weight = nn.Parameter(W_NK.clone(), requires_grad=False)
    return layer.bfloat16()


def _torchao(config: str) -> Callable[[Tensor], Bind]:
    def make(W_NK: Tensor) -> Bind:
        from torchao import quantization as library

        arguments = {"group_size": GROUP, "int4_packing_format": "opaque"} if config.startswith("Int4") else {}
        model = nn.Sequential(_linear(W_NK))
        library.quantize_(model, getattr(library, config)(**arguments, set_inductor_config=False))
        return lambda x: lambda: model(x)

    return make


def _bnb_nf4(W_NK: Tensor) -> Bind:
    import bitsandbytes as library

    layer = library.nn.Linear4bit(
        W_NK.shape[1], W_NK.shape[0], False, torch.bfloat16, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = library.nn.Params4bit(
        W_NK.bfloat16(), requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer
    )
    layer = layer.to("cpu").eval()
    return lambda x: lambda: layer(x)


def _bnb_int8(W_NK: Tensor) -> Bind:
    import bitsandbytes as library

    layer = library.nn.Linear8bitLt(W_NK.shape[1], W_NK.shape[0], False, has_fp16_weights=False)
    layer.weight = library.nn.Int8Params(W_NK.bfloat16(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu").eval()
    return lambda x: lambda: layer(x)


def _quanto(bits: int) -> Callable[[Tensor], Bind]:
    def make(W_NK: Tensor) -> Bind:
        from optimum import quanto as library

        model = nn.Sequential(_linear(W_NK))
        library.quantize(model, weights=getattr(library, f"qint{bits}"))
        library.freeze(model)
        return lambda x: lambda: model(x)

    return make


def _onnxruntime(bits: int) -> Callable[[Tensor], Bind]:
    """MatMulNBits at its accuracy level 4: tokens become 8-bit integers, in blocks."""

    def make(W_NK: Tensor) -> Bind:
        import onnx
        import onnxruntime as library
        from onnx import TensorProto, helper, numpy_helper

        N, K = W_NK.shape
        codes, scale = _grouped(W_NK, (1 << (bits - 1)) - 1)
        codes = (codes + (1 << (bits - 1))).to(torch.uint8)
        words = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=K, N=N, bits=bits, block_size=GROUP
        )
        node.attribute.append(helper.make_attribute("accuracy_level", 4))
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, K])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, N])],
            [
                numpy_helper.from_array(words.reshape(N, K // GROUP, -1).numpy(), "w"),
                numpy_helper.from_array(scale.flatten().contiguous().numpy(), "s"),
            ],
        )
        sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=sets, ir_version=10)
        onnx.checker.check_model(model)
        options = library.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = library.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

        def bind(x_TK: Tensor) -> Call:
            x = x_TK.float().numpy()
            return lambda: session.run(None, {"x": x})[0]

        return bind

    return make


def _openvino(bits: int) -> Callable[[Tensor], Bind]:
    """Compressed weights; tokens become 8-bit integers in groups, as it does unless told otherwise."""

    def make(W_NK: Tensor) -> Bind:
        import numpy as np
        import openvino as library
        from openvino import opset13 as ops

        N, K = W_NK.shape
        codes, scale = _grouped(W_NK, (1 << (bits - 1)) - 1)
        shape = [N, K // GROUP, GROUP]
        values = codes.to(torch.int8).reshape(shape)
        if bits == 4:
            halves = (values & 15).to(torch.uint8).flatten()
            packed = (halves[::2] | halves[1::2] << 4).numpy()
        else:
            packed = values.numpy()
        kind = library.Type.i4 if bits == 4 else library.Type.i8
        weight = ops.constant(library.Tensor(packed, shape, kind))
        wide = ops.multiply(ops.convert(weight, "f16"), ops.constant(scale[..., None].half().numpy()))
        matrix = ops.convert(ops.reshape(wide, ops.constant(np.array([N, K])), False), "f32")
        x = ops.parameter([-1, K], library.Type.f32)
        model = library.Model([ops.matmul(x, matrix, False, True)], [x])
        options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "bf16"}
        request = library.Core().compile_model(model, "CPU", options).create_infer_request()

        def bind(x_TK: Tensor) -> Call:
            tokens = library.Tensor(x_TK.float().numpy())

            def call() -> object:
                request.set_input_tensor(tokens)
                request.infer()
                return request.get_output_tensor().data

            return call

        vars(bind)["memory"] = packed  # the tensor does not own it
        return bind

    return make


def _ggml(bits: int) -> Callable[[Tensor], Bind]:
    """llama.cpp's Q4_0 or Q8_0: blocks of 32, tokens in blocks of 8-bit integers."""

    def make(W_NK: Tensor) -> Bind:
        import ctypes

        import ggml as library

        (N, K), kind = W_NK.shape, getattr(library, f"GGML_TYPE_Q{bits}_0")
        floats = ctypes.POINTER(ctypes.c_float)

        def bind(x_TK: Tensor) -> Call:
            size = 64 * N * K // 8 + 64 * x_TK.numel() + 16 * len(x_TK) * N + (1 << 24)
            context = library.ggml_init(library.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=False))
            weight = library.ggml_new_tensor_2d(context, kind, K, N)
            tokens = library.ggml_new_tensor_2d(context, library.GGML_TYPE_F32, K, len(x_TK))
            source, x = W_NK.contiguous(), x_TK.float().contiguous()
            library.ggml_quantize_chunk(
                kind, ctypes.cast(source.data_ptr(), floats), library.ggml_get_data(weight), 0, N, K, None
            )
            ctypes.memmove(library.ggml_get_data(tokens), x.data_ptr(), x.nbytes)
            product = library.ggml_mul_mat(context, weight, tokens)
            graph = library.ggml_new_graph(context)
            library.ggml_build_forward_expand(graph, product)
            plan = library.ggml_graph_plan(graph, 1, None)
            work = ctypes.create_string_buffer(max(1, plan.work_size))
            plan.work_data = ctypes.cast(work, ctypes.POINTER(ctypes.c_uint8))
            memory = (ctypes.c_float * (len(x_TK) * N)).from_address(library.ggml_get_data(product))
            y_TN = torch.frombuffer(memory, dtype=torch.float32).view(len(x_TK), N)

            def call() -> Tensor:
                library.ggml_graph_compute(graph, ctypes.byref(plan))
                return y_TN

            vars(call)["memory"] = work, context  # as long as the call itself
            return call

        return bind

    return make


PEERS = (
    Peer("torch bf16 prepacked (oneDNN)", 16, 16, _prepacked),
    Peer("torch _weight_int4pack_mm_for_cpu", 4, 16, _int4pack),
    Peer("torch _weight_int8pack_mm", 8, 16, _int8pack),
    Peer("torch onednn.qlinear_pointwise", 8, 8, _onednn),
    Peer("torch quantized::linear_dynamic", 8, 8, _linear_dynamic),
    Peer("torchao int4", 4, 16, _torchao("Int4WeightOnlyConfig"), "torchao"),
    Peer("torchao int8", 8, 16, _torchao("Int8WeightOnlyConfig"), "torchao"),
    Peer("torchao int8 dynamic", 8, 8, _torchao("Int8DynamicActivationInt8WeightConfig"), "torchao"),
    Peer("bitsandbytes NF4", 4, 16, _bnb_nf4, "bitsandbytes"),
    Peer("bitsandbytes int8", 8, 8, _bnb_int8, "bitsandbytes"),
    Peer("quanto int4", 4, 16, _quanto(4), "optimum-quanto"),
    Peer("quanto int8", 8, 16, _quanto(8), "optimum-quanto"),
    Peer("onnxruntime MatMulNBits 4", 4, 8, _onnxruntime(4), "onnxruntime"),
    Peer("onnxruntime MatMulNBits 8", 8, 8, _onnxruntime(8), "onnxruntime"),
    Peer("OpenVINO i4", 4, 8, _openvino(4), "openvino"),
    Peer("OpenVINO i8", 8, 8, _openvino(8), "openvino"),
    Peer("ggml Q4_0", 4, 8, _ggml(4), "ggml-python"),
    Peer("ggml Q8_0", 8, 8, _ggml(8), "ggml-python"),
)

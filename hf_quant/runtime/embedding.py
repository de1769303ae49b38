"""QuantEmbedding: a lookup table held packed; a lookup dequantizes only the rows asked for."""

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_quant.errors import UnsupportedModel
from hf_quant.formats import Layer, PackedFormat, format_named
from hf_quant.qtensor import QTensor
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import Packed
from hf_quant.spec import Spec


class QuantEmbedding(Packed, nn.Embedding):
    """`y = Q[ids]` with the table Q packed `[N, K]`: N entries of width K.

    In place of a subclass of nn.Embedding it keeps that class's own forward around the lookup (Gemma scales what it
    looks up, OPT shifts positions), by being a subclass of both.
    """

    source: ClassVar[type[nn.Embedding]] = nn.Embedding

    def __init__(
        self,
        fmt: PackedFormat,
        layer: Layer,
        tensors: dict[str, Tensor],
        *,
        dtype: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate the dense table
        self.num_embeddings, self.embedding_dim = layer.shape
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self._hold(fmt, layer, tensors, dtype)

    @classmethod
    def from_qtensor(
        cls, q: QTensor, fmt: PackedFormat, *, like: nn.Embedding | None = None, dtype: torch.dtype = torch.float32
    ) -> "QuantEmbedding":
        """A table from what a solver returned, with the settings and the forward of `like`."""
        table = _made_like(like, fmt, Layer(q.shape, q.spec), fmt.pack(q), dtype)
        table.prepare()
        return table

    def describe(self) -> dict[str, Any]:
        """All that `from_json` needs besides the shape, JSON-safe."""
        return {"format": self.format.id, "weights": self.layer.weights.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any], *, like: nn.Embedding, dtype: torch.dtype) -> "QuantEmbedding":
        """An empty table on the meta device with the shapes and types of a saved one, to take the place of `like`."""
        shape = (like.num_embeddings, like.embedding_dim)
        fmt, layer = format_named(data["format"]), Layer(shape, Spec.from_json(data["weights"]))
        tensors = {name: torch.empty(s, dtype=d, device="meta") for name, (s, d) in fmt.layout(layer).items()}
        return _made_like(like, fmt, layer, tensors, dtype)

    def plain(self, weight: nn.Parameter) -> nn.Embedding:
        """The float embedding it stands for, holding `weight`."""
        module = self.source.__new__(self.source)
        nn.Module.__init__(module)
        _adopt(module, self)
        module.weight = weight
        return module

    def __reduce__(self) -> tuple[Any, ...]:
        """By its source class, as a class made on the fly has no name to be found by."""
        return _blank, (self.source,), self.__getstate__()

    def prepare(self) -> None:
        """A lookup has no kernel to choose."""
        self._unprepare()
        self.kernel = "lookup"
        if not self.qweight.is_meta:
            self._settle()

    def forward(self, input: Tensor) -> Tensor:
        """Ids `[...]` -> `[..., K]` in the compute dtype."""
        return rows_of(self, input.reshape(-1)).reshape(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format.id}"


@cache
def _class_like(source: type[nn.Embedding]) -> type[QuantEmbedding]:
    if source is nn.Embedding:
        return QuantEmbedding
    own = {"__init__": QuantEmbedding.__init__, "source": source}
    return type(f"Quant{source.__name__}", (source, QuantEmbedding), own)


def _blank(source: type[nn.Embedding]) -> QuantEmbedding:
    made = _class_like(source)  # type: ignore[arg-type]  # classes are hashable
    return made.__new__(made)


def _made_like(
    like: nn.Embedding | None, fmt: PackedFormat, layer: Layer, tensors: dict[str, Tensor], dtype: torch.dtype
) -> QuantEmbedding:
    table = _class_like(nn.Embedding if like is None else type(like))(fmt, layer, tensors, dtype=dtype)
    if like is not None:
        _adopt(table, like)
    return table


def _adopt(target: nn.Module, source: nn.Module) -> None:
    """Take over settings and buffers: everything but the weight, in either of its forms, and accelerate's hooks."""
    own = {*vars(nn.Module()), *Packed.__annotations__, "forward", "_hf_hook", "_old_forward"}
    target.__dict__.update({k: v for k, v in vars(source).items() if k not in own})
    for name, buffer in source.named_buffers(recurse=False):
        target.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)


def tied_embedding(table: QuantEmbedding, like: nn.Embedding) -> QuantEmbedding:
    """Another embedding over the same packed tensors (an encoder's and a decoder's)."""
    other = _made_like(like, table.format, table.layer, _shared(table), table.compute_dtype)
    other.prepare()
    return other


def tied_head(table: QuantEmbedding, bias: Tensor | None = None) -> QuantLinear:
    """A linear layer over the same packed tensors (an output head tied to its embedding)."""
    head = QuantLinear(table.format, table.layer, _shared(table), dtype=table.compute_dtype, bias=bias)
    head.prepare()
    return head


def _shared(table: QuantEmbedding) -> dict[str, Tensor]:
    return {name: getattr(table, name) for name in table.format.layout(table.layer)}


def retie(model: nn.Module) -> None:
    """Rewrite transformers' tied keys `head.weight -> table.weight` as ties of the packed tensors, and share them.

    Raises:
        UnsupportedModel: only one end of a tie is quantized.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    rewritten: dict[str, str] = {}
    for target, source in ties.items():
        ends = [_owner(model, key) for key in (target, source)]
        packed = [isinstance(end, Packed) for end in ends]
        if not any(packed) or not (target.endswith(".weight") and source.endswith(".weight")):
            rewritten[target] = source
            continue
        if not all(packed):
            raise UnsupportedModel(
                f"{target} is tied to {source} and only one of them is quantized; quantize both, keep both, or set "
                "config.tie_word_embeddings = False"
            )
        head, table = ends
        assert isinstance(table, Packed)  # noqa: S101  `packed` says so
        for name in table.format.layout(table.layer):
            setattr(head, name, getattr(table, name))
            rewritten[target.removesuffix("weight") + name] = source.removesuffix("weight") + name
    if rewritten != ties:
        model.all_tied_weights_keys = rewritten  # type: ignore[assignment]  # plain attributes of PreTrainedModel
        model._tied_weights_keys = rewritten  # type: ignore[assignment]


def _owner(model: nn.Module, key: str) -> nn.Module:
    return model.get_submodule(key.rpartition(".")[0])


def rows_of(table: Packed, ids_T: Tensor) -> Tensor:
    """Rows of a packed matrix, `[T, K]` in its compute dtype."""
    tensors = table.packed_tensors()
    values = [tensors[name] for name in sorted(tensors)]
    rows: Tensor = _rows(ids_T, values, table.format.id, table.layer.key, table.compute_dtype)
    return rows


@torch.library.custom_op("hf_quant::rows", mutates_args=())
def _rows(ids: Tensor, tensors: list[Tensor], format_id: str, layer: str, dtype: torch.dtype) -> Tensor:
    fmt, whole = format_named(format_id), Layer.from_key(layer)
    named = dict(zip(sorted(fmt.layout(whole)), tensors, strict=True))
    return fmt.rows(ids, named, whole).to(dtype)


@_rows.register_fake
def _(ids: Tensor, tensors: list[Tensor], format_id: str, layer: str, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(ids.shape[0], Layer.from_key(layer).shape[1], dtype=dtype)

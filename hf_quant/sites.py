"""Sites: which matrices of a model can be quantized, which are kept and why, and which blocks they sit in."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

Kind = Literal["linear", "conv1d", "embedding", "experts"]

# Kept in full precision unless an override names them: heads decide the output directly, routers decide the path.
KEPT_NAMES = {
    "output head": (
        "lm_head",
        "classifier",
        "score",
        "qa_outputs",
        "*_head",
        "embed_out",
        "cls",
        "pooler",
    ),
    "router": ("router", "gate", "shared_expert_gate"),
}
# The same, of the model's own children only: attention blocks have layers of these names inside.
KEPT_CHILDREN = {
    "output head": ("proj_out", "proj_out_*"),
    "input or output convolution": ("conv_in", "conv_out"),
}

PLAIN_LINEARS = ("FalconLinear",)  # subclasses of nn.Linear that compute what it does


@dataclass(frozen=True, slots=True)
class Site:
    """One matrix `[N, K]` (or `[E, N, K]` for fused experts) that a method quantizes.

    Attributes:
        name: dotted path of the module in the model.
        kind: how the module stores and uses it.
        shape: (N outputs, K inputs) of the logical matrix.
        block: dotted path of the block it sits in, or "" outside every block.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    block: str = ""


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Sites of one block that read the same input tensor, in order of execution.

    Attributes:
        producer: dotted path of the norm (or linear) whose output they read, when a per-channel scale can be folded
            into it; None when there is none.
        channels: the producer's output channel that each input channel carries (values that several query heads
            share); None: the one with the same number.
        shifts: a constant can be moved from the producer to the readers, too.
        head: so many neighbouring input channels can be rotated together with the producer's.
        parts: which part of a concatenation each input channel came from, where there was one (`joins`).
    """

    sites: tuple[Site, ...]
    producer: str | None = None
    channels: Tensor | None = field(default=None, compare=False)
    shifts: bool = field(default=False, compare=False)
    head: int = field(default=1, compare=False)
    parts: Tensor | None = field(default=None, compare=False)


def linear_shape(module: nn.Module) -> tuple[Kind, tuple[int, int]] | None:
    """(kind, (N, K)) when the module is a plain linear layer or GPT-2's transposed Conv1D, else None."""
    plain = type(module) is nn.Linear or type(module).__name__ in PLAIN_LINEARS
    if plain and isinstance(module, nn.Linear):
        return "linear", (module.out_features, module.in_features)
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
        return "conv1d", (weight.shape[1], weight.shape[0])
    return None


def outputs_of(module: nn.Module) -> int:
    """Width of what a linear layer or an embedding puts out.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if (found := linear_shape(module)) is None:
        raise TypeError(f"is a {type(module).__name__}, neither a linear layer nor an embedding")
    return found[1][0]


def find_blocks(model: nn.Module) -> list[str]:
    """Paths of the repeated blocks: children of every outermost ModuleList whose members all hold a linear.

    Bare linear layers in a list (the layers of a detector's MLP, which may run once for every decoder layer) are none.
    """
    blocks: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(b + ".") for b in blocks)
        if not isinstance(module, nn.ModuleList) or inside:
            continue
        if len(module) and all(any(linear_shape(m) for m in child.modules() if m is not child) for child in module):
            blocks += [f"{name}.{i}" for i in range(len(module))]
    return blocks


def kept_reason(name: str) -> str | None:
    """Why a module of this name, or inside one of it, stays in full precision by default; or None."""
    parts = name.split(".")
    for table, looked_at in ((KEPT_NAMES, parts), (KEPT_CHILDREN, parts[:1])):
        for reason, patterns in table.items():
            if any(fnmatchcase(part, p) for part in looked_at for p in patterns):
                return reason
    return None


def covering(chosen: Sequence[str], names: Iterable[str]) -> list[str]:
    """The shortest globs that match the chosen names and none of the others: `a.b.*` where all of `a.b` is chosen."""
    others = set(names) - set(chosen)
    found: dict[str, None] = {}
    for name in chosen:
        parts = name.split(".")
        heads = (".".join(parts[:cut]) + "." for cut in range(1, len(parts)))
        whole = (head + "*" for head in heads if not any(o.startswith(head) for o in others))
        found[next(whole, name)] = None
    return list(found)


def walk(model: nn.Module) -> Iterator[Site]:
    """Every matrix that could be quantized, in module order."""
    blocks = find_blocks(model)
    for name, module in model.named_modules():
        found = linear_shape(module)
        if found is None and isinstance(module, nn.Embedding):
            found = "embedding", (module.num_embeddings, module.embedding_dim)
        if found:
            block = next((b for b in blocks if name.startswith(b + ".")), "")
            yield Site(name, found[0], found[1], block)

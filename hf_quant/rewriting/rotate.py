"""Rotate: apply `Rotations` to the weights of a model, in place, once they were rehearsed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.coverage import ties
from hf_quant.errors import UnsupportedModel
from hf_quant.rewriting.anatomy import Body, examine, probe_of, rehearse
from hf_quant.rewriting.rewrite import fold_norm, map_inputs, map_outputs
from hf_quant.runtime.rotating import rotate_input
from hf_quant.sites import SiteGroup
from hf_quant.stages.sampler import Batch
from hf_quant.stages.transform import Loss, Rotations, WholeTransform

MakeLoss = Callable[[nn.Module, Body], Loss]


def rotate_whole(
    model: nn.Module,
    blocks: Sequence[str],
    transform: WholeTransform,
    batches: Sequence[Batch],
    seed: int,
    make_loss: MakeLoss | None = None,
) -> None:
    """Let a transform look at the model, and apply what it proposes.

    Args:
        model: rotated in place.
        blocks: its blocks.
        transform: what proposes.
        batches: to look at the model with; none are needed where inputs can be made up.
        seed: of what is drawn at random.
        make_loss: makes what a transform that learns is lent.

    Raises:
        UnsupportedModel: the architecture does not allow it; no weight was touched.
    """
    probe = probe_of(model, batches)
    body = examine(model, blocks, probe)
    untieable(model)
    loss: Loss = _no_loss if make_loss is None or not transform.learns else make_loss(model, body)
    rotations = transform.rotate(body.anatomy(), loss, seed)
    allowed = {g.sites[0].name for g in body.values}, {g.sites[0].name for g in body.inner}
    for name in (*(set(rotations.heads) - allowed[0]), *(set(rotations.online) - allowed[1])):
        raise UnsupportedModel(
            f"{name} cannot be rotated so: its input is neither the values of attention heads nor something of a "
            "block's own (positions are rotated into queries and keys, so these are not)"
        )
    if rotations.residual is not None:
        rehearse(model, body, rotations.residual, probe)
    apply(model, body, rotations)


def _no_loss(rotations: Rotations, step: int) -> Tensor:
    raise UnsupportedModel("a loss is lent only to transforms that say they learn")


@torch.no_grad()
def apply(model: nn.Module, body: Body, rotations: Rotations) -> None:
    """Rewrite the weights."""
    if rotations.residual is not None:
        untie(model)
        for name, readers in body.norms.items():
            fold_norm(name, model.get_submodule(name), [model.get_submodule(r) for r in readers])
        rotate_stream(model, body, rotations.residual.to(next(model.parameters()).device))
    by_first = {g.sites[0].name: g for g in body.inner}
    for name, R in rotations.heads.items():
        rotate_heads(model, by_first[name], R.to(next(model.parameters()).device))
    for name, rotation in rotations.online.items():
        for site in by_first[name].sites:
            rotate_input(model.get_submodule(site.name), rotation)


def rotate_stream(model: nn.Module, body: Body, R_DD: Tensor) -> None:
    """Writers `W -> R^T W` (less the mean of their outputs, where norms subtract it), readers `W -> W R`."""
    R = R_DD.double()

    def write(W_DK: Tensor) -> Tensor:
        return R.T @ (W_DK - W_DK.mean(0) if body.centered else W_DK)

    for name in body.tables:
        table = model.get_submodule(name).weight
        assert isinstance(table, Tensor)  # noqa: S101  an embedding's
        table.data.copy_(write(table.double().T).T.to(table.dtype))
    for name in body.writers:
        map_outputs(model.get_submodule(name), write)
    for norm, readers in body.norms.items():
        rotate_bias(model.get_submodule(norm), R)
        for reader in readers:
            map_inputs(model.get_submodule(reader), lambda W_NK: W_NK @ R)


def rotate_bias(norm: nn.Module, R: Tensor) -> None:
    """What `fold_norm` had to leave in the norm is added to what is rotated now."""
    bias = getattr(norm, "bias", None)
    if isinstance(bias, Tensor):
        bias.data.copy_((bias.double() @ R).to(bias.dtype))


def rotate_heads(model: nn.Module, group: SiteGroup, R: Tensor) -> None:
    """`v -> v R` in every head, and the readers of the values back; heads that share values share R."""
    assert group.producer is not None  # noqa: S101  `examine` has seen to it
    d = group.head
    R_HDD, of_reader = heads_of(group, R.double())
    map_outputs(model.get_submodule(group.producer), lambda W_NK: (R_HDD.mT @ W_NK.unflatten(0, (-1, d))).flatten(0, 1))
    for site in group.sites:
        rotated = lambda W: torch.einsum("nhd,hde->nhe", W.unflatten(-1, (-1, d)), of_reader).flatten(1)  # noqa: E731
        map_inputs(model.get_submodule(site.name), rotated)


def heads_of(group: SiteGroup, R: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation of every head of the producer, and of every head of the reader, `[heads, d, d]` each."""
    assert group.channels is not None  # noqa: S101  `examine` has seen to it
    d, channels = group.head, group.channels.to(R.device)
    R_HDD = R.expand((int(channels.max()) + 1) // d, d, d) if R.dim() == 2 else R
    return R_HDD, R_HDD[channels.view(-1, d)[:, 0] // d]


def untie(model: nn.Module) -> None:
    """Give every layer that shares an embedding's table a copy of its own: the two are rewritten differently.

    Raises:
        UnsupportedModel: the model has no switch to load it untied with.
    """
    tied, configs = ties(model), untieable(model)
    if not tied:
        return
    for name in tied:
        module = model.get_submodule(name)
        assert isinstance(module.weight, Tensor)  # noqa: S101
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=module.weight.requires_grad)
    for config in configs:
        config.tie_word_embeddings = False
    left = {k: v for k, v in getattr(model, "all_tied_weights_keys", {}).items() if k.rpartition(".")[0] not in tied}
    model.all_tied_weights_keys = left  # type: ignore[assignment]  # a plain attribute of PreTrainedModel


def untieable(model: nn.Module) -> list[Any]:
    """The configs that say that an embedding is tied.

    Raises:
        UnsupportedModel: one is, and no config says so: it could not be loaded untied.
    """
    tied = ties(model)
    parts: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = [c for c in {id(c): c for c in parts}.values() if getattr(c, "tie_word_embeddings", False)]
    if tied and not configs:
        raise UnsupportedModel(
            f"{', '.join(tied)} of {type(model).__name__} is tied to an embedding whatever its config says, and a "
            "rotation needs two matrices; use a method without rotations, such as smoothquant or gptq"
        )
    return configs

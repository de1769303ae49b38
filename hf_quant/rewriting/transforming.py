"""Transforming: offer the groups of a block to transforms, fold what they propose, and check the block afterwards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_quant.capture import collect
from hf_quant.errors import UnsupportedModel
from hf_quant.groups import inside
from hf_quant.plan import SitePlan
from hf_quant.recipe import Recipe
from hf_quant.rewriting.joins import with_joins
from hf_quant.rewriting.pairs import link
from hf_quant.rewriting.rewrite import float_weight, fold, producer_rows
from hf_quant.running.distributed import reduce_states
from hf_quant.sites import SiteGroup, linear_shape
from hf_quant.spec import Spec
from hf_quant.stages.sampler import Batch
from hf_quant.stages.transform import (
    Diagonal,
    JoinTransform,
    Online,
    OnlineTransform,
    PairTransform,
    Transform,
    WholeTransform,
)
from hf_quant.stats import Stat, State

ROUNDS = 50  # of a transform of pairs: chains of layers settle in a few
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-6}


@dataclass(frozen=True, slots=True, eq=False)
class Transforming:
    """A block whose weights are rewritten.

    Attributes:
        model: the block is in it, and so are the producers and readers.
        block: the block.
        name: its path in the model.
        run: calls the block on what reaches it in a batch.
        batches: the calibration data.
        sites: plans of the model's sites.
    """

    model: nn.Module
    block: nn.Module
    name: str
    run: Callable[[nn.Module, int], Tensor]
    batches: Sequence[Batch]
    sites: Mapping[str, SitePlan]

    def apply(self, recipe: Recipe, groups: Sequence[SiteGroup]) -> dict[str, Spec]:
        """Let every transform of the recipe look at every group; verify that the block still computes the same.

        Returns the specs of sites whose weights are to be quantized otherwise than planned.

        Raises:
            UnsupportedModel: it does not.
        """
        transforms = [t for t in recipe.transforms if not isinstance(t, WholeTransform)]
        specs: dict[str, Spec] = {}
        if not transforms or not groups:
            return specs
        before = self.run(self.block, 0)
        groups = link(groups, self.block, self.name, lambda b: self.run(b, 0))
        if any(isinstance(t, JoinTransform) for t in transforms):
            groups = with_joins(groups, self.block, self.name, lambda b: self.run(b, 0))
        for transform in transforms:
            for _ in range(ROUNDS if isinstance(transform, PairTransform) else 1):
                if not self._once(recipe, groups, transform, specs):
                    break
        drift = float((self.run(self.block, 0) - before).float().norm() / before.float().norm().clamp_min(1e-12))
        if drift > TOLERANCE[before.dtype]:
            raise UnsupportedModel(
                f"the rewrite changed what block {self.name} computes (relative drift {drift:.2e}): this architecture "
                "uses a norm's output in a way that cannot be seen; use a method without a transform, such as gptq"
            )
        return specs

    def _once(
        self,
        recipe: Recipe,
        groups: Sequence[SiteGroup],
        transform: Transform | PairTransform | OnlineTransform | JoinTransform,
        specs: dict[str, Spec],
    ) -> bool:
        """Offer every group that it can rewrite to a transform; whether it rewrote one."""
        able = [g for g in groups if isinstance(transform, OnlineTransform) or g.producer is not None]
        if isinstance(transform, JoinTransform):
            able = [g for g in groups if g.parts is not None]
        if isinstance(transform, PairTransform):
            able = [g for g in able if linear_shape(self.model.get_submodule(str(g.producer))) is not None]
        wanted = {inside(g.sites[0].name, self.name): transform.needs for g in able}
        states: dict[str, dict[Stat, State]] = {}
        if transform.needs:
            states = reduce_states(collect(self.block, self.run, self.batches, wanted, None))
        rewrote = False
        for group in able:
            stats = states.get(inside(group.sites[0].name, self.name), None if transform.needs else {})
            if stats is None:
                continue
            own = self.sites[group.sites[0].name].recipe
            Ws = [float_weight(self.model.get_submodule(s.name), s).float() for s in group.sites]
            rewrite: Diagonal | Online | None
            if isinstance(transform, PairTransform):
                rows = producer_rows(self.model, group)
                rewrite = transform.pair(rows, Ws, stats, own.weights, own.inputs, recipe.range)
            elif isinstance(transform, JoinTransform):
                assert group.parts is not None  # noqa: S101  such groups alone are able
                weights = transform.weights(group.parts, own.weights, own.inputs)
                rewrite = transform.join(group.parts, Ws, stats, weights, own.inputs)
                if rewrite is not None and weights != own.weights:
                    specs.update((site.name, weights) for site in group.sites)
            elif isinstance(transform, OnlineTransform):
                rewrite = transform.online(Ws, stats, own.weights, own.inputs, recipe.range)
            else:
                rewrite = transform.propose(Ws, stats, own.weights, own.inputs, recipe.range)
            if rewrite is not None:
                fold(self.model, group, rewrite)
                rewrote = True
        return rewrote

"""The result of a pruning run, and the page that shows it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from secateur.core import engine
from secateur.core.batches import Data
from secateur.core.budget import Budget
from secateur.core.recipe import Recipe
from secateur.errors import StructureError
from secateur.measure.effective import Effective, effective
from secateur.measure.profile import Profile
from secateur.structure.inputs import Inputs
from secateur.structure.plan import Plan
from secateur.structure.structure import Structure
from secateur.structure.verify import Verification
from secateur.training.loop import History

if TYPE_CHECKING:
    from secateur.measure.report import Page, Section
    from secateur.measure.similarity import Similarity

SAMPLES_COMPARED = 256
"""Of the dense and the pruned network, in a report."""


@dataclass(frozen=True)
class Pruned:
    """The result of `prune`.

    Attributes:
        model: The pruned network, an ordinary module of the original class, in eval mode.
        masks: For unstructured pruning: which weights are kept, by parameter name; empty otherwise.
        structure_plan: For structured pruning: what remains of the original network; for channels per input: where its
            gates stand; empty otherwise.
        before: What the original network costs.
        after: What the pruned network costs.
        recipe: What was done.
        budget: What was asked.
        seed: What controlled every random choice.
        rounds: What happened at each pruning moment.
        history: The training curve of the recovery.
        structure: The axes of the original network, frozen ones with reasons; None for unstructured pruning.
        proofs: For structured pruning: one proof per cut that the network computes what the masked one computes.
        inputs: The example inputs.
    """

    model: nn.Module
    masks: Mapping[str, Tensor]
    structure_plan: Plan
    before: Profile
    after: Profile
    recipe: Recipe
    budget: Budget
    seed: int
    rounds: tuple[engine.Round, ...]
    history: History
    structure: Structure | None = None
    proofs: tuple[Verification, ...] = ()
    inputs: Inputs = field(default=Inputs((), {}), repr=False)

    @cached_property
    def effective(self) -> Effective | None:
        """What has an effect in the pruned network; None if its axes cannot be proved, or each input has its own."""
        if self.structure_plan.gated:
            return None
        try:
            return effective(self.model, self.inputs)
        except StructureError:
            return None

    @property
    def effective_sparsity(self) -> float | None:
        """The share of the original parameters that are gone, zero or cut off from the output; None if unknown."""
        return None if self.effective is None else 1 - self.effective.params / self.before.params

    @property
    def collapsed(self) -> tuple[str, ...]:
        """The masked tensors of which nothing has an effect any more (layer collapse)."""
        if not self.masks or self.effective is None:  # to know what has an effect takes a trace
            return tuple(name for name, mask in self.masks.items() if not mask.any())
        return tuple(name for name in self.masks if self.effective.weights[name] == 0)

    def about(self) -> dict[str, Any]:
        """Return what was done and what came out, as plain data."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "recipe_hash": self.recipe.hash,
            "budget": self.budget.model_dump(mode="json", exclude_none=True),
            "seed": self.seed,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
        }

    def report(
        self, path: str | os.PathLike[str] | None = None, *, dense: nn.Module | None = None, data: Data | None = None
    ) -> str:
        """Return a page about this run as HTML that works offline.

        Args:
            path: Where to write it, if anywhere.
            dense: The original network. With it and `data`, the page shows how alike the layers of both networks are.
            data: Batches, of which the first 256 samples or so are taken.
        """
        page = _page(self, None if dense is None or data is None else _similarity(dense, self.model, data))
        if path is not None:
            page.write(path)
        return page.html()


def _similarity(dense: nn.Module, pruned: nn.Module, data: Data) -> Similarity:
    from secateur.measure.similarity import similarity, some_samples

    return similarity(dense, pruned, some_samples(data, SAMPLES_COMPARED))


def _page(pruned: Pruned, similarity: Similarity | None) -> Page:
    # Plotly takes a second to import, and most runs need no page.
    from secateur.measure.figures import training_figure
    from secateur.measure.report import (
        Page,
        Section,
        Tile,
        change,
        count,
        depth_section,
        frozen_section,
        percentage,
        similarity_section,
        weights_section,
        widths_section,
        winners_section,
    )

    before, after = pruned.before, pruned.after
    sections = [_costs(pruned)]
    if pruned.structure is not None:
        section = depth_section if pruned.structure_plan.dropped else widths_section
        sections.append(section(pruned.structure, pruned.structure_plan))
    elif pruned.structure_plan.gated:
        sections.append(winners_section(pruned.structure_plan, pruned.model))
    else:
        sections.append(weights_section(pruned.masks, pruned.effective, pruned.collapsed))
    if pruned.history:
        sections.append(Section("Recovery", figure=training_figure({"pruned": pruned.history})))
    if similarity is not None:
        sections.append(similarity_section(similarity))
    if pruned.structure is not None:
        sections.append(frozen_section(pruned.structure))
        what = f"{change(before.macs, after.macs)} MACs, {change(before.params, after.params)} parameters"
        error = max(proof.max_error for proof in pruned.proofs)
        tiles = [Tile(f"{error:.0e}", "largest relative difference between cut and masked network")]
    elif pruned.structure_plan.gated:
        what = f"each input takes {change(before.macs, after.effective_macs)} MACs or fewer"
        tiles = [Tile(count(after.effective_macs), "MACs that an input takes at most")]
    else:
        what = f"{100 * (1 - after.nonzero_params / after.params):.1f} % of the weights are zero"
        what += ", LAYER COLLAPSE" if pruned.collapsed else ""
        tiles = [
            Tile(count(after.nonzero_params), "weights that are not zero"),
            Tile(percentage(pruned.effective_sparsity), "effective sparsity: parameters zero or cut off"),
        ]
    return Page(
        title="secateur: pruned network",
        headline=f"{type(pruned.model).__name__}, pruned by {pruned.recipe.criterion.name}: {what}",
        subtitle=f"Budget: {pruned.budget}. Recipe {pruned.recipe.hash}, seed {pruned.seed}.",
        tiles=[
            Tile(change(before.macs, after.macs), f"MACs ({count(before.macs)} → {count(after.macs)})"),
            Tile(change(before.params, after.params), f"parameters ({count(before.params)} → {count(after.params)})"),
            *tiles,
        ],
        sections=sections,
    )


def _costs(pruned: Pruned) -> Section:
    from secateur.measure.report import Section, Table, change

    labels = {
        "params": "parameters",
        "nonzero_params": "non-zero parameters",
        "macs": "MACs, dense",
        "effective_macs": "MACs, without products with zeros",
        "bytes": "bytes of parameters and buffers",
    }
    before, after = pruned.before.as_dict(), pruned.after.as_dict()
    rows = [(text, f"{before[k]:,}", f"{after[k]:,}", change(before[k], after[k])) for k, text in labels.items()]
    return Section("Cost", table=Table(("", "before", "after", "change"), rows))

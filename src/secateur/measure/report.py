"""Reports as single HTML pages that work offline."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import plotly.offline as plotly_offline

from secateur.atomic import written_atomically
from secateur.environment import environment
from secateur.measure.figures import similarity_figure, templates, widths_figure
from secateur.structure.gated import gates_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secateur.measure.effective import Effective
    from secateur.measure.similarity import Similarity
    from secateur.structure.plan import Plan
    from secateur.structure.structure import Structure

MINUS = "\N{MINUS SIGN}"
FROZEN_TEXT = "An axis is cut only if its slices are known in every tensor that holds them. These were left alone."

COLLAPSE_TEXT = (
    "Where no shortcut leads around such a layer, the output does not depend on the input. Ask for less sparsity, or "
    "for an allocation or a method that keeps every layer alive (uniform, erk, synflow)."
)
SIMILARITY_TEXT = (
    "Centered kernel alignment of the layers' outputs: 1 where both networks see the samples alike, up to rotation and "
    "scale."
)


@dataclass(frozen=True)
class Tile:
    """A number that stands out."""

    value: str
    label: str


@dataclass(frozen=True)
class Table:
    """Rows of text; `strong` is the row that matters, `text_columns` are aligned left."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int = -1
    text_columns: Sequence[int] = (0,)


@dataclass(frozen=True)
class Section:
    """A heading with text, a table or a figure below it."""

    title: str
    text: str = ""
    table: Table | None = None
    figure: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Page:
    """All that the template shows."""

    title: str
    headline: str
    subtitle: str
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()
    footer: str = field(default_factory=lambda: machine_line())

    def html(self) -> str:
        """Return the page; it needs no network."""
        plots = any("Plotly.newPlot" in section.figure for section in self.sections)
        script = plotly_offline.get_plotlyjs() if plots else ""
        return templates().get_template("report.html.j2").render(vars(self), plotly_js=script)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page; the file appears whole or not at all."""
        with written_atomically(path) as temporary:
            temporary.write_text(self.html(), encoding="utf-8")


def machine_line(facts: Mapping[str, str | int] | None = None) -> str:
    """Return the facts about a machine and its packages in one line; default: this machine."""
    facts = facts or environment()
    packages = ", ".join(f"{name} {facts[name]}" for name in list(facts)[4:])
    machine = f"{facts['processor']}, {facts['cores']} cores, {facts['system']}"
    return f"Measured on {machine}, Python {facts['python']}, {packages}."


# ------------------------------------------------------------------------------------------- parts of a report


def widths_section(structure: Structure, plan: Plan) -> Section:
    """Return the section on the kept width of each axis."""
    before = {axis.name: axis.size for axis in structure.prunable}
    after = {name: len(plan.axes[name].kept) if name in plan.axes else size for name, size in before.items()}
    return Section(
        "Kept width per layer",
        figure=widths_figure(before, after),
        caption="Units of each free axis before and after. An axis runs through every tensor that shares it.",
    )


def weights_section(masks: Mapping[str, Tensor], effective: Effective | None, collapsed: Sequence[str]) -> Section:
    """Return the section on the weights that are left in each layer, and on those of them that have an effect."""
    rows = []
    for name, mask in masks.items():
        kept = int(mask.sum())
        works = "unknown" if effective is None else f"{effective.weights[name]:,}"
        rows.append((name, f"{mask.numel():,}", f"{kept:,}", f"{100 * kept / mask.numel():.2f} %", works))
    return Section(
        "Weights per layer",
        text=collapse_warning(collapsed),
        table=Table(("layer", "weights", "kept", "density", "on a path"), rows),
        caption=_cut_off(effective),
    )


def collapse_warning(collapsed: Sequence[str]) -> str:
    """Return what it means that nothing of some layers has an effect; empty if there are none."""
    if not collapsed:
        return ""
    return f"Warning, layer collapse: nothing of {_some(collapsed)} has an effect any more. {COLLAPSE_TEXT}"


def collapses_warning(collapsed: Mapping[str, Sequence[str]]) -> str:
    """Return the same of several networks, from the method that pruned each -> its layers without effect."""
    cut_off = {method: layers for method, layers in collapsed.items() if layers}
    dead = "; ".join(f"after {m}, nothing of {_some(layers)} has an effect" for m, layers in cut_off.items())
    return f"Warning, layer collapse: {dead}. {COLLAPSE_TEXT}" if dead else ""


def _cut_off(effective: Effective | None) -> str:
    if effective is None:
        return "Which weights lie on a path from the input to the output is not known: the axes could not be proved."
    units = sum(effective.cut_off.values())
    which = f": {_some([f'{count} of {axis}' for axis, count in effective.cut_off.items()])}" if units else ""
    return (
        "On a path: weights that are not zero and lie on a path from the input to the output. "
        f"Units without such a path: {units}{which}."
    )


def depth_section(structure: Structure, plan: Plan) -> Section:
    """Return the section on the residual branches: what was dropped, and what could not be."""
    dropped = {drop.module for drop in plan.dropped}
    rows = []
    for branch in structure.branches:
        gone = any(path in dropped for path, _ in branch.modules)
        rows.append((branch.name, count(branch.macs), "dropped" if gone else branch.reason or "kept"))
    return Section("Residual branches", table=Table(("branch", "MACs", ""), rows, text_columns=(0, 2)))


def winners_section(plan: Plan, model: nn.Module) -> Section:
    """Return the section on how many channels each gated convolution computes for an input."""
    gates = gates_of(model)
    rows = []
    for gate in plan.gated:
        channels = gates[gate.convolution].convolution.out_channels
        share = f"{100 * gate.winners / channels:.1f} %"
        rows.append((gate.convolution, f"{channels:,}", f"{gate.winners:,}", share))
    return Section(
        "Channels per input",
        table=Table(("layer", "channels", "computed", "density"), rows),
        caption="Which channels are computed depends on the input. On one sample the others are skipped; in a batch "
        "all are computed, and those that do not belong to a sample are set to zero.",
    )


def similarity_section(similarity: Similarity) -> Section:
    """Return the section on how alike the layers of the dense and the pruned network see the same samples."""
    same, text = similarity.of_same(), SIMILARITY_TEXT
    if same:
        least = min(same, key=lambda name: same[name])
        mean = sum(same.values()) / len(same)
        text += f" Layers of the same name have {mean:.2f} on average, {least} the least: {same[least]:.2f}."
    caption = "Rows: the dense network. Columns: the pruned one."
    return Section("Representations, layer by layer", text, figure=similarity_figure(similarity), caption=caption)


def frozen_section(structure: Structure) -> Section:
    """Return the section on what was frozen and why."""
    return Section(
        "What was frozen, and why",
        text=FROZEN_TEXT,
        table=frozen_table({axis.name: axis.reason for axis in structure.axes if not axis.prunable}),
    )


def frozen_table(reasons: Mapping[str, str]) -> Table:
    """Return frozen axes grouped by reason, from axis name -> reason."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        groups[short_reason(reason)].append(name)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    rows = [(reason, str(len(names)), _some(names)) for reason, names in ordered]
    return Table(("reason", "axes", "for example"), rows, text_columns=(0, 2))


def short_reason(reason: str) -> str:
    """Return the first reason without the place where it arose."""
    return re.sub(r" \(.*?\)$", "", reason.partition(";")[0])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def count(number: float) -> str:
    """Return a count for people: 48.5 M, 308 k, 512."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g}"


def percentage(share: float | None) -> str:
    """Return a share for people: 97.53 %."""
    return "unknown" if share is None else f"{100 * share:.2f} %"


def change(before: float, after: float) -> str:
    """Return a relative change for people: −70 %, +3 %."""
    return f"{100 * (after / before - 1):+.0f} %".replace("-", MINUS)

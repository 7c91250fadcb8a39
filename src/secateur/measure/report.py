"""Reports as single HTML pages that work offline."""

from __future__ import annotations

import base64
import os
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as graph_objects
import plotly.offline as plotly_offline
from jinja2 import Environment, PackageLoader, StrictUndefined

from secateur.atomic import written_atomically
from secateur.environment import environment
from secateur.structure.gated import gates_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secateur.measure.effective import Effective
    from secateur.measure.similarity import Similarity
    from secateur.structure.plan import Plan
    from secateur.structure.structure import Structure

# Okabe & Ito: told apart by everyone, on light and on dark ground.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8a929c"
MINUS = "\N{MINUS SIGN}"
FROZEN_TEXT = "An axis is cut only if its slices are known in every tensor that holds them. These were left alone."

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


@cache
def templates() -> Environment:
    """Return the templates of reports."""
    return Environment(loader=PackageLoader("secateur.measure"), autoescape=True, undefined=StrictUndefined)


def machine_line(facts: Mapping[str, str | int] | None = None) -> str:
    """Return the facts about a machine and its packages in one line; default: this machine."""
    facts = facts or environment()
    packages = ", ".join(f"{name} {facts[name]}" for name in list(facts)[4:])
    machine = f"{facts['processor']}, {facts['cores']} cores, {facts['system']}"
    return f"Measured on {machine}, Python {facts['python']}, {packages}."


# ------------------------------------------------------------------------------------------------------ figures


@dataclass(frozen=True)
class Point:
    """A measured network in a trade-off plot; `half_width` is that of its interval."""

    x: float
    y: float
    half_width: float = 0.0
    note: str = ""


def tradeoff_figure(series: Mapping[str, Sequence[Point]], x_title: str, y_title: str, dense: Point) -> str:
    """Return a plot of accuracy against cost: one line per method, a dotted line at the dense network."""
    figure = _figure(x_title, y_title)
    for (name, points), color in zip(series.items(), cycle(COLORS), strict=False):
        points = sorted(points, key=lambda p: p.x)
        figure.add_scatter(
            x=[p.x for p in points],
            y=[p.y for p in points],
            error_y={"array": [p.half_width for p in points], "thickness": 1.5, "width": 4},
            text=[p.note for p in points],
            hovertemplate="%{x:.3g}, %{y:.2f}<br>%{text}<extra>" + name + "</extra>",
            mode="lines+markers" if len(points) > 1 else "markers",
            marker={"size": 9, "color": color, "symbol": "circle" if len(points) > 1 else "diamond"},
            line={"color": color, "width": 2},
            name=name,
        )
    figure.add_hline(y=dense.y, line={"color": GREY, "dash": "dot"})
    figure.add_scatter(x=[dense.x], y=[dense.y], mode="markers", marker={"size": 11, "color": GREY}, name="dense")
    return _div(figure)


def widths_figure(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """Return bars of the units of each axis before and after."""
    figure = _figure("units", "")
    names = list(before)
    figure.add_bar(
        y=names, x=list(before.values()), orientation="h", marker={"color": GREY, "opacity": 0.35}, name="before"
    )
    figure.add_bar(
        y=names,
        x=[after[name] for name in names],
        orientation="h",
        marker={"color": COLORS[2]},
        text=[f"{after[name]} of {before[name]}" for name in names],
        textposition="outside",
        cliponaxis=False,
        name="after",
    )
    figure.update_layout(barmode="overlay", height=120 + 30 * len(names))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(range=[0, max(before.values(), default=1) * 1.18])
    return _div(figure)


def training_figure(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return training loss and, where it was measured, validation accuracy over optimizer steps, side by side."""
    validated = any("validation" in entry for history in histories.values() for entry in history)
    figure = _figure("optimizer steps", "training loss")
    for (name, history), color in zip(histories.items(), COLORS, strict=False):
        line = {"color": color, "width": 2}
        trained = [entry for entry in history if "train_loss" in entry]
        steps, losses = [e["step"] for e in trained], [e["train_loss"] for e in trained]
        figure.add_scatter(x=steps, y=losses, mode="lines", line=line, name=name)
        measured = [entry for entry in history if "validation" in entry]
        if measured:
            steps, values = [e["step"] for e in measured], [100 * e["validation"] for e in measured]
            style = {"line": line, "marker": {"size": 8}, "mode": "lines+markers", "showlegend": False}
            figure.add_scatter(x=steps, y=values, name=name, xaxis="x2", yaxis="y2", **style)
    if validated:
        figure.update_layout(
            xaxis={"domain": [0, 0.44]},
            xaxis2={"domain": [0.56, 1], "title": "optimizer steps", "anchor": "y2", **_GRID},
            yaxis2={"title": "validation accuracy (%)", "anchor": "x2", **_GRID},
        )
    return _div(figure)


def similarity_figure(similarity: Similarity) -> str:
    """Return a heat map of the similarity of each layer of one network (rows) to each of another (columns)."""
    figure = _figure("layers of the pruned network", "layers of the dense network")
    figure.add_heatmap(
        x=similarity.second,
        y=similarity.first,
        z=similarity.values.tolist(),
        zmin=0,
        zmax=1,
        colorscale="Viridis",
        colorbar={"title": similarity.index.upper(), "thickness": 14, "outlinewidth": 0},
        hovertemplate="dense: %{y}<br>pruned: %{x}<br>%{z:.3f}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    figure.update_xaxes(showgrid=False, type="category", tickangle=-60)
    figure.update_layout(height=min(900, 260 + 22 * len(similarity.first)))
    return _div(figure)


def lines_figure(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_title: str,
    y_title: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    falling_x: bool = False,
) -> str:
    """Return lines through points (x, y), one per name; a single point is a diamond. `falling_x`: large x left."""
    figure = _figure(x_title, y_title)
    for (name, points), color in zip(series.items(), cycle(COLORS), strict=False):
        alone, few = len(points) == 1, len(points) <= 15
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mode="markers" if alone else "lines+markers" if few else "lines",
            marker={"size": 11 if alone else 8, "symbol": "diamond" if alone else "circle", "color": color},
            line={"color": color, "width": 2},
            name=name,
        )
    figure.update_xaxes(autorange="reversed" if falling_x else True)
    if log_x:
        figure.update_xaxes(type="log", dtick="D2", tickformat="~g")  # 10, 20, 50, 100 rather than every digit
    figure.update_yaxes(type="log" if log_y else "linear", exponentformat="power")
    return _div(figure)


def pictures_figure(rows: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Return rows of pictures, each row and each picture with a caption; pictures are (3, height, width) in [0, 1]."""
    encoded = {row: {caption: _png(picture) for caption, picture in own.items()} for row, own in rows.items()}
    return templates().get_template("pictures.html.j2").render(rows=encoded)


def _png(picture: Tensor) -> str:
    """Return a picture as a PNG file in base64."""
    pixels = (255 * picture.detach().clamp(0, 1)).round().byte().permute(1, 2, 0).contiguous()
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in pixels)  # 0: no filter

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, red green blue
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


_GRID: dict[str, Any] = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "automargin": True}


def _figure(x_title: str, y_title: str) -> Any:
    figure: Any = graph_objects.Figure()
    figure.update_layout(
        height=420,
        margin={"l": 60, "r": 60, "t": 20, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": -0.2},
        font={"size": 13},
        hovermode="closest",
        hoverlabel={"bgcolor": "#2b333e", "font": {"color": "#ffffff"}},
    )
    figure.update_xaxes(title=x_title, **_GRID)
    figure.update_yaxes(title=y_title, **_GRID)
    return figure


def _div(figure: Any) -> str:
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    return html


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
    return (
        f"Warning, layer collapse: nothing of {_some(collapsed)} has an effect any more. Where no shortcut leads "
        "around such a layer, the output does not depend on the input. Ask for less sparsity, or for an allocation or "
        "a method that keeps every layer alive (uniform, erk, synflow)."
    )


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


def change(before: float, after: float) -> str:
    """Return a relative change for people: −70 %, +3 %."""
    return f"{100 * (after / before - 1):+.0f} %".replace("-", MINUS)

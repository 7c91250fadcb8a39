"""Figures of reports, as parts of a page that work offline."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as graph_objects
from jinja2 import Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.measure.similarity import Similarity

# Okabe & Ito: told apart by everyone, on light and on dark ground.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8a929c"


@cache
def templates() -> Environment:
    """Return the templates of reports."""
    return Environment(loader=PackageLoader("secateur.measure"), autoescape=True, undefined=StrictUndefined)


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

"""Charts as arrays, for `media.write_image`: matplotlib without its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    levels: Mapping[str, float],
    x_label: str,
    y_label: str,
) -> np.ndarray:
    """float32 [360, 640, 3]: one line of (x, y) per series, and a dashed horizontal line per level."""
    figure, axes = _axes(x_label, y_label)
    for name, points in series.items():
        if points:
            x, y = zip(*points, strict=True)
            # A few points are shown as such: a line between two evaluations claims more than was measured.
            axes.plot(x, y, label=name, lw=1.2, marker="o" if len(points) < 30 else None, ms=3)
    for i, (name, y) in enumerate(levels.items()):
        axes.axhline(y, ls="--", lw=1, color=f"C{len(series) + i}", label=name)
    axes.legend(frameon=False, fontsize=8)
    return _pixels(figure)


def bar_chart(counts: Sequence[int], edges: Sequence[float], title: str, x_label: str, y_label: str) -> np.ndarray:
    """float32 [360, 640, 3]: a histogram that was counted already (`numpy.histogram`)."""
    figure, axes = _axes(x_label, y_label)
    axes.stairs(counts, edges, fill=True)
    axes.set_title(title, fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _pixels(figure)


def _axes(x_label: str, y_label: str):
    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(np.float32) / 255

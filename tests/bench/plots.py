"""The results as pictures: who is how fast, how latencies are distributed, and what a held snapshot
does over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from .contest import Contest
from .report import Plot, Report

matplotlib.use("svg")
# the same picture for the same figures, so that a commit shows what has changed
matplotlib.rcParams["svg.hashsalt"] = "pgqueue"

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

LABELS = {
    "latency": ("percent of the messages", "ms"),
    "held": ("seconds", "messages per second"),
}
COLUMNS = 2
OURS = ("pgqueue ", "pgqueue,", "order ")


def draw(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write the pictures of each server that there are figures for."""
    files = []
    for report in reports:
        major = report.version.split(".")[0]
        plotted = {plot.title for plot in report.plots}
        rates = [
            contest
            for contest in report.contests
            if contest.metric == "msg/s" and contest.title not in plotted
        ]
        if rates:
            files.append(folder / f"throughput-{major}.svg")
            _bars(f"PostgreSQL {report.version}; pgqueue is blue", rates, files[-1])
        for kind in LABELS:
            plots = [plot for plot in report.plots if plot.kind == kind]
            if plots:
                files.append(folder / f"{kind}-{major}.svg")
                _lines(f"PostgreSQL {report.version}", plots, files[-1])
    return files


def _bars(title: str, contests: Sequence[Contest], file: Path) -> None:
    figure, axes = _grid(title, len(contests))
    for axis, contest in zip(axes, contests, strict=False):
        names = list(contest.samples)
        medians = [contest.median(name) for name in names]
        colors = ["tab:blue" if f"{name} ".startswith(OURS) else "tab:gray" for name in names]
        bars = axis.barh(names, medians, color=colors)
        axis.bar_label(bars, labels=[f"{median:,.0f}" for median in medians], fontsize=7)
        axis.set_title(f"{contest.title}, msg/s", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.15)
        axis.invert_yaxis()
    _save(figure, file)


def _lines(title: str, plots: Sequence[Plot], file: Path) -> None:
    figure, axes = _grid(title, len(plots))
    for axis, plot in zip(axes, plots, strict=False):
        for name, points in plot.lines.items():
            axis.plot(*zip(*points, strict=True), label=name)
        across, up = LABELS[plot.kind]
        axis.set_xlabel(across, fontsize=7)
        axis.set_ylabel(up, fontsize=7)
        # latencies are below zero when a handler was faster than the publisher's own answer
        axis.set_yscale("symlog" if plot.kind == "latency" else "linear")
        axis.set_ylim(bottom=None if plot.kind == "latency" else 0)
        axis.set_title(plot.title, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    _save(figure, file)


def _grid(title: str, number: int) -> tuple[Figure, list[Axes]]:
    rows = -(-number // COLUMNS)
    figure, grid = pyplot.subplots(rows, COLUMNS, figsize=(11, 2.6 * rows), squeeze=False)
    axes = list(grid.flat)
    for axis in axes[number:]:
        axis.axis("off")
    figure.suptitle(title, fontsize=10)
    return figure, axes


def _save(figure: Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)

"""A picture of the rows: speeds by temperature, concurrency and system, with the ratio to plain decoding above each bar."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tools.bench.report import Row
from tools.train_vsd.plots import GROUP, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def speeds(part: Sequence[Row]) -> "Figure":
    """One panel per temperature and concurrency, whose scales differ; a system that is missing in a panel has no bar there."""
    cells = list(dict.fromkeys((row.temperature, row.concurrency) for row in part))
    systems = [name for name in dict.fromkeys(row.system for row in part) if any(r.system == name and r.tokens_per_second for r in part)]
    figure, every = panels(len(cells))
    for axes, (temperature, concurrency) in zip(every, cells, strict=True):
        for row in part:
            if (row.temperature, row.concurrency) == (temperature, concurrency) and row.tokens_per_second is not None:
                place = systems.index(row.system)
                bar = axes.bar(place, row.tokens_per_second, GROUP, color=f"C{place}", label=row.system)
                axes.bar_label(bar, ["" if row.speedup_vs_plain is None else f"{row.speedup_vs_plain:.2f}x"], fontsize=7)
        axes.set_xticks([])
        axes.set(title=f"T = {temperature:g}, concurrency {concurrency}", ylabel="Tokens per second")
    legend(figure, every[0])
    return figure

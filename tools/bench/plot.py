"""A picture of the rows: speeds by temperature, concurrency and system, with the ratio to plain decoding above each bar."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tools.bench.report import Row
from tools.train_vsd.plots import GROUP, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def speeds(part: Sequence[Row]) -> "Figure":
    """One panel per temperature and concurrency, whose scales differ. A system that is missing in one of them has no bar there."""
    cells = list(dict.fromkeys((row.temperature, row.concurrency) for row in part))
    systems = list(dict.fromkeys(row.system for row in part if row.tokens_per_second is not None))
    figure, every = panels(len(cells))
    for axes, (temperature, concurrency) in zip(every, cells, strict=True):
        here = {row.system: row for row in part if (row.temperature, row.concurrency) == (temperature, concurrency)}
        for place, system in enumerate(systems):
            row = here[system]
            bar = axes.bar(place, row.tokens_per_second or 0, GROUP, color=f"C{place}", label=system)
            axes.bar_label(bar, ["" if row.speedup_vs_plain is None else f"{row.speedup_vs_plain:.2f}x"], fontsize=7)
        axes.set_xticks([])
        axes.set(title=f"T = {temperature:g}, concurrency {concurrency}", ylabel="Tokens per second")
    legend(figure, every[0])
    return figure

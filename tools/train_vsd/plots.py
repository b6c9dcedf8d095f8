"""Pictures of a training run and of a comparison. The functions that draw return figures, ``save`` writes them as PNG files.

Matplotlib is imported where something is drawn: training works without it.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.train_vsd.evaluate import add_up

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: list[Any] = [
    "petroff8",  # colours that colour-blind readers can tell apart
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "savefig.dpi": 144,
    },
]
WIDTH, HEIGHT = 4.5, 3.0  # of one panel, in inches
GROUP = 0.8  # of the distance between two groups of bars is bars


def save(folder: Path, draw: Callable[[], Mapping[str, "Figure"]]) -> list[Path]:
    """Write the figures of ``draw`` as ``folder``/NAME.png; without matplotlib nothing but a line on the terminal."""
    try:
        import matplotlib.style
    except ImportError:
        print("No pictures: matplotlib is not installed (the extras vsd-serve[train] and vsd-serve[bench] have it).")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context(STYLE):
        figures = draw()
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def run_figures(evaluations: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, float]]) -> dict[str, "Figure"]:
    """Of a training run, from ``evaluate``'s figures, one per temperature, and ``Run.history``, which may be empty."""
    by_temperature = {f"T = {e['temperature']:g}": e for e in evaluations}
    over_time = {"acceptance_over_time": acceptance_over_time(history)} if history else {}
    return over_time | {
        "acceptance_by_depth": acceptance_by_depth({name: e["acceptance_by_depth"] for name, e in by_temperature.items()}),
        "accepted_lengths": accepted_lengths({"": {name: e["acceptance_histogram"] for name, e in by_temperature.items()}}),
    }


def comparison_figures(summary: Sequence[Mapping[str, Any]], arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, "Figure"]:
    """Of a comparison, from what its ``compare.json`` holds. Counts of all seeds are added up."""
    systems = dict.fromkeys(row["system"] for row in summary)
    counts = {
        system: {objective: add_up([seed["tallies"][system]["histogram"] for seed in seeds]) for objective, seeds in arms.items()}
        for system in systems
    }
    return {"acceptance_lengths": compared_lengths(summary), "accepted_lengths": accepted_lengths(counts)}


def acceptance_over_time(history: Sequence[Mapping[str, float]]) -> "Figure":
    """Acceptance length of every measurement against the seconds of training before it, one line per temperature."""
    figure, (axes,) = panels(1)
    seconds = [record["elapsed"] for record in history]
    for name in dict.fromkeys(key for record in history for key in record if key.startswith("tau_t")):
        axes.plot(seconds, [record[name] for record in history], marker=".", label=f"T = {name.removeprefix('tau_t')}")
    axes.set_ylim(1, max(1.1, axes.get_ylim()[1]))  # 1: the bonus token alone
    axes.set(xlabel="Training time (s)", ylabel="Acceptance length\n(tokens per verification)")
    legend(figure, axes)
    return figure


def acceptance_by_depth(shares: Mapping[str, Sequence[float]]) -> "Figure":
    """``shares``: by series, of the verifications whose accepted path reached depth 1, 2, ..., from 0 to 1."""
    figure, (axes,) = panels(1)
    for name, values in shares.items():
        axes.plot(range(1, len(values) + 1), [100 * value for value in values], marker="o", markersize=4, label=name)
    axes.set_xticks(range(1, max(map(len, shares.values())) + 1))
    axes.set_ylim(0, 100)
    axes.set(xlabel="Depth (draft tokens)", ylabel="Verifications that\nreached it (%)")
    legend(figure, axes)
    return figure


def accepted_lengths(histograms: Mapping[str, Mapping[str, Sequence[int]]]) -> "Figure":
    """``histograms``: by panel and series, the number of verifications that accepted 0, 1, ... draft tokens."""
    figure, every = panels(len(histograms))
    for axes, (title, series) in zip(every, histograms.items(), strict=True):
        width = GROUP / len(series)
        for i, (name, counts) in enumerate(series.items()):
            centres = np.arange(len(counts)) + (i - (len(series) - 1) / 2) * width
            axes.bar(centres, 100 * np.array(counts) / max(1, sum(counts)), width, color=f"C{i}", label=name)
        axes.set_xticks(range(max(map(len, series.values()))))
        axes.set(title=title, xlabel="Accepted draft tokens", ylabel="Verifications (%)")
    legend(figure, every[0])
    return figure


def compared_lengths(summary: Sequence[Mapping[str, Any]], base: str = "eagle3") -> "Figure":
    """Acceptance length by system and objective. Whiskers are the interval of the ratio to ``base``, in units of its length."""
    systems, objectives = (list(dict.fromkeys(row[key] for row in summary)) for key in ("system", "objective"))
    figure, (axes,) = panels(1, width=1.6 * WIDTH, height=0.8 + 0.18 * len(systems) * (len(objectives) + 1))
    width = GROUP / len(objectives)
    for i, objective in enumerate(objectives):
        rows = [row for row in summary if row["objective"] == objective]
        lengths = np.array([row["acceptance_length"] for row in rows])
        low, high = np.array([row["ci95"] for row in rows]).T * lengths / [row["ratio"] for row in rows]
        places = np.array([systems.index(row["system"]) for row in rows]) + (i - (len(objectives) - 1) / 2) * width
        whiskers = np.stack((lengths - low, high - lengths)).clip(min=0)
        bars = axes.barh(places, lengths, width, color=f"C{i}", label=objective, xerr=whiskers, error_kw={"elinewidth": 1})
        labels = [f"{row['acceptance_length']:.2f}" + (f" ({row['ratio'] - 1:+.1%})" if objective != base else "") for row in rows]
        axes.bar_label(bars, labels, padding=3, fontsize=7)
    axes.set_yticks(range(len(systems)), [textwrap.fill(system, 24) for system in systems])
    axes.invert_yaxis()
    axes.set_xlabel(f"Acceptance length (tokens per verification)\nin brackets, and whiskers (95 % interval): against {base}")
    legend(figure, axes)
    return figure


def panels(number: int, width: float = WIDTH, height: float = HEIGHT) -> tuple["Figure", list["Axes"]]:
    """An empty figure of ``number`` panels, two in a row; sizes of a panel in inches."""
    from matplotlib.figure import Figure

    columns = min(2, number)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(number)]


def legend(figure: "Figure", axes: "Axes") -> None:
    """One legend for all panels, above them."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)))

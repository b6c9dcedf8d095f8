"""The model card and the pictures, from hand-made figures."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from drafts.eagle3 import Eagle3Config, Eagle3Head, HeadMetadata
from tools.train_vsd import plots
from tools.train_vsd.evaluate import acceptance
from tools.train_vsd.generate import Completion
from tools.train_vsd.m_step import OBJECTIVES, VsdSettings
from tools.train_vsd.report import write_card, write_comparison
from tools.train_vsd.trainer import TrainSettings

DEPTH = 3
SYSTEMS = ("T=0 tree", "T=0 chain", "T=1 tree")
ARMS = ("eagle3", "lk", "vsd:paths=5")
HISTORY = [
    {"step": 0, "elapsed": 0.0, "tau_t0": 1.1, "tau_t1": 1.0},
    {"step": 40, "elapsed": 61.5, "tau_t0": 3.0, "tau_t1": 2.0},
    {"step": 80, "elapsed": 123.0, "tau_t0": 2.9, "tau_t1": 1.9},
]
SETTINGS = TrainSettings("vsd", minutes=12.5, depth=DEPTH, batch_tokens=384, accumulate=2, seed=17, vsd=VsdSettings(paths=40, car=0.15))


def evaluation(temperature: float, length: float) -> dict[str, Any]:
    return {
        "temperature": temperature, "acceptance_length": length, "acceptance_length_ci95": [length - 0.22, length + 0.24],
        "acceptance_length_per_prompt_mean": length + 0.07, "num_prompts": 29, "repeated_8_grams": 0.123 + temperature / 10,
        "acceptance_by_depth": [0.9, 0.7, 0.4], "acceptance_histogram": [10, 20, 30, 40],
        "tree": {"nodes": 16, "depth": DEPTH, "topk": 6},
    }  # fmt: skip


EVALUATIONS = [evaluation(0.0, 3.456), evaluation(1.0, 2.345)]


def head(objective: str = "vsd", temperature_shift: bool = False) -> Eagle3Head:
    made = Eagle3Head(Eagle3Config(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=40, draft_vocab_size=40,
        target_hidden_size=16, max_position_embeddings=64, temperature_shift=temperature_shift,
    ))  # fmt: skip
    held_out = {f"{name}_{k}": base - k / 100 for name, base in (("accuracy", 0.8), ("overlap", 0.6)) for k in range(1, DEPTH + 1)}
    temperatures = ((0.0, (0.71, 0.82)), (1.0, (1.13, 1.24)))
    made.metadata = HeadMetadata("a" * 64, "b" * 64, objective, held_out, temperatures, {1: 1.0, 16: 3.33})
    return made


@pytest.fixture
def card(tmp_path: Path) -> Callable[..., str]:
    """Writes a card with its pictures into tmp_path and returns its text."""

    def write(settings: TrainSettings = SETTINGS, **options: Any) -> str:
        prompts = tmp_path / "questions.jsonl"
        prompts.write_text('{"prompt": "Why?"}\n')
        data = {"rows": 1234, "tokens": 56789, "steps_done": 321, "seconds": 747}
        write_card(tmp_path, head(settings.objective, **options), settings, "some/Target-8B", prompts, data, EVALUATIONS, HISTORY)
        return (tmp_path / "README.md").read_text()

    return write


def test_card_says_what_was_done_and_measured(card: Callable[..., str]) -> None:
    text = " ".join(card().split())
    facts = (
        "some/Target-8B", "a" * 64, "b" * 64, "`questions.jsonl`", hashlib.sha256(b'{"prompt": "Why?"}\n').hexdigest(),
        "321 steps in 747 seconds", "1234 rows", "56789 answer tokens", "seed 17", "3 unrolled steps",
        "Objective `vsd`: coverage by S = 40 paths, ARW on, CAR 0.15, survival 1, anchor 0.5", "the target's own text.",
        "Budget: 12.5 minutes, 2 x 384 padded tokens a step", "best of 3 measured on the way, that of step 40 (62 seconds)",
        "| 1 | 79.0% | 59.0% |", "| 3 | 77.0% | 57.0% |", "16 nodes, depth 3, top 6",
        "| 0 | 3.46 | 3.24 to 3.70 | 3.53 | 29 | 12.3% |", "| 1 | 2.35 | 2.12 to 2.58 | 2.42 | 29 | 22.3% |",
        "| 0 | 0.71, 0.82 |", "| 1 | 1.13, 1.24 |", "3.33 with 16",
    )  # fmt: skip
    for fact in facts:
        assert fact in text, fact


def test_card_says_how_to_serve(card: Callable[..., str]) -> None:
    text = card()
    assert "python -m server TARGET --draft HEAD\n" in text
    assert """--speculative-config '{"method": "eagle3", "model": "DIR", "num_speculative_tokens": 3}'""" in text
    assert "--speculative-algorithm EAGLE3 --speculative-draft-model-path DIR" in text
    assert "python -m tools.train_vsd export --draft HEAD --format sglang --output DIR   # or eagle, or speculators" in text
    assert "request's temperature" not in text
    assert "This head knows the request's temperature" in card(temperature_shift=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_card_says_whose_reading_vsd_is(card: Callable[..., str], objective: str) -> None:
    text = card(replace(SETTINGS, objective=objective, minutes=None, steps=500, anchors=4))
    assert f"Objective `{objective}`: " in text
    assert "40 drafts from each of 4 anchors a row" in text
    assert "Budget: 500 steps" in text
    reading = "ARW and CAR are this project's reading of Zou et al." in text and "2602.05774" in text
    assert reading == (objective == "vsd")


def test_card_shows_pictures_that_are_there(card: Callable[..., str], tmp_path: Path) -> None:
    text = card()
    written = sorted((tmp_path / "report").iterdir())
    assert len(written) == 3
    for file in written:
        assert f"](report/{file.name})" in text
        assert imread(file).shape[:2] == (432, 648)


def test_card_without_matplotlib_has_no_pictures(
    card: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    text = card()
    assert "![" not in text
    assert "3.24 to 3.70" in text
    assert not (tmp_path / "report").exists()
    assert capsys.readouterr().out.splitlines() == [
        "No pictures: matplotlib is not installed (the extras vsd-serve[train] and vsd-serve[bench] have it)."
    ]


def test_a_run_is_drawn_by_temperature() -> None:
    figures = plots.run_figures(EVALUATIONS, HISTORY)
    (axes,) = figures["acceptance_over_time"].axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[0.0, 61.5, 123.0]] * 2
    assert [list(line.get_ydata()) for line in axes.lines] == [[1.1, 3.0, 2.9], [1.0, 2.0, 1.9]]
    assert axes.get_xlabel() == "Training time (s)"
    (axes,) = figures["acceptance_by_depth"].axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2, 3]] * 2
    assert list(axes.lines[0].get_ydata()) == pytest.approx([90, 70, 40])
    (axes,) = figures["accepted_lengths"].axes
    assert [[bar.get_height() for bar in bars] for bars in axes.containers] == [pytest.approx([10, 20, 30, 40])] * 2
    for figure in figures.values():
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["T = 0", "T = 1"]


def test_acceptance_counts_what_is_drawn() -> None:
    shallow, deep = Completion(0, [1, 2, 3]), Completion(1, [1, 2, 3])
    for accepted in (0, 2, 2):
        shallow.speculation.record(8, accepted, depth=2)
    deep.speculation.record(8, 4, depth=4)
    assert acceptance([shallow, deep])["acceptance_histogram"] == [1, 0, 2, 0, 1]


def test_nothing_verified_is_drawn_too(tmp_path: Path) -> None:
    empty = acceptance([Completion(0)]) | {"temperature": 0.0}
    assert len(plots.save(tmp_path, lambda: plots.run_figures([empty], HISTORY[:1]))) == 3
    assert "acceptance_over_time" not in plots.run_figures(EVALUATIONS, [])


def comparison() -> dict[str, Any]:
    """What compare.json holds, for two seeds, the second with a deeper tree."""
    summary = [
        {"system": system, "objective": arm, "acceptance_length": 3 * ratio, "ratio": ratio, "ci95": [ratio - gap, ratio + gap]}
        for system in SYSTEMS
        for arm, ratio, gap in zip(ARMS, (1.0, 1.1, 0.9), (0.0, 0.05, 0.02), strict=True)
    ]
    seeds = [{"tallies": {system: {"histogram": counts} for system in SYSTEMS}} for counts in ([1, 3], [2, 2, 2])]
    return {"summary": summary, "arms": dict.fromkeys(ARMS, seeds)}


def test_a_comparison_is_drawn_by_system_and_objective() -> None:
    figures = plots.comparison_figures(**comparison())
    (axes,) = figures["acceptance_lengths"].axes
    bars = [container for container in axes.containers if hasattr(container, "patches")]
    assert [[bar.get_width() for bar in series] for series in bars] == [pytest.approx([3 * ratio] * 3) for ratio in (1.0, 1.1, 0.9)]
    whiskers = [series.errorbar.lines[2][0].get_segments()[0][:, 0].tolist() for series in bars]
    assert whiskers == [pytest.approx(ends) for ends in ([3.0, 3.0], [3.15, 3.45], [2.64, 2.76])]
    assert {text.get_text() for text in axes.texts} == {"3.00", "3.30 (+10.0%)", "2.70 (-10.0%)"}
    every = figures["accepted_lengths"].axes
    assert [axes.get_title() for axes in every] == list(SYSTEMS)
    for axes in every:
        assert [[bar.get_height() for bar in series] for series in axes.containers] == [pytest.approx([30, 50, 20])] * 3


def test_a_comparison_folder_gets_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(json.dumps(comparison()))
    assert write_comparison(tmp_path) == (
        "![Acceptance lengths](report/acceptance_lengths.png)\n![Accepted lengths](report/accepted_lengths.png)\n"
    )
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"acceptance_lengths.png", "accepted_lengths.png"}
    assert all(imread(file).size for file in (tmp_path / "report").iterdir())

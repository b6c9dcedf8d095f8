"""The comparison of objectives: its arithmetic on made-up tallies, equal billing, and a whole run of two arms."""

import itertools
import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from server.engine.types import SpeculationStats
from tests.tools.tiny_training import shrink, tiny_prompts, tiny_target
from tools.prompts import PromptError
from tools.train_vsd import __main__ as cli
from tools.train_vsd import compare
from tools.train_vsd.compare import Tally, parse_arm, ratio, summary, systems, train_interleaved
from tools.train_vsd.generate import Completion
from tools.train_vsd.trainer import Result


def tally(seed: int, scale: float = 1.0, prompts: int = 30) -> Tally:
    """Random prompts; a head ``scale`` times as good commits as many tokens more."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(5, 40, prompts)
    lengths = rng.uniform(1.5, 5, prompts)
    tokens = [int(n) for n in np.round(steps * lengths * scale)]
    return Tally([int(n) for n in steps], tokens, [0.0] * prompts, [1], 2.0, sum(tokens))


def test_a_system_against_itself_is_exactly_one() -> None:
    same = [tally(0), tally(1)]
    assert ratio(same, same) == {"ratio": 1.0, "ci95": [1.0, 1.0]}


def test_the_ratio_is_pooled_and_paired() -> None:
    ours, base = [tally(0, 1.2), tally(1, 1.1)], [tally(0), tally(1)]
    found = ratio(ours, base)
    pooled = [sum(sum(t.tokens) for t in side) / sum(sum(t.steps) for t in side) for side in (ours, base)]
    assert found["ratio"] == pytest.approx(pooled[0] / pooled[1])
    low, high = found["ci95"]
    assert low < found["ratio"] < high
    assert low > 1.1
    assert high < 1.2
    assert ratio(ours, base) == found, "the interval is the same in every run"
    # Prompts differ far more than the two systems do: in pairs that cancels, without pairs it would not.
    shuffled = [Tally(**asdict(t)) for t in ours]
    for t in shuffled:
        order = np.random.default_rng(5).permutation(len(t.steps))
        t.steps, t.tokens = [t.steps[i] for i in order], [t.tokens[i] for i in order]
    unpaired = ratio(shuffled, base)
    assert unpaired["ratio"] == pytest.approx(found["ratio"])
    assert unpaired["ci95"][1] - unpaired["ci95"][0] > 4 * (high - low)


def test_the_interval_is_about_two_standard_errors() -> None:
    rng = np.random.default_rng(0)
    steps = [20] * 400
    base = Tally(steps, [60] * 400, [0.0] * 400, [1], 1.0, 1)
    ours = Tally(steps, [int(n) for n in rng.normal(66, 12, 400)], [0.0] * 400, [1], 1.0, 1)
    low, high = ratio([ours], [base])["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * np.std(ours.tokens) / 60 / 20, rel=0.1)


def test_tally_counts_the_bonus_token_and_loops() -> None:
    def completion(index: int, accepted: list[int], tokens: list[int]) -> Completion:
        stats = SpeculationStats()
        for count in accepted:
            stats.record(draft_nodes=7, accepted=count, depth=3)
        return Completion(index, tokens, speculation=stats)

    found = Tally.of([completion(0, [0, 3], list(range(6))), completion(1, [1], [1, 2] * 20), Completion(2, [9])], 4.0)
    assert found.steps == [2, 1, 0]
    assert found.tokens == [5, 2, 0]
    assert found.length == pytest.approx(7 / 3)
    assert found.repeated[0] == 0
    assert found.repeated[1] > 0.9
    assert found.histogram == [1, 1, 0, 1]
    assert (found.seconds, found.generated) == (4.0, 47)


def test_summary() -> None:
    def result(seed: int, steps: list[int], tokens: list[int], repeated: list[float], seconds: float) -> dict[str, Any]:
        made = Tally(steps, tokens, repeated, [1], seconds, 100)
        return {"seed": seed, "tallies": {"tree": vars(made), "chain": vars(made)}, "sigmas": {}}

    steps = [10, 10, 10, 10, 10, 10, 0]
    arms = {
        "eagle3": [result(seed, steps, [20, 50, 30, 40, 60, 70, 0], [0, 0, 0.9, 0, 0, 0.6, 0], 2.0) for seed in (4, 5)],
        "vsd": [
            result(4, steps, [80, 50, 30, 40, 60, 20, 0], [0.0] * 7, 1.0),
            result(5, steps, [80, 50, 30, 40, 70, 20, 0], [0.0] * 7, 3.0),
        ],
    }
    rows = summary(arms)
    assert [(row["system"], row["objective"]) for row in rows] == list(itertools.product(("tree", "chain"), ("eagle3", "vsd")))
    base, ours = rows[:2]
    assert base["worst_prompts"] == [0, 2, 3, 1, 4], "a prompt without any verification is none of them"
    assert ours["worst_prompts"][:4] == [5, 2, 3, 1]
    assert base["ratio"] == 1.0
    assert base["acceptance_length"] == pytest.approx(270 / 60)
    assert ours["acceptance_length"] == pytest.approx((280 + 290) / 120)
    assert ours["ratio"] == pytest.approx(570 / 540)
    assert ours["by_seed"] == [round(280 / 60, 4), round(290 / 60, 4)]
    assert ours["tokens_per_second"] == 50.0
    assert base["looping_prompts"] == pytest.approx(2 / 7)
    assert ours["seeds"] == 2
    arms["vsd"] = arms["vsd"][1:]
    arms["eagle3"][0] = result(4, steps, [99] * 7, [0.0] * 7, 1.0)
    assert summary(arms)[1]["ratio"] == pytest.approx(290 / 270), "seeds are compared with the same seeds only"
    text = compare.table(rows)
    assert text.count("\n") == 2 + 4
    assert "+5.6%" in text


def test_parse_arm() -> None:
    assert parse_arm("eagle3") == ("eagle3", {})
    arm = "vsd:paths=5,car=0,arw=0,law=speculative,anchors=2,conditioned=1"
    options = {"paths": 5, "car": 0.0, "arw": False, "law": "speculative", "anchors": 2, "conditioned": True}
    assert parse_arm(arm) == ("vsd", options)
    assert [type(value) for value in parse_arm(arm)[1].values()] == [int, float, bool, str, int, bool]


@pytest.mark.parametrize(
    "arm", ["nonsense", "nonsense:car=1", "vsd:speed=3", "vsd:paths=many", "vsd:arw=true", "vsd:car", "vsd:law=mine", ""]
)
def test_an_arm_that_is_none(arm: str) -> None:
    with pytest.raises(PromptError, match=rf"arm '{re.escape(arm)}': expected one of eagle3, lk, vat, vsd, with options paths"):
        parse_arm(arm)


class Paced:
    """A trainer whose step takes a known time on a made-up clock."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        self.clock, self.seconds, self.rates = clock, seconds, list[float]()
        self.head = nn.Linear(1, 1)
        self.starts: list[float] = []

    def step(self, rate: float) -> Result:
        self.starts.append(self.clock[0])
        self.clock[0] += self.seconds
        self.rates.append(rate)
        return Result(1.0, [0.5])


def test_arms_are_billed_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(compare, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    arms = {"fast": Paced(clock, 0.1), "slow": Paced(clock, 0.5), "middling": Paced(clock, 0.3)}
    spent = train_interleaved(arms, 30.0)  # type: ignore[arg-type]
    for name, arm in arms.items():
        assert 30.0 <= spent[name] < 30.0 + arm.seconds + 1e-6
        assert spent[name] == pytest.approx(len(arm.rates) * arm.seconds)
        assert arm.rates[-1] < 0.05, "every arm's rate falls to zero over its own time"
        assert max(arm.rates) > 0.9
        assert not arm.head.weight.requires_grad
    for half in (115, 130, 160):  # at any time they have had about the same
        had = [arm.seconds * sum(start < half for start in arm.starts) for arm in arms.values()]
        assert max(had) - min(had) <= 0.6


def test_systems_show_the_baseline_as_shipped_and_at_its_best() -> None:
    found = systems(4)
    assert len({system.name for system in found}) == len(found)
    assert {system.temperature for system in found} == {0.0, 0.5, 1.0}
    assert any(system.sigma == 1.0 and system.nodes == 16 for system in found)
    assert any(system.sigma is None and system.temperature == 0 for system in found)
    chain = next(system for system in found if system.topk == 1)
    assert chain.options(0.7, 4) == {"tree_nodes": 5, "tree_depth": 4, "tree_topk": 1, "draft_temperature": 0.7}


def test_a_whole_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shrink(monkeypatch.setattr)
    monkeypatch.setattr(compare, "SIGMAS", (0.5, 1.0))
    monkeypatch.setattr(compare, "VALIDATION_PROMPTS", 2)
    monkeypatch.setattr(compare, "VALIDATION_TOKENS", 6)
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1} w{i + 2} w9"}) + "\n" for i in range(10, 13)))
    start = ["--target", tiny_target(tmp_path / "target"), "--prompts", tiny_prompts(tmp_path / "prompts.jsonl"), "--device", "cpu"]
    rest = ["--output", tmp_path / "out", "--minutes", 0.01, "--answers", 60, "--evaluation", evaluation, "--limit", 3, "--max-tokens", 8,
            "--depth", 2, "--seeds", 1]  # fmt: skip

    def run(*more: object) -> None:
        monkeypatch.setattr("sys.argv", ["train_vsd", "compare", *map(str, [*start, *rest, *more])])
        cli.main()

    for arms, message in ((["vsd", "lk"], "lacks eagle3"), (["eagle3", "vsd:car=much"], "arm 'vsd:car=much': expected")):
        with pytest.raises(SystemExit, match=message):
            run("--arms", *arms)
        assert not (tmp_path / "out").exists(), "refused before any work"
    began = time.monotonic()
    run("--arms", "eagle3", "vsd:paths=4,anchors=1", "--first-seed", 3)
    assert time.monotonic() - began > 1.2, "both arms had their time"
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(found["arms"]) == ["eagle3", "vsd:paths=4,anchors=1"]
    for (result,) in found["arms"].values():
        assert result["training_steps"] >= 1
        assert result["training_seconds"] >= 0.6
        assert set(result["tallies"]) == {system.name for system in systems(2)}
        for made in result["tallies"].values():
            assert len(made["steps"]) == 3
            assert made["generated"] > 0
    assert len(found["summary"]) == 2 * len(systems(2))
    table = (tmp_path / "out" / "compare.md").read_text()
    assert table.split("\n\n")[0] in capsys.readouterr().out
    assert table.count("| eagle3 |") == len(systems(2))
    heads = {path.parent.name for path in (tmp_path / "out" / "seed-3").glob("*/model.safetensors")}
    assert heads == {"eagle3", "vsd-paths-4-anchors-1"}

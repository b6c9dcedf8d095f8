"""The benchmark over HTTP, against stub servers: what it measures, and when it refuses to compare."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from server.engine.config import EngineConfig
from tools.bench import http
from tools.bench.http import PLAIN, SPECULATION, BenchError, Completion, Round
from tools.prompts import read_prompts

STUB = Path(__file__).with_name("stub_server.py")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the command line with stubs as servers; returns its exit status and the rows it wrote (None: it wrote none)."""
    commands: list[list[str]] = []
    popen = subprocess.Popen

    def start(command, **options):
        commands.append(list(command))
        return popen([command[0], str(STUB), *command[3:]], **options)

    monkeypatch.setattr(http.subprocess, "Popen", start)

    def run(*arguments: str, fault: str | None = None):
        if fault:
            monkeypatch.setenv("STUB_FAULT", fault)
        output = tmp_path / "rows.json"
        status = http.main(["--limit", "3", "--max-tokens", "8", "--rounds", "2", "--json", str(output), *arguments])
        return status, json.loads(output.read_text()) if output.exists() else None

    run.commands = commands  # type: ignore[attr-defined]
    return run


def test_measures_both_servers_at_each_concurrency(bench, capsys) -> None:
    status, rows = bench("--concurrency", "1,2")
    assert status == 0
    assert [(row["system"], row["concurrency"]) for row in rows] == [(SPECULATION, 1), (PLAIN, 1), (SPECULATION, 2), (PLAIN, 2)]
    drafted, plain = rows[:2]
    assert drafted["tokens"] == plain["tokens"] == 3 * 8
    assert drafted["acceptance_length"] == 2.0
    assert plain["acceptance_length"] is None
    assert plain["speedup_vs_plain"] == 1.0
    assert drafted["speedup_vs_plain"] == pytest.approx(plain["seconds"] / drafted["seconds"], rel=0.05)
    assert drafted["tokens_per_second"] == pytest.approx(drafted["tokens"] / drafted["seconds"], rel=0.05)
    assert "same text" in capsys.readouterr().out


def test_servers_differ_in_the_draft_alone(bench, monkeypatch) -> None:
    monkeypatch.setenv("VSD_DRAFT", "must-not-reach-the-servers")
    status, _ = bench("--concurrency", "1", "--", "--dtype", "float32")
    assert status == 0
    drafted, plain = bench.commands
    assert drafted[drafted.index("--draft") + 1] == EngineConfig().draft
    assert plain[plain.index("--draft") + 1] == "none"
    for command in (drafted, plain):
        assert command[:3] == [sys.executable, "-m", "server"]
        assert command[-2:] == ["--dtype", "float32"]
        for option in ("--draft", "--port"):
            del command[command.index(option) : command.index(option) + 2]
    assert drafted == plain


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("short", "different numbers of tokens"),
        ("exit", "cannot load the head"),
        ("error", "the step failed"),
    ],
)
def test_no_ratio_when_something_went_wrong(bench, capsys, fault: str, message: str) -> None:
    status, rows = bench("--concurrency", "1", fault=fault)
    assert (status, rows) == (1, None)
    captured = capsys.readouterr()
    assert message in captured.err
    assert "speedup" not in captured.out


def test_server_that_never_gets_ready(bench, capsys) -> None:
    status, rows = bench("--start-timeout", "1", fault="slow")
    assert (status, rows) == (1, None)
    assert "not ready after 1 s" in capsys.readouterr().err


def test_different_texts_fail_the_run(bench, capsys) -> None:
    status, rows = bench("--concurrency", "1", fault="words")
    assert status == 1
    assert [row["differing_texts"] for row in rows] == [3, 3]
    captured = capsys.readouterr()
    assert "TEXTS DIFFER for 3 prompts" in captured.err
    assert "same text" not in captured.out


def test_servers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    async def load(url, bodies, concurrency, progress):
        order.append((url, len(bodies)))
        return Round(1.0, tuple(Completion("", 1) for _ in bodies))

    monkeypatch.setattr(http, "load", load)
    http.measure({SPECULATION: "a", PLAIN: "b"}, [{}] * 4, concurrency=2, rounds=3)
    assert order == [("a", 2), ("b", 2), ("a", 4), ("b", 4), ("b", 4), ("a", 4), ("a", 4), ("b", 4)]


def test_ratio_is_that_of_the_median_speeds() -> None:
    def rounds(*seconds: float) -> list[Round]:
        return [Round(s, (Completion("a", 10, steps=4, accepted=6),)) for s in seconds]

    measured = {SPECULATION: rounds(1, 2, 10), PLAIN: rounds(6, 4, 1)}
    drafted, plain = http.rows(measured, concurrency=1, temperature=0)
    assert (drafted["seconds"], plain["seconds"]) == (2, 4)
    assert (drafted["tokens_per_second"], plain["tokens_per_second"]) == (5.0, 2.5)
    assert (drafted["speedup_vs_plain"], plain["speedup_vs_plain"]) == (2.0, 1.0)
    assert "2.00x (0.10 .. 6.00)" in http.table(measured, [drafted, plain])
    assert drafted["acceptance_length"] == 2.5  # 1 + 6 / 4


def test_same_total_from_different_requests_is_refused() -> None:
    one = Round(1.0, (Completion("a", 3), Completion("b", 5)))
    other = Round(1.0, (Completion("a", 5), Completion("b", 3)))
    with pytest.raises(BenchError, match="different numbers"):
        http.rows({SPECULATION: [one], PLAIN: [other]}, concurrency=1, temperature=0)


def test_model_needs_its_own_head(capsys) -> None:
    with pytest.raises(SystemExit):
        http.parse_arguments(["--model", "somewhere"])
    assert "--model needs --draft" in capsys.readouterr().err


def test_shipped_prompts_fit_the_demo_target() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EngineConfig().model)
    for name in ("gsm8k_test", "humaneval"):
        prompts = read_prompts(http.PROMPTS.with_name(f"{name}.jsonl"), tokenizer)
        assert max(map(len, prompts)) + 128 <= 1024, name

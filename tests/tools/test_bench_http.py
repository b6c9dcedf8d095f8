"""The benchmark over HTTP, against stub servers: what it measures, and when it refuses to compare."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from server.engine.config import EngineConfig
from tools.bench import http
from tools.bench.arguments import PROMPTS
from tools.bench.work import PLAIN, SPECULATION
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
        assert "--no-prefix-caching" in command, "rounds repeat the prompts"
        assert command[-2:] == ["--dtype", "float32"]
        for option in ("--draft", "--port"):
            del command[command.index(option) : command.index(option) + 2]
    assert drafted == plain


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("exit", "cannot load the head"),
        ("error", "the step failed"),
    ],
)
def test_no_rows_when_something_went_wrong(bench, capsys, fault: str, message: str) -> None:
    status, rows = bench("--concurrency", "1", fault=fault)
    assert (status, rows) == (1, None)
    captured = capsys.readouterr()
    assert message in captured.err
    assert "tokens/s" not in captured.out


def test_server_that_never_gets_ready(bench, capsys) -> None:
    status, rows = bench("--start-timeout", "1", fault="slow")
    assert (status, rows) == (1, None)
    assert "not ready after 1 s" in capsys.readouterr().err


def test_different_texts_fail_the_run(bench, capsys) -> None:
    status, rows = bench("--concurrency", "1", fault="words")
    assert status == 1
    assert [row["differing_answers"] for row in rows] == [3, 0]
    captured = capsys.readouterr()
    assert "ANSWERS DIFFER for 3 prompts" in captured.err
    assert "same text" not in captured.out


def test_no_ratio_between_different_numbers_of_tokens(bench, capsys) -> None:
    status, rows = bench("--concurrency", "1", fault="short")
    assert status == 1
    assert [row["speedup_vs_plain"] for row in rows] == [None, 1.0]
    captured = capsys.readouterr()
    assert f"NO RATIO for {SPECULATION}:" in captured.err
    assert "same text" not in captured.out


def test_shipped_prompts_fit_the_demo_target() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EngineConfig().model)
    for name in ("gsm8k_test", "humaneval"):
        prompts = read_prompts(PROMPTS.with_name(f"{name}.jsonl"), tokenizer)
        assert max(map(len, prompts)) + 128 <= 1024, name

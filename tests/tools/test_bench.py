"""The side-by-side benchmark: arithmetic of its rows, its worker processes, and the whole of it on the demo pair."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from server.engine.config import EngineConfig
from tools.bench import __main__ as bench
from tools.bench.backends import Engine
from tools.bench.plot import speeds
from tools.bench.report import Row, rows, table, verdict
from tools.bench.rounds import Round, SystemFailure, measure
from tools.bench.work import PLAIN, SPECULATION, Settings, Work
from tools.bench.worker import Worker
from tools.bench.workers import environment, started

STUB = Path(__file__).with_name("stub_peer.py")


def rounds(*seconds: float, answer: tuple[int, ...] = (1, 2, 3), steps: int = 0, accepted: int = 0) -> list[Round]:
    return [Round(s, (answer, (7,)), (len(answer), 1), steps, accepted) for s in seconds]


# Rounds


def test_systems_take_turns_in_an_order_that_is_reversed_every_other_round() -> None:
    order = []

    def run(system: str, items: Sequence[int], progress: tqdm) -> Round:
        order.append((system, len(items)))
        return Round(float(len(order)), (), ())

    measured, failed = measure(["a", "b"], run, [0] * 4, warm_up=2, rounds=3, title="")
    assert order == [("a", 2), ("b", 2), ("a", 4), ("b", 4), ("b", 4), ("a", 4), ("a", 4), ("b", 4)]
    assert [one.seconds for one in measured["a"]] == [3, 6, 7], "the warm-up is not counted"
    assert [one.seconds for one in measured["b"]] == [4, 5, 8]
    assert not failed


def test_system_that_fails_leaves_the_others_alone() -> None:
    calls = []

    def run(system: str, items: Sequence[int], progress: tqdm) -> Round:
        calls.append(system)
        if system == "b" and calls.count("b") == 2:
            raise SystemFailure("out of luck")
        return Round(1.0, (), ())

    measured, failed = measure(["a", "b"], run, [0], warm_up=1, rounds=2, title="")
    assert {system: len(done) for system, done in measured.items()} == {"a": 2}
    assert failed == {"b": "out of luck"}
    assert calls.count("b") == 2, "it gets no further turn"


# Rows


def test_speed_is_of_the_median_round_and_the_ratio_the_median_within_rounds() -> None:
    measured = {PLAIN: rounds(8, 4, 1), SPECULATION: rounds(4, 1, 2, steps=4, accepted=6)}
    plain, drafted = rows(measured, PLAIN, 8, 0.0, measured)
    assert (plain.seconds, plain.tokens, plain.tokens_per_second) == (4, 4, 1.0)
    assert (drafted.seconds, drafted.tokens, drafted.tokens_per_second) == (2, 4, 2.0)
    assert drafted.speedup_vs_plain == 2.0  # of 2, 4 and 0.5
    assert drafted.speedup_range == (0.5, 4.0)
    assert plain.speedup_vs_plain == 1.0
    assert (plain.acceptance_length, drafted.acceptance_length) == (None, 2.5)  # 1 + 6 / 4
    assert (drafted.system, drafted.concurrency, drafted.temperature, drafted.missing) == (SPECULATION, 8, 0.0, None)
    assert "2.00x (0.50 .. 4.00)" in table([plain, drafted])


@pytest.mark.parametrize("other", [(1, 2), (1, 2, 3, 4)])
def test_no_ratio_between_different_numbers_of_tokens(other: tuple[int, ...], capsys) -> None:
    measured = {PLAIN: rounds(2, 2), "a": [*rounds(1), *rounds(1, answer=other)], "b": rounds(1, 1)}
    part = rows(measured, PLAIN, 1, 0.0, ())
    assert [row.speedup_vs_plain for row in part] == [1.0, None, 2.0]
    assert part[1].speedup_range is None
    assert "x (" not in table([part[1]])
    assert verdict(part, (PLAIN,)) == 1
    assert "NO RATIO for a:" in capsys.readouterr().err


def test_same_total_from_different_prompts_is_refused() -> None:
    measured = {PLAIN: [Round(1.0, (), (3, 5))], "a": [Round(1.0, (), (5, 3))]}
    assert rows(measured, PLAIN, 1, 0.0, ())[1].speedup_vs_plain is None


def test_answers_are_compared_with_plain_decoding_in_every_round(capsys) -> None:
    other = rounds(1, answer=(1, 2, 4))
    measured = {PLAIN: rounds(1, 1), "once": [*rounds(1), *other], "peer": other * 2, "not compared": other * 2, SPECULATION: rounds(1, 1)}
    part = rows(measured, PLAIN, 1, 0.0, {PLAIN, "once", "peer", SPECULATION})
    assert [row.differing_answers for row in part] == [0, 1, 1, None, 0]
    assert verdict(part, (PLAIN, SPECULATION)) == 0, "a peer may round differently"
    assert verdict(part, ("once",)) == 1
    assert "ANSWERS DIFFER for 1 prompts" in capsys.readouterr().err


def test_missing_system_has_a_row_without_figures(capsys) -> None:
    part = [*rows({PLAIN: rounds(1)}, PLAIN, 1, 0.0, ()), Row("vllm", 1, 0.0, missing="no such module")]
    assert "vllm             missing: no such module" in table(part)
    assert verdict(part, (PLAIN,)) == 0
    assert not capsys.readouterr().err


def test_picture_has_a_bar_for_what_was_measured() -> None:
    part = [
        *rows({PLAIN: rounds(2), "a": rounds(1)}, PLAIN, 1, 0.0, ()),
        *rows({PLAIN: rounds(4)}, PLAIN, 8, 0.0, ()),
        Row("never there", 1, 0.0, missing="no such module"),
        Row("a", 8, 0.0, missing="one at a time"),
    ]
    first, second = speeds(part).axes
    assert [bar.get_height() for bar in first.patches] == [2.0, 4.0]
    assert [text.get_text() for text in first.texts] == ["1.00x", "2.00x"]
    assert [bar.get_height() for bar in second.patches] == [1.0, 0.0]
    assert [text.get_text() for text in second.texts] == ["1.00x", ""]


# Workers


def settings(**other) -> Settings:
    return Settings("model", "draft", "cpu", "float32", 1, 2, 64, 4, "converted", **other)


def test_worker_answers_what_fails(capsys) -> None:
    class Broken:
        version = "0"

        def __init__(self, settings: Settings) -> None:
            if settings.model != "model":
                raise ModuleNotFoundError("No module named 'vllm'")

        def run(self, work: Work):
            raise ValueError("first line\nsecond line")

    worker = Worker("hf")
    worker.backend = Broken
    given = settings().__dict__
    assert worker.answer({"load": given | {"model": "other"}}) == {"error": "ModuleNotFoundError: No module named 'vllm'"}
    assert worker.answer({"load": given}) == {"version": "0"}
    assert worker.answer({"run": Work("hf", [[1]], 1, 0.0, 1).__dict__}) == {"error": "ValueError: first line"}
    assert "Traceback" in capsys.readouterr().err, "the log has the rest"


def test_no_such_interpreter(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemFailure, match="cannot run nowhere/python: No such file"),
        started("vllm", "nowhere/python", 1, tmp_path / "log"),
    ):
        pass


def test_workers_get_the_same_threads_and_openmp_only_where_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("VSD_DRAFT", "must-not-reach-the-engine")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    python = tmp_path / "bin" / "python"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    plain, vllm = environment("hf", str(python), 2), environment("vllm-ngram", str(python), 2)
    assert vllm.pop("LD_PRELOAD") == str(tmp_path / "lib" / "libiomp5.so")
    assert vllm == plain
    assert plain["OMP_NUM_THREADS"] == "2"
    assert "VSD_DRAFT" not in plain


# All of it


@pytest.fixture
def peer_python(tmp_path: Path) -> str:
    """An "interpreter" that is a peer whatever it is told to run."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STUB}" "$@"\n')
    script.chmod(0o755)
    return str(script)


class FakeEngine:
    """Instead of our worker's process, where the engine itself does not matter."""

    idle_load = 0.0

    def ask(self, request: dict) -> dict:
        if "load" in request:
            return {"version": "0.1.0"}
        work = request["run"]
        token_ids = [[prompt[-1] + 1 + i for i in range(work["max_tokens"])] for prompt in work["prompts"]]
        return {"seconds": 1.0, "token_ids": token_ids, "steps": 0, "accepted": 0}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, peer_python: str):
    """Runs the command line with a stub as vLLM; returns its exit status and its rows by system."""
    real = bench.started

    def start(backend: str, *arguments):
        return nullcontext(FakeEngine()) if backend == "vsd-serve" else real(backend, *arguments)

    monkeypatch.setattr(bench, "started", start)

    def run(*arguments: str, fault: str = ""):
        monkeypatch.setenv("STUB_FAULT", fault)
        output = tmp_path / "rows.json"
        given = ["--limit", "3", "--max-tokens", "8", "--rounds", "2", "--concurrency", "2", "--peers", "vllm"]
        places = ["--peer-python", f"vllm={peer_python}", "--work-dir", str(tmp_path / "work"), "--json", str(output)]
        status = bench.main([*given, *places, *arguments])
        return status, {row["system"]: row for row in json.loads(output.read_text())} if output.exists() else None

    return run


def test_peer_over_the_protocol(run) -> None:
    status, found = run()
    assert status == 0
    assert found["vllm"] == {
        "system": "vllm",
        "concurrency": 2,
        "temperature": 0.0,
        "tokens_per_second": 48.0,
        "tokens": 24,
        "seconds": 0.5,
        "acceptance_length": 3.0,
        "speedup_vs_plain": 2.0,
        "speedup_range": [2.0, 2.0],
        "differing_answers": 0,
        "missing": None,
        "dtype": "float32",
        "threads": len(os.sched_getaffinity(0)),
        "rounds": 2,
        "max_tokens": 8,
        "version": "1.2.3",
    }


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("load", "no such model"), ("run", "out of luck"), ("exit", "its process ended with status 3, see vllm.log in the work directory")],
)
def test_peer_that_does_not_work_is_missing(run, capsys, fault: str, reason: str) -> None:
    status, found = run(fault=fault)
    assert status == 0
    assert reason in found["vllm"]["missing"]
    assert found["vllm"]["tokens_per_second"] is None
    assert found[SPECULATION]["speedup_vs_plain"] == 1.0
    assert reason in capsys.readouterr().out


def test_peer_that_stops_early_gets_no_ratio(run, capsys) -> None:
    status, found = run(fault="short")
    assert status == 1
    assert found["vllm"]["speedup_vs_plain"] is None
    assert found[SPECULATION]["speedup_vs_plain"] == 1.0
    assert "NO RATIO for vllm" in capsys.readouterr().err


def test_sampled_answers_of_peers_are_not_compared(run) -> None:
    _, found = run("--temperature", "1")
    assert found["vllm"]["differing_answers"] is None
    assert found[SPECULATION]["differing_answers"] == 0
    _, found = run("--dtype", "bfloat16")
    assert found[SPECULATION]["differing_answers"] is None


def test_wrong_arguments(capsys) -> None:
    for wrong in (["--peers", "vllm,sglang"], ["--peer-python", "vllm"], ["--model", "somewhere"]):
        with pytest.raises(SystemExit):
            bench.parse_arguments(wrong)
    errors = capsys.readouterr().err
    assert "sglang unknown" in errors
    assert "expected NAME=PATH" in errors
    assert "--model needs --draft" in errors


def test_engines_share_the_model_and_only_one_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig()
    assert config.draft
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    backend = Engine(Settings(config.model, config.draft, "cpu", "float32", 1, 2, 64, 4, "converted"))
    drafted, plain = backend.engines[SPECULATION], backend.engines[PLAIN]
    assert drafted.steps.target.model is plain.steps.target.model
    assert given == [1]
    assert plain.max_model_len == drafted.max_model_len == 64
    assert not plain.prefix_cache.enabled, "rounds repeat the prompts"
    assert not drafted.prefix_cache.enabled
    drafted.load_rule = None  # the whole tree at every step, however slow this machine
    with_drafts, without = (backend.run(Work(system, [[5, 6, 7], [8, 9]], 2, 0.0, 16)) for system in (SPECULATION, PLAIN))
    assert with_drafts.token_ids == without.token_ids
    assert [len(ids) for ids in without.token_ids] == [16, 16]
    assert with_drafts.accepted > 0
    assert 0 < with_drafts.steps < 2 * 16
    assert (without.steps, without.accepted) == (0, 0)


def test_demo_pair_and_transformers(tmp_path: Path) -> None:
    """Real processes: the engine, plain and speculative, and transformers give the same tokens. CTranslate2 is not there."""
    output, picture = tmp_path / "rows.json", tmp_path / "speeds.png"
    options = ["--limit", "2", "--max-tokens", "8", "--rounds", "1", "--concurrency", "1,2", "--threads", "1"]
    places = ["--work-dir", str(tmp_path / "work"), "--json", str(output), "--plot", str(picture)]
    peers = ["--peers", "hf,hf-prompt-lookup,ctranslate2", "--peer-python", "ctranslate2=/nowhere/python"]
    assert bench.main([*options, *places, *peers]) == 0
    found = json.loads(output.read_text())
    cells = [(row["system"], row["concurrency"]) for row in found]
    systems = (PLAIN, SPECULATION, "hf", "hf-prompt-lookup", "ctranslate2")
    assert sorted(cells) == sorted((system, concurrency) for system in systems for concurrency in (1, 2))
    assert {field.name for field in fields(Row)} <= set(found[0])
    by_cell = dict(zip(cells, found, strict=True))
    for (system, concurrency), row in by_cell.items():
        if system == "ctranslate2" or (system, concurrency) == ("hf-prompt-lookup", 2):
            assert row["missing"]
            continue
        assert (row["missing"], row["tokens"], row["differing_answers"]) == (None, 2 * 8, 0), row
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=0.05)
        assert row["speedup_vs_plain"] == pytest.approx(by_cell[PLAIN, concurrency]["seconds"] / row["seconds"], rel=0.05)
        assert row["acceptance_length"] is None or system in (SPECULATION, "hf-prompt-lookup")  # a busy machine may decode plainly
    assert (by_cell[SPECULATION, 1]["acceptance_length"] or 2) > 1
    assert "No such file" in by_cell["ctranslate2", 1]["missing"]
    assert "one prompt at a time" in by_cell["hf-prompt-lookup", 2]["missing"]
    assert picture.stat().st_size > 0

"""What the checks of outside clients make of the clients' reports, and that a fault of one is told and ends in status 1."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tools.clients import __main__ as command
from tools.clients import guidellm, lm_eval, schemathesis
from tools.clients.checks import ClientError, Setting, run


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting("http://127.0.0.1:1", tmp_path, tmp_path)


def program(setting: Setting, source: str) -> str:
    path = setting.programs / "client"
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(0o755)
    return path.name


def test_programs_run_offline_in_their_folder(setting: Setting) -> None:
    name = program(setting, "import os, sys; print(os.getcwd(), os.environ['HF_HUB_OFFLINE'], os.environ['X'], *sys.argv[1:])")
    assert run(setting, name, "a b", environment={"X": "y"}) == f"{setting.folder} 1 y a b\n"
    assert (setting.folder / "client.log").read_text().endswith("a b\n")


def test_a_program_that_fails(setting: Setting) -> None:
    with pytest.raises(ClientError, match=r"status 3:\nwhy"):
        run(setting, program(setting, "import sys; print('why'); sys.exit(3)"))


@pytest.mark.parametrize(
    ("fault", "told"), [(None, "ok "), (ClientError("wrong\nat length"), "wrong"), (ValueError("odd"), "ValueError: odd")]
)
def test_verdicts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Exception | None, told: str
) -> None:
    def check(setting: Setting) -> str:
        if fault:
            raise fault
        return "found"

    monkeypatch.setattr(command, "CHECKS", {"one": {"a": check}, "two": {"b": lambda setting: "fine"}})
    monkeypatch.setattr(command, "server", lambda draft: nullcontext("http://127.0.0.1:1"))
    assert command.main(["--folder", str(tmp_path / "made")]) == int(fault is not None)
    first, second, last = capsys.readouterr().out.splitlines()
    assert told in first
    assert first.startswith("FAILED" if fault else "ok")
    assert second.startswith("ok"), "the others still run"
    assert last == ("1 of the checks failed" if fault else "all checks passed")


def test_unknown_clients_are_refused() -> None:
    with pytest.raises(SystemExit):
        command.main(["curl"])


def har(folder: Path, *answers: tuple[int, str]) -> Path:
    entries = [{"response": {"status": status, "content": {"mimeType": kind}}} for status, kind in answers]
    path = folder / "report.har"
    path.write_text(json.dumps({"log": {"entries": entries}}))
    return path


def test_schemathesis_met_what_it_is_there_for(tmp_path: Path) -> None:
    answers = [(status, "application/json") for status in (200, 400, 401, 404, 405)]
    stream = (200, "text/event-stream; charset=utf-8")
    assert schemathesis.summary(har(tmp_path, *answers, stream)).endswith("; 1 streams")
    with pytest.raises(ClientError, match="no answer was a stream"):
        schemathesis.summary(har(tmp_path, *answers))
    with pytest.raises(ClientError, match="status 401"):
        schemathesis.summary(har(tmp_path, *(answer for answer in answers if answer[0] != 401), stream))


def answer_of_guidellm(answered: int = 4, errored: int = 0, incomplete: int = 0, tokens: int = guidellm.OUTPUT_TOKENS) -> dict[str, Any]:
    totals = {"errored": errored, "incomplete": incomplete}
    requests = {"successful": [{"output_tokens": tokens}] * answered, "errored": [{"error": "503"}] * errored}
    return {"benchmarks": [{"metrics": {"request_totals": totals}, "requests": requests}]}


@pytest.mark.parametrize(
    ("report", "fault"),
    [
        (answer_of_guidellm(9), None),
        (answer_of_guidellm(9, errored=1), "1 requests"),
        (answer_of_guidellm(1), "only 1"),
        (answer_of_guidellm(9, incomplete=5), "did not end"),
        (answer_of_guidellm(9, tokens=3), r"gave \[3\]"),
    ],
)
def test_loads(monkeypatch: pytest.MonkeyPatch, setting: Setting, report: dict[str, Any], fault: str | None) -> None:
    def write(_: Setting, *arguments: str) -> str:
        (output,) = (argument for argument in arguments if argument.startswith("kind=json,path="))
        Path(output.removeprefix("kind=json,path=")).write_text(json.dumps(report))
        return ""

    monkeypatch.setattr(guidellm, "run", write)
    if fault is None:
        assert guidellm.load(setting, "/v1/completions") == 9
    else:
        with pytest.raises(ClientError, match=fault):
            guidellm.load(setting, "/v1/completions")


def test_samples_are_compared_one_by_one(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    def write(_: Setting, *arguments: str, **options: Any) -> str:
        folder = Path(arguments[arguments.index("--output_path") + 1]) / "demo"
        folder.mkdir(parents=True, exist_ok=True)
        for task in lm_eval.TASKS:
            samples = [json.dumps({"doc_id": i, "resps": [[f"{task} {i}"]]}) for i in reversed(range(lm_eval.SAMPLES))]
            (folder / f"samples_{task}_2000-01-01.jsonl").write_text("\n".join(samples))
        return ""

    monkeypatch.setattr(lm_eval, "run", write)
    ours, others = [lm_eval.evaluate(setting, setting.url, name) for name in ("ours", "others")]
    lm_eval.compare(ours, others)
    others["vsd_sampled"][5] = [["else"]]
    with pytest.raises(ClientError, match=r"vsd_sampled, sample 5: .*vsd_sampled 5.*else"):
        lm_eval.compare(ours, others)
    monkeypatch.setattr(lm_eval, "SAMPLES", lm_eval.SAMPLES + 1)
    with pytest.raises(ClientError, match="has 16 samples, not 17"):
        lm_eval._read(setting.folder / "lm-eval" / "ours", "vsd_greedy")

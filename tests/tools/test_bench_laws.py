"""The comparison of acceptance rules on the demo pair: every rule at every temperature, and what shared noise is for."""

import json
from pathlib import Path

import pytest

from tools.bench import laws
from tools.bench.laws import main


def test_shared_noise_accepts_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(laws, "TREES", ((8, 3, 4),))
    monkeypatch.setattr(laws, "CHAINS", (3,))
    monkeypatch.setattr(laws, "PATHS", ((2, 3),))
    file = tmp_path / "laws.json"
    assert main(["--limit", "4", "--max-tokens", "24", "--temperature", "1", "--json", str(file)]) == 0
    rows = {row["law"]: row for row in json.loads(file.read_text())}
    assert list(rows) == ["shared noise", "deterministic tree", "p/q chain", "recursive rejection"]
    lengths = {law: row["acceptance_length"] for law, row in rows.items()}
    assert lengths["shared noise"] == max(lengths.values())
    assert all(1 < length < 5 for length in lengths.values())
    assert all(row["tokens_per_second"] > 0 and row["temperature"] == 1 for row in rows.values())
    assert capsys.readouterr().out.count("\n") == 5


def test_a_model_without_its_head_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "somewhere"])
    assert "--model needs --draft" in capsys.readouterr().err

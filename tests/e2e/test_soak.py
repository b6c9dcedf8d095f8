"""A short soak: it passes with a sound server, and notices one that is not."""

import pytest

from tools.soak import main


@pytest.mark.parametrize(("faults", "status"), [("", 0), ("prefill:raise:0.6", 1)])
def test_soak(faults: str, status: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    if faults:
        monkeypatch.setenv("VSD_FAULTS", faults)
    assert main(["--seconds", "4", "--concurrency", "8"]) == status, capfd.readouterr().err
    assert ("error: status 500" in capfd.readouterr().err) == bool(faults)

"""Whole runs of the command: interrupted and resumed, in several processes, on rows that are not held out."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from drafts.eagle3 import Eagle3Head
from tests.tools.test_trainer import numeric
from tests.tools.tiny_training import shrink
from tools.train_vsd import __main__ as cli
from tools.train_vsd.data import Row, collate, is_held_out, read_answers
from tools.train_vsd.teacher import Teacher
from tools.train_vsd.trainer import Trainer, TrainSettings

ROOT = Path(__file__).resolve().parents[2]


DRIVER = """
import sys, time
from tests.tools.tiny_training import shrink
from tools.train_vsd import __main__ as cli, loop
from tools.train_vsd.trainer import Trainer
shrink()
loop.SAVE_SECONDS = 0
step = Trainer.step
def hanging(self, rate):
    if self.steps == 3:
        step(self, rate)  # what it learned since the last save is lost
        print("hanging", flush=True)
        time.sleep(600)
    return step(self, rate)
Trainer.step = hanging
cli.main()
"""


def start(driver: str, launcher: list[str], *arguments: object) -> subprocess.Popen:
    """``driver`` in processes of its own, with as many threads as here."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, *launcher, driver, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_an_interrupted_run_ends_as_one_that_was_not(target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch.setattr)
    common = [
        "train",
        "--target",
        target,
        "--prompts",
        prompts,
        "--steps",
        6,
        "--depth",
        2,
        "--anchors",
        1,
        "--paths",
        3,
        "--device",
        "cpu",
    ]

    def run(output: str, *more: object) -> None:
        monkeypatch.setattr("sys.argv", ["train_vsd", *map(str, [*common, "--output", tmp_path / output, *more])])
        cli.main()

    process = start(DRIVER, ["-c"], *common, "--output", tmp_path / "killed")
    assert process.stdout is not None
    assert any("hanging" in line for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = torch.load(tmp_path / "killed.data" / "state.pt", weights_only=True)
    assert state["trainer"]["steps"] == 3
    with pytest.raises(SystemExit, match="run with depth 2, but depth 3 was asked for"):
        run("killed", "--resume", "--depth", 3)
    run("killed", "--resume")
    run("whole")
    killed, whole = (torch.load(tmp_path / f"{name}.data" / "state.pt", weights_only=True) for name in ("killed", "whole"))
    assert killed["trainer"]["steps"] == whole["trainer"]["steps"] == 6
    assert [r | {"elapsed": 0} for r in killed["run"]["history"]] == [r | {"elapsed": 0} for r in whole["run"]["history"]]
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    for kept, plain in zip(killed["trainer"]["optimisers"], whole["trainer"]["optimisers"], strict=True):
        for key, values in plain["state"].items():
            for name, value in values.items():
                assert torch.equal(torch.as_tensor(kept["state"][key][name]), torch.as_tensor(value)), name
    assert any(weight.any() for weight in whole["trainer"]["optimisers"][0]["state"][0].values())


PROCESSES = """
import os, sys
import torch, torch.distributed as dist
from tests.tools.test_trainer import numeric
from tests.tools.tiny_training import shrink
from tools.train_vsd import __main__ as cli
folder = sys.argv.pop(1)
# The launcher's own meeting point serves one group only, that of the command.
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=int(os.environ["RANK"]), world_size=2)
result = numeric(sharded="--shard-target" in sys.argv)
if dist.get_rank() == 0:
    torch.save(result, f"{folder}/numeric.pt")
dist.destroy_process_group()
shrink()
cli.main()
"""


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_are_one(target: Path, prompts: Path, tmp_path: Path, sharded: bool) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(PROCESSES)
    arguments = ["train", "--target", target, "--prompts", prompts, "--output", tmp_path / "head", "--minutes", 0.04, "--depth", 2,
                 "--accumulate", 2, "--device", "cpu", *["--shard-target"] * sharded]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(str(driver), launcher, tmp_path, *arguments)
    expected = numeric()
    try:
        process.communicate(timeout=200)
    finally:
        process.terminate()
    assert process.returncode == 0
    found = torch.load(tmp_path / "numeric.pt", weights_only=True)
    assert (found["target_weights"] < 0.6 * expected["target_weights"]) == sharded, "a process holds its half, and the last layer gathered"
    for ours, theirs in zip(found["results"], expected["results"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-6, rel=1e-6)
        assert ours[1] == pytest.approx(theirs[1])
    for name, weight in expected["head"].items():
        torch.testing.assert_close(found["head"][name], weight, atol=1e-6, rtol=0)
    head = json.loads((tmp_path / "head" / "config.json").read_text())
    assert "acceptance_length_t0" in json.dumps(head), "the command trained, calibrated and measured"
    state = torch.load(tmp_path / "head.data" / "state.pt", weights_only=True)
    assert state["trainer"]["steps"] > 0
    assert state["trainer"]["position"] + 100 * state["trainer"]["passes"] > 0


def test_held_out_prompts_are_never_trained_on(target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch.setattr)
    seen: set[tuple[int, ...]] = set()

    def spy(rows: list[Row]) -> Any:
        seen.update(tuple(row.prompt) for row in rows)
        return collate(rows)

    monkeypatch.setattr("tools.train_vsd.data.collate", spy)
    monkeypatch.setattr("tools.train_vsd.train.collate", spy)
    monkeypatch.setattr("tools.train_vsd.trainer.Trainer.__init__", _spied_init(seen))
    arguments = ["--target", target, "--prompts", prompts, "--output", tmp_path / "head", "--steps", 3, "--depth", 2, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["train_vsd", "train", *map(str, arguments)])
    cli.main()
    (file,) = (tmp_path / "head.data").glob("answers-*.jsonl")
    assert 40 < len(seen) < len(read_answers(file))
    assert not [prompt for prompt in seen if is_held_out(prompt)]


def _spied_init(seen: set[tuple[int, ...]]) -> Any:
    plain = Trainer.__init__

    def init(self: Trainer, head: Eagle3Head, teacher: Teacher, rows: list[Row], settings: TrainSettings) -> None:
        seen.update(tuple(row.prompt) for row in rows)
        plain(self, head, teacher, rows, settings)

    return init

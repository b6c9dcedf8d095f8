"""Runs a trainer to the end of its budget: measures, keeps the best head, catches divergence, saves and resumes."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from tools.train_vsd.trainer import Trainer, rate

SAVE_SECONDS = 60
MEASUREMENTS = 10  # over a budget
DIVERGED = 0.9  # of the best acceptance length: below it the run goes back
SLOWER = 1 / 6  # the rate after going back

Measure = Callable[[], dict[str, float]]
"""Acceptance lengths of the head as it is, by name; their mean decides which head is kept."""


class ResumeError(ValueError):
    """A run cannot go on from what is on disk."""


@dataclass
class Run:
    """What a run knows beside the trainer's state. ``history``: one record per measurement; ``elapsed`` in seconds of training,
    ``prepared`` in seconds of the budget before it."""

    prepared: float = 0.0
    elapsed: float = 0.0
    best: float = 0.0
    best_head: dict[str, Any] = field(default_factory=dict)
    rate_scale: float = 1.0
    history: list[dict[str, float]] = field(default_factory=list)


class Loop:
    """``folder``: where the state, the metrics and TensorBoard's events go. ``keep`` is called when the head is the best so far."""

    def __init__(self, trainer: Trainer, folder: Path, measure: Measure, keep: Callable[[], None], prepared: float = 0.0) -> None:
        self.trainer, self.settings, self.folder = trainer, trainer.settings, folder
        self.measure, self.keep = measure, keep
        self.run = Run(prepared)
        self.main = not dist.is_initialized() or dist.get_rank() == 0
        folder.mkdir(parents=True, exist_ok=True)
        self.board = _tensorboard(folder) if self.main else None

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def resume(self) -> None:
        """Go on from the state in ``folder``; ResumeError where there is none, or one of other settings."""
        if not self.state_file.exists():
            raise ResumeError(f"--resume was given, but there is no {self.state_file}: nothing was interrupted there; leave --resume out.")
        state = torch.load(self.state_file, map_location=self.trainer.device, weights_only=True)
        ours = asdict(self.settings)
        if changed := [key for key, value in ours.items() if state["settings"].get(key) != value]:
            found = ", ".join(f"{key} {state['settings'].get(key)}" for key in changed)
            asked = ", ".join(f"{key} {ours[key]}" for key in changed)
            raise ResumeError(f"{self.state_file} is of a run with {found}, but {asked} was asked for: give the same options to resume it.")
        self.trainer.load_state_dict(state["trainer"])
        self.run = Run(**state["run"])

    def __call__(self) -> Run:
        """Train to the end of the budget; the trainer's head is the best measured one then."""
        trainer, run = self.trainer, self.run
        saved, began = time.monotonic(), time.monotonic() - run.elapsed
        if not run.history:
            self._measure()
            began = time.monotonic() - run.elapsed
        total = self.settings.steps
        smoothed: list[float] = []
        with tqdm(
            total=total, initial=trainer.steps, desc=self.settings.objective, unit="step", mininterval=2, disable=not self.main
        ) as bar:
            while (progress := self._progress(began)) < 1:
                result = trainer.step(rate(progress) * run.rate_scale)
                smoothed = _smooth(smoothed, [result.loss, *result.accuracy])
                bar.set_postfix_str(self._line(progress, smoothed), refresh=False)
                bar.update()
                run.elapsed = time.monotonic() - began
                self._log({"loss": result.loss, "rate": rate(progress) * run.rate_scale, "accuracy_1": result.accuracy[0]})
                if not math.isfinite(result.loss):
                    self._go_back(f"the loss is {result.loss}")
                elif self._progress(began) * MEASUREMENTS >= len(run.history):
                    self._measure()
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
                began = time.monotonic() - run.elapsed  # measuring and saving are not training
        trainer.head.load_state_dict(run.best_head)
        trainer.head.requires_grad_(False).eval()
        self.save()
        return run

    def _progress(self, began: float) -> float:
        """The same in every process: that of the first one's clock."""
        progress = self.settings.progress(self.trainer.steps, time.monotonic() - began, self.run.prepared)
        if dist.is_initialized():
            shared = [progress]
            dist.broadcast_object_list(shared)
            progress = shared[0]
        return progress

    def _line(self, progress: float, smoothed: list[float]) -> str:
        lengths = " ".join(f"{name} {value:.2f}" for name, value in self.run.history[-1].items() if name.startswith("tau"))
        return f"{progress:.0%} loss {smoothed[0]:.3f} accuracy {' '.join(f'{a:.2f}' for a in smoothed[1:])} {lengths}"

    def _measure(self) -> None:
        run = self.run
        lengths = [self.measure()]  # in every process: a sharded target needs them all
        if dist.is_initialized():
            dist.broadcast_object_list(lengths)
        tau = sum(lengths[0].values()) / len(lengths[0])
        record = {"step": self.trainer.steps, "elapsed": round(run.elapsed, 3), **lengths[0]}
        run.history.append(record)
        self._log(lengths[0])
        if self.main:
            with (self.folder / "history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if tau >= run.best:
            run.best = tau
            run.best_head = {name: weight.clone() for name, weight in self.trainer.head.state_dict().items()}
            if self.main:
                self.keep()
        elif tau < DIVERGED * run.best:
            self._go_back(f"the acceptance length fell to {tau:.2f} from {run.best:.2f}")

    def _go_back(self, reason: str) -> None:
        self.run.rate_scale *= SLOWER
        self.trainer.restart(self.run.best_head)
        if self.main:
            tqdm.write(f"step {self.trainer.steps}: {reason}; going back to the best head at {self.run.rate_scale:.3f} of the rate")

    def save(self) -> None:
        """Write the state; a reader never sees half of it."""
        if self.main:
            partial = self.state_file.with_suffix(".partial")
            torch.save({"settings": asdict(self.settings), "trainer": self.trainer.state_dict(), "run": vars(self.run)}, partial)
            os.replace(partial, self.state_file)

    def _log(self, values: dict[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, self.trainer.steps)


def _tensorboard(folder: Path) -> Any | None:
    """A writer of TensorBoard's events, where it is installed."""
    try:
        from tensorboard.summary import Writer
    except ImportError:
        return None
    return Writer(str(folder / "tensorboard"))


def _smooth(old: list[float], new: list[float]) -> list[float]:
    """Exponential averages; a short batch has fewer steps and leaves the later averages alone."""
    averaged = [0.9 * a + 0.1 * b for a, b in zip(old, new, strict=False)]
    return averaged + (old[len(new) :] or new[len(old) :])

"""python -m tools.gpu_check: everything that only a machine with an NVIDIA GPU can say, in less than nine minutes.

Kernel tests on the GPU, token equality of the engine on it, compute-sanitizer where it is installed, ``kernels.bench``, and
``tools.bench.gpu``. Needs torch, transformers, Triton and pytest; with pytest-xdist, tests compile kernels on several cores. A stage that
fails or runs out of time is recorded, and the others go on. Results go to benchmarks/results/gpu-NAME.json.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# No conftest: what it imports beyond pytest need not be on such a machine.
PYTEST = (sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider")
SECONDS = 530.0
TAIL = 4000  # characters of a failed stage's output that are kept


@dataclass(frozen=True)
class Stage:
    """A command and the seconds that it may take where there are SECONDS for everything, else in proportion. ``shown``: what it prints."""

    name: str
    command: Sequence[str | Path]
    seconds: float
    shown: bool = False


@dataclass(frozen=True)
class Outcome:
    """``summary``: the last line of the output; ``output``: its end, kept when the stage failed."""

    name: str
    passed: bool
    seconds: float
    summary: str
    output: str = ""


def checks() -> list[Stage]:
    """What may run side by side."""
    cores, several = os.cpu_count() or 1, find_spec("xdist") is not None
    found = [
        Stage("kernels", [*PYTEST, *(("-n", str(min(8, cores))) if several else ()), "tests/kernels/gpu"], 150),
        Stage("engine", [*PYTEST, *(("-n", str(min(3, cores))) if several else ()), "tests/engine/gpu"], 150),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        memcheck = [sanitizer, "--tool", "memcheck", "--error-exitcode", "1", "--target-processes", "all"]
        found.append(Stage("memcheck", [*memcheck, *PYTEST, "tests/kernels/gpu", "-k", "small and not fpbs"], 150))
    return found


def measurements(folder: Path) -> list[Stage]:
    """What must run alone; each writes the file of its name, the last one takes what time is left."""
    speed = [sys.executable, "-m", "tools.bench.gpu"]
    return [
        Stage("bench", [sys.executable, "-m", "kernels.bench", "--json", folder / "bench"], 90, shown=True),
        Stage(
            "speed", [*speed, "--rounds", "2", "--per-stream", "3", "--max-tokens", "192", "--json", folder / "speed"], SECONDS, shown=True
        ),
    ]


def run(stage: Stage, seconds: float, until: float) -> Outcome:
    """Ended at ``until`` (of ``time.monotonic``), ``seconds`` after the first stage began, if not before. Never raises for what it does."""
    start = time.monotonic()
    process = subprocess.Popen(
        stage.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"TQDM_DISABLE": "1"},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(0.0, min(stage.seconds * seconds / SECONDS, until - start)))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        output = process.communicate()[0] + f"\nstopped after {time.monotonic() - start:.0f} s"
    passed = process.returncode == 0
    if stage.shown and passed:
        print(output, flush=True)
    lines = output.strip().splitlines()
    return Outcome(stage.name, passed, time.monotonic() - start, lines[-1] if lines else "", "" if passed else output[-TAIL:])


def read(file: Path) -> object:
    """What a stage has written; None where it had not come so far."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def told(outcome: Outcome) -> Outcome:
    print(f"{outcome.name}: {'passed' if outcome.passed else 'FAILED'} in {outcome.seconds:.0f} s; {outcome.summary}")
    print(outcome.output, end="", flush=True)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default %(default)s)")
    seconds = parser.parse_args().seconds
    timed = partial(run, seconds=seconds, until=time.monotonic() + seconds)
    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU, and torch finds none.", file=sys.stderr)
        return 1
    device = torch.cuda.get_device_name()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    with TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
        outcomes = [told(outcome) for outcome in threads.map(timed, checks())]
        measured = {}
        for stage in measurements(Path(folder)):
            outcomes.append(told(timed(stage)))
            measured[stage.name] = read(Path(folder, stage.name))
    versions = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    file.write_text(json.dumps(versions | {"stages": [asdict(outcome) for outcome in outcomes]} | measured, indent=1) + "\n")
    print(f"written to {file.relative_to(ROOT)}")
    return int(not all(outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

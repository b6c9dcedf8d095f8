"""python -m tools.gpu_check: everything that only a machine with an NVIDIA GPU can say, in less than nine minutes.

Kernel tests on the GPU, token equality of the engine on it, compute-sanitizer where it is installed, and ``kernels.bench``. Needs torch,
transformers, Triton and pytest. A stage that fails or runs out of time is recorded, and the others go on. Results go to
benchmarks/results/gpu-NAME.json.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# No conftest: what it imports beyond pytest need not be on such a machine.
PYTEST = (sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider")
TAIL = 4000  # characters of a failed stage's output that are kept


@dataclass(frozen=True)
class Stage:
    """A command and the seconds that it may take."""

    name: str
    command: Sequence[str | Path]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """``summary``: the last line of the output; ``output``: its end, kept when the stage failed."""

    name: str
    passed: bool
    seconds: float
    summary: str
    output: str = ""


def stages(bench_file: Path) -> list[Stage]:
    found = [
        Stage("kernels", [*PYTEST, "tests/kernels/gpu"], 150),
        Stage("engine", [*PYTEST, "tests/engine/gpu"], 150),
        Stage("bench", [sys.executable, "-m", "kernels.bench", "--json", bench_file], 120),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        memcheck = [sanitizer, "--tool", "memcheck", "--error-exitcode", "1", "--target-processes", "all"]
        found.append(Stage("memcheck", [*memcheck, *PYTEST, "tests/kernels/gpu", "-k", "small"], 90))
    return found


def run(stage: Stage) -> Outcome:
    """Never raises for what the stage does."""
    start = time.monotonic()
    try:
        result = subprocess.run(stage.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=stage.seconds)
        passed, output = result.returncode == 0, result.stdout
    except subprocess.TimeoutExpired as expired:
        partial = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else expired.stdout or ""
        passed, output = False, f"{partial}\nstopped after {stage.seconds:.0f} s"
    lines = output.strip().splitlines()
    return Outcome(stage.name, passed, time.monotonic() - start, lines[-1] if lines else "", "" if passed else output[-TAIL:])


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU, and torch finds none.", file=sys.stderr)
        return 1
    device = torch.cuda.get_device_name()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    bench_file = file.with_suffix(".bench")
    outcomes = []
    for stage in stages(bench_file):
        outcomes.append(run(stage))
        print(f"{stage.name}: {'passed' if outcomes[-1].passed else 'FAILED'} in {outcomes[-1].seconds:.0f} s; {outcomes[-1].summary}")
        print(outcomes[-1].output, end="", flush=True)
    bench = json.loads(bench_file.read_text()) if bench_file.exists() else None
    bench_file.unlink(missing_ok=True)
    versions = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    file.write_text(json.dumps(versions | {"stages": [asdict(outcome) for outcome in outcomes], "bench": bench}, indent=1) + "\n")
    print(f"written to {file.relative_to(ROOT)}")
    return int(not all(outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

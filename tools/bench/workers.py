"""The processes that hold the systems, seen from the benchmark: started one after the other, asked one at a time."""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.bench.arguments import ROOT
from tools.bench.rounds import SystemFailure


class WorkerProcess:
    """One ``tools.bench.worker``. What it prints goes to ``log``."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        self.idle_cpu = self.idle_seconds = 0.0  # of the process between requests, in all
        self._last_reply = time.monotonic()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Its reply. Raises SystemFailure when that is an error, or when the process ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        idle_seconds = time.monotonic() - self._last_reply
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemFailure(f"its process ended with status {self.process.wait()}, see {self.log.name} in the work directory")
        self._last_reply = time.monotonic()
        reply = json.loads(line)
        self.idle_cpu += reply.get("idle_cpu", 0.0)
        self.idle_seconds += idle_seconds
        if "error" in reply:
            raise SystemFailure(reply["error"])
        return reply

    @property
    def idle_load(self) -> float:
        """Cores that the process kept busy while it had nothing to do."""
        return self.idle_cpu / max(self.idle_seconds, 1.0)


@contextmanager
def started(backend: str, python: str, threads: int, log: Path) -> Iterator[WorkerProcess]:
    """A worker of ``backend`` under the interpreter ``python`` until the block ends. SystemFailure where there is no such interpreter."""
    with log.open("w", encoding="utf-8") as output:
        try:
            process = subprocess.Popen(
                [python, "-m", "tools.bench.worker", backend], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
                text=True, cwd=ROOT, env=environment(backend, python, threads),
            )  # fmt: skip
        except OSError as error:
            raise SystemFailure(f"cannot run {python}: {error.strerror}") from error
        try:
            yield WorkerProcess(process, log)
        finally:
            process.kill()  # it holds nothing that must be saved, and some take long to end by themselves
            process.wait()


def environment(backend: str, python: str, threads: int) -> dict[str, str]:
    """The same for all, but for the OpenMP library that vLLM asks for on a CPU, where its own environment has it.

    How threads wait is left to each system, as its users have it: they spin for milliseconds between two steps, and sleep between turns.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VSD_")}
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
    preload = {"LD_PRELOAD": str(openmp)} if backend.startswith("vllm") and openmp.exists() else {}
    return {
        **preload,
        **inherited,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",  # everything is on disk by now
        "PYTHONPATH": str(ROOT),
    }

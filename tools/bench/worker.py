"""python -m tools.bench.worker BACKEND: one process that holds a system, or several that share a model, and runs prompts on request.

Requests are lines of JSON on standard input, each answered by one line on standard output; the process ends when its input does.

    {"load": {field of Settings: value}}  ->  {"version": "4.8.5"}
    {"run": {field of Work: value}}       ->  {"seconds": 1.5, "token_ids": [[5, 6], ...], "steps": 0, "accepted": 0, "idle_cpu": 0.0}
    anything that fails                   ->  {"error": "ModuleNotFoundError: No module named 'vllm'"}

``seconds``: from the first prompt submitted to the last token received, prefill included. ``idle_cpu``: CPU seconds that the process
used between the previous reply and this request, while others ran. Runs under the interpreter of its backend: nothing is imported here
that they might lack.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tools.bench.backends import BACKENDS
from tools.bench.work import Backend, Settings, Work


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the backends print goes to the log
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=replies)


class Worker:
    def __init__(self, backend: str) -> None:
        self.backend = BACKENDS[backend]
        self.loaded: Backend | None = None
        self.cpu = time.process_time()

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Never raises for what the backend does."""
        try:
            if "load" in request:
                return self.load(Settings(**request["load"]))
            return self.run(Work(**request["run"]))
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        finally:
            self.cpu = time.process_time()

    def load(self, settings: Settings) -> dict[str, Any]:
        self.loaded = self.backend(settings)
        return {"version": self.loaded.version}

    def run(self, work: Work) -> dict[str, Any]:
        assert self.loaded is not None, "run before load"
        idle = time.process_time() - self.cpu
        start = time.perf_counter()
        answers = self.loaded.run(work)
        return {"seconds": time.perf_counter() - start, "idle_cpu": idle} | asdict(answers)


if __name__ == "__main__":
    main()

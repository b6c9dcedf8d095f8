"""A stand-in for an interpreter with a peer, started by the benchmark's tests: counts upwards from the prompt's last token.

STUB_FAULT = short | load | run | exit.
"""

import json
import os
import sys

FAULT = os.environ.get("STUB_FAULT")


def answer(request: dict) -> dict:
    if "load" in request:
        assert request["load"]["concurrency"] == 2
        return {"error": "ValueError: no such model"} if FAULT == "load" else {"version": "1.2.3"}
    if FAULT == "exit":
        sys.exit(3)
    work = request["run"]
    tokens = work["max_tokens"] - (FAULT == "short")
    token_ids = [[prompt[-1] + 1 + i for i in range(tokens)] for prompt in work["prompts"]]
    reply = {"seconds": 0.5, "token_ids": token_ids, "steps": len(token_ids), "accepted": 2 * len(token_ids), "idle_cpu": 0.0}
    return {"error": "RuntimeError: out of luck"} if FAULT == "run" else reply


assert sys.argv[1:] == ["-m", "tools.bench.worker", "vllm"]
for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)

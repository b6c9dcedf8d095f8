"""A stand-in for `python -m server`, started by the benchmark's tests: counts "words" to max_tokens, the drafted server two at a time.

VSD_* variables must not reach it. Environment: STUB_FAULT = exit | slow | short | words | error.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULT = os.environ.get("STUB_FAULT")
DRAFTED = "--draft" in sys.argv and sys.argv[sys.argv.index("--draft") + 1] != "none"
PORT = int(sys.argv[sys.argv.index("--port") + 1])


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        status = 503 if FAULT == "slow" else 200
        self.answer(status, json.dumps({"data": [{"id": "stub"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        tokens = body["max_tokens"] - (FAULT == "short" and DRAFTED)
        steps = tokens // 2 if DRAFTED else 0
        time.sleep(0.01 * (steps or tokens))
        words = [f"{body['prompt'][0]}.{i} " for i in range(tokens)]
        if FAULT == "words" and DRAFTED:
            words[-1] = "other "
        speculation = {"num_spec_steps": steps, "num_accepted_draft_tokens": tokens - steps} if DRAFTED else None
        events = [{"choices": [{"text": word}], "usage": None} for word in words]
        events.append({"choices": [], "usage": {"completion_tokens": tokens}, "metrics": {"speculative_decoding": speculation}})
        if FAULT == "error":
            events[1:] = [{"error": {"message": "the step failed"}}]
        self.answer(200, "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


if any(name.startswith("VSD_") for name in os.environ):
    sys.exit("a VSD_ variable reached the server")
if FAULT == "exit":
    sys.exit("cannot load the head")
ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()

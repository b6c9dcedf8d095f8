"""python -m tools.soak: a real server under mixed load for some minutes, with clients that leave and requests that are wrong.

The KV pool is small, so that requests wait for blocks. At the end nothing may be left: no request, no block, no place in the batch; the
memory must be flat after the first third, which is not judged below 45 seconds; and every greedy answer must be what the same server says
without speculation.
Prints one line of JSON; the status is 1 when anything was wrong.
"""

import argparse
import asyncio
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from tqdm.asyncio import tqdm

from tools.bench.http import free_port

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ROWS = 8
SERVER = ("--max-num-seqs", str(ROWS), "--max-queued-requests", "24", "--max-model-len", "512", "--kv-cache-memory", "14MiB")
START_SECONDS = 300
JUDGED = 45.0  # seconds of the shortest soak whose memory is judged: before, caches and allocators are still filling
GROWTH = 1.05  # of the memory after the first third that the last third may reach
SUBJECTS = ("a fox", "the number 12", "def add(a, b):", "an old ship", "rain", "the king's daughter")
PROMPTS = [f"{'One two three. ' * repeats}Tell me about {subject}" for subject in SUBJECTS for repeats in (0, 3, 25)]
SAMPLING: tuple[dict[str, Any], ...] = (
    {}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.0, "top_k": 40, "min_p": 0.02}, {"temperature": 1.3, "seed": 5, "n": 2},
)  # fmt: skip
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"stop": ["\n"]}, {"frequency_penalty": 0.5, "presence_penalty": 0.3}, {"repetition_penalty": 1.2},
    {"logit_bias": {"40": 3, "41": -5}},
    {"ignore_eos": True}, {"min_tokens": 1}, {"speculation": {"max_nodes": 3}}, {"cache_salt": "a"},
)  # fmt: skip
ANIMAL = {
    "type": "object", "properties": {"animal": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["animal", "legs"], "additionalProperties": False,
}  # fmt: skip
FORMS: tuple[dict[str, Any], ...] = (
    {}, {"response_format": {"type": "json_object"}}, {"structured_outputs": {"choice": ["seven apples", "seven pears"]}},
    {"structured_outputs": {"regex": "[a-z]{3,9}( [a-z]{2,9}){3}"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "animal", "schema": ANIMAL}}},
)  # fmt: skip
TOOLS = {"tools": [{"type": "function", "function": {"name": "count", "parameters": ANIMAL}}], "tool_choice": "required"}
WRONG: tuple[tuple[int, dict[str, Any]], ...] = (
    (400, {"temperature": -1}), (400, {"n": 10**9}), (400, {"prompt": []}), (400, {"prompt": [10**6]}), (400, {"max_tokens": 10**6}),
    (404, {"model": "other"}), (400, {"logit_bias": {"x": 1}}), (400, {"stop": ""}), (400, {"prompt": "x" * 10**5}), (400, {"suffix": "x"}),
    (400, {"structured_outputs": {"regex": "(a|aa)+" * 200}}), (400, {"response_format": {"type": "yaml"}}),
)  # fmt: skip


@dataclass
class Tally:
    """What happened. ``greedy``: by request without its options of transport, the texts that came back."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    greedy: dict[str, set[str]] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)  # MiB, once a second


class Clients:
    """Everything that is asked of the server at ``http``; ``draws`` decides what."""

    def __init__(self, http: httpx.AsyncClient, tally: Tally, draws: random.Random) -> None:
        self._http, self._tally, self._draws = http, tally, draws

    async def run(self, deadline: float) -> None:
        """One client: request after request until ``deadline`` on the monotonic clock."""
        kinds = {self._answered: 70, self._leave: 15, self._leave_early: 5, self._wrong: 8, self._look: 2}
        while time.monotonic() < deadline:
            (ask,) = self._draws.choices(list(kinds), list(kinds.values()))
            self._tally.counts[ask.__name__.strip("_")] += 1
            try:
                await ask()
            except httpx.HTTPError as error:
                self._tally.faults.append(f"{ask.__name__}: {error!r}")

    def _request(self) -> tuple[str, dict[str, Any]]:
        """A path and a body for it."""
        draws = self._draws
        body = {"max_tokens": draws.choice((1, 12, 48)), **({"temperature": 0} if draws.random() < 0.6 else draws.choice(SAMPLING))}
        options = draws.choice(OPTIONS) if draws.random() < 0.7 else draws.choice(FORMS)
        if draws.random() < 0.7:
            return COMPLETIONS, {"prompt": draws.choice(PROMPTS), **body, **options}
        return CHAT, {"messages": [{"role": "user", "content": draws.choice(PROMPTS)}], **body, **(TOOLS if options in FORMS else options)}

    async def _answered(self) -> None:
        path, body = self._request()
        extra: dict[str, Any] = {"stream": self._draws.random() < 0.5}
        if self._draws.random() < 0.2:
            extra |= {"logprobs": 3} if path == COMPLETIONS else {"logprobs": True, "top_logprobs": 3}
        response = await self._http.post(path, json={**body, **extra})
        if response.status_code == 503 and "retry-after" in response.headers:
            self._tally.counts["overloaded"] += 1
            await asyncio.sleep(0.2)
        elif response.status_code != 200:
            self._tally.faults.append(f"status {response.status_code} for {body}: {response.text[:200]}")
        elif body.get("temperature") == 0:
            text = _stream_text(response.text) if extra["stream"] else _text(response.json())
            self._tally.greedy.setdefault(json.dumps([path, body]), set()).add(text)

    async def _leave(self) -> None:
        """Read some events and hang up."""
        path, body = self._request()
        async with self._http.stream("POST", path, json={**body, "max_tokens": 200, "stream": True}) as response:
            lines = self._draws.randrange(12)
            async for _ in response.aiter_lines():
                lines -= 1
                if lines < 0:
                    return

    async def _leave_early(self) -> None:
        """Hang up while the request waits or is computed."""
        path, body = self._request()
        with suppress(httpx.TimeoutException):
            await self._http.post(path, json={**body, "max_tokens": 200}, timeout=self._draws.uniform(0.01, 0.3))

    async def _wrong(self) -> None:
        status, fields = self._draws.choice(WRONG)
        response = await self._http.post(COMPLETIONS, json={"prompt": "x", **fields})
        if response.status_code != status or set(response.json()) != {"error"}:
            self._tally.faults.append(f"status {response.status_code}, not {status}, for {fields}: {response.text[:200]}")

    async def _look(self) -> None:
        for path in ("/livez", "/readyz", "/metrics", "/v1/models"):
            (await self._http.get(path)).raise_for_status()


def _stream_text(events: str) -> str:
    *parts, done = [line.removeprefix("data: ") for line in events.splitlines() if line]
    if done != "[DONE]":
        return "a stream without [DONE]"
    return "".join(_text(json.loads(part)) for part in parts)


def _text(answer: dict[str, Any]) -> str:
    """What a whole answer says, or what an event adds to it; of a call its arguments."""
    text = ""
    for choice in answer.get("choices", []):
        said = choice.get("message") or choice.get("delta") or {}
        calls = said.get("tool_calls") or []
        text += (choice.get("text") or said.get("content") or "") + "".join(call["function"].get("arguments", "") for call in calls)
    return text


async def soak(url: str, process: int, seconds: float, concurrency: int, seed: int) -> Tally:
    """Load for ``seconds``, then what must hold afterwards."""
    tally, draws = Tally(), random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        deadline = time.monotonic() + seconds
        sampler = asyncio.create_task(_watch_memory(process, seconds, tally))
        await asyncio.gather(*(Clients(http, tally, draws).run(deadline) for _ in range(concurrency)))
        sampler.cancel()
        await _check_rest(http, tally)
        await _check_rows(http, tally)
        await _check_greedy(http, tally)
    if seconds >= JUDGED:
        _check_memory(tally)
    return tally


async def _watch_memory(process: int, seconds: float, tally: Tally) -> None:
    for _ in tqdm(range(math.ceil(seconds)), desc="soak", unit="s", disable=None):
        status = Path(f"/proc/{process}/status").read_text()
        tally.memory.append(int(status.split("VmRSS:")[1].split()[0]) // 1024)
        await asyncio.sleep(1)


async def _gauges(http: httpx.AsyncClient) -> dict[str, float]:
    text = (await http.get("/metrics")).text
    names = ("vsd_num_requests_running", "vsd_num_requests_waiting", "vsd_kv_cache_usage_ratio")
    return {line.split("{")[0]: float(line.split()[-1]) for line in text.splitlines() if line.startswith(names)}


async def _check_rest(http: httpx.AsyncClient, tally: Tally) -> None:
    for _ in range(100):
        gauges = await _gauges(http)
        if not any(gauges.values()):
            return
        await asyncio.sleep(0.1)
    tally.faults.append(f"left behind after the load: {gauges}")


async def _check_rows(http: httpx.AsyncClient, tally: Tally) -> None:
    """All places of the batch can be taken together."""
    most = 0.0
    body = {"prompt": ["x"] * ROWS, "max_tokens": 64, "ignore_eos": True, "temperature": 0}
    post = asyncio.create_task(http.post(COMPLETIONS, json=body))
    while not post.done():
        most = max(most, (await _gauges(http))["vsd_num_requests_running"])
    if (await post).status_code != 200 or most < ROWS:
        tally.faults.append(f"{most:.0f} requests ran together, not {ROWS}")


async def _check_greedy(http: httpx.AsyncClient, tally: Tally) -> None:
    places = asyncio.Semaphore(ROWS)

    async def check(key: str, texts: set[str]) -> None:
        path, asked = json.loads(key)
        body = {**asked, "speculation": {"enabled": False}}
        async with places:
            response = await http.post(path, json=body)
        if response.status_code != 200:
            tally.faults.append(f"status {response.status_code} for {body}: {response.text[:200]}")
        elif texts != {plain := _text(response.json())}:
            tally.faults.append(f"not the text of plain decoding, {plain!r}, but {texts - {plain}} for {key}")

    await tqdm.gather(*(check(key, texts) for key, texts in tally.greedy.items()), desc="plain decoding", unit="answer", disable=None)


def _check_memory(tally: Tally) -> None:
    third = len(tally.memory) // 3
    if third and median(tally.memory[-third:]) > GROWTH * median(tally.memory[third : 2 * third]):
        tally.faults.append(f"memory grows: {tally.memory[third]} MiB after a third, {tally.memory[-1]} MiB at the end")


def main(argv: Sequence[str] | None = None) -> int:
    """The status: 0 when all held."""
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-m", "server", "--port", str(port), *SERVER], stdout=log, stderr=log)
        try:
            _wait_until_ready(process, url)
            tally = asyncio.run(soak(url, process.pid, args.seconds, args.concurrency, args.seed))
            process.terminate()
            if process.wait(60) != 0:
                tally.faults.append(f"the server ended with status {process.returncode}")
        finally:
            process.kill()
        log.seek(0)
        printed = log.read().decode(errors="replace")
    if "Traceback" in printed:
        tally.faults.append(f"a traceback in the log: {printed[printed.index('Traceback') :][:2000]}")
    report = {
        "seconds": args.seconds, "requests": dict(tally.counts), "greedy_requests_compared": len(tally.greedy),
        "memory_mib": tally.memory[:: max(1, len(tally.memory) // 10)], "faults": len(tally.faults),
    }  # fmt: skip
    print(json.dumps(report))
    for fault in tally.faults[:20]:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if tally.faults else 0


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("error: the server did not start")


if __name__ == "__main__":
    sys.exit(main())

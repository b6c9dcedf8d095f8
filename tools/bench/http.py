"""python -m tools.bench.http: speculation against our own plain decoding, over HTTP, in one run.

Two real servers of the same model, one with the draft head and one without, answer the same prompts with the same number of tokens.
Each round loads one server, then the other, in alternating order; the other one idles meanwhile. Speeds are tokens over the seconds from
the first request sent to the last token received, prefill included. The speed-up is the median of the ratios within rounds; their range
says how far to trust it.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from tqdm import tqdm
from transformers import AutoTokenizer

from tools.bench.arguments import add_common, complete_draft
from tools.bench.report import Row, rows, table, verdict
from tools.bench.rounds import BenchError, Round, measure
from tools.bench.work import PLAIN, SPECULATION
from tools.prompts import PromptError, read_prompts


@dataclass(frozen=True)
class Completion:
    """One answer, and what its server says of speculation (zeros without)."""

    text: str
    tokens: int
    steps: int = 0
    accepted: int = 0


# Servers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(command: Sequence[str], url: str, timeout: float) -> Iterator[None]:
    """Runs ``command`` until the block ends, from the moment it answers /health. Raises BenchError with its log if it never does."""
    # What is compared stands on the command line alone.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VSD_")}
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process:
        try:
            _wait_until_healthy(process, url, timeout)
            yield
        except (BenchError, httpx.HTTPError) as error:
            log.seek(0)
            tail = log.read().decode(errors="replace")[-3000:]
            raise BenchError(f"{error}\n{' '.join(command)} printed:\n{tail}") from error
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"the server ended with status {process.returncode} before it was ready")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise BenchError(f"the server was not ready after {timeout:.0f} s")


# Load


async def complete(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Completion:
    """One streamed completion, read to its end."""
    text, tokens = "", None
    speculation: dict[str, int] = {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise BenchError(f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')}")
        async for line in response.aiter_lines():
            if not line.startswith("data:") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data:"))
            if "error" in chunk:
                raise BenchError(f"the server broke off: {chunk['error']}")
            text += "".join(choice["text"] for choice in chunk["choices"])
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            speculation = (chunk.get("metrics") or {}).get("speculative_decoding") or speculation
    if tokens is None:
        raise BenchError("the stream ended without a usage report")
    return Completion(text, tokens, speculation.get("num_spec_steps", 0), speculation.get("num_accepted_draft_tokens", 0))


async def load(url: str, bodies: Sequence[Mapping[str, Any]], concurrency: int, progress: tqdm) -> Round:
    """Sends all requests, at most ``concurrency`` at a time."""
    slots = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(body: Mapping[str, Any]) -> Completion:
            async with slots:
                completion = await complete(client, body)
            progress.update()
            return completion

        started = time.perf_counter()
        completions = await asyncio.gather(*(one(body) for body in bodies))
        seconds = time.perf_counter() - started
    return Round(
        seconds,
        tuple(completion.text for completion in completions),
        tuple(completion.tokens for completion in completions),
        sum(completion.steps for completion in completions),
        sum(completion.accepted for completion in completions),
    )


# Command line


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.http",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Arguments after -- go to both servers: ... -- --dtype float32 --kv-cache-memory 2GiB",
    )
    add_common(parser, rounds=5)
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="request i has seed i (default %(default)s)")
    parser.add_argument("--start-timeout", type=float, default=600, metavar="S", help="seconds a server may take to load")
    parser.add_argument("server", nargs="*", metavar="-- FLAGS", help="flags for both servers")
    args = parser.parse_args(argv)
    complete_draft(parser, args)
    return args


def run(args: argparse.Namespace) -> list[Row]:
    prompts = read_prompts(args.prompts, AutoTokenizer.from_pretrained(args.model), args.limit)
    urls = {system: f"http://127.0.0.1:{free_port()}" for system in (SPECULATION, PLAIN)}

    def command(system: str, draft: str) -> list[str]:
        port = urls[system].rpartition(":")[2]
        return [
            sys.executable,
            "-m",
            "server",
            args.model,
            "--draft",
            draft,
            "--host",
            "127.0.0.1",
            "--port",
            port,
            "--no-prefix-caching",
            *args.server,
        ]

    result = []
    with (
        serving(command(SPECULATION, args.draft), urls[SPECULATION], args.start_timeout),
        serving(command(PLAIN, "none"), urls[PLAIN], args.start_timeout),
    ):
        name = httpx.get(f"{urls[SPECULATION]}/v1/models", timeout=60).json()["data"][0]["id"]
        common = {"model": name, "max_tokens": args.max_tokens, "temperature": args.temperature, "ignore_eos": True}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        bodies = [{"prompt": prompt, "seed": seed, **common, **stream} for seed, prompt in enumerate(prompts)]
        for concurrency in args.concurrency:

            def turn(system: str, part: Sequence[Mapping[str, Any]], progress: tqdm, concurrency: int = concurrency) -> Round:
                return asyncio.run(load(urls[system], part, concurrency, progress))

            measured, _ = measure(list(urls), turn, bodies, concurrency, args.rounds, f"concurrency {concurrency}")
            part = rows(measured, PLAIN, concurrency, args.temperature, measured)
            print(table(part), flush=True)
            result += part
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when there was nothing to compare or the texts differed."""
    args = parse_arguments(argv)
    try:
        result = run(args)
    except (BenchError, PromptError, OSError, httpx.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in result], indent=2) + "\n", encoding="utf-8")
    if verdict(result, (PLAIN, SPECULATION)):
        return 1
    print("Every prompt got the same text with and without speculation.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A real server process, once per session."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from drafts.checkpoint import save_head
from tests.engine.engines import byte_tokenizer, random_head, tiny_model
from tools.demo.tokenizer import CHAT_TEMPLATE

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "drafts" / "demo"
KEY = {"authorization": "Bearer Second key"}
BODY = {"prompt": "x", "max_tokens": 4, "temperature": 0}
START_SECONDS = 280  # importing torch and transformers takes most of it on a busy machine


@dataclass
class Server:
    """``url`` without a path; ``log`` grows while the server runs."""

    url: str
    process: subprocess.Popen[str]
    log: list[str]


def launch(*arguments: str, port: int = 0, **environment: str) -> tuple[subprocess.Popen[str], list[str]]:
    """Start the server, on a free port by default; its lines appear in the list."""
    process = subprocess.Popen(
        [sys.executable, "-m", "server", *arguments, "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        log.extend(iter(process.stdout.readline, ""))

    threading.Thread(target=read, daemon=True).start()
    return process, log


def listening_at(log: list[str]) -> str | None:
    found = re.search(r"running on (https?://\S+)", "".join(log))
    return found[1] if found else None


def wait_for_url(process: subprocess.Popen[str], log: list[str]) -> str:
    """Where the server listens, once it is ready."""
    for _ in range(START_SECONDS * 10):
        if "server.lifecycle: ready" in "".join(log) and (url := listening_at(log)):
            return url
        try:
            process.wait(0.1)
            break
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("the server did not start:\n" + "".join(log))


@pytest.fixture(scope="session")
def server_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The demo pair once it is there, else a random pair; VSD_TEST_MODEL and VSD_TEST_DRAFT name another."""
    if model := os.environ.get("VSD_TEST_MODEL"):
        return [model, "--draft", os.environ.get("VSD_TEST_DRAFT", "none")]
    if all(list((DEMO / name).glob("*.safetensors")) for name in ("target", "vsd")):
        return []
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a pair that is loaded fast and knows nothing."""
    return [*make_pair(tmp_path_factory.mktemp("small")), "--served-model-name", "served", "--max-num-seqs", "4", "--threads", "1"]


def make_pair(directory: Path) -> list[str]:
    model = tiny_model(max_position_embeddings=512)
    model.save_pretrained(directory / "target")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory / "target")
    save_head(directory / "head", random_head(model), torch.float32)
    return [str(directory / "target"), "--draft", str(directory / "head")]


@pytest.fixture(scope="session")
def server(server_arguments: list[str]) -> Iterator[Server]:
    process, log = launch(*server_arguments, "--served-model-name", "served", "--max-num-seqs", "8", "--max-queued-requests", "8")
    try:
        yield Server(wait_for_url(process, log), process, log)
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == 0
    assert not any("Traceback" in line for line in log), "".join(log)


@contextmanager
def serving(*arguments: str, status: int = 0, **environment: str) -> Iterator[Server]:
    """A server of its own, ready, which ends with ``status`` at the latest when the block does."""
    process, log = launch(*arguments, **environment)
    try:
        yield Server(wait_for_url(process, log), process, log)
        if process.poll() is None:
            process.terminate()
        assert process.wait(60) == status, "".join(log)
    finally:
        process.kill()


def metric(http: httpx.Client, name: str) -> float:
    found = re.search(rf"^vsd_{name}{{[^}}]*}} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def at_rest(http: httpx.Client) -> bool:
    """Nothing runs, waits or holds blocks."""
    return not any(metric(http, name) for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio"))


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def guarded(pair: list[str]) -> Iterator[Server]:
    """A server with keys, and clients that have little time."""
    options = ["--client-timeout", "1", "--max-logprobs", "200", "--cors-origin", "https://pages.example", "--kv-cache-memory", "310KiB"]
    with serving(*pair, *options, VSD_API_KEY="First,Second key") as server:
        yield server
    log = "".join(server.log)
    assert "Traceback" not in log
    assert not re.search("First|Second", log)


@pytest.fixture
def keyed(guarded: Server) -> Iterator[httpx.Client]:
    """A client with a key; what a test did leaves a server that works."""
    with httpx.Client(base_url=guarded.url, headers=KEY, timeout=60) as client:
        yield client
        assert client.get("/livez").status_code == 200
        assert client.post("/v1/completions", json=BODY).status_code == 200
        wait_until(lambda: at_rest(client))


def connect(server: Server, receive_buffer: int | None = None) -> socket.socket:
    url = httpx.URL(server.url)
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(20)
    client.connect((url.host, url.port))
    return client


def exchange(server: Server, request: bytes) -> bytes:
    """What the server answers before it closes, if anything."""
    with connect(server) as client:
        try:
            client.sendall(request)
            return b"".join(iter(lambda: client.recv(65536), b""))
        except ConnectionError:
            return b""

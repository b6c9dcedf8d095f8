"""A real server process, once per session."""

import os
import re
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

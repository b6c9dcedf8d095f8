"""What the checks of all clients share: the server, running a client's program, and how it went."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.bench.http import free_port, serving

TARGET, DRAFT = "drafts/demo/target", "drafts/demo/vsd"
KEY = "Conformance"
ROWS = 8
SERVER = ("--api-key", KEY, "--max-model-len", "512", "--max-num-seqs", str(ROWS), "--max-queued-requests", str(ROWS))
START_SECONDS = 300
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class ClientError(Exception):
    """A client found a fault, or could not run."""


@dataclass(frozen=True)
class Setting:
    """``url`` without a path; ``programs``: the folder of the clients' commands; ``folder``: where they may write."""

    url: str
    programs: Path
    folder: Path


@contextmanager
def server(draft: str) -> Iterator[str]:
    """The demo target with ``draft``; yields the URL. Raises BenchError if it does not start."""
    port = free_port()
    command = [sys.executable, "-m", "server", TARGET, "--draft", draft, "--served-model-name", "demo", "--port", str(port), *SERVER]
    url = f"http://127.0.0.1:{port}"
    with serving(command, url, START_SECONDS):
        yield url


def run(setting: Setting, *command: str, environment: Mapping[str, str] | None = None, where: Path | None = None) -> str:
    """What a client's program printed, run in the folder ``where``. ClientError with the end of it unless its status is 0.

    By default that is the clients' own folder, for some leave caches where they are.
    """
    folder = setting.folder
    variables = {**os.environ, **OFFLINE, "HF_HOME": str(folder / "huggingface"), "NO_PROXY": "127.0.0.1", **(environment or {})}
    program = str(setting.programs / command[0])
    done = subprocess.run([program, *command[1:]], cwd=where or folder, env=variables, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    (folder / f"{command[0]}.log").write_text(printed, encoding="utf-8")
    if done.returncode != 0:
        raise ClientError(f"{command[0]} ended with status {done.returncode}:\n{printed[-6000:]}")
    return printed


def expect(condition: object, message: str) -> None:
    if not condition:
        raise ClientError(message)

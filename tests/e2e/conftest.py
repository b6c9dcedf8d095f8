"""A real server process, once per session."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "drafts" / "demo"
START_SECONDS = 280  # importing torch and transformers takes most of it on a busy machine


@dataclass
class Server:
    """``url`` without a path; ``log`` grows while the server runs."""

    url: str
    process: subprocess.Popen[str]
    log: list[str]


def launch(*arguments: str) -> tuple[subprocess.Popen[str], list[str]]:
    """Start the server on a free port; its lines appear in the list."""
    process = subprocess.Popen(
        [sys.executable, "-m", "server", *arguments, "--port", "0"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
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


def wait_for_url(process: subprocess.Popen[str], log: list[str]) -> str:
    for _ in range(START_SECONDS * 10):
        if found := re.search(r"running on (http://\S+)", "".join(log)):
            return found[1]
        try:
            process.wait(0.1)
            break
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("the server did not start:\n" + "".join(log))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, and a tokenizer of bytes."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, eos_token_id=256, bos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def server_arguments(tiny_model: Path) -> list[str]:
    """The demo pair once it is there; VSD_TEST_MODEL and VSD_TEST_DRAFT name another."""
    if model := os.environ.get("VSD_TEST_MODEL"):
        return [model, "--draft", os.environ.get("VSD_TEST_DRAFT", "none")]
    demo_is_there = all(list((DEMO / name).glob("*.safetensors")) for name in ("target", "eagle3"))
    return [] if demo_is_there else [str(tiny_model)]


@pytest.fixture(scope="session")
def server(server_arguments: list[str]) -> Iterator[Server]:
    process, log = launch(*server_arguments, "--served-model-name", "served", "--max-num-seqs", "8", "--max-queued-requests", "8")
    try:
        yield Server(wait_for_url(process, log), process, log)
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client

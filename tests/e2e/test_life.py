"""The life of a server process: it loads, serves, drains, and says when it is beyond help."""

import json
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from tests.e2e.conftest import Server, at_rest, launch, listening_at, serving, wait_for_url, wait_until

BODY = {"prompt": "x", "max_tokens": 40, "ignore_eos": True, "temperature": 0}
SLOW = {"VSD_FAULTS": "step:sleep=0.05"}  # 40 tokens of a head that knows nothing take two seconds


def client_of(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60)


def text_and_end(lines: Iterator[str]) -> tuple[str, dict]:
    """The text of a stream that closes as it should, and its last event."""
    *events, done = [line.removeprefix("data: ") for line in lines if line]
    assert done == "[DONE]"
    parsed = [json.loads(event) for event in events]
    return "".join(choice["text"] for event in parsed for choice in event.get("choices", [])), parsed[-1]


def test_loading_serving_draining(pair: list[str]) -> None:
    process, log = launch(*pair, **SLOW)
    try:
        wait_until(lambda: listening_at(log), 120)
        with httpx.Client(base_url=listening_at(log) or "", timeout=60) as http:
            early = http.post("/v1/completions", json=BODY)
            probe = http.get("/readyz")
            assert http.get("/livez").status_code == 200
            assert (early.status_code, early.json()["error"]["code"]) == (503, "model_loading")
            assert early.headers["retry-after"]
            assert (probe.status_code, probe.json()["status"]) == (503, "loading")
            assert 0 <= probe.json()["percent"] < 100
            wait_for_url(process, log)
            assert http.get("/readyz").status_code == 200

            with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                wait_until(lambda: http.get("/readyz").status_code == 503, 5)
                refused = http.post("/v1/completions", json=BODY)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_shutting_down")
                assert refused.headers["retry-after"]
                assert text_and_end(lines)[1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(10) == 0
    finally:
        process.kill()


def test_a_second_signal_ends_it_at_once(pair: list[str]) -> None:
    with (
        serving(*pair, status=-signal.SIGTERM, **SLOW) as server,
        client_of(server) as http,
        http.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 400, "stream": True}) as response,
    ):
        next(response.iter_lines())
        server.process.terminate()
        wait_until(lambda: http.get("/readyz").status_code == 503, 5)
        server.process.terminate()
        server.process.wait(2)


def test_what_is_not_done_in_time_ends_with_an_event(pair: list[str]) -> None:
    with (
        serving(*pair, "--drain-timeout", "0.5", **SLOW) as server,
        client_of(server) as http,
        http.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 400, "stream": True}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.process.terminate()
        assert text_and_end(lines)[1]["error"]["message"] == "The server is shutting down."
        server.process.wait(10)


def beyond_help(server: Server, http: httpx.Client) -> None:
    wait_until(lambda: http.get("/livez").status_code == 503)
    assert http.get("/readyz").status_code == 503
    refused = http.post("/v1/completions", json=BODY)
    assert (refused.status_code, refused.json()["error"]["type"]) == (500, "server_error")
    server.process.terminate()
    server.process.wait(20)
    assert [line for line in server.log if line.startswith("error: ")] == ["error: the engine stopped or hung; the log says why\n"]


def test_a_step_that_hangs(pair: list[str]) -> None:
    with (
        serving(*pair, "--step-timeout", "1", status=1, VSD_FAULTS="step:sleep=600") as server,
        client_of(server) as http,
        http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response,
    ):
        beyond_help(server, http)
        assert text_and_end(response.iter_lines())[1]["error"]


def test_a_device_that_is_lost(pair: list[str]) -> None:
    with serving(*pair, status=1, VSD_FAULTS="target:device") as server, client_of(server) as http:
        with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
            assert text_and_end(response.iter_lines())[1]["error"]["type"] == "server_error"
        assert at_rest(http)
        beyond_help(server, http)


def test_a_port_that_is_taken(pair: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process, log = launch(*pair, port=port)
        assert process.wait(120) == 1
    (error,) = [line for line in log if line.startswith("error: ")]
    assert error.startswith(f"error: cannot listen on 127.0.0.1 port {port}: Address already in use")


def truncate(head: Path) -> None:
    weights = head / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def pickle(head: Path) -> None:
    (head / "model.safetensors").unlink()
    torch.save({}, head / "pytorch_model.bin")


@pytest.mark.parametrize("damage", [truncate, pickle])
def test_a_head_that_cannot_be_used(pair: list[str], tmp_path: Path, damage: Callable[[Path], None]) -> None:
    head = tmp_path / "head"
    shutil.copytree(pair[2], head)
    damage(head)
    process, log = launch(pair[0], "--draft", str(head))
    assert process.wait(120) == 1
    (error,) = [line for line in log if line.startswith("error: ")]
    assert str(head) in error
    assert not any("Traceback" in line for line in log)


@pytest.mark.parametrize("seconds", [0, 3])
def test_end_while_loading(pair: list[str], seconds: float) -> None:
    process, log = launch(*pair)
    wait_until(lambda: listening_at(log), 120)
    time.sleep(seconds)
    process.terminate()
    assert process.wait(15) == 0, "".join(log)

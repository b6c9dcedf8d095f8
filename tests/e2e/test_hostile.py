"""Clients that mean harm, or cannot do better, at a server with keys."""

import json
import shutil
import ssl
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import BODY, KEY, Server, at_rest, connect, exchange, metric, serving, wait_until


@pytest.mark.parametrize("key", ["First", "Second key"])
def test_every_key_opens(keyed: httpx.Client, key: str) -> None:
    assert keyed.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize("key", ["first", "Second Key", "First,Second key", "Second"])
def test_other_keys_do_not(keyed: httpx.Client, key: str) -> None:
    assert keyed.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 401


@pytest.mark.parametrize(
    "target",
    ["/v1/models", "//v1/models", "/%76%31/models", "/v1/models?x=/health", "/%68ealth", "/health/", "//health", "/health/../v1/models",
     "http://x/health", "/metrics", "/openapi.json", "/nothing", "*"],
)  # fmt: skip
@pytest.mark.parametrize("host", ["x", "x/?", "x/#", "/health"])
def test_no_path_goes_around_the_key(keyed: httpx.Client, guarded: Server, target: str, host: str) -> None:
    answer = exchange(guarded, f"GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    assert answer.split()[1] == b"401"


@pytest.mark.parametrize(
    "headers", [b"".join(b"x-%d: y\r\n" % i for i in range(10_000)), b"x: " + b"y" * (16 << 20) + b"\r\n"], ids=["many", "long"]
)
def test_headers_without_end(keyed: httpx.Client, guarded: Server, headers: bytes) -> None:
    answer = exchange(guarded, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + headers + b"\r\n")
    assert not answer or answer.split()[1] in (b"400", b"431")


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"], ids=["first", "second"])
@pytest.mark.parametrize(
    ("at_once", "slowly"),
    [
        (b"", b"GET /health HTTP/1.1\r\nx: " + b"y" * 100),
        (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: {KEY['authorization']}\r\ncontent-length: 100\r\n\r\n".encode(),
            b" " * 99,
        ),
    ],
    ids=["headers", "body"],
)
def test_requests_that_drip(keyed: httpx.Client, guarded: Server, before: bytes, at_once: bytes, slowly: bytes) -> None:
    with connect(guarded) as client:
        client.sendall(before)
        assert not before or b"200 OK" in client.recv(65536)
        start = time.monotonic()
        if at_once:
            client.sendall(at_once)
        with suppress(ConnectionError):
            for byte in slowly:
                client.sendall(bytes([byte]))
                time.sleep(0.1)
        assert time.monotonic() - start < 5


def test_a_reader_that_stops(keyed: httpx.Client, guarded: Server) -> None:
    """Cut off, its place and blocks free, while others go on."""
    prompts = ["x"] * 64
    body = json.dumps({"prompt": prompts, "max_tokens": 400, "ignore_eos": True, "stream": True, "logprobs": 200}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: {KEY['authorization']}\r\ncontent-type: application/json\r\n"
    aborted = 'outcome="abort"}'
    with connect(guarded, receive_buffer=4096) as client:
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: metric(keyed, "num_requests_running") > 0)
        wait_until(lambda: aborted in keyed.get("/metrics").text, 90)
        wait_until(lambda: at_rest(keyed), 5)
    assert metric(keyed, "generation_tokens_total") < 400 * len(prompts) / 2
    assert any("cut off: it did not read" in line for line in guarded.log)


def test_pages_of_other_origins(keyed: httpx.Client) -> None:
    """Only those that were named get permission, and even they need the key."""
    for origin, allowed in (("https://pages.example", "https://pages.example"), ("https://other.example", None)):
        ask = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        with httpx.Client(base_url=keyed.base_url, timeout=60) as page:
            assert page.options("/v1/completions", headers=ask).headers.get("access-control-allow-origin") == allowed
            assert page.post("/v1/completions", json=BODY, headers={"origin": origin}).status_code == 401
        assert keyed.post("/v1/completions", json=BODY, headers={"origin": origin}).headers.get("access-control-allow-origin") == allowed


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory = tmp_path_factory.mktemp("tls")
    files = directory / "certificate.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(command, check=True, capture_output=True)
    return files


def test_tls(pair: list[str], certificate: tuple[Path, Path]) -> None:
    chain, key = map(str, certificate)
    with serving(*pair, "--ssl-certfile", chain, "--ssl-keyfile", key) as server:
        assert server.url.startswith("https://")
        with httpx.Client(base_url=server.url, verify=ssl.create_default_context(cafile=chain), timeout=60) as http:
            assert http.post("/v1/completions", json=BODY).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url, timeout=60)

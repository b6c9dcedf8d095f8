"""Whatever fails inside, each request gets its text or an error in the form of the API, and then all is as before."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.e2e.conftest import at_rest, metric, serving, wait_until

PROMPTS = [f"{word} upon a time, " * repeats for word in ("once", "twice") for repeats in (1, 6)]


def body(prompt: str) -> dict:
    return {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}


def read(response: httpx.Response) -> str | None:
    """The text; None for an error, which must look like one."""
    if response.headers["content-type"].startswith("text/event-stream"):
        *events, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert done == "[DONE]"
        parts = [json.loads(event) for event in events]
        error, text = parts[-1].get("error"), "".join(choice["text"] for part in parts for choice in part.get("choices", []))
    else:
        answer = response.json()
        error, text = answer.get("error"), answer["choices"][0]["text"] if response.status_code == 200 else ""
        assert (error is None) == (response.status_code == 200)
    if error is None:
        return text
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"
    assert "injected" not in error["message"]
    return None


@pytest.fixture(scope="module")
def expected(pair: list[str]) -> dict[str, str]:
    with serving(*pair) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        texts = {prompt: read(http.post("/v1/completions", json=body(prompt))) for prompt in PROMPTS}
    assert all(texts.values())
    return {prompt: text or "" for prompt, text in texts.items()}


@pytest.mark.parametrize(
    ("faults", "counter"),
    [
        ("draft:raise:0.4,draft:nan:0.3,draft:memory:0.1", "draft_failures_total"),
        ("prefill:raise:0.3,commit:memory:0.1,verify:raise:0.05,target:memory:0.05", "step_failures_total"),
        ("target:nan:0.05,step:raise:0.03,tokenizer:raise:0.1,step:sleep=0.05:0.1", "step_failures_total"),
    ],
)
def test_faults(pair: list[str], expected: dict[str, str], faults: str, counter: str) -> None:
    with serving(*pair, VSD_FAULTS=faults) as server, httpx.Client(base_url=server.url, timeout=60) as http:

        def post(i: int) -> tuple[str, str | None]:
            prompt = PROMPTS[i % len(PROMPTS)]
            return prompt, read(http.post("/v1/completions", json={**body(prompt), "stream": i % 3 == 0}))

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(post, range(48)))
        assert all(text in (None, expected[prompt]) for prompt, text in answers)
        failed = sum(text is None for _, text in answers)
        assert (failed == 0) == faults.startswith("draft")
        assert failed < len(answers)
        assert metric(http, counter) > 0
        wait_until(lambda: at_rest(http))
        assert http.get("/livez").status_code == http.get("/readyz").status_code == 200
        assert any(read(http.post("/v1/completions", json=body(PROMPTS[0]))) == expected[PROMPTS[0]] for _ in range(20))

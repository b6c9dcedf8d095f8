"""What a server must survive from those who send requests: each is answered as the API says, and leaves a server that works."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import BODY, KEY, Server, connect, exchange, wait_until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
TALK = [{"role": "user", "content": "x"}]
TEXT = "abcdefghijklmnopqrstuvwxyz"
SPELLED = {"structured_outputs": {"choice": [TEXT]}}  # the model has no choice, so that a step accepts many tokens


def post(http: httpx.Client, path: str, fields: dict[str, Any]) -> httpx.Response:
    """``fields`` beside a prompt; what no JSON library would send, such as NaN, is sent."""
    body = {**({"messages": TALK} if path == CHAT else {"prompt": "x"}), "max_tokens": 8, **fields}
    return http.post(path, content=json.dumps(body), headers=JSON)


def check_refusal(response: httpx.Response, status: int, param: str | None = None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert param in (None, error["param"])
    assert len(response.content) < 2000
    assert response.headers["x-request-id"]
    return str(error["message"])


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    text = response.json()["choices"][0]["text"]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_request(keyed: httpx.Client, path: str) -> None:
    for content in (b"", b"{", b"[" * 10_000, b'{"a":' * 10_000, b"\xff", b"null", b"[]", b'"x"'):
        check_refusal(keyed.post(path, content=content, headers=JSON), 400)
    check_refusal(keyed.post(path, content=b'{"prompt": "x"}', headers={"content-type": "text/plain"}), 400)


def test_a_body_without_end(keyed: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        yield from (b" " * 2**20 for _ in range(40))

    check_refusal(keyed.post(COMPLETIONS, content=b" " * (2**24 + 1), headers=JSON), 413)
    check_refusal(keyed.post(COMPLETIONS, content=chunks(), headers=JSON), 413)


def test_every_route_needs_the_key(keyed: httpx.Client, guarded: Server) -> None:
    described = keyed.get("/openapi.json").json()["paths"]
    routes = [(method.upper(), path) for path, operations in described.items() for method in operations]
    routes += [("GET", path) for path in ("/metrics", "/openapi.json", "/docs", "/redoc", "/docs/oauth2-redirect", "/nothing")]
    assert ("POST", CHAT) in routes
    wrong = [{}, {"authorization": "Bearer other"}, {"authorization": "Bearer second key"}, {"authorization": "Second key"}]
    with httpx.Client(base_url=guarded.url) as stranger:
        for method, path in routes:
            free = path in ("/health", "/livez", "/readyz")
            for headers in wrong:
                response = stranger.request(method, path, headers=headers)
                assert (response.status_code == 401) != free, (path, headers)
                if not free:
                    check_refusal(response, 401)


INF, NAN = float("inf"), float("nan")
REFUSED: dict[str, tuple[str, list[Any]]] = {
    "prompts": ("prompt", ["", [], [[]], [""], ["x"] * 100_000, -1, None, {"a": 1}]),
    "token ids": ("prompt", [[-1], [10**4], [2**63], [True], [1.5], [1, "x"], ["x", 1], [[1], "x"]]),
    "half a surrogate pair": ("prompt", ["\ud800", "a\udfff"]),
    "n": ("n", [0, -1, 10**9, 129, 1.5, "2"]),
    "temperature": ("temperature", [NAN, INF, -INF, -1, "1"]),
    "top_p": ("top_p", [0, -1, 1.1, NAN]),
    "min_p": ("min_p", [2, -0.1, NAN]),
    "top_k": ("top_k", [-7, 1.5, 2**63]),
    "penalties": ("presence_penalty", [NAN, 5, -INF]),
    "seed": ("seed", [2**63, -(2**63) - 1, 1.5]),
    "stop": ("stop", ["", [""], ["x"] * 100_000, "x" * 2**20, [1], "\ud800"]),
    "stop tokens": ("stop_token_ids", [[-1], [10**4], [1] * 10**5]),
    "logit_bias": ("logit_bias", [{"999": 1}, {"1": 1e9}, {"1": -1e9}, {"1": NAN}, {"x": 1}, {str(i): 1 for i in range(10**5)}]),
    "logprobs": ("logprobs", [10**6, -1]),
    "max_tokens": ("max_tokens", [0, -1, 2**63]),
    "embeddings": ("prompt_embeds", ["gASVCgAAAAAAAACMBnN5c3RlbZQu", [[0.5]]]),
    "speculation": ("speculation", [1, {"max_nodes": -1}]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_out_of_bounds(keyed: httpx.Client, name: str) -> None:
    field, values = REFUSED[name]
    for value in values:
        check_refusal(post(keyed, COMPLETIONS, {field: value}), 400, field)
        if field not in ("prompt", "prompt_embeds", "logprobs"):
            check_refusal(post(keyed, CHAT, {field: value}), 400, field)


def test_too_many_choices_or_tokens(keyed: httpx.Client) -> None:
    assert "128" in check_refusal(post(keyed, COMPLETIONS, {"prompt": ["x"] * 129}), 400, "prompt")
    check_refusal(post(keyed, COMPLETIONS, {"prompt": ["x"] * 2, "n": 128}), 400, "n")
    for fields in ({"max_tokens": 512}, {"prompt": "x" * 600}, {"prompt": [1] * 400, "max_tokens": 200}):
        response = post(keyed, COMPLETIONS, fields)
        assert check_refusal(response, 400).startswith("This model's maximum context length is")
        assert response.json()["error"]["code"] == "context_length_exceeded"
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        check_refusal(post(keyed, path, {"model": "other", "tokens": [1]}), 404, "model")
    check_refusal(keyed.get("/v1/models/other"), 404, "model")


def test_more_than_the_cache_holds(keyed: httpx.Client) -> None:
    """Refused at once, since it could only wait for ever."""
    limit = post(keyed, "/tokenize", {}).json()["max_model_len"]
    assert limit < 512
    for tokens, status in ((limit - 1, 200), (limit, 400)):
        assert post(keyed, COMPLETIONS, {"max_tokens": tokens, "ignore_eos": True}).status_code == status


@pytest.mark.parametrize("fields", [{"temperature": 1e-300}, {"temperature": 1e-45}, {"temperature": 1e-9, "top_p": 1e-300}])
def test_hardly_any_temperature_is_none(keyed: httpx.Client, fields: dict) -> None:
    greedy = text_of(post(keyed, COMPLETIONS, {"temperature": 0}))
    assert text_of(post(keyed, COMPLETIONS, {**fields, "seed": -5})) == greedy


OPTIONS: list[dict] = [
    {"presence_penalty": 2}, {"frequency_penalty": -2}, {"repetition_penalty": 100}, {"repetition_penalty": 1e-3},
    {"logit_bias": {"97": 100, "98": -100}}, {"min_p": 1}, {"top_p": 1e-9}, {"top_k": 1}, {"seed": -(2**63)}, {"logprobs": 200},
    {"presence_penalty": 1, "frequency_penalty": 1, "min_p": 0.1, "logit_bias": {"256": 100}, "min_tokens": 8, "n": 4},
]  # fmt: skip


def test_every_option_with_speculation(keyed: httpx.Client) -> None:
    """The same text as without, one after the other and all at once."""

    def texts(options: dict, speculation: bool) -> list[str]:
        fields = {"prompt": "x and y and x and", "max_tokens": 24, "seed": 1, **options, "speculation": {"enabled": speculation}}
        response = post(keyed, COMPLETIONS, fields)
        assert response.status_code == 200, response.text
        return [choice["text"] for choice in response.json()["choices"]]

    plain = [texts(options, False) for options in OPTIONS]
    assert [texts(options, True) for options in OPTIONS] == plain
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda options: texts(options, True), OPTIONS)) == plain


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("end", [{"stop": "def"}, {"stop": ["zz", "f"]}, {"stop_token_ids": [ord("f")]}])
def test_an_end_inside_an_accepted_block(keyed: httpx.Client, path: str, end: dict) -> None:
    """What the same step accepted after it is in no text, log-probability or count."""
    cut = {"def": "abc", "f": "abcde"}[end["stop"] if isinstance(end.get("stop"), str) else "f"]
    counted = 6
    logprobs: dict[str, Any] = {"logprobs": True} if path == CHAT else {"logprobs": 0}
    answers = []
    for speculation in (True, False):
        fields = {"max_tokens": 64, "temperature": 0, **SPELLED, **end, **logprobs, "speculation": {"enabled": speculation}}
        response = post(keyed, path, fields)
        assert response.status_code == 200, response.text
        answer = response.json()
        (choice,) = answer["choices"]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        tokens = choice["logprobs"]["content"] if path == CHAT else choice["logprobs"]["tokens"]
        answers.append((text, len(tokens), answer["usage"]["completion_tokens"], choice["finish_reason"]))
        if speculation:
            figures = answer["metrics"]["speculative_decoding"]
            assert 1 + figures["num_spec_steps"] + figures["num_accepted_draft_tokens"] > counted, "a step accepted more than was kept"
    assert answers == [(cut, counted, counted, "stop")] * 2


LONG = "".join(f"\n{a}: {b} {b} {b} {b}" for a, b in pairwise("abcdefghijklmno")) + '\no: "x"'
BOMBS: dict[str, tuple[str, dict]] = {
    "alternatives": ("structured_outputs", {"regex": "(a|aa)+" * 200 + "b"}),
    "repeats": ("structured_outputs", {"regex": "((((a{1,500}){1,500}){1,500}){1,500})"}),
    "stars": ("structured_outputs", {"regex": ".*" * 3000 + "b"}),
    "brackets": ("structured_outputs", {"regex": "(" * 5000 + "a" + ")*" * 5000}),
    "late": ("structured_outputs", {"regex": "(x|y)" + "(a|aa)+" * 200 + "b"}),
    "productions": ("structured_outputs", {"grammar": "start: a" + LONG}),
    "left recursion": ("structured_outputs", {"grammar": 'start: start start start | "a" | '}),
    "circle": ("response_format", {"$ref": "#"}),
    "items": ("response_format", {"type": "array", "items": {"type": "array", "minItems": 10**5}, "minItems": 10**6}),
    "properties": ("response_format", {"type": "object", "required": [f"p{i}" for i in range(3000)]}),
    "depth": ("response_format", json.loads('{"items": ' * 400 + "{}" + "}" * 400)),
    "references": (
        "response_format",
        {"$ref": "#/$defs/d0", "$defs": {"d40": {}, **{f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 9} for i in range(40)}}},
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_forms_that_explode(keyed: httpx.Client, guarded: Server, name: str) -> None:
    """A 400, or a text after all; others are served meanwhile."""
    field, form = BOMBS[name]
    if field == "response_format":
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": form}}
    with httpx.Client(base_url=guarded.url, headers=KEY, timeout=60) as other, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, keyed, COMPLETIONS, {field: form, "seed": 1})
        while not answer.done():
            assert other.get("/livez", timeout=10).status_code == 200
            assert other.post(COMPLETIONS, json=BODY).status_code == 200
    if answer.result().status_code != 200:
        check_refusal(answer.result(), 400)
    tools = [{"type": "function", "function": {"name": "f", "parameters": form["json_schema"]["schema"]}}] if "json_schema" in form else []
    if tools and (response := post(keyed, CHAT, {"tools": tools, "tool_choice": "required"})).status_code != 200:
        check_refusal(response, 400)


def test_a_form_that_explodes_late_in_a_stream(keyed: httpx.Client) -> None:
    field, form = BOMBS["late"]
    response = post(keyed, COMPLETIONS, {field: form, "stream": True})
    *_, error, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert done == "[DONE]"
    assert json.loads(error)["error"]["type"] == "invalid_request_error"
    assert "grammar" in json.loads(error)["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [{"chat_template": "{{ 1 }}"}, {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}]
    + [{"chat_template_kwargs": {name: "x"}} for name in ("chat_template", "tokenize", "messages", "conversation", "return_tensors")],
)  # fmt: skip
def test_templates_of_requests(keyed: httpx.Client, fields: dict) -> None:
    for path in (CHAT, "/tokenize"):
        check_refusal(post(keyed, path, {"messages": TALK, "prompt": None, **fields}), 400, next(iter(fields)))


def test_pictures_are_not_fetched(keyed: httpx.Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"
        for url in (here, "http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "data:image/png;base64," + "A" * 2**20):
            for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "input_audio", "input_audio": {"url": url}}):
                check_refusal(post(keyed, CHAT, {"messages": [{"role": "user", "content": [part]}]}), 400, "messages")
        check_refusal(post(keyed, CHAT, {"messages": [{"role": "user", "content": "data:image/png;base64," + "A" * 2**24}]}), 413)
        listener.settimeout(0.5)
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize("speculation", [True, False])
def test_characters_that_take_several_tokens(keyed: httpx.Client, speculation: bool) -> None:
    """No event has a part of one."""
    text = "zażółć gęślą jaźń 🦊 \0 é"
    fields = {"max_tokens": 64, "stream": True, "structured_outputs": {"choice": [text]}, "speculation": {"enabled": speculation}}
    response = post(keyed, COMPLETIONS, {**fields, "prompt": "a\0b 🦊"})
    events = [json.loads(line[6:]) for line in response.content.decode().splitlines() if line.startswith("data: {")]
    pieces = [choice["text"] for event in events for choice in event["choices"]]
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)
    assert speculation or len(pieces) > 15


def test_a_request_id_of_several_lines(keyed: httpx.Client, guarded: Server) -> None:
    for given in (b"a\rSet-Cookie: x", b"y" * 10_000, b'"; drop', b"\xff"):
        head = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: " + given + b"\r\n\r\n"
        answer = exchange(guarded, head)
        assert given not in answer
        assert b"set-cookie" not in answer.lower()


def test_a_model_name_is_no_label(keyed: httpx.Client) -> None:
    check_refusal(post(keyed, COMPLETIONS, {"model": 'evil"} 1'}), 404, "model")
    assert "evil" not in keyed.get("/metrics").text


def test_a_client_that_leaves_without_a_word(keyed: httpx.Client, guarded: Server) -> None:
    """While it waits, in its prompt, and among its drafts: the neighbour's text is what it was."""
    alone = text_of(post(keyed, COMPLETIONS, {"max_tokens": 48, "temperature": 0}))
    body = json.dumps({"prompt": ["x" * 200] * 8, "max_tokens": 200, "ignore_eos": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: {KEY['authorization']}\r\ncontent-type: application/json\r\n"
    with ThreadPoolExecutor(1) as pool:
        for delay in (0.0, 0.02, 0.2):
            with connect(guarded) as client:
                client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                neighbour = pool.submit(post, keyed, COMPLETIONS, {"max_tokens": 48, "temperature": 0})
                client.settimeout(delay or 1e-6)
                with pytest.raises(TimeoutError):
                    pytest.fail(client.recv(300).decode())
            assert text_of(neighbour.result()) == alone
    wait_until(lambda: 'outcome="abort"}' in keyed.get("/metrics").text)

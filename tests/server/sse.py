"""Server-sent events as a client reads them."""

import json

import httpx


def read_events(response: httpx.Response) -> list[dict]:
    """The events of a stream that ends as it should; the wire form is checked on the way."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"]
    *parts, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(part.startswith("data: {") and "\n" not in part for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]

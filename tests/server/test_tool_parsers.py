"""Texts of models as content and calls, at once and in every way to part them."""

import random

import pytest

from server.openai.tool_parsers import Arguments, CallStart, Content, HermesParser, JsonParser, NamedParser, ToolParser

AREA, NOW = '{"x": 3, "t": "a}\\"]{"}', "{}"


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def tagged(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


HERMES = [
    ("", "", []),
    ("Hello there.\n", "Hello there.\n", []),
    (tagged(call("area", AREA)), "", [("area", AREA)]),
    ("Let me see.\n" + tagged(call("area", AREA)), "Let me see.", [("area", AREA)]),
    (tagged(call("area", AREA)) + "\n" + tagged(call("now", NOW)) + "\n", "", [("area", AREA), ("now", NOW)]),
    (tagged(call("area", AREA)) + " Done.", " Done.", [("area", AREA)]),
    ('<tool_call>{"arguments": {"x": [1, {"name": "no"}]}, "name": "area"}</tool_call>', "", [("area", '{"x": [1, {"name": "no"}]}')]),
    ('<tool_call>{"name": "n\\u0061w"}</tool_call>', "", [("naw", "{}")]),
    ("a < b <tool_call", "a < b <tool_call", []),
    ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
    ('<tool_call> {"x": 1}</tool_call> so', '<tool_call> {"x": 1}</tool_call> so', []),
    ('<tool_call>{"name": "area", "arguments": {"x": ', "", [("area", '{"x": ')]),
    ('<tool_call>{"name": "ar', '<tool_call>{"name": "ar', []),
    (tagged(call("area", '{"type": "arguments", "arguments": {}}')), "", [("area", '{"type": "arguments", "arguments": {}}')]),
]
LLAMA = [
    ("Hello {there}; [you]\n", "Hello {there}; [you]\n", []),
    (call("area", AREA, "parameters"), "", [("area", AREA)]),
    ("<|python_tag|>" + call("area", AREA, "parameters") + "; " + call("now", NOW), "", [("area", AREA), ("now", NOW)]),
    ('\n{"answer": 42} it is', '\n{"answer": 42} it is', []),
    ("<|pyth", "<|pyth", []),
    (call("area", AREA) + " Done.", " Done.", [("area", AREA)]),
    (" \n", " \n", []),
    ("[1, 2]", "[1, 2]", []),
]
REQUIRED = [
    (f"[{call('area', AREA)}]", "", [("area", AREA)]),
    (f"[ {call('area', AREA)} ,\n{call('now', NOW)}]\n", "", [("area", AREA), ("now", NOW)]),
    ('[{"name": "area", "arguments": {"x"', "", [("area", '{"x"')]),
]
CASES = (
    [(HermesParser(), *case) for case in HERMES]
    + [(JsonParser(";"), *case) for case in LLAMA]
    + [(JsonParser("[],"), *case) for case in REQUIRED]
    + [(NamedParser("area"), AREA, "", [("area", AREA)])]
)


def read(parser: ToolParser, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    content, calls = "", []
    for piece in [piece for part in parts for piece in parser.feed(part)] + parser.finish():
        match piece:
            case Content(text):
                assert text
                content += text
            case CallStart(name):
                calls.append((name, ""))
            case Arguments(text):
                assert text
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return content, calls


@pytest.mark.parametrize(("parser", "text", "content", "calls"), CASES, ids=range(len(CASES)))
def test_pieces(parser: ToolParser, text: str, content: str, calls: list) -> None:
    def again() -> ToolParser:
        fresh = type(parser).__new__(type(parser))
        fresh.__dict__.update(start)
        return fresh

    start, rng = dict(parser.__dict__), random.Random(0)
    assert read(again(), [text]) == (content, calls)
    assert read(again(), list(text)) == (content, calls)
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(text) + 1), k=4))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(again(), parts) == (content, calls)


def test_arguments_come_as_they_grow() -> None:
    parser = HermesParser()
    assert parser.feed('Well.<tool_call>{"name": "area", "argu') == [Content("Well."), CallStart("area")]
    assert [parser.feed(part) for part in ('ments": ', '{"x"', ": 3}", "}</tool_call>")] == [
        [],
        [Arguments('{"x"')],
        [Arguments(": 3}")],
        [],
    ]


def test_text_comes_as_soon_as_it_is_certain() -> None:
    parser = HermesParser()
    assert [parser.feed(part) for part in ("a ", "b <tool", "s> c", " ")] == [[Content("a")], [Content(" b")], [Content(" <tools> c")], []]
    assert parser.finish() == [Content(" ")]

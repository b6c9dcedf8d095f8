"""Calls of functions in the text of a model, read as it grows: the same pieces whether the text comes at once or in parts."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

ToolFormat = Literal["hermes", "llama3_json"]
PYTHON_TAG = "<|python_tag|>"  # Llama 3's sign that a call follows
_SPACE = " \n\r\t"


class Content(NamedTuple):
    """Text that belongs to no call."""

    text: str


class CallStart(NamedTuple):
    """A call begins."""

    name: str


class Arguments(NamedTuple):
    """More of the JSON text of the arguments of the last call."""

    text: str


Piece = Content | CallStart | Arguments


class CallReader:
    """One JSON object {"name": ..., "arguments": {...}}, a character at a time; Llama 3 says "parameters".

    ``raw``: what has been read, and what stood before it.
    """

    def __init__(self, raw: str) -> None:
        self.raw, self.name, self.done = raw, "", False
        self._arguments, self._has_arguments = "", False
        self._told = False  # that there is a call
        self._depth = 0
        self._string: str | None = None  # what has come of the string that is open
        self._escaped = False
        self._key, self._after_colon = "", False

    @property
    def begun(self) -> bool:
        return self._depth > 0

    def feed(self, character: str) -> None:
        self.raw += character
        if self._key in ("arguments", "parameters") and self._after_colon and (self._depth > 1 or character == "{"):
            self._arguments += character
            self._has_arguments = True
        self._read(character)

    def take(self) -> Iterator[Piece]:
        """What is new: the name first, then the arguments, whatever their order in the text."""
        if not self.name:
            return
        if not self._told:
            self._told = True
            yield CallStart(self.name)
        if self.done and not self._has_arguments:
            self._arguments = "{}"
        if self._arguments:
            yield Arguments(self._arguments)
            self._arguments = ""

    def _read(self, character: str) -> None:
        if self._string is not None:
            self._read_string(character)
        elif character == '"':
            self._string = ""
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.done = self._depth == 0
        elif self._depth == 1 and character in ":,":
            self._after_colon = character == ":"

    def _read_string(self, character: str) -> None:
        assert self._string is not None
        if character == '"' and not self._escaped:
            if self._depth == 1:
                self._end_string(self._string)
            self._string = None
            return
        self._escaped = character == "\\" and not self._escaped
        self._string += character

    def _end_string(self, text: str) -> None:
        try:
            value = str(json.loads(f'"{text}"'))
        except ValueError:
            value = ""
        if not self._after_colon:
            self._key = value
        elif self._key == "name" and not self.name:
            self.name = value


class ToolParser(ABC):
    """Splits a text into what is said and what is called. A call that turns out to have no name is said."""

    def __init__(self) -> None:
        self._text = ""  # not yet understood
        self._reader: CallReader | None = None
        self._called = False

    def feed(self, text: str) -> list[Piece]:
        """What the next part of the text adds."""
        self._text += text
        pieces: list[Piece] = []
        before: tuple[int, CallReader | None] | None = None
        while self._text and before != (len(self._text), self._reader):
            before = len(self._text), self._reader
            pieces += self._read_call(self._reader) if self._reader else self._read_text()
        return pieces

    def finish(self) -> list[Piece]:
        """What is left when the text has ended."""
        left = self._left()
        if self._reader is not None:
            left = "" if self._reader.name else self._reader.raw
        self._text, self._reader = "", None
        return [Content(left)] if left else []

    def _read_call(self, reader: CallReader) -> Iterator[Piece]:
        for i, character in enumerate(self._text):
            if not reader.begun and character not in _SPACE + "{":
                self._text, self._reader = self._text[i:], None
                yield Content(reader.raw)
                return
            reader.feed(character)
            if reader.done:
                self._text, self._reader = self._text[i + 1 :], None
                self._called |= bool(reader.name)
                self._end_call(bool(reader.name))
                if not reader.name:
                    yield Content(reader.raw)
                break
        else:
            self._text = ""
        yield from reader.take()

    @abstractmethod
    def _read_text(self) -> Iterator[Piece]:
        """Take from ``_text`` what is said, as far as that is certain, and begin the next call."""

    @abstractmethod
    def _end_call(self, named: bool) -> None:
        """An object has been read to its end."""

    @abstractmethod
    def _left(self) -> str:
        """What of ``_text`` is said, now that nothing follows."""


class HermesParser(ToolParser):
    """<tool_call>{...}</tool_call> anywhere in the text; spaces before a call are no part of what is said."""

    OPENING, CLOSING = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        super().__init__()
        self._closing = False  # a call has ended, and its tag may follow

    def _read_text(self) -> Iterator[Piece]:
        if self._closing:
            text = self._text.lstrip(_SPACE)
            if len(text) < len(self.CLOSING) and self.CLOSING.startswith(text):
                return
            self._text, self._closing = text.removeprefix(self.CLOSING), False
        text, found, rest = self._text.partition(self.OPENING)
        if found:
            self._text, self._reader = rest, CallReader(found)
        else:
            text = _without_beginning_of(self.OPENING, text)
        said = text.rstrip(_SPACE)
        if not found:
            self._text = self._text[len(said) :]
        if said:
            yield Content(said)

    def _end_call(self, named: bool) -> None:
        self._closing = named

    def _left(self) -> str:
        return "" if self._closing or (self._called and self._text.isspace()) else self._text


class JsonParser(ToolParser):
    """Objects alone, apart from spaces and ``between``; a text that begins otherwise is said from there on."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self._between = _SPACE + between
        self._said = False

    def _read_text(self) -> Iterator[Piece]:
        text = self._text if self._said else self._text.lstrip(self._between).removeprefix(PYTHON_TAG).lstrip(self._between)
        if not self._said and text.startswith("{"):
            self._text, self._reader = text, CallReader(self._text[: -len(text)])
        elif self._said or not PYTHON_TAG.startswith(text):
            self._said = True
            text, self._text = self._text, ""
            yield Content(text)

    def _end_call(self, named: bool) -> None:
        self._said = not named

    def _left(self) -> str:
        return self._text.strip(self._between) if self._called else self._text


class NamedParser(ToolParser):
    """The text is the arguments of one call, whose name is known."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _read_text(self) -> Iterator[Piece]:
        if not self._called:
            self._called = True
            yield CallStart(self._name)
        text, self._text = self._text, ""
        yield Arguments(text)

    def _end_call(self, named: bool) -> None:
        raise AssertionError("no call is read")

    def _left(self) -> str:
        return ""


def _without_beginning_of(tag: str, text: str) -> str:
    """``text`` without the longest end of it that ``tag`` could begin with."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return text[:-length]
    return text


PARSERS: dict[ToolFormat, Callable[[], ToolParser]] = {"hermes": HermesParser, "llama3_json": lambda: JsonParser(";")}

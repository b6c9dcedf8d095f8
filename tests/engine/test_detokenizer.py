"""Text as it streams: whole characters only, stop strings held back until they are ruled out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.detokenizer import Detokenizer
from tests.engine.engines import EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()


def stream(
    tokens: list[int], stop: tuple[str, ...] = (), include: bool = False, prompt: tuple[int, ...] = (), min_tokens: int = 0
) -> tuple[list[str], list[str], str | None]:
    """Pieces, what was shown after each token, and the stop string that ended it."""
    detokenizer = Detokenizer(TOKENIZER.backend_tokenizer, list(prompt), stop, include)
    pieces, shown = [], []
    for i, token in enumerate(tokens):
        piece, stopped = detokenizer.add(token, i + 1 >= min_tokens, ends=False)
        pieces.append(piece)
        shown.append(detokenizer.show(finished=stopped is not None or i + 1 == len(tokens)))
        if stopped is not None:
            return pieces, shown, stopped
    return pieces, shown, None


def test_characters_of_several_bytes_come_whole() -> None:
    text = "a é 日本 🙂!"
    pieces, shown, _ = stream(list(text.encode()))
    assert "".join(pieces) == "".join(shown) == text
    assert [piece for piece in pieces if piece] == list(text)
    assert pieces[2:4] == ["", "é"]


@given(st.text(max_size=20), st.text(alphabet="ab é🙂", max_size=12))
def test_any_text_after_any_prompt(prompt: str, text: str) -> None:
    pieces, shown, _ = stream(list(text.encode()), prompt=tuple(prompt.encode()))
    assert "".join(pieces) == "".join(shown) == text


@given(st.lists(st.integers(0, EOS), max_size=30), st.lists(st.integers(0, EOS), max_size=12))
def test_any_bytes_after_any_bytes_never_raise(tokens: list[int], prompt: list[int]) -> None:
    """Models generate invalid UTF-8 too, and prompts may end within a character."""
    pieces, shown, _ = stream(tokens, prompt=tuple(prompt))
    assert "".join(pieces) == "".join(shown)


@given(st.lists(st.integers(0, 255), max_size=30))
def test_invalid_bytes_become_what_decoding_at_once_makes_of_them(tokens: list[int]) -> None:
    tokens = [*tokens, *b" end"]
    pieces, _, _ = stream(tokens)
    assert "".join(pieces) == bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_is_shown_as_stop_strings_are(include: bool) -> None:
    detokenizer = Detokenizer(TOKENIZER.backend_tokenizer, [], ("ab",), include)
    assert detokenizer.add(97, True, ends=False) == ("a", None)
    assert detokenizer.add(98, True, ends=True)[0] == "b"
    assert detokenizer.show(finished=True) == ("ab" if include else "a")


def test_special_tokens_have_no_text() -> None:
    assert "".join(stream([65, EOS, 66])[0]) == "AB"


@given(st.text(alphabet="ab", max_size=14), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_stop_strings_against_searching_the_whole_text(text: str, stop: list[str], include: bool) -> None:
    _, shown, stopped = stream(list(text.encode()), tuple(stop), include)
    ends = [(text.find(one) + len(one), text.find(one), one) for one in stop if one in text]
    if not ends:
        assert stopped is None
        assert "".join(shown) == text
        return
    first_end = min(end for end, _, _ in ends)  # the token that completes a stop string ends the request
    start, which = min((text[:first_end].find(one), one) for one in stop if one in text[:first_end])
    assert stopped == which
    assert "".join(shown) == text[: start + len(which) * include]


@given(st.text(alphabet="ab", max_size=14), st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=3))
def test_what_was_shown_is_never_taken_back(text: str, stop: list[str]) -> None:
    """At every point the shown text is a beginning of the final text, and no more is held back than a stop string could need."""
    pieces, shown, _ = stream(list(text.encode()), tuple(stop))
    final = "".join(shown)
    longest = max(map(len, stop))
    for i in range(len(shown)):
        so_far = "".join(shown[: i + 1])
        assert final.startswith(so_far)
        assert len(so_far) >= min(len("".join(pieces[: i + 1])) - longest + 1, len(final))


def test_a_stop_string_across_tokens_and_characters() -> None:
    _, shown, stopped = stream(list("price: 5 €, then".encode()), ("€,",))
    assert stopped == "€,"
    assert "".join(shown) == "price: 5 "


def test_no_stop_before_min_tokens() -> None:
    """A stop string completed too early does not count, neither then nor later."""
    _, shown, stopped = stream(list(b"ab ab ab"), ("ab",), min_tokens=3)
    assert stopped == "ab"
    assert "".join(shown) == "ab "
    _, shown, stopped = stream(list(b"ab......"), ("ab", "xxxxxxxxx"), min_tokens=3)
    assert stopped is None
    assert "".join(shown) == "ab......"


@pytest.mark.parametrize("prompt", ["", "Hello", "x" * 50, "日本"])
def test_a_leading_space_is_kept(prompt: str) -> None:
    assert "".join(stream(list(b" world"), prompt=tuple(prompt.encode()))[0]) == " world"

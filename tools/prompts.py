"""Prompt files: JSON lines with ``turns``, ``messages`` or ``prompt``."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


class PromptError(ValueError):
    """A prompt file cannot be used: one sentence with the line and what was expected."""


def read_prompts(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, limit: int | None = None, all_turns: bool = False
) -> list[list[int]]:
    """Token ids of the first ``limit`` prompts of ``path``.

    ``turns`` gives its first turn, or every turn as a prompt of its own with ``all_turns``; turns and ``messages`` go through the chat
    template with the generation prompt where the tokenizer has one, and are joined by newlines where it has none. ``prompt`` is
    taken as it is.
    """
    path = _existing(path)
    texts = list(islice(_texts(path, tokenizer, all_turns), limit))
    if not texts:
        raise PromptError(f"The prompt file {path} is empty: expected JSON lines with 'turns', 'messages' or 'prompt'.")
    encoded = {}
    for rendered in (True, False):  # one call each: a call costs more than a prompt
        part = [text for text, was_rendered in texts if was_rendered is rendered]
        encoded[rendered] = iter(tokenizer(part, add_special_tokens=not rendered, verbose=False).input_ids if part else [])
    return [next(encoded[rendered]) for _, rendered in texts]


def shared_passages(first: Path, second: Path, words: int = 13) -> list[tuple[int, int]]:
    """Pairs of line numbers whose prompts have ``words`` consecutive words in common, or are the same; one pair for a line of ``first``."""
    known: dict[str, int] = {}
    for number, text in reversed(_contents(second)):
        known |= dict.fromkeys(_passages(text, words), number)
    pairs = [(number, [known[passage] for passage in _passages(text, words) if passage in known]) for number, text in _contents(first)]
    return [(number, found[0]) for number, found in pairs if found]


def _passages(text: str, words: int) -> list[str]:
    found = re.findall(r"\w+", text.lower())
    return [" ".join(found[i : i + words]) for i in range(max(1, len(found) - words + 1))]


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise PromptError(f"There is no prompt file at {path}: expected JSON lines with 'turns', 'messages' or 'prompt'.")
    return path


def _no_prompt(number: int, path: Path, error: Exception) -> PromptError:
    return PromptError(
        f"Line {number} of {path} is no prompt ({error}): expected a JSON object with 'turns' (list of strings), "
        "'messages' (list of role and content) or 'prompt' (string)."
    )


def _contents(path: Path) -> list[tuple[int, str]]:
    """Line numbers and all that the user says there."""
    contents = []
    for number, line in enumerate(_existing(path).read_text(encoding="utf-8").split("\n"), start=1):
        try:
            record = json.loads(line) if line.strip() else {}
            said = [message["content"] for message in record.get("messages", ()) if message.get("role") == "user"]
            text = "\n".join([*record.get("turns", ()), *said, record.get("prompt", "")])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _no_prompt(number, path, error) from None
        if text.strip():
            contents.append((number, text))
    return contents


def _texts(path: Path, tokenizer: PreTrainedTokenizerBase, all_turns: bool) -> Iterator[tuple[str, bool]]:
    """Every prompt's text, and whether the chat template made it (and with it the special tokens)."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield from _render(json.loads(line), tokenizer, all_turns)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise _no_prompt(number, path, error) from None


def _render(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, all_turns: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(record.get("prompt"), str):
        yield record["prompt"], False
    elif record.get("messages"):
        yield _render_chat(record["messages"], tokenizer)
    elif record.get("turns"):
        for turn in record["turns"] if all_turns else record["turns"][:1]:
            yield _render_chat([{"role": "user", "content": turn}], tokenizer)
    else:
        raise KeyError(f"keys {', '.join(record)}")


def _render_chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    contents = [message["content"] for message in messages]
    if not all(isinstance(content, str) for content in contents):
        raise TypeError("a turn is no string")
    if tokenizer.chat_template is None:
        return "\n".join(contents), False
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), True

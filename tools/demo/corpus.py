"""The text that the demo target learns from.

Only text whose licence allows shipping weights without conditions is read: public-domain children's books, CC BY African
Storybook, TinyStories, GSM8K train, permissively licensed Python, hand-written instruction seeds.
"""

import ast
import gzip
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Document:
    """A training text: raw ``text``, or a ``messages`` conversation that the chat template renders."""

    domain: str
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def prompt(self) -> str | None:
        """The user's first message, None for raw text."""
        return self.messages[0][1] if self.messages else None

    def is_held_out(self) -> bool:
        """One document in fifty, chosen by its content, is never trained on."""
        key = self.text or self.messages[0][1]
        return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 50 == 0


@dataclass(frozen=True)
class Source:
    """One part of the mix. ``passes``: how often it is read while the whole mix is read once."""

    domain: str
    file: str
    passes: float
    documents: Callable[[dict], Iterator[Document]]


def _rows(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _chat(domain: str, user: str, assistant: str) -> Document:
    return Document(domain, messages=(("user", user), ("assistant", assistant)))


def _stories(row: dict) -> Iterator[Document]:
    """Each story as it is, and as the answer to its own first sentence."""
    text = row["text"].strip()
    yield Document("stories", text)
    opening = re.match(r".{20,160}?[.!?\"](?=\s)", text, re.DOTALL)
    if opening:
        yield _chat("stories", f"Write a story that begins like this: {opening.group(0)}", text)


def _books(row: dict) -> Iterator[Document]:
    if row["audience"] == "children":
        yield Document("books", row["text"].strip())


def _gsm8k(row: dict) -> Iterator[Document]:
    yield _chat("math", row["question"].strip(), row["answer_plain"].strip())


def _seeds(row: dict) -> Iterator[Document]:
    yield Document("instructions", messages=tuple((m["role"], m["content"]) for m in row["messages"]))


def _python_files(row: dict) -> Iterator[Document]:
    if len(row["text"]) < 20_000:
        yield Document("python", row["text"].strip())


def _python_functions(row: dict) -> Iterator[Document]:
    """Signature and docstring as the question, body as the answer."""
    lines = row["text"].splitlines()
    for node in ast.walk(ast.parse(row["text"])):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not ast.get_docstring(node):
            continue
        docstring_end = node.body[0].end_lineno or node.lineno
        head = "\n".join(lines[node.lineno - 1 : docstring_end])
        body = "\n".join(lines[docstring_end : node.end_lineno])
        if 80 < len(head) < 1200 and 20 < len(body) < 1500:
            indent = " " * node.col_offset
            yield _chat("functions", _dedent(head, indent), _dedent(body, indent).strip("\n"))


def _dedent(code: str, indent: str) -> str:
    return "\n".join(line.removeprefix(indent) for line in code.splitlines())


SOURCES = (
    Source("stories", "tinystories_sample.jsonl.gz", 1.0, _stories),
    Source("stories", "stories_african_storybook.jsonl.gz", 1.0, _stories),
    Source("books", "books_standardebooks.jsonl.gz", 0.1, _books),
    Source("math", "gsm8k_train.jsonl.gz", 2.0, _gsm8k),
    Source("python", "python_permissive.jsonl.gz", 0.3, _python_files),
    Source("functions", "python_permissive.jsonl.gz", 2.0, _python_functions),
    Source("instructions", "instruct_seed_tasks.jsonl.gz", 2.0, _seeds),
)


def load(corpus: Path, seed: int) -> tuple[list[Document], list[Document]]:
    """Return the shuffled training mix (documents repeated by ``passes``) and the held-out documents."""
    rng = random.Random(seed)
    train: list[Document] = []
    held_out: list[Document] = []
    for source in SOURCES:
        path = corpus / source.file
        if not path.exists():
            raise FileNotFoundError(f"corpus file {path} is missing: expected the files {sorted({s.file for s in SOURCES})}")
        documents = [document for row in _rows(path) for document in source.documents(row)]
        kept = [document for document in documents if not document.is_held_out()]
        held_out += [document for document in documents if document.is_held_out()]
        whole, part = divmod(source.passes, 1)
        train += kept * int(whole) + rng.sample(kept, int(part * len(kept)))
    rng.shuffle(train)
    return train, held_out

"""From prompts to training batches: the target's own answers, cached on disk, then padded rows of similar length."""

import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from server.engine.engine import Engine
from server.engine.types import SamplingParams
from tools.train_vsd.generate import complete


@dataclass(frozen=True)
class AnswerSettings:
    """How the target answers: every second prompt greedily, the others at ``temperature``."""

    max_tokens: int = 200
    temperature: float = 1.0
    seed: int = 0

    def sampling(self, index: int) -> SamplingParams:
        """Options for the prompt at ``index``."""
        temperature = 0.0 if index % 2 == 0 else self.temperature
        return SamplingParams(max_tokens=self.max_tokens, temperature=temperature, seed=self.seed + index)


class Row(NamedTuple):
    """One prompt and the target's answer to it, as token ids. ``temperature`` and ``seed``: what the answer was drawn with, which is
    also how its text will be verified; seed None where the noise is not known."""

    prompt: list[int]
    answer: list[int]
    temperature: float = 0.0
    seed: int | None = None


class Batch(NamedTuple):
    """Rows padded on the right. Chain (b, a) is a draft that starts from the true feature at token ``first[b] + a``.

    Chain a of a row begins where serving would after the answer's token a: its step k proposes the token at first + a + k + 2, and
    is compared with the target's distribution at ``first + a + k + 1``. Chains with a + k >= chains have run past the answer.
    """

    tokens: Tensor  # int64 [B, T]
    first: Tensor  # int64 [B], index of the prompt's last token
    chains: Tensor  # int64 [B], how many: length of the answer - 1
    temperature: Tensor  # float32 [B], 0 for greedy rows
    seed: Tensor  # int64 [B], of the noise that sampled rows were drawn with

    def divisor(self, greedy: float = 1.0) -> Tensor:
        """What logits are divided by, float32 [B]: the temperature; ``greedy`` for greedy rows."""
        return torch.where(self.temperature > 0, self.temperature, greedy)

    def starts(self) -> Tensor:
        """Index of the true feature that each chain starts from, clamped to the row, [B, A]."""
        ahead = torch.arange(int(self.chains.max()), device=self.tokens.device)
        return (self.first[:, None] + ahead).clamp(max=self.tokens.shape[1] - 2)

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))


def is_held_out(prompt: Sequence[int]) -> bool:
    """One prompt in twenty, chosen by its content alone, is never trained on."""
    return hashlib.sha256(json.dumps(list(prompt)).encode()).digest()[0] * 20 < 256


def weights_identity(target: str | Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of change of the target's weight files; cheap for any size."""
    files = sorted(Path(target).glob("*.safetensors"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def answers_path(folder: Path, target: str | Path, prompts: Sequence[Sequence[int]], settings: AnswerSettings) -> Path:
    """Where the answers of this target to these prompts under these settings are kept."""
    key = [str(target), weights_identity(target), list(map(list, prompts)), asdict(settings)]
    return folder / f"answers-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.jsonl"


def read_answers(path: Path) -> dict[int, list[int]]:
    """Answers by index of their prompt. A last line cut short by an interruption is left out."""
    answers: dict[int, list[int]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                answers[record["index"]] = record["answer"]
    return answers


def write_answers(
    path: Path, engine: Engine, prompts: Sequence[list[int]], settings: AnswerSettings, in_flight: int, minutes: float | None = None
) -> dict[int, list[int]]:
    """Answers to all ``prompts``, or to as many as ``minutes`` allow; those that ``path`` has already are not made again."""
    answers = read_answers(path)
    todo = [i for i in range(len(prompts)) if i not in answers]
    requests = [(prompts[i], settings.sampling(i)) for i in todo]
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(_line(i, answer) for i, answer in answers.items()), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(prompts), initial=len(answers), desc="answers", mininterval=2) as bar:
        tokens, start = 0, time.monotonic()
        for completion in complete(engine, requests, in_flight, deadline):
            index = todo[completion.index]
            answers[index] = completion.token_ids
            file.write(_line(index, completion.token_ids))
            tokens += len(completion.token_ids)
            bar.set_postfix({"tokens/s": round(tokens / (time.monotonic() - start))}, refresh=False)
            bar.update()
    return answers


def _line(index: int, answer: list[int]) -> str:
    return json.dumps({"index": index, "answer": answer}) + "\n"


def split_rows(prompts: Sequence[list[int]], answers: dict[int, list[int]], settings: AnswerSettings) -> tuple[list[Row], list[Row]]:
    """(rows to train on, held-out rows). An answer of one token says nothing about drafting and is left out."""
    drawn = {i: settings.sampling(i) for i in answers}
    rows = [Row(prompts[i], answers[i], drawn[i].temperature, drawn[i].seed) for i in sorted(answers) if len(answers[i]) >= 2]
    return [row for row in rows if not is_held_out(row.prompt)], [row for row in rows if is_held_out(row.prompt)]


def collate(rows: Sequence[Row]) -> Batch:
    """Rows as one batch, padded with token 0."""
    sequences = [torch.tensor(row.prompt + row.answer) for row in rows]
    return Batch(
        tokens=torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True),
        first=torch.tensor([len(row.prompt) - 1 for row in rows]),
        chains=torch.tensor([len(row.answer) - 1 for row in rows]),
        temperature=torch.tensor([row.temperature for row in rows], dtype=torch.float32),
        seed=torch.tensor([row.seed or 0 for row in rows]),
    )


class Batches:
    """Endless batches of at most about ``tokens`` padded tokens, in a fresh random order each pass over ``rows``.

    Within a pool of 512 rows, rows of similar answer length go together: answers cost most, and padding them is waste. The order is a
    function of ``seed`` and the pass alone, so that ``passes`` and ``position`` say where to go on.
    """

    def __init__(self, rows: Sequence[Row], tokens: int, seed: int, passes: int = 0, position: int = 0) -> None:
        self.rows, self.tokens, self.seed, self.passes, self.position = rows, tokens, seed, passes, position
        self._groups = self._shuffled()

    def _shuffled(self) -> list[list[Row]]:
        rng = random.Random(f"{self.seed}/{self.passes}")
        order = rng.sample(self.rows, len(self.rows))
        groups: list[list[Row]] = []
        for start in range(0, len(order), 512):
            pool = sorted(order[start : start + 512], key=lambda row: (len(row.answer) // 16, len(row.prompt)))
            groups += grouped(pool, self.tokens)
        rng.shuffle(groups)
        return groups

    def __next__(self) -> Batch:
        if self.position == len(self._groups):
            self.passes, self.position = self.passes + 1, 0
            self._groups = self._shuffled()
        self.position += 1
        return collate(self._groups[self.position - 1])


def grouped(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """Consecutive rows in groups whose padded size stays within ``tokens``; a longer row is a group of its own."""
    groups: list[list[Row]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.prompt) + len(row.answer))
        if not groups or longest * (len(groups[-1]) + 1) > tokens:
            groups.append([])
            longest = len(row.prompt) + len(row.answer)
        groups[-1].append(row)
    return groups

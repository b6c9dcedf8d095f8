"""Prompts, answers on disk, batches."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tools.prompts import PromptError, read_prompts
from tools.train_vsd.data import (
    AnswerSettings,
    Batches,
    Row,
    answers_path,
    collate,
    grouped,
    is_held_out,
    read_answers,
    split_rows,
)

WORDS = ["<unk>", "user", ":", "assistant", "one", "two", "three"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    turns = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant :{% endif %}"
    return tokenizer


def words(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_three_kinds_of_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(
        tmp_path / "prompts.jsonl",
        {"turns": ["one", "two"]},
        {"prompt": "one two"},
        {"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "one"}]},
    )
    read = [words(ids) for ids in read_prompts(path, tokenizer)]
    assert read == ["user : one assistant :", "one two", "user : three assistant : two user : one assistant :"]
    assert [words(ids) for ids in read_prompts(path, tokenizer, 2, all_turns=True)] == ["user : one assistant :", "user : two assistant :"]
    tokenizer.chat_template = None
    assert [words(ids) for ids in read_prompts(path, tokenizer, 1)] == ["one"]


@pytest.mark.parametrize("record", [{"text": "one"}, {"turns": []}, {"turns": [1]}, ["one"], {"messages": ["one"]}])
def test_a_line_that_is_no_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, record: object) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prompt": "one"}, record)
    with pytest.raises(PromptError, match=r"Line 2 of .* is no prompt"):
        read_prompts(path, tokenizer)


def test_no_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PromptError, match="no prompt file"):
        read_prompts(tmp_path / "prompts.jsonl", tokenizer)
    with pytest.raises(PromptError, match="is empty"):
        read_prompts(write(tmp_path / "prompts.jsonl"), tokenizer)


def test_the_answers_file_is_named_by_what_made_it(tmp_path: Path) -> None:
    def name(**changes: object) -> str:
        given = {"target": tmp_path, "prompts": [[1, 2], [3]], "settings": AnswerSettings()} | changes
        return answers_path(tmp_path, **given).name

    assert name() == name()
    assert len({name(), name(prompts=[[1, 2]]), name(settings=AnswerSettings(seed=1)), name(target=tmp_path / "other")}) == 4
    before = name()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert name() != before


def test_answers_cut_short_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"index": 3, "answer": [1, 2]}\n{"index": 4, "answer": [1, 2, 3')
    assert read_answers(path) == {3: [1, 2]}
    assert read_answers(tmp_path / "none.jsonl") == {}


def test_half_of_the_answers_are_greedy() -> None:
    settings = AnswerSettings(temperature=0.7, seed=5)
    assert [settings.sampling(i).temperature for i in range(4)] == [0.0, 0.7, 0.0, 0.7]
    assert settings.sampling(1).seed != settings.sampling(2).seed


def test_split_by_content() -> None:
    prompts = [[i % 900, i + 1] if i < 900 else [i - 900, i - 899] for i in range(1000)]  # the last hundred come again
    settings = AnswerSettings(temperature=0.7, seed=5)
    trained, held_out = split_rows(prompts, {i: [1, 2, i] for i in range(1000)}, settings)
    assert 20 < len(held_out) < 100
    assert len(trained) + len(held_out) == 1000
    assert all(is_held_out(row.prompt) for row in held_out)
    assert not {tuple(row.prompt) for row in trained} & {tuple(row.prompt) for row in held_out}
    for row in (*trained, *held_out):
        drawn = settings.sampling(row.answer[2])
        assert (row.prompt, row.temperature, row.seed) == (prompts[row.answer[2]], drawn.temperature, drawn.seed)
    assert split_rows(prompts, {0: [1]}, settings) == ([], [])


def test_collate() -> None:
    batch = collate([Row([1, 2, 3], [4, 5, 6]), Row([7], [8, 9], 0.5, 2**40)])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]]
    assert batch.first.tolist() == [2, 0]
    assert batch.chains.tolist() == [2, 1]
    assert batch.starts().tolist() == [[2, 3], [0, 1]]
    assert batch.temperature.tolist() == [0.0, 0.5]
    assert batch.divisor().tolist() == [1.0, 0.5]
    assert batch.seed.tolist() == [0, 2**40]


def test_batches_cover_every_row_once_a_pass_within_the_budget() -> None:
    rows = [Row([i] * (1 + i % 40), [i] * (2 + i % 13)) for i in range(300)]
    source, seen = Batches(rows, 200, seed=3), torch.zeros(300)
    sizes = []
    while (seen < 1).any():
        batch = next(source)
        sizes.append(batch.tokens.numel())
        seen[batch.tokens[:, 0]] += 1
    assert seen.max() == 1
    assert max(sizes) <= 200


def test_the_order_is_a_function_of_the_seed_alone() -> None:
    rows = [Row([i] * (1 + i % 40), [i] * (2 + i % 13)) for i in range(300)]

    def order(source: Batches, count: int) -> list[list[int]]:
        return [next(source).tokens[:, 0].tolist() for _ in range(count)]

    source = Batches(rows, 2000, seed=3)
    one_pass = len(source._groups)
    whole = order(source, 2 * one_pass + 3)
    assert (source.passes, source.position) == (2, 3)
    random.seed(1)
    torch.manual_seed(1)
    assert order(Batches(rows, 2000, seed=3), len(whole)) == whole
    assert sorted(whole[:one_pass]) != sorted(whole[one_pass : 2 * one_pass]), "every pass has an order of its own"
    assert order(Batches(rows, 2000, seed=4), 3) != whole[:3]
    for done in (1, one_pass, one_pass + 2):  # going on anywhere, the end of a pass included
        source = Batches(rows, 2000, seed=3)
        order(source, done)
        again = Batches(rows, 2000, 3, source.passes, source.position)
        assert order(again, len(whole) - done) == whole[done:]


def test_a_row_longer_than_the_budget_stands_alone() -> None:
    rows = [Row([1] * 50, [2, 3]), Row([1], [2, 3]), Row([1], [2, 3])]
    assert [len(group) for group in grouped(rows, 10)] == [1, 2]

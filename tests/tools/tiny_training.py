"""A random target and head for tests of the trainer, texts that the engine generated with them, and drafting as serving does it."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drafts.eagle3 import Eagle3Head, rotated
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.target import Target
from server.engine.types import SamplingParams
from tests.engine.engines import byte_tokenizer
from tools.train_vsd import calibrate, train
from tools.train_vsd.data import AnswerSettings, Row
from tools.train_vsd.generate import complete
from tools.train_vsd.teacher import Teacher, new_head

VOCAB = 50


def tiny_teacher() -> Teacher:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    return Teacher(LlamaForCausalLM(config))


def tiny_head(teacher: Teacher, draft_vocabulary: list[int] | None = None, temperature_shift: bool = False) -> Eagle3Head:
    """Random weights. ``draft_vocabulary``: target ids in rising order."""
    torch.manual_seed(1)
    head = new_head(teacher.model, torch.ones(3))
    if draft_vocabulary is not None or temperature_shift:
        size = len(draft_vocabulary or range(VOCAB))
        head = Eagle3Head(dataclasses.replace(head.config, draft_vocab_size=size, temperature_shift=temperature_shift))
        head.share_embedding(teacher.model.get_input_embeddings().weight)
        if head.d2t is not None:
            head.d2t.copy_(torch.tensor(draft_vocabulary) - torch.arange(size))
    for weight in head.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.2)
    return head


def engine_rows(teacher: Teacher, requests: list[tuple[list[int], float, int | None, int]]) -> list[Row]:
    """Rows that the engine generates for (prompt, temperature, seed, length)."""
    with teacher.serving():
        engine = Engine(Target(teacher.model, taps=False), None, byte_tokenizer(), EngineConfig(max_num_seqs=4))
        params = [(prompt, SamplingParams(max_tokens=n, temperature=t, seed=seed)) for prompt, t, seed, n in requests]
        answers = {done.index: done.token_ids for done in complete(engine, params, in_flight=4)}
    return [Row(prompt, answers[i], t, seed) for i, (prompt, t, seed, _) in enumerate(requests)]


class Served:
    """A head with a plain growing cache for one sequence."""

    def __init__(self, head: Eagle3Head, temperature: float) -> None:
        self.head, self.condition = head, head.condition(min(temperature, 1.0))
        self.keys, self.values = torch.empty(0), torch.empty(0)

    def row(self, token: int, hidden: Tensor, position: int) -> Tensor:
        @rotated
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys = torch.cat((self.keys.view(-1, *k.shape[1:]), k))
            self.values = torch.cat((self.values.view(-1, *v.shape[1:]), v))
            q, k, v = (x.transpose(0, 1) for x in (q, self.keys, self.values))
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(0, 1)

        angles = self.head.angles(torch.tensor([position]))
        return self.head(self.head.embed(torch.tensor([token])), hidden, angles, attend, self.condition)


@torch.no_grad()
def draft(head: Eagle3Head, teacher: Teacher, committed: list[int], path: list[int], temperature: float) -> tuple[list[Tensor], Tensor]:
    """The head's states while it drafts ``path`` after ``committed``, whose last token's own feature is not known yet, one more than
    the path has tokens; and the target's logits for the same places [len(path) + 1, V], each from a pass over its own prefix alone."""
    root = len(committed) - 1
    served, states = Served(head, temperature), []
    hidden = teacher.model(torch.tensor([committed[:root]]), output_hidden_states=True).hidden_states
    features = head.combine(torch.cat([hidden[i][0] for i in teacher.layers], dim=-1))
    for i in range(root):
        y = served.row(committed[i + 1], features[i : i + 1], i)
    states.append(y[0])
    for k, token in enumerate(path):
        y = served.row(token, y, root + k)
        states.append(y[0])
    logits = [teacher.model(torch.tensor([committed + path[:k]])).logits[0, -1] for k in range(len(path) + 1)]
    return states, torch.stack(logits)


def shrink(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Make ``train`` and ``compare`` small: few answers, short measurements. ``patch``: monkeypatch.setattr, or setattr in a process
    of its own."""
    sizes = {"MEASURED_PROMPTS": 2, "MEASURED_TOKENS": 8, "FITTED_PROMPTS": 3, "PROBED_PROMPTS": 2, "PROBED_TOKENS": 8}
    for name, value in sizes.items():
        patch(train, name, value)
    patch(train, "NODES", (1, 4))
    patch(calibrate, "NODES", (1, 4))
    patch(train, "AnswerSettings", functools.partial(AnswerSettings, max_tokens=20))


def tiny_target(path: Path) -> Path:
    """A target of a few thousand parameters with its tokenizer, saved at ``path``; word w7 is token 7."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2, eos_token_id=0, bos_token_id=None,
        pad_token_id=0,
    )).save_pretrained(path)  # fmt: skip
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0").save_pretrained(path)
    return path


def tiny_prompts(path: Path) -> Path:
    """80 prompts of three words."""
    path.write_text("".join(json.dumps({"prompt": f"w{i % 40} w{i // 40 + 1} w7"}) + "\n" for i in range(80)))
    return path

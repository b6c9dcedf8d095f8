"""What the trained target is like: held-out loss, loops, samples, and the model card that says so."""

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tools.demo.corpus import Document
from tools.loops import repeated_8_grams


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, encoded: list[tuple[str, list[int]]], context: int, per_domain: int = 40) -> dict[str, float]:
    """Nats per token by domain, over the first ``context`` tokens of up to ``per_domain`` documents each."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    seen: Counter[str] = Counter()
    for domain, ids in encoded:
        if seen[domain] == per_domain or len(ids) < 2:
            continue
        seen[domain] += 1
        row = torch.tensor([ids[:context]], device=model.device)
        count = row.shape[1] - 1
        totals[domain][0] += model(input_ids=row, labels=row).loss.item() * count
        totals[domain][1] += count
    return {domain: loss / count for domain, (loss, count) in sorted(totals.items())}


@torch.no_grad()
def greedy_answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
    """Greedy answers to ``prompts`` through the chat template, end tokens included."""
    answers = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        output = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


def write_card(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: list[Document],
    losses: dict[str, float],
    history: list[dict[str, Any]],
) -> None:
    """Write the model card with figures measured on the saved weights. ``history``: tokens, minutes and device of each run."""
    prompts = _prompts_by_domain(held_out, 8)
    rows, samples = [], []
    for domain, texts in prompts.items():
        answers = greedy_answers(model, tokenizer, texts, 160)
        loops = sum(map(repeated_8_grams, answers)) / len(answers)
        ended = sum(answer[-1] in model.generation_config.eos_token_id for answer in answers)
        rows.append(f"| {domain} | {loops:.1%} | {ended}/{len(answers)} |")
        samples.append(f"**{domain}**: `{texts[0][:200]!r}`\n\n```text\n{tokenizer.decode(answers[0], skip_special_tokens=True)}\n```")
    loss_rows = [f"| {domain} | {loss:.3f} | {math.exp(loss):.1f} |" for domain, loss in losses.items()]
    parameters = sum(p.numel() for p in model.parameters())
    path.write_text(
        _CARD.format(
            parameters=parameters / 1e6,
            layers=model.config.num_hidden_layers,
            hidden=model.config.hidden_size,
            vocab=model.config.vocab_size,
            context=model.config.max_position_embeddings,
            runs=", then ".join(f"{run['tokens'] / 1e6:.1f}M tokens in {run['minutes']:.0f} minutes on {run['device']}" for run in history),
            losses="\n".join(loss_rows),
            loops="\n".join(rows),
            samples="\n\n".join(samples),
        ),
        encoding="utf-8",
    )


def _prompts_by_domain(held_out: list[Document], count: int) -> dict[str, list[str]]:
    prompts: dict[str, list[str]] = defaultdict(list)
    for document in held_out:
        if document.prompt and len(prompts[document.domain]) < count and len(document.prompt) < 800:
            prompts[document.domain].append(document.prompt)
    return dict(prompts)


_CARD = """---
license: apache-2.0
language: en
library_name: transformers
---
# vsd-demo target

A Llama of {parameters:.1f}M parameters ({layers} layers, hidden size {hidden}, {vocab} tokens, context {context}) trained from scratch by
`python -m tools.demo`, so that the server can be tried and tested without downloading anything. It tells simple stories, imitates
grade-school arithmetic and writes Python-like text. It is a test model: it knows nothing, its arithmetic is wrong, and how often its
greedy text loops is measured below.

**Why this shape.** At this size a layer costs its fixed overhead and not its weights, and an EAGLE-3 draft head costs about one
layer a draft level. A deep, narrow model therefore has the ratio of target cost to draft cost that large models have.

## Training
{runs}.

Muon for matrices, AdamW for the rest; saved as bfloat16. The command with more minutes, on a GPU, or with `--continue-from`, gives a
better one.

Data and licences: Standard Ebooks children's books (public domain, CC0), African Storybook (CC BY), TinyStories (CDLA-Sharing-1.0,
no condition on models), GSM8K train (MIT), Python source of TheAlgorithms/Python, keon/algorithms, rich, more-itertools (MIT),
networkx, click, werkzeug (BSD-3-Clause), self-instruct seed tasks (Apache-2.0). No share-alike and no non-commercial text. One
document in fifty, chosen by a hash of its content, was held out.

## Held-out loss (float32 arithmetic on the saved weights)

| domain | nats per token | perplexity |
|---|---|---|
{losses}

## Greedy answers to held-out prompts, up to 160 tokens

| domain | repeated 8-grams | ended by themselves |
|---|---|---|
{loops}

## Samples (greedy)

{samples}
"""

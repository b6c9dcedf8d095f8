"""What a training run leaves to read: the model card beside the head, and the pictures of runs and comparisons."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.eagle3 import Eagle3Head, HeadMetadata
from tools.train_vsd import plots
from tools.train_vsd.m_step import DECAY, VsdSettings
from tools.train_vsd.trainer import TrainSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = "report"  # the folder of the pictures, beside the text that shows them


def write_card(
    path: Path, head: Eagle3Head, settings: TrainSettings, target: str, prompts: Path, data: Mapping[str, int],
    evaluations: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, float]],
) -> None:  # fmt: skip
    """Write README.md and its pictures into ``path``.

    ``data``: ``rows``, answer ``tokens``, ``steps_done`` and ``seconds`` of the training. ``evaluations``: ``evaluate``'s figures, one
    per temperature. ``history``: that of the ``Run``.
    """
    assert head.metadata is not None
    with prompts.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    pictures = _pictures(path, lambda: plots.run_figures(evaluations, history))
    (path / "README.md").write_text(_CARD.format(
        target=Path(target).name if Path(target).is_dir() else target, metadata=head.metadata, prompts=prompts.name, digest=digest,
        parameters=sum(p.numel() for p in head.parameters()) / 1e6, objective=_objective(settings), budget=_budget(settings),
        kept=_kept(history), seed=settings.seed, depth=settings.depth, tree=evaluations[0]["tree"],
        agreement=_agreement(head.metadata, settings.depth), lengths=_lengths(evaluations), calibration=_calibration(head.metadata),
        pictures=pictures and f"{pictures}\n", shift=_SHIFT if head.config.temperature_shift else "", **data,
    ), encoding="utf-8")  # fmt: skip


def write_comparison(output: Path) -> str:
    """Draw the pictures of the comparison in ``output``, which holds its compare.json; returns the Markdown that shows them."""
    found = json.loads((output / "compare.json").read_text(encoding="utf-8"))
    return _pictures(output, lambda: plots.comparison_figures(found["summary"], found["arms"]))


def _pictures(folder: Path, draw: Callable[[], Mapping[str, "Figure"]]) -> str:
    """Save what ``draw`` returns; Markdown for a text in ``folder``, empty without matplotlib."""
    files = plots.save(folder / PICTURES, draw)
    return "".join(f"![{file.stem.replace('_', ' ').capitalize()}]({PICTURES}/{file.name})\n" for file in files)


def _objective(settings: TrainSettings) -> str:
    """The objective with its weights, and which paths it was trained on."""
    steps = f"step k weighs {DECAY:g}^k"
    weights = {
        "eagle3": steps,
        "lk": steps,
        "vat": f"steps weigh 1 before a path's first rejection and {DECAY:g}^k from there on",
        "vsd": _vsd_weights(settings.vsd),
    }[settings.objective]
    paths = "the target's own text"
    if settings.anchors:
        paths += (
            f", and {settings.vsd.paths} drafts from each of {settings.anchors} anchors a row, verified by the law `{settings.vsd.law}`"
        )
    return f"Objective `{settings.objective}`: {weights}. Paths: {paths}." + (_READING if settings.objective == "vsd" else "")


def _vsd_weights(vsd: VsdSettings) -> str:
    return (
        f"coverage by S = {vsd.paths} paths, ARW {'on' if vsd.arw else 'off'}, CAR {vsd.car:g}, survival {vsd.survival:g}, "
        f"anchor {vsd.anchor:g}"
    )


def _budget(settings: TrainSettings) -> str:
    budget = f"{settings.minutes:.3g} minutes" if settings.minutes is not None else f"{settings.steps} steps"
    return f"{budget}, {settings.accumulate} x {settings.batch_tokens} padded tokens a step"


def _kept(history: Sequence[Mapping[str, float]]) -> str:
    """Which of the heads measured while training is the one in the folder."""
    lengths = [[value for name, value in record.items() if name.startswith("tau_")] for record in history]
    if not any(lengths):
        return ""
    best = max(range(len(history)), key=lambda i: (sum(lengths[i]), i))
    record = history[best]
    return (
        f" The head is the best of {len(history)} measured on the way, that of step {record['step']:.0f} ({record['elapsed']:.0f} seconds)."
    )


def _agreement(metadata: HeadMetadata, depth: int) -> str:
    found = metadata.held_out
    return "\n".join(f"| {k} | {found[f'accuracy_{k}']:.1%} | {found[f'overlap_{k}']:.1%} |" for k in range(1, depth + 1))


def _lengths(evaluations: Sequence[Mapping[str, Any]]) -> str:
    row = (
        "| {temperature:g} | {acceptance_length:.2f} | {acceptance_length_ci95[0]:.2f} to {acceptance_length_ci95[1]:.2f} | "
        "{acceptance_length_per_prompt_mean:.2f} | {num_prompts} | {repeated_8_grams:.1%} |"
    )
    return "\n".join(row.format(**evaluation) for evaluation in evaluations)


def _calibration(metadata: HeadMetadata) -> str:
    rows = [f"| {temperature:g} | {', '.join(f'{sigma:.2f}' for sigma in sigmas)} |" for temperature, sigmas in metadata.draft_temperature]
    lengths = ", ".join(f"{length:.2f} with {nodes}" for nodes, length in metadata.acceptance_length.items())
    table = "\n".join(("| temperature | draft temperature of level 1, 2, ... |", "|---|---|", *rows))
    return f"{table}\n\nAcceptance length at temperature 0 by tree nodes: {lengths}."


_READING = """
ARW and CAR are this project's reading of Zou et al., "Variational Speculative Decoding" (arXiv 2602.05774), not that paper's own
formulas or code: results here say nothing about results there."""

_SHIFT = " This head knows the request's temperature and other servers do not: they get it as it is at temperature 0."

_CARD = """---
library_name: vsd-serve
tags: [speculative-decoding, eagle3]
---
# EAGLE-3 draft head for {target}

{parameters:.1f}M parameters, in the SpecForge layout (`config.json`, `model.safetensors`); the input embedding is the target's.
Made by `python -m tools.train_vsd train`. It speeds up its target and changes nothing of what the target generates.

| made for | |
|---|---|
| target | {target} |
| target architecture (sha256) | `{metadata.target_hash}` |
| tokenizer (sha256) | `{metadata.tokenizer_hash}` |

## Training

{objective}

Budget: {budget}; {depth} unrolled steps, seed {seed}. {steps_done} steps in {seconds} seconds on {rows} rows
({tokens} answer tokens).{kept}

Data: text generated by the target, half of it greedily, from the prompts of `{prompts}` (sha256 `{digest}`);
the prompts' own terms apply to it. One prompt in twenty, chosen by a hash of its content, was held out.

## Held-out agreement with the target, by draft step

| step | first choice agrees | overlap of the distributions |
|---|---|---|
{agreement}

## Held-out acceptance length

Tokens per verification, bonus token counted, with trees of {tree[nodes]} nodes, depth {tree[depth]}, top {tree[topk]}. Repeated 8-grams are
the share of looping text, which is easy to draft.

| temperature | pooled | 95 % interval | mean over prompts | prompts | repeated 8-grams |
|---|---|---|---|---|---|
{lengths}

{pictures}## Calibration

{calibration}

## Serving

TARGET is the target, HEAD this directory, DIR an export of it:

```bash
python -m server TARGET --draft HEAD

python -m tools.train_vsd export --draft HEAD --format sglang --output DIR   # or eagle, or speculators with --target TARGET
vllm serve TARGET --speculative-config '{{"method": "eagle3", "model": "DIR", "num_speculative_tokens": {depth}}}'
python -m sglang.launch_server --model-path TARGET --speculative-algorithm EAGLE3 --speculative-draft-model-path DIR \\
    --speculative-num-steps {tree[depth]} --speculative-eagle-topk {tree[topk]} --speculative-num-draft-tokens {tree[nodes]}
```

vLLM reads exports as `sglang` and as `speculators`, SGLang those as `sglang`, SafeAILab's EAGLE those as `eagle`.{shift}
"""

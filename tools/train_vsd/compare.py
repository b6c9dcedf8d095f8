"""Objectives against each other: same start, same data, equal training time, the same engine, several seeds.

The arms of a seed take turns step by step, each billed for its own time, so that whatever else the machine does slows all alike.
"""

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from drafts.checkpoint import save_head
from drafts.eagle3 import Eagle3Head
from server.engine.loading import resolve_device
from server.engine.types import SamplingParams
from tools.loops import repeated_8_grams
from tools.prompts import PromptError, read_prompts
from tools.train_vsd.data import Row
from tools.train_vsd.evaluate import add_up
from tools.train_vsd.generate import Completion
from tools.train_vsd.m_step import OBJECTIVES, Law, VsdSettings
from tools.train_vsd.probe import Probe
from tools.train_vsd.report import write_comparison
from tools.train_vsd.teacher import Teacher
from tools.train_vsd.train import answers, batch_tokens, initial_head, load_teacher, refuse_evaluation_prompts
from tools.train_vsd.trainer import Trainer, TrainSettings, rate

SIGMAS = (0.4, 0.55, 0.7, 0.85, 1.0, 1.2)
LOOPING = 0.5  # share of repeated 8-grams from which a text counts as looping
RESAMPLES = 2000
VALIDATION_PROMPTS, VALIDATION_TOKENS = 24, 64


class System(NamedTuple):
    """One way to serve a head. ``sigma`` None: its own best drafting temperature on the validation prompts."""

    name: str
    temperature: float
    nodes: int
    topk: int
    sigma: float | None

    def options(self, sigma: float, depth: int) -> dict[str, Any]:
        """Fields of EngineConfig."""
        return {"tree_nodes": self.nodes, "tree_depth": depth, "tree_topk": self.topk, "draft_temperature": sigma}


def systems(depth: int) -> list[System]:
    """What every head is served as: trees of 16 nodes with the scores of EAGLE and at the head's best, and a chain."""
    return [
        System("T=0 tree, scores as EAGLE ships them", 0.0, 16, 6, 1.0),
        System("T=0 tree, own best drafting temperature", 0.0, 16, 6, None),
        System("T=0 chain", 0.0, depth + 1, 1, 1.0),
        System("T=0.5 tree, own best drafting temperature", 0.5, 16, 6, None),
        System("T=1 tree, own best drafting temperature", 1.0, 16, 6, None),
    ]


def train_interleaved(trainers: Mapping[str, Trainer], seconds: float) -> dict[str, float]:
    """Train all arms for ``seconds`` each, the one that had least first; returns the seconds that each had."""
    spent = dict.fromkeys(trainers, 0.0)
    with tqdm(total=round(seconds * len(trainers)), unit="s", desc=" ".join(trainers), mininterval=2) as bar:
        while (name := min(spent, key=spent.__getitem__)) and spent[name] < seconds:
            start = time.monotonic()
            result = trainers[name].step(rate(spent[name] / seconds))
            spent[name] += time.monotonic() - start
            bar.set_postfix_str(f"{name} loss {result.loss:.3f} accuracy {result.accuracy[0]:.2f}", refresh=False)
            bar.update(round(sum(spent.values())) - bar.n)
    for trainer in trainers.values():
        trainer.head.requires_grad_(False).eval()
    return spent


@dataclass
class Tally:
    """Of one system on one set of prompts, one entry per prompt: verifications, tokens committed, share of repeated 8-grams."""

    steps: list[int]
    tokens: list[int]
    repeated: list[float]
    histogram: list[int]
    seconds: float
    generated: int

    @classmethod
    def of(cls, completions: Sequence[Completion], seconds: float) -> "Tally":
        """Sums over ``completions``, in order of their prompts."""
        stats = [completion.speculation for completion in completions]
        return cls(
            [s.num_steps for s in stats], [s.num_steps + s.num_accepted_tokens for s in stats],
            [repeated_8_grams(completion.token_ids) for completion in completions], add_up([s.acceptance_histogram for s in stats]),
            seconds, sum(len(completion.token_ids) for completion in completions),
        )  # fmt: skip

    @property
    def length(self) -> float:
        return sum(self.tokens) / sum(self.steps)


def best_sigma(probe: Probe, head: Eagle3Head, prompts: Sequence[list[int]], temperature: float, depth: int) -> float:
    """Of SIGMAS, the one with the longest acceptance on the validation prompts, for trees of 16 nodes."""
    sampling = SamplingParams(max_tokens=VALIDATION_TOKENS, temperature=temperature, seed=0)
    system = System("", temperature, 16, 6, None)
    lengths = {sigma: Tally.of(probe.complete(head, prompts, sampling, **system.options(sigma, depth)), 0.0).length for sigma in SIGMAS}
    return max(lengths, key=lengths.__getitem__)


def measure(
    probe: Probe, head: Eagle3Head, validation: Sequence[list[int]], prompts: Sequence[list[int]], depth: int, max_tokens: int, seed: int
) -> dict[str, Any]:
    """Tallies by system, and the drafting temperatures that were chosen."""
    sigmas = {t: best_sigma(probe, head, validation, t, depth) for t in (0.0, 1.0)}
    sigmas[0.5] = (sigmas[0.0] + sigmas[1.0]) / 2  # as the engine interpolates
    tallies = {}
    for system in systems(depth):
        sampling = SamplingParams(max_tokens=max_tokens, temperature=system.temperature, seed=1000 * seed)
        options = system.options(sigmas[system.temperature] if system.sigma is None else system.sigma, depth)
        start = time.monotonic()
        completions = probe.complete(head, prompts, sampling, **options)
        tallies[system.name] = vars(Tally.of(completions, time.monotonic() - start))
    return {"sigmas": sigmas, "tallies": tallies}


def ratio(ours: Sequence[Tally], base: Sequence[Tally], chosen: np.ndarray | slice = slice(None)) -> dict[str, Any]:
    """Pooled acceptance length of ``ours`` over that of ``base``, one tally per seed, prompts in the same order, with a paired
    bootstrap interval over prompts: a resampled prompt brings all its seeds and both systems. ``chosen``: which prompts."""
    steps, base_steps = (np.array([t.steps for t in tallies]).sum(0)[chosen] for tallies in (ours, base))
    tokens, base_tokens = (np.array([t.tokens for t in tallies]).sum(0)[chosen] for tallies in (ours, base))
    samples = np.random.default_rng(0).integers(len(steps), size=(RESAMPLES, len(steps)))

    def lengths(tokens: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return tokens[samples].sum(1) / steps[samples].sum(1)

    resampled = lengths(tokens, steps) / lengths(base_tokens, base_steps)
    point = (tokens.sum() / steps.sum()) / (base_tokens.sum() / base_steps.sum())
    return {"ratio": float(point), "ci95": [float(x) for x in np.quantile(resampled, (0.025, 0.975))]}


def summary(arms: Mapping[str, Sequence[Mapping[str, Any]]], base: str = "eagle3") -> list[dict[str, Any]]:
    """One row per system and objective from ``measure``'s results, one per seed: length, ratio to ``base`` on all prompts and on those that
    do not loop, speed, looping share, worst prompts."""
    rows = []
    for name in arms[base][0]["tallies"]:
        references = {found["seed"]: Tally(**found["tallies"][name]) for found in arms[base]}
        for objective, results in arms.items():
            tallies = [Tally(**found["tallies"][name]) for found in results]
            reference = [references[found["seed"]] for found in results]  # paired seed by seed
            steps, tokens = (np.array([getattr(t, key) for t in tallies]).sum(0) for key in ("steps", "tokens"))
            calm = np.mean([t.repeated for t in reference], axis=0) <= LOOPING
            rows.append({
                "system": name,
                "objective": objective,
                "seeds": len(tallies),
                "acceptance_length": float(tokens.sum() / steps.sum()),
                "by_seed": [round(t.length, 4) for t in tallies],
                **ratio(tallies, reference),
                "without_loops": ratio(tallies, reference, calm) if calm.any() else None,
                "tokens_per_second": sum(t.generated for t in tallies) / sum(t.seconds for t in tallies),
                "looping_prompts": float(np.mean([[share > LOOPING for share in t.repeated] for t in tallies])),
                "worst_prompts": [int(i) for i in np.argsort(np.where(steps > 0, tokens / np.maximum(steps, 1), np.inf))[:5]],
            })  # fmt: skip
    return rows


def run_compare(args: argparse.Namespace) -> None:
    """The command: trains and measures the arms of every seed, then writes the table, the plots and ``compare.json`` for all seeds
    that OUTPUT holds."""
    for arm in args.arms:
        parse_arm(arm)
    if "eagle3" not in args.arms:
        raise PromptError(f"--arms {' '.join(args.arms)} lacks eagle3, which the others are compared with.")
    device = resolve_device(args.device)
    teacher = load_teacher(args.target, device)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    refuse_evaluation_prompts(args.prompts, args.evaluation)
    probe = Probe(teacher, tokenizer, concurrency=32)
    prompts = [prompt for file in args.evaluation for prompt in read_prompts(file, tokenizer, args.limit)]
    train_rows, held_out = answers(args, TrainSettings(minutes=args.minutes))
    validation = [row.prompt for row in held_out][:VALIDATION_PROMPTS]
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        trainers = {arm: new_trainer(args, arm, seed, teacher, train_rows, device) for arm in args.arms}
        seconds = train_interleaved(trainers, 60 * args.minutes)
        arms = {}
        for name, trainer in trainers.items():
            save_head(args.output / f"seed-{seed}" / re.sub(r"\W+", "-", name), trainer.head)
            found = measure(probe, trainer.head, validation, prompts, args.depth, args.max_tokens, seed)
            arms[name] = found | {"seed": seed, "training_steps": trainer.steps, "training_seconds": seconds[name]}
            (args.output / f"seed-{seed}.json").write_text(json.dumps(arms, indent=1) + "\n", encoding="utf-8")
    print(write_summary(args.output))


def new_trainer(args: argparse.Namespace, arm: str, seed: int, teacher: Teacher, rows: Sequence[Row], device: torch.device) -> Trainer:
    """An arm's trainer; arms of one seed have the same start and the same rows in the same order."""
    objective, options = parse_arm(arm)
    anchors, conditioned = options.pop("anchors", 0), options.pop("conditioned", objective == "vsd")
    torch.manual_seed(seed)
    head = initial_head(args.target, args.init, objective, teacher, list(rows[:8]), conditioned)
    settings = TrainSettings(
        objective, minutes=args.minutes, depth=args.depth, batch_tokens=batch_tokens(device), warm=args.init is not None, seed=seed,
        anchors=anchors, vsd=VsdSettings(**options),
    )  # fmt: skip
    return Trainer(head, teacher, rows, settings)


def parse_arm(arm: str) -> tuple[str, dict[str, Any]]:
    """``vsd:paths=5,car=0`` -> the objective and VsdSettings' fields, or ``anchors`` and ``conditioned``."""
    objective, _, options = arm.partition(":")
    parsed: dict[str, Any] = {}
    types = {name: type(value) for name, value in asdict(VsdSettings()).items()} | {"anchors": int, "conditioned": bool}
    try:
        OBJECTIVES[objective]
        for option in filter(None, options.split(",")):
            key, _, value = option.partition("=")
            parsed[key] = bool(int(value)) if types[key] is bool else types[key](value)
        if parsed.get("law", "noise") not in get_args(Law):
            raise ValueError
    except (KeyError, ValueError):
        expected = f"one of {', '.join(OBJECTIVES)}, with options {', '.join(types)} as in vsd:paths=5,arw=0"
        raise PromptError(f"arm {arm!r}: expected {expected}") from None
    return objective, parsed


def write_summary(output: Path) -> str:
    """``compare.json`` and ``compare.md`` from all seeds in ``output``; returns the table."""
    seeds = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(output.glob("seed-*.json"))]
    arms = {name: [seed[name] for seed in seeds if name in seed] for name in dict.fromkeys(name for seed in seeds for name in seed)}
    rows = summary(arms)
    (output / "compare.json").write_text(json.dumps({"summary": rows, "arms": arms}, indent=1) + "\n", encoding="utf-8")
    text = table(rows)
    (output / "compare.md").write_text(f"{text}\n{write_comparison(output)}", encoding="utf-8")
    return text


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """``summary``'s rows in Markdown."""
    columns = ("served as", "objective", "acceptance length", "against EAGLE-3", "95 % interval", "by seed", "tokens/s", "looping prompts")
    lines = [columns, ("---",) * len(columns)]
    for row in rows:
        low, high = row["ci95"]
        lines.append((
            row["system"], row["objective"], f"{row['acceptance_length']:.3f}", f"{row['ratio'] - 1:+.1%}",
            f"{low - 1:+.1%} to {high - 1:+.1%}", ", ".join(f"{length:.2f}" for length in row["by_seed"]),
            f"{row['tokens_per_second']:.0f}", f"{row['looping_prompts']:.0%}",
        ))  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

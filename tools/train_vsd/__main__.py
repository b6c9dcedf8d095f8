"""python -m tools.train_vsd train | evaluate | calibrate | compare | export: make a draft head for a target, measure it, tune it."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

import yaml
from transformers import AutoConfig

from drafts.checkpoint import DraftError, target_hash, tokenizer_hash, write_metadata
from drafts.eagle3 import HeadMetadata
from drafts.formats import LAYOUTS
from server.engine.config import EngineConfig, EngineError
from server.engine.types import SamplingParams
from tools.prompts import PromptError, read_prompts
from tools.train_vsd.calibrate import NODES, calibrate
from tools.train_vsd.compare import run_compare
from tools.train_vsd.data import is_held_out
from tools.train_vsd.evaluate import evaluate, measuring_engine
from tools.train_vsd.export import export_head
from tools.train_vsd.loop import ResumeError
from tools.train_vsd.m_step import OBJECTIVES, Law, VsdSettings
from tools.train_vsd.train import (
    CONCURRENCY,
    EVALUATION_PROMPTS,
    FITTED_PROMPTS,
    MEASURED_PROMPTS,
    MEASURED_TOKENS,
    run_train,
)


def main() -> None:
    try:
        args = parse_arguments()
        args.run(args)
    except (DraftError, EngineError, PromptError, ResumeError) as error:
        raise SystemExit(f"error: {error}") from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_vsd", description=__doc__, epilog="--config FILE.yaml holds long options and their values."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--target", required=True, help="directory or hub id of the target")
    shared.add_argument("--prompts", type=Path, required=True, help="JSON lines with turns, messages or prompt")
    shared.add_argument("--device", default="auto", help="auto, cpu or cuda")

    trainer = commands.add_parser("train", parents=[shared], help="train a head on the target's own answers to the prompts")
    trainer.add_argument("--output", type=Path, required=True, help="directory for the head; answers are kept in OUTPUT.data")
    trainer.add_argument("--init", help="head to start from (default: a fresh one)")
    trainer.add_argument("--objective", choices=sorted(OBJECTIVES), default="vsd")
    budget = trainer.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="optimiser steps")
    budget.add_argument("--minutes", type=float, help="wall time for answers and training together")
    trainer.add_argument("--depth", type=int, default=5, help="unrolled draft steps; the depth of the tree that will be served")
    trainer.add_argument(
        "--paths", type=int, default=VsdSettings().paths, help="draft paths S per anchor that the objective counts on or draws"
    )
    trainer.add_argument(
        "--anchors", type=int, default=0, help="per row, from which paths are drafted and verified beside the target's text"
    )
    trainer.add_argument("--law", choices=get_args(Law), default="noise", help="how drafts are verified at temperatures above 0")
    trainer.add_argument("--accumulate", type=int, default=1, help="batches per optimiser step, shared by the processes")
    trainer.add_argument("--shard-target", action="store_true", help="split the target among the processes while training (FSDP2)")
    trainer.add_argument("--evaluation", type=Path, nargs="*", default=sorted(EVALUATION_PROMPTS.glob("*.jsonl")), metavar="FILE",
                         help="prompt files that must share no passage with --prompts (default: those in benchmarks/prompts)")  # fmt: skip
    trainer.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same options")
    trainer.set_defaults(run=run_train)

    _add_measuring(commands, shared)
    comparer = _add_compare(commands, shared)
    for command in (trainer, comparer):
        command.add_argument("--temperature", type=float, default=1.0, help="of every second answer; the others are greedy")
        command.add_argument("--answers", type=int, help="how many the target gives (default: as many as the budget can use)")
        command.add_argument("--seed", type=int, default=0, help="of the answers, and of training where --seeds does not set it")
    return parser.parse_args(with_config(sys.argv[1:]))


def with_config(arguments: list[str]) -> list[str]:
    """``arguments`` with ``--config FILE`` replaced by the options in FILE, which those on the command line override."""
    if "--config" not in arguments[:-1]:
        return arguments
    at = arguments.index("--config")
    path = Path(arguments[at + 1])
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        raise PromptError(f"--config {path} is no YAML file of options and values, for example 'depth: 5'.")
    given = []
    for name, value in options.items():
        if value is not False:
            given += [f"--{name}".replace("_", "-"), *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
    rest = arguments[:at] + arguments[at + 2 :]
    return [*rest[:1], *given, *rest[1:]]


def _add_measuring(commands: Any, shared: argparse.ArgumentParser) -> None:
    measure = commands.add_parser("evaluate", parents=[shared], help="acceptance length of a head, measured by the engine")
    measure.add_argument("--draft", required=True, help="directory of the head")
    measure.add_argument("--temperature", type=float, default=0.0)
    measure.add_argument("--max-tokens", type=int, default=MEASURED_TOKENS)
    measure.add_argument("--limit", type=int, help="use the first LIMIT prompts")
    measure.add_argument("--all-turns", action="store_true", help="every turn is a prompt of its own")
    defaults = EngineConfig()
    measure.add_argument("--tree-nodes", type=int, default=defaults.tree_nodes)
    measure.add_argument("--tree-depth", type=int, default=defaults.tree_depth)
    measure.add_argument("--tree-topk", type=int, default=defaults.tree_topk)
    measure.add_argument("--draft-temperature", default="auto", help="auto: as calibrated for the head; or a number")
    measure.add_argument("--ngrams", action="store_true", help="draft from the requests' own text beside the head, as the server does")
    measure.add_argument("--seed", type=int, default=0)
    measure.add_argument("--concurrency", type=int, default=CONCURRENCY, help="requests that run at once")
    measure.add_argument("--json", type=Path, help="write the figures here")
    measure.set_defaults(run=run_evaluate)

    tuner = commands.add_parser("calibrate", parents=[shared], help="find the draft temperatures, write them into the head's config.json")
    tuner.add_argument("--draft", required=True, help="directory of the head")
    tuner.set_defaults(run=run_calibrate)

    exporter = commands.add_parser("export", help="write a head in another server's layout")
    exporter.add_argument("--draft", required=True, help="directory of the head")
    exporter.add_argument("--format", choices=LAYOUTS, required=True)
    exporter.add_argument("--output", type=Path, required=True, help="directory that does not exist yet, or is empty")
    exporter.add_argument("--target", help="what the head is for; the speculators layout names it")
    exporter.set_defaults(run=lambda args: export_head(args.draft, args.format, args.output, args.target))


def _add_compare(commands: Any, shared: argparse.ArgumentParser) -> argparse.ArgumentParser:
    comparer = commands.add_parser("compare", parents=[shared], help="objectives against each other at equal cost, several seeds")
    comparer.add_argument("--output", type=Path, required=True, help="directory for heads, table, plots and compare.json")
    comparer.add_argument("--init", help="head that every arm starts from (default: a fresh one)")
    comparer.add_argument("--minutes", type=float, required=True, help="training time of every arm")
    comparer.add_argument("--seeds", type=int, default=3, help="how many")
    comparer.add_argument("--first-seed", type=int, default=0, help="runs of several seeds can share OUTPUT, and machines the work")
    comparer.add_argument("--arms", nargs="+", default=["eagle3", "lk", "vat", "vsd"], metavar="ARM",
                          help=f"an objective ({', '.join(OBJECTIVES)}), with options as in vsd:paths=5,car=0")  # fmt: skip
    comparer.add_argument("--evaluation", type=Path, nargs="+", default=sorted(EVALUATION_PROMPTS.glob("*.jsonl")), metavar="FILE",
                          help="prompts that results are reported on (default: those in benchmarks/prompts)")  # fmt: skip
    comparer.add_argument("--limit", type=int, default=64, help="prompts per file of --evaluation")
    comparer.add_argument("--max-tokens", type=int, default=96)
    comparer.add_argument("--depth", type=int, default=5)
    comparer.set_defaults(run=run_compare)
    return comparer


def run_evaluate(args: argparse.Namespace) -> None:
    sigma = None if args.draft_temperature == "auto" else float(args.draft_temperature)
    engine = measuring_engine(
        args.target, args.draft, args.device, args.concurrency, args.ngrams, tree_nodes=args.tree_nodes, tree_depth=args.tree_depth,
        tree_topk=args.tree_topk, draft_temperature=sigma,
    )  # fmt: skip
    prompts = read_prompts(args.prompts, engine.tokenizer, args.limit, args.all_turns)
    fitting = [prompt for prompt in prompts if len(prompt) + args.max_tokens <= engine.max_request_tokens]
    if not fitting:
        raise PromptError(f"No prompt of {args.prompts} leaves room for {args.max_tokens} tokens in {engine.max_request_tokens}.")
    sampling = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    figures = evaluate(engine, fitting, sampling, args.concurrency) | {"skipped_prompts": len(prompts) - len(fitting)}
    text = json.dumps(figures, indent=2)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)


def run_calibrate(args: argparse.Namespace) -> None:
    engine = measuring_engine(args.target, args.draft, args.device, CONCURRENCY, tree_nodes=max(NODES))
    prompts = read_prompts(args.prompts, engine.tokenizer)
    fitting = [prompt for prompt in prompts if len(prompt) + MEASURED_TOKENS <= engine.max_request_tokens]
    if not fitting:
        raise PromptError(f"No prompt of {args.prompts} leaves room for {MEASURED_TOKENS} tokens in {engine.max_request_tokens}.")
    unseen = [prompt for prompt in fitting if is_held_out(prompt)]  # what training left out, where the file has enough of it
    prompts = (unseen if len(unseen) >= MEASURED_PROMPTS else fitting)[: MEASURED_PROMPTS + FITTED_PROMPTS]
    drafter = engine.proposer.drafter
    assert drafter is not None
    metadata = drafter.head.metadata or HeadMetadata(
        target_hash(AutoConfig.from_pretrained(args.target)), tokenizer_hash(engine.tokenizer), "unknown"
    )
    metadata = calibrate(engine, metadata, prompts[-FITTED_PROMPTS:], prompts[:MEASURED_PROMPTS], MEASURED_TOKENS, CONCURRENCY)
    write_metadata(args.draft, metadata)
    print(f"draft temperatures {dict(metadata.draft_temperature)}, acceptance length by nodes {dict(metadata.acceptance_length)}")


if __name__ == "__main__":
    main()

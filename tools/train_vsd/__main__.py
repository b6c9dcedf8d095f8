"""python -m tools.train_vsd train | evaluate | calibrate: make a draft head for a target, measure it, tune it."""

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from drafts.checkpoint import DraftError, load_head, save_head, target_hash, tokenizer_hash, write_metadata
from drafts.eagle3 import Eagle3Head, HeadMetadata
from server.engine.config import EngineConfig, EngineError
from server.engine.engine import Engine
from server.engine.loading import resolve_device, resolve_dtype
from server.engine.types import SamplingParams
from tools.prompts import PromptError, read_prompts
from tools.train_vsd.calibrate import NODES, calibrate
from tools.train_vsd.data import AnswerSettings, Row, answers_path, collate, is_held_out, split_rows, write_answers
from tools.train_vsd.evaluate import evaluate, measuring_engine
from tools.train_vsd.objectives import OBJECTIVES
from tools.train_vsd.report import write_card
from tools.train_vsd.teacher import Teacher, new_head
from tools.train_vsd.trainer import TrainSettings, held_out_agreement, train

ANSWER_SHARE = 1 / 3  # of a budget in minutes goes to the target's answers
MEASURED_PROMPTS = 32
MEASURED_TOKENS = 128
CONCURRENCY = 16


def main() -> None:
    args = parse_arguments()
    try:
        args.run(args)
    except (DraftError, EngineError, PromptError) as error:
        raise SystemExit(f"error: {error}") from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.train_vsd", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--target", required=True, help="directory or hub id of the target")
    shared.add_argument("--prompts", type=Path, required=True, help="JSON lines with turns, messages or prompt")
    shared.add_argument("--device", default="auto", help="auto, cpu or cuda")

    trainer = commands.add_parser("train", parents=[shared], help="train a head on the target's own answers to the prompts")
    trainer.add_argument("--output", type=Path, required=True, help="directory for the head; answers are kept in OUTPUT.data")
    trainer.add_argument("--init", help="head to start from (default: a fresh one)")
    trainer.add_argument("--objective", choices=sorted(OBJECTIVES), default="eagle3")
    budget = trainer.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="optimiser steps")
    budget.add_argument("--minutes", type=float, help="wall time for answers and training together")
    trainer.add_argument("--depth", type=int, default=5, help="unrolled draft steps; the depth of the tree that will be served")
    trainer.add_argument("--temperature", type=float, default=1.0, help="of every second answer; the others are greedy")
    trainer.add_argument("--seed", type=int, default=0)
    trainer.set_defaults(run=run_train)

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
    measure.add_argument("--seed", type=int, default=0)
    measure.add_argument("--concurrency", type=int, default=CONCURRENCY, help="requests that run at once")
    measure.add_argument("--json", type=Path, help="write the figures here")
    measure.set_defaults(run=run_evaluate)

    tuner = commands.add_parser("calibrate", parents=[shared], help="find the draft temperatures, write them into the head's config.json")
    tuner.add_argument("--draft", required=True, help="directory of the head")
    tuner.set_defaults(run=run_calibrate)
    return parser.parse_args()


def run_train(args: argparse.Namespace) -> None:
    device = resolve_device(args.device)
    settings = TrainSettings(
        args.objective, args.steps, args.minutes, args.depth, batch_tokens=512 if device.type == "cpu" else 16384, seed=args.seed
    )
    start = time.monotonic()
    train_rows, held_out = answers(args, settings)
    dtype = resolve_dtype("auto", device, AutoConfig.from_pretrained(args.target))
    teacher = Teacher.load(args.target, device, dtype)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    head = initial_head(args, teacher, train_rows)
    if args.minutes is not None:
        settings = replace(settings, minutes=max(args.minutes / 10, args.minutes - (time.monotonic() - start) / 60))
    began = time.monotonic()
    steps = train(head, teacher, train_rows, settings, lambda head: save_head(args.output, head))
    seconds = round(time.monotonic() - began)
    assert head.metadata is not None
    head.metadata = replace(head.metadata, held_out=held_out_agreement(head, teacher, held_out, settings))
    save_head(args.output, head)
    evaluations = measure_head(args, [row.prompt for row in held_out][:MEASURED_PROMPTS])
    lengths = {f"acceptance_length_t{e['temperature']:g}": round(e["acceptance_length"], 4) for e in evaluations}
    head.metadata = replace(head.metadata, held_out={**head.metadata.held_out, **lengths})
    write_metadata(args.output, head.metadata)
    tokens = sum(len(row.answer) for row in train_rows)
    data = {"rows": len(train_rows), "tokens": tokens, "steps_done": steps, "seconds": seconds}
    write_card(args.output, head, settings, args.target, args.prompts, data, evaluations)
    print(json.dumps(dict(head.metadata.held_out), indent=2))


def answers(args: argparse.Namespace, settings: TrainSettings) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): the target's answers to as many prompts as the budget wants."""
    engine = Engine.from_config(EngineConfig(model=args.target, draft=None, device=args.device, max_num_seqs=64))
    answer = AnswerSettings(temperature=args.temperature, seed=args.seed)
    room = engine.max_request_tokens - answer.max_tokens
    prompts = [prompt for prompt in read_prompts(args.prompts, engine.tokenizer) if len(prompt) <= room]
    if not prompts:
        raise PromptError(f"No prompt of {args.prompts} leaves room for {answer.max_tokens} tokens in {engine.max_request_tokens}.")
    random.Random(args.seed).shuffle(prompts)
    if settings.steps is not None:  # about as many answers as the steps can see once
        prompts = prompts[: max(64, settings.steps * settings.batch_tokens // answer.max_tokens)]
    path = answers_path(Path(f"{args.output}.data"), args.target, prompts, answer)
    minutes = None if settings.minutes is None else settings.minutes * ANSWER_SHARE
    train_rows, held_out = split_rows(prompts, write_answers(path, engine, prompts, answer, 64, minutes))
    if not train_rows or not held_out:
        found = f"{len(train_rows)} training and {len(held_out)} held-out answers"
        raise PromptError(f"{args.prompts} gave {found}, but both are needed: use more prompts or a bigger budget.")
    return train_rows, held_out


def initial_head(args: argparse.Namespace, teacher: Teacher, rows: list[Row]) -> Eagle3Head:
    tokens = tokenizer_hash(AutoTokenizer.from_pretrained(args.target))
    model = teacher.model
    if args.init is None:
        head = new_head(model, teacher.feature_rms(collate(rows[:8]).to(model.device)))
    else:
        embedding = model.get_input_embeddings().weight.float()
        head = load_head(args.init, model.config, tokenizer_hash=tokens, embedding=embedding, device=model.device, dtype=torch.float32)
    head.metadata = HeadMetadata(target_hash(model.config), tokens, args.objective)
    return head


def measure_head(args: argparse.Namespace, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The saved head's acceptance at temperatures 0 and 1."""
    engine = measuring_engine(args.target, str(args.output), args.device, CONCURRENCY, tree_depth=args.depth)
    params = [SamplingParams(max_tokens=MEASURED_TOKENS, temperature=temperature, seed=args.seed) for temperature in (0.0, 1.0)]
    return [evaluate(engine, prompts, sampling, CONCURRENCY) for sampling in params]


def run_evaluate(args: argparse.Namespace) -> None:
    sigma = None if args.draft_temperature == "auto" else float(args.draft_temperature)
    engine = measuring_engine(
        args.target, args.draft, args.device, args.concurrency, tree_nodes=args.tree_nodes, tree_depth=args.tree_depth,
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
    unseen = [prompt for prompt in prompts if is_held_out(prompt)]  # what training left out, where the file has enough of it
    prompts = (unseen if len(unseen) >= MEASURED_PROMPTS else prompts)[:MEASURED_PROMPTS]
    drafter = engine.steps.drafter
    assert drafter is not None
    metadata = drafter.head.metadata or HeadMetadata(
        target_hash(AutoConfig.from_pretrained(args.target)), tokenizer_hash(engine.tokenizer), "unknown"
    )
    metadata = calibrate(engine, metadata, prompts, MEASURED_TOKENS, CONCURRENCY)
    write_metadata(args.draft, metadata)
    print(f"draft temperatures {dict(metadata.draft_temperature)}, acceptance length by nodes {dict(metadata.acceptance_length)}")


if __name__ == "__main__":
    main()

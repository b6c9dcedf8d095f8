"""``train``: prompts -> the target's answers -> a trained, calibrated, measured head with its model card."""

import argparse
import json
import os
import random
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer

from drafts.checkpoint import load_head, save_head, target_hash, tokenizer_hash, write_metadata
from drafts.eagle3 import Eagle3Head, HeadMetadata
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.loading import resolve_device, resolve_dtype
from server.engine.types import SamplingParams
from tools.prompts import PromptError, read_prompts, shared_passages
from tools.train_vsd.calibrate import NODES, calibrate
from tools.train_vsd.data import AnswerSettings, Row, answers_path, collate, read_answers, split_rows, write_answers
from tools.train_vsd.evaluate import evaluate, measuring_engine
from tools.train_vsd.loop import Loop
from tools.train_vsd.m_step import VsdSettings
from tools.train_vsd.probe import Probe
from tools.train_vsd.report import write_card
from tools.train_vsd.teacher import Teacher, new_head, whole
from tools.train_vsd.trainer import Trainer, TrainSettings, held_out_agreement

ANSWER_SHARE = 1 / 3  # of a budget in minutes goes to the target's answers
MEASURED_PROMPTS = 32
FITTED_PROMPTS = 64  # for the draft temperatures
MEASURED_TOKENS = 128
PROBED_PROMPTS, PROBED_TOKENS = 16, 64  # at intervals while training
CONCURRENCY = 16
SHARPNESS = 1.5  # of the logits of a head that knows the temperature: about what calibration finds, sigma 0.57 at 0 and 0.85 at 1
EVALUATION_PROMPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "prompts"


def run_train(args: argparse.Namespace) -> None:
    """The command. Under ``torchrun`` or ``accelerate launch`` every process takes its share of each step's batches."""
    device = start_process(resolve_device(args.device))
    settings = settings_from(args, device)
    start = time.monotonic()
    train_rows, held_out = answers(args, settings, finished=args.resume)
    teacher = load_teacher(args.target, device)
    if args.shard_target:
        teacher.shard()
    torch.manual_seed(args.seed)
    head = initial_head(args.target, args.init, args.objective, teacher, train_rows, conditioned=settings.objective == "vsd")
    probe = Probe(teacher, AutoTokenizer.from_pretrained(args.target), CONCURRENCY)
    prompts = [row.prompt for row in held_out]
    loop = Loop(
        Trainer(head, teacher, train_rows, settings),
        Path(f"{args.output}.data"),
        measure=lambda: probe.lengths(head, prompts[:PROBED_PROMPTS], PROBED_TOKENS, tree_depth=settings.depth),
        keep=lambda: save_head(args.output, head),
        prepared=time.monotonic() - start,
    )
    if args.resume:
        loop.resume()
    run = loop()
    assert head.metadata is not None
    head.metadata = replace(head.metadata, held_out=held_out_agreement(head, teacher, held_out, settings))
    if loop.main:
        save_head(args.output, head)
        evaluations = measure_head(args, head, prompts)
        tokens = sum(len(row.answer) for row in train_rows)
        data = {"rows": len(train_rows), "tokens": tokens, "steps_done": loop.trainer.steps, "seconds": round(run.elapsed)}
        write_card(args.output, head, settings, args.target, args.prompts, data, evaluations, run.history)
        print(json.dumps(dict(head.metadata.held_out), indent=2))
    if dist.is_initialized():
        dist.destroy_process_group()


def start_process(device: torch.device) -> torch.device:
    """Join the other processes where a launcher started several; returns this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    dist.init_process_group(timeout=timedelta(days=1))  # the others wait while the first has the target answer, and measures
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def settings_from(args: argparse.Namespace, device: torch.device) -> TrainSettings:
    """The run's settings; batches are sized for the device."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if args.accumulate % world:
        raise PromptError(
            f"--accumulate {args.accumulate} batches a step cannot be shared by {world} processes: use a multiple of {world}."
        )
    if args.shard_target and (world == 1 or args.anchors):
        raise PromptError(
            f"--shard-target with {world} processes and --anchors {args.anchors}: start several processes (torchrun or accelerate launch), "
            "without --anchors, whose trees differ from process to process."
        )
    return TrainSettings(
        args.objective, args.steps, args.minutes, args.depth, batch_tokens=batch_tokens(device), accumulate=args.accumulate,
        warm=args.init is not None, seed=args.seed, anchors=args.anchors, vsd=VsdSettings(paths=args.paths, law=args.law),
    )  # fmt: skip


def batch_tokens(device: torch.device) -> int:
    """Padded tokens of a batch: what keeps the device busy."""
    return 512 if device.type == "cpu" else 16384


def answers(args: argparse.Namespace, settings: TrainSettings, finished: bool = False) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): the target's answers to as many prompts as the budget wants. ``finished``: those on disk are all
    that there will be."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()  # the first process writes them, the others read them
        finished = True
    refuse_evaluation_prompts(args.prompts, args.evaluation)
    threads = torch.get_num_threads()  # training goes on with them
    engine = Engine.from_config(EngineConfig(model=args.target, draft=None, device=args.device, threads=threads, max_num_seqs=64))
    answer = AnswerSettings(temperature=args.temperature, seed=args.seed)
    room = engine.max_request_tokens - answer.max_tokens
    prompts = [prompt for prompt in read_prompts(args.prompts, engine.tokenizer) if len(prompt) <= room]
    if not prompts:
        raise PromptError(f"No prompt of {args.prompts} leaves room for {answer.max_tokens} tokens in {engine.max_request_tokens}.")
    random.Random(args.seed).shuffle(prompts)
    if args.answers is not None:
        prompts = prompts[: args.answers]
    elif settings.steps is not None:  # about as many answers as the steps can see once
        prompts = prompts[: max(64, settings.steps * settings.accumulate * settings.batch_tokens // answer.max_tokens)]
    path = answers_path(Path(f"{args.output}.data"), args.target, prompts, answer)
    minutes = None if settings.minutes is None else settings.minutes * ANSWER_SHARE
    found = read_answers(path) if finished else write_answers(path, engine, prompts, answer, 64, minutes)
    train_rows, held_out = split_rows(prompts, found, answer)
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()
    if not train_rows or not held_out:
        counts = f"{len(train_rows)} training and {len(held_out)} held-out answers"
        raise PromptError(f"{args.prompts} gave {counts}, but both are needed: use more prompts or a bigger budget.")
    return train_rows, held_out


def refuse_evaluation_prompts(prompts: Path, evaluation: list[Path]) -> None:
    """PromptError that names the rows of ``prompts`` which share a long passage with an evaluation prompt."""
    for file in evaluation:
        if found := shared_passages(prompts, file):
            rows = ", ".join(f"line {ours} (line {theirs} there)" for ours, theirs in found[:5])
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise PromptError(f"{prompts} holds prompts that {file} evaluates on: {rows}{more}. Take them out, or choose --evaluation.")


def load_teacher(target: str, device: torch.device) -> Teacher:
    """The target in its own type on a GPU, in float32 on a CPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return Teacher.load(target, device, resolve_dtype("auto", device, AutoConfig.from_pretrained(target)))


def initial_head(target: str, init: str | None, objective: str, teacher: Teacher, rows: list[Row], conditioned: bool) -> Eagle3Head:
    """The head at ``init`` or a fresh one, in float32. ``conditioned``: it is told the request's temperature."""
    tokens = tokenizer_hash(AutoTokenizer.from_pretrained(target))
    model = teacher.model
    if init is None:
        head = new_head(model, teacher.feature_rms(collate(rows[:8]).to(model.device)))
    else:
        embedding = whole(model.get_input_embeddings().weight).float()
        head = load_head(init, model.config, tokenizer_hash=tokens, embedding=embedding, device=model.device, dtype=torch.float32)
    if conditioned and head.temperature_shift is None:
        head.config = replace(head.config, temperature_shift=True, temperature_sharpness=SHARPNESS)
        head.temperature_shift = torch.nn.Parameter(torch.zeros(head.config.hidden_size, device=model.device))
    head.metadata = HeadMetadata(target_hash(model.config), tokens, objective)
    return head


def measure_head(args: argparse.Namespace, head: Eagle3Head, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Calibrate the saved head and measure its acceptance at temperatures 0 and 1; both go into its metadata."""
    assert head.metadata is not None
    measured, fitted = prompts[:MEASURED_PROMPTS], prompts[MEASURED_PROMPTS:][:FITTED_PROMPTS] or prompts
    engine = measuring_engine(args.target, str(args.output), args.device, CONCURRENCY, tree_nodes=max(NODES), tree_depth=args.depth)
    head.metadata = calibrate(engine, head.metadata, fitted, measured, MEASURED_TOKENS, CONCURRENCY)
    engine.shape = engine.shape._replace(nodes=EngineConfig().tree_nodes)
    params = [SamplingParams(max_tokens=MEASURED_TOKENS, temperature=temperature, seed=args.seed) for temperature in (0.0, 1.0)]
    evaluations = [evaluate(engine, measured, sampling, CONCURRENCY) for sampling in params]
    lengths = {f"acceptance_length_t{e['temperature']:g}": round(e["acceptance_length"], 4) for e in evaluations}
    head.metadata = replace(head.metadata, held_out={**head.metadata.held_out, **lengths})
    write_metadata(args.output, head.metadata)
    return evaluations

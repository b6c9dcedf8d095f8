"""python -m tools.bench: this engine, plain and speculative, beside transformers, CTranslate2, vLLM and llama.cpp, in one run.

Every system runs in a process of its own with the same number of threads, and gets the same prompts as token ids, at most --concurrency
at once. It generates exactly --max-tokens tokens for each, the end-of-sequence token ignored; at temperatures above 0, prompt i has seed
i where a system takes seeds. Systems take turns, in an order that is reversed every other round, after a turn that is not counted. A
speed is tokens over the seconds from the first prompt submitted to the last token received, prefill included, of the median round; a
ratio is the median of those within rounds.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import AutoTokenizer

from drafts.checkpoint import DraftError, find_head
from tools.bench.arguments import ROOT, add_common, complete_draft, positive, temperatures
from tools.bench.plot import speeds
from tools.bench.report import Row, rows, table, verdict
from tools.bench.rounds import BenchError, Round, SystemFailure, measure
from tools.bench.work import PLAIN, SPECULATION, Settings, Work
from tools.bench.workers import WorkerProcess, started
from tools.prompts import PromptError, read_prompts
from tools.train_vsd.export import export_head
from tools.train_vsd.plots import save

OURS = "vsd-serve"
# The worker of every peer.
PEERS = {
    "hf": "hf",
    "hf-prompt-lookup": "hf",
    "ctranslate2": "ctranslate2",
    "vllm": "vllm",
    "vllm-ngram": "vllm-ngram",
    "vllm-eagle3": "vllm-eagle3",
    "llama.cpp": "llama.cpp",
}
INTERPRETERS = ("hf", "ctranslate2", "vllm", "llama.cpp")  # what --peer-python names: a worker's name up to the first dash
IDLE_LIMIT = 0.1  # cores that a waiting process may keep busy


@dataclass
class Systems:
    """``workers``: the process of every system that loaded; ``missing``: why another did not."""

    workers: dict[str, WorkerProcess] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def run(self, work: Work) -> Round:
        reply = self.workers[work.system].ask({"run": asdict(work)})
        answers = tuple(map(tuple, reply["token_ids"]))
        return Round(reply["seconds"], answers, tuple(map(len, answers)), reply["steps"], reply["accepted"])


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser, rounds=3)
    parser.add_argument("--peers", type=peers, default=list(PEERS), metavar="A,B", help=f"of {', '.join(PEERS)} (default: all)")
    parser.add_argument("--temperature", type=temperatures, default=[0.0], metavar="T,T", help="default 0")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all systems (default %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="vLLM's is that of its build")
    parser.add_argument(
        "--threads", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="of every system (default: all)"
    )
    parser.add_argument("--draft-tokens", type=positive, default=4, metavar="N", help="length of the peers' drafts (default %(default)s)")
    parser.add_argument("--peer-python", type=interpreter, action="append", default=[], metavar="NAME=PATH",
                        help=f"interpreter of {', '.join(INTERPRETERS)} (default: WORK_DIR/venv/bin/python, which make bench-peers makes,"
                             " where it exists, else this one; hf: this one)")  # fmt: skip
    parser.add_argument("--work-dir", type=Path, default=ROOT / "build" / "bench", metavar="DIR", help="logs and converted models")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the speeds")
    args = parser.parse_args(argv)
    complete_draft(parser, args)
    return args


def peers(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} unknown, expected some of {', '.join(PEERS)}")
    return names


def interpreter(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if name not in INTERPRETERS or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH with NAME one of {', '.join(INTERPRETERS)}, got {text}")
    return name, path


@contextmanager
def loaded(args: argparse.Namespace, model: Path, longest: int) -> Iterator[Systems]:
    """All systems, loaded one after the other: the engine times its steps when it starts. Raises BenchError where it does not load."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        model=str(model),
        draft=str(find_head(args.draft)),
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        concurrency=max(args.concurrency),
        max_length=longest + args.max_tokens,
        draft_tokens=args.draft_tokens,
        converted=str(args.work_dir / f"converted-{fingerprint(model)}"),
    )
    held = {PLAIN: OURS, SPECULATION: OURS} | {name: PEERS[name] for name in args.peers}
    systems = Systems()
    with ExitStack() as stack:
        for backend in tqdm(list(dict.fromkeys(held.values())), desc="load", unit="process", disable=None):
            names = [name for name, holder in held.items() if holder == backend]
            try:
                if backend == "vllm-eagle3":
                    folder = stack.enter_context(TemporaryDirectory(dir=args.work_dir))
                    export_head(settings.draft, "sglang", Path(folder, "head"), str(model))
                    settings = replace(settings, draft=str(Path(folder, "head")))
                worker = stack.enter_context(started(backend, python_of(backend, args), args.threads, args.work_dir / f"{backend}.log"))
                version = worker.ask({"load": asdict(settings)})["version"]
            except (SystemFailure, DraftError) as error:
                if backend == OURS:
                    raise BenchError(f"{OURS} does not load: {error}") from error
                systems.missing |= dict.fromkeys(names, str(error))
                continue
            systems.workers |= dict.fromkeys(names, worker)
            systems.versions |= dict.fromkeys(names, version)
        yield systems


def python_of(backend: str, args: argparse.Namespace) -> str:
    prepared = args.work_dir / "venv" / "bin" / "python"
    name = backend.partition("-")[0] if backend != OURS else OURS
    default = str(prepared) if name in INTERPRETERS[1:] and prepared.exists() else sys.executable
    return dict(args.peer_python).get(name, default)


def local(model: str) -> Path:
    """The directory of ``model``, from the hub if need be."""
    return Path(model).resolve() if Path(model).is_dir() else Path(snapshot_download(model))


def fingerprint(model: Path) -> str:
    """Changes when a file of the model does."""
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(model.iterdir())]
    return hashlib.sha256(json.dumps([str(model), files]).encode()).hexdigest()[:16]


def run(args: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """All rows, and the versions by system."""
    model = local(args.model)
    prompts = read_prompts(args.prompts, AutoTokenizer.from_pretrained(model), args.limit)
    result = []
    with loaded(args, model, max(map(len, prompts))) as systems:
        for temperature in args.temperature:
            for concurrency in args.concurrency:
                result += cell(args, systems, prompts, temperature, concurrency)
                print(table(result[-len(systems.workers) - len(systems.missing) :]), flush=True)
        for system, worker in systems.workers.items():
            if worker.idle_load > IDLE_LIMIT:
                print(f"{system} kept {worker.idle_load:.1f} cores busy while it waited: all others were slowed down", file=sys.stderr)
    return result, systems.versions


def cell(args: argparse.Namespace, systems: Systems, prompts: list[list[int]], temperature: float, concurrency: int) -> list[Row]:
    """Every system at one temperature and concurrency. Raises BenchError where this engine fails."""

    def turn(system: str, part: Sequence[list[int]], progress: tqdm) -> Round:
        one = systems.run(Work(system, list(part), concurrency, temperature, args.max_tokens))
        progress.update(len(part))
        return one

    title = f"T={temperature:g} concurrency {concurrency}"
    measured, failed = measure(list(systems.workers), turn, prompts, concurrency, args.rounds, title)
    for system in (PLAIN, SPECULATION):
        if system in failed:
            raise BenchError(f"{system} failed at concurrency {concurrency}: {failed[system]}")
    exact = set(measured) if temperature == 0 else {PLAIN, SPECULATION}
    part = rows(measured, PLAIN, concurrency, temperature, exact if args.dtype == "float32" else ())
    missing = systems.missing | failed
    return part + [Row(system, concurrency, temperature, missing=reason) for system, reason in missing.items()]


def records(result: Sequence[Row], args: argparse.Namespace, versions: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of --json."""
    settings = {name: getattr(args, name) for name in ("dtype", "threads", "rounds", "max_tokens")}
    return [asdict(row) | settings | {"version": versions.get(row.system)} for row in result]


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when there was nothing to compare, a ratio was refused, or the engine's texts differ."""
    args = parse_arguments(argv)
    print(f"{args.dtype}, {args.threads} threads, {args.limit} prompts, {args.max_tokens} tokens each, {args.rounds} rounds", flush=True)
    try:
        result, versions = run(args)
    except (BenchError, DraftError, PromptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(records(result, args, versions), indent=2) + "\n", encoding="utf-8")
    if args.plot:
        save(args.plot.parent, lambda: {args.plot.stem: speeds(result)})
    return verdict(result, (PLAIN, SPECULATION))


if __name__ == "__main__":
    sys.exit(main())

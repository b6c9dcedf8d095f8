"""Command-line arguments that both benchmarks have."""

import argparse
from pathlib import Path

from server.engine.config import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ROOT / "benchmarks" / "prompts" / "gsm8k_test.jsonl"


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=EngineConfig.model, help="target: local directory or hub id (default: the demo target)")
    parser.add_argument("--draft", help="draft head (default: the demo head; needed with --model)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")


def add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    add_model(parser)
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE", help="JSON lines with turns, messages or prompt")
    parser.add_argument("--limit", type=positive, default=8, metavar="N", help="prompts taken from the file (default %(default)s)")
    parser.add_argument("--max-tokens", type=positive, default=128, metavar="N", help="generated per prompt (default %(default)s)")
    parser.add_argument("--concurrency", type=counts, default=[1, 8], metavar="N,N", help="requests in flight (default 1,8)")
    parser.add_argument("--rounds", type=positive, default=rounds, metavar="N", help="measured rounds (default %(default)s)")


def complete_draft(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The demo head for the demo target; any other model names its own."""
    if args.draft is None:
        if args.model != EngineConfig.model:
            parser.error("--model needs --draft: a head is trained for one model")
        args.draft = EngineConfig.draft


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return number


def counts(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def temperatures(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]

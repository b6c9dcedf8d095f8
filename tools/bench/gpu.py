"""python -m tools.bench.gpu: the demo pair inflated to a large model on an NVIDIA GPU, plain and speculative, beside transformers.

The pair is made on the GPU and not written down. All systems share its weights and take turns in one process; plain decoding and
speculation have engines of their own. Prompts, tokens and ratios are as in ``tools.bench``, but that every stream gets the same number of
prompts. What a plain step of one stream takes is set beside the time in which the GPU reads the weights, at the rate at which it copies.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drafts.eagle3 import Eagle3Head
from kernels.bench import copy_rate
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.host import keep_what_is_loaded
from server.engine.lean import LeanDecoder
from server.engine.target import Target, self_check
from server.engine.types import SamplingParams
from tools.bench.arguments import PROMPTS, counts, positive, temperatures
from tools.bench.backends import answers_of, generated
from tools.bench.inflate import LIKE, inflated_config, inflated_head, inflated_target, plan_inflation
from tools.bench.report import Row, rows, table
from tools.bench.rounds import Round, measure
from tools.bench.work import PLAIN, SPECULATION, Answers, Work
from tools.prompts import read_prompts

DTYPE = torch.bfloat16
GENERATE, LOOKUP = "hf", "hf-prompt-lookup"
LOOKUP_TOKENS = 10  # that prompt lookup drafts


@dataclass(frozen=True)
class PlainStep:
    """Of one stream: ``weights`` gigabytes must be read, at ``copy`` gigabytes per second at best; ``share``: of that rate."""

    milliseconds: float
    weights: float
    copy: float
    share: float


def make_pair(like: str, context: int, device: torch.device) -> tuple[LlamaForCausalLM, Eagle3Head, PreTrainedTokenizerFast]:
    """The demo pair, inflated, on ``device``."""
    target, draft = str(EngineConfig.model), str(EngineConfig.draft)
    config, head, inflater = plan_inflation(target, draft, like, device)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    torch.set_default_dtype(DTYPE)
    with device:
        large = LlamaForCausalLM(inflated_config(config, inflater, DTYPE, context))
    torch.set_default_dtype(torch.float32)
    own = large.state_dict()
    with torch.no_grad():
        for part in inflated_target(model, inflater):
            for name, tensor in part.items():
                own[name].copy_(tensor)
    large_head = inflated_head(head, inflater).to(device, DTYPE).requires_grad_(False)
    large_head.share_embedding(large.get_input_embeddings().weight)
    return large.eval(), large_head, AutoTokenizer.from_pretrained(target)


class Systems:
    """Both engines and transformers over one model."""

    def __init__(self, args: argparse.Namespace, longest: int) -> None:
        device = torch.device("cuda")
        config = EngineConfig(
            device="cuda", dtype="bfloat16", max_num_seqs=max(args.concurrency), max_model_len=longest + args.max_tokens,
            tree_nodes=args.tree_nodes, tree_depth=args.tree_depth, tree_topk=args.tree_topk, prefix_caching=False,
        )  # fmt: skip
        self.model, head, tokenizer = make_pair(args.like, longest + args.max_tokens, device)
        decoder = LeanDecoder(self.model)
        target = Target(self.model, True, decoder)
        self_check(target, config.block_size)
        self.engines = {
            PLAIN: Engine(Target(self.model, False, decoder), None, tokenizer, config),
            SPECULATION: Engine(target, head, tokenizer, config),
        }
        read = sum(p.nbytes for p in decoder.parameters()) - self.model.get_input_embeddings().weight.nbytes
        self.weights = read / 1e9
        self.model.set_attn_implementation("sdpa")  # transformers' own forward pass is used by its generate alone
        self.model.generation_config = GenerationConfig()  # no end-of-sequence token
        keep_what_is_loaded()

    def run(self, system: str, prompts: Sequence[list[int]], progress: tqdm, concurrency: int, temperature: float, tokens: int) -> Round:
        work = Work(system, list(prompts), concurrency, temperature, tokens)
        start = time.perf_counter()
        if system in self.engines:
            answers = answers_of(self.engines[system], work)
        else:
            options: dict[str, Any] = {"prompt_lookup_num_tokens": LOOKUP_TOKENS} if system == LOOKUP else {}
            answers = Answers([answer for prompt in prompts for answer in generated(self.model, [prompt], work, dict(options))])
        seconds = time.perf_counter() - start
        progress.update(len(prompts))
        lengths = tuple(map(len, answers.token_ids))
        return Round(seconds, tuple(map(tuple, answers.token_ids)), lengths, answers.steps, answers.accepted)

    def plain_step(self, prompt: list[int], copy: float, tokens: int) -> PlainStep:
        """The median from the end of one step of an answer to the end of the next, without the first, which record and compile."""
        engine = self.engines[PLAIN]
        engine.add_request("plain step", prompt, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
        ends = []
        while engine.has_work():
            engine.step()
            ends.append(time.perf_counter())
        seconds = [after - before for before, after in pairwise(ends)]
        typical = median(seconds[len(seconds) // 4 :])
        return PlainStep(1000 * typical, self.weights, copy, self.weights / typical / copy)


def bench(args: argparse.Namespace) -> Iterator[tuple[list[Row], PlainStep]]:
    """What is known after every temperature and concurrency."""
    copy = copy_rate()
    prompts = read_prompts(
        args.prompts, AutoTokenizer.from_pretrained(EngineConfig.model), max(args.fewest, max(args.concurrency) * args.per_stream)
    )
    systems = Systems(args, max(map(len, prompts)))
    step = systems.plain_step(prompts[0], copy, args.max_tokens)
    print(
        f"a plain step of one stream: {step.milliseconds:.2f} ms, {step.share:.0%} of {copy:.0f} GB/s over {step.weights:.2f} GB",
        flush=True,
    )
    result: list[Row] = []
    for temperature in args.temperature:
        for concurrency in args.concurrency:
            names = [PLAIN, SPECULATION, *([GENERATE, LOOKUP] if concurrency == 1 and temperature == 0 else [])]
            turn = partial(systems.run, concurrency=concurrency, temperature=temperature, tokens=args.max_tokens)
            part = prompts[: max(concurrency * args.per_stream, args.fewest)]
            title = f"T={temperature:g} concurrency {concurrency}"
            measured, failed = measure(names, turn, part, concurrency, args.rounds, title)
            result += rows(measured, PLAIN, concurrency, temperature, ())  # in 16 bits texts may part at a tie
            result += [Row(name, concurrency, temperature, missing=why) for name, why in failed.items()]
            print(table(result[-len(names) :]), *filter(None, map(_per_token, result[-len(names) :])), sep="\n", flush=True)
            yield result, step


def _per_token(row: Row) -> str:
    """What is left of the acceptance length as speed."""
    if row.system != SPECULATION or not row.acceptance_length or not row.speedup_vs_plain:
        return ""
    return f"speed against plain over acceptance length: {row.speedup_vs_plain / row.acceptance_length:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--like", default="llama-3.1-8b", help=f"{', '.join(LIKE)}, or sizes as tools.bench.inflate takes (default %(default)s)"
    )
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE", help="JSON lines with turns, messages or prompt")
    parser.add_argument("--concurrency", type=counts, default=[1, 32, 128], metavar="N,N", help="default 1,32,128")
    parser.add_argument("--temperature", type=temperatures, default=[0.0, 1.0], metavar="T,T", help="default 0,1")
    parser.add_argument("--per-stream", type=positive, default=1, metavar="N", help="prompts for every stream (default %(default)s)")
    parser.add_argument("--fewest", type=positive, default=3, metavar="N", help="prompts at least (default %(default)s)")
    parser.add_argument("--max-tokens", type=positive, default=96, metavar="N", help="generated per prompt (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="measured rounds (default %(default)s)")
    parser.add_argument("--tree-nodes", type=positive, default=32, metavar="N", help="default %(default)s")
    parser.add_argument("--tree-depth", type=positive, default=7, metavar="N", help="default %(default)s")
    parser.add_argument("--tree-topk", type=positive, default=6, metavar="N", help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tools.bench.gpu needs an NVIDIA GPU, and torch finds none.", file=sys.stderr)
        return 1
    settings = {name: getattr(args, name) for name in ("like", "rounds", "max_tokens", "tree_nodes", "tree_depth", "tree_topk")}
    known = {"device": torch.cuda.get_device_name(), "dtype": "bfloat16"} | settings
    for result, step in bench(args):
        if args.json:
            args.json.write_text(json.dumps(known | {"plain_step": asdict(step), "rows": [asdict(row) for row in result]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

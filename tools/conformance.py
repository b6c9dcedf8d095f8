"""make conformance: exported heads in the speculators package and in vLLM's CPU build, against the same heads here.

Runs in an environment of its own, which has those two; argument: what ``tools.train_vsd evaluate --json`` measured here for the same
prompts and chain of drafts.
"""

import json
import os
import sys

# Before the imports that read them: nothing is fetched or reported.
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # works in containers, where binding to cores may not

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from drafts.checkpoint import read_head, save_head
from drafts.eagle3 import Eagle3Head
from tools.prompts import read_prompts
from tools.train_vsd.export import causal, export_head

TARGET, DRAFT = "drafts/demo/target", "drafts/demo/eagle3"
PROMPTS = Path("benchmarks/prompts/gsm8k_test.jsonl")
LOGITS_TOLERANCE = 1e-4
LENGTH_TOLERANCE = 0.05  # of the acceptance length
VARIANTS: tuple[dict[str, object], ...] = (
    {},
    {"draft_vocab_size": 1000},
    {"norm_before_residual": True},
    {"norm_output": True},
    {"own_embedding": True},
)


def main() -> None:
    ours = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with TemporaryDirectory() as folder:
        failures = check_speculators(Path(folder)) + check_vllm(Path(folder), ours)
    if failures:
        raise SystemExit(f"error: {failures} of the comparisons failed")


def verdict(what: str, found: float, limit: float) -> int:
    """Prints one comparison. 1 where it failed."""
    print(f"{'ok' if found <= limit else 'FAILED':6} {what}: {found:.2g}, limit {limit:g}", flush=True)
    return int(not found <= limit)


# --- speculators: the same logits ------------------------------------------------------------------------------------------


def check_speculators(folder: Path) -> int:
    failures = 0
    for number, options in enumerate(VARIANTS):
        source, exported = folder / f"head{number}", folder / f"speculators{number}"
        head = variant(options)
        save_head(source, head, torch.float32)
        export_head(str(source), "speculators", exported, TARGET)
        what = ", ".join(f"{key}={value}" for key, value in options.items()) or "as trained"
        failures += verdict(f"speculators, largest difference of logits, {what}", logits_difference(head, exported), LOGITS_TOLERANCE)
    return failures


def variant(options: dict[str, object]) -> Eagle3Head:
    """The demo head with other settings; weights that they leave without a value are random."""
    trained = read_head(Path(DRAFT), AutoConfig.from_pretrained(TARGET)).requires_grad_(False)
    torch.manual_seed(0)
    head = Eagle3Head(replace(trained.config, **options)).requires_grad_(False)  # type: ignore[arg-type]
    head.load_state_dict({name: t for name, t in trained.state_dict().items() if name != "lm_head.weight"}, strict=False)
    if head.d2t is None:
        head.lm_head.load_state_dict(trained.lm_head.state_dict())
    else:
        head.d2t.copy_(torch.arange(len(head.d2t)) * 3)
    if head.embed_tokens is not None:
        head.embed_tokens.normal_()
    return head


@torch.no_grad()
def logits_difference(head: Eagle3Head, exported: Path, rows: int = 32) -> float:
    """The largest |logit| difference between ``head`` and what the speculators package makes of ``exported``."""
    from speculators import SpeculatorModel, SpeculatorModelConfig  # type: ignore[import-not-found]

    config = SpeculatorModelConfig.from_pretrained(str(exported))
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(str(exported), config=config, dtype=torch.float32)
    model.load_verifier_weights()
    theirs: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: theirs.append(logits))
    torch.manual_seed(0)
    tokens, features = torch.randint(head.config.vocab_size, (rows,)), torch.randn(rows, 3 * head.config.target_hidden_size)
    model(features[None], tokens[None], torch.zeros(1, rows, dtype=torch.int64), ttt_steps=1)
    head.share_embedding(model.embed_tokens.weight)
    ours = head.logits(head(head.embed(tokens), head.combine(features), head.angles(torch.arange(rows)), causal))
    return float((ours - theirs[0][0]).abs().max())


# --- vLLM: the same acceptance length --------------------------------------------------------------------------------------


def check_vllm(folder: Path, ours: dict[str, Any]) -> int:
    prompts = read_prompts(PROMPTS, AutoTokenizer.from_pretrained(TARGET), ours["num_prompts"])
    length, failures = ours["acceptance_length"], 0
    for layout in ("sglang", "speculators"):
        export_head(DRAFT, layout, folder / layout, TARGET)
        theirs = vllm_length(folder / layout, prompts, ours["tree"]["depth"], ours["max_tokens"])
        what = f"vLLM, {layout} layout, acceptance length {theirs:.4f} against {length:.4f}, relative difference"
        failures += verdict(what, abs(theirs / length - 1), LENGTH_TOLERANCE)
    return failures


def vllm_length(draft: Path, prompts: list[list[int]], chain: int, max_tokens: int) -> float:
    """Tokens committed per verification of ``chain`` drafts at temperature 0, bonus token counted, in float32."""
    from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found]

    llm = LLM(
        model=TARGET,
        dtype="float32",
        max_num_seqs=len(prompts),
        enforce_eager=True,
        disable_log_stats=False,  # the counters below are among them
        speculative_config={"method": "eagle3", "model": str(draft), "num_speculative_tokens": chain},
    )
    llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], SamplingParams(temperature=0, max_tokens=max_tokens))
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    llm.llm_engine.engine_core.shutdown()
    return 1 + counters["vllm:spec_decode_num_accepted_tokens"] / counters["vllm:spec_decode_num_drafts"]


if __name__ == "__main__":
    main()

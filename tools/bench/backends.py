"""The systems that are measured, one class each. What a class needs is imported when it loads, by the process that holds it."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tools.bench.llama_cpp import LlamaCpp
from tools.bench.work import PLAIN, SPECULATION, Answers, Backend, Settings, Work


class Engine:
    """This project's engine, in process: speculative and plain, over one copy of the model."""

    def __init__(self, settings: Settings) -> None:
        from server.engine.config import EngineConfig
        from server.engine.engine import Engine
        from server.engine.host import keep_what_is_loaded
        from server.engine.loading import load
        from server.engine.target import Target

        config = EngineConfig(
            settings.model, settings.draft, settings.device, settings.dtype, threads=settings.threads, max_model_len=settings.max_length,
            max_num_seqs=settings.concurrency, prefix_caching=False,  # rounds repeat the prompts
        )  # fmt: skip
        self.version = importlib.metadata.version("vsd-serve")
        target, head, tokenizer = load(config)
        self.engines = {
            SPECULATION: Engine(target, head, tokenizer, config),
            PLAIN: Engine(Target(target.model, taps=False, decoder=target.decoder), None, tokenizer, config),
        }
        keep_what_is_loaded()  # as the server does

    def run(self, work: Work) -> Answers:
        return answers_of(self.engines[work.system], work)


def answers_of(engine: Any, work: Work) -> Answers:
    """What one of this project's engines makes of ``work``."""
    from server.engine.types import SamplingParams
    from tools.train_vsd.generate import complete

    requests = [
        (prompt, SamplingParams(max_tokens=work.max_tokens, temperature=work.temperature, seed=seed, ignore_eos=True))
        for seed, prompt in enumerate(work.prompts)
    ]
    done = sorted(complete(engine, requests, work.concurrency), key=lambda completion: completion.index)
    stats = [completion.speculation for completion in done]
    return Answers([c.token_ids for c in done], sum(s.num_steps for s in stats), sum(s.num_accepted_tokens for s in stats))


class Transformers:
    """transformers' generate: left-padded batches, or prompt lookup, which takes one prompt at a time."""

    def __init__(self, settings: Settings) -> None:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, GenerationConfig

        self.version = transformers.__version__
        device = settings.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype)).to(device).eval()
        self.model.generation_config = GenerationConfig()  # no end-of-sequence token, and none of the model's own sampling options
        self.draft_tokens = settings.draft_tokens
        self.forwards = 0
        self.model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def run(self, work: Work) -> Answers:
        import torch

        lookup = work.system == "hf-prompt-lookup"
        if lookup and work.concurrency > 1:
            raise ValueError("assisted generation takes one prompt at a time")
        torch.manual_seed(0)
        self.forwards = 0
        answers: list[list[int]] = []
        for batch in batches(work.prompts, work.concurrency):
            answers += generated(self.model, batch, work, {"prompt_lookup_num_tokens": self.draft_tokens} if lookup else {})
        if not lookup:
            return Answers(answers)
        return Answers(answers, self.forwards, sum(map(len, answers)) - self.forwards)


def generated(model: Any, prompts: list[list[int]], work: Work, options: dict[str, Any]) -> list[list[int]]:
    """transformers' generate on a left-padded batch; the model's generation config must have no end-of-sequence token."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    if work.temperature > 0:
        options |= {"do_sample": True, "temperature": work.temperature, "top_k": 0}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=work.max_tokens, pad_token_id=0, **options)
    return out[:, width:].tolist()


class CTranslate2:
    """CTranslate2's generator, on a converted copy of the model that is kept."""

    def __init__(self, settings: Settings) -> None:
        import ctranslate2  # type: ignore[import-not-found]

        self.version = ctranslate2.__version__
        folder = Path(settings.converted) / f"ctranslate2-{settings.dtype}"
        if not folder.exists():
            self._convert(settings, folder)
        self.generator = ctranslate2.Generator(
            str(folder), device=settings.device, compute_type=settings.dtype, intra_threads=settings.threads, inter_threads=1
        )
        self.vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def _convert(self, settings: Settings, folder: Path) -> None:
        """In a process of its own: what the conversion imports and holds does not stay."""
        unfinished = folder.with_suffix(".unfinished")
        command = [sys.executable, "-m", "ctranslate2.converters.transformers", "--model", settings.model, "--force"]
        subprocess.run([*command, "--output_dir", str(unfinished), "--quantization", settings.dtype], check=True)
        vocabulary = json.loads((unfinished / "vocabulary.json").read_text(encoding="utf-8"))
        config = json.loads((unfinished / "config.json").read_text(encoding="utf-8"))
        # It does not load a model without these tokens. Which ones they are makes no difference: no prompt or answer depends on them.
        config |= {name: vocabulary[0] for name in ("bos_token", "eos_token", "unk_token") if config.get(name) is None}
        (unfinished / "config.json").write_text(json.dumps(config), encoding="utf-8")
        unfinished.rename(folder)

    def run(self, work: Work) -> Answers:
        import ctranslate2

        ctranslate2.set_random_seed(0)
        sampling = {"sampling_topk": 0, "sampling_temperature": work.temperature} if work.temperature > 0 else {}
        results = self.generator.generate_batch(
            [[self.vocabulary[token] for token in prompt] for prompt in work.prompts],
            max_batch_size=work.concurrency, max_length=work.max_tokens, end_token=[], include_prompt_in_result=False, **sampling,
        )  # fmt: skip
        return Answers([list(result.sequences_ids[0]) for result in results])


class Vllm:
    """vLLM's engine in this process: plain, or with n-gram or EAGLE-3 speculation by chains. Compiled, as vLLM does by default."""

    def __init__(self, settings: Settings, method: Literal["ngram", "eagle3"] | None = None) -> None:
        # Read by the imports: a second process would poll, and threads bound to cores collapse where cores are shared.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        import vllm  # type: ignore[import-not-found]

        self.version = vllm.__version__
        options: dict[str, dict[str, Any]] = {
            "ngram": {"prompt_lookup_min": 1, "prompt_lookup_max": 4},
            "eagle3": {"model": settings.draft},
        }
        speculation = {"method": method, "num_speculative_tokens": settings.draft_tokens, **options[method]} if method else None
        self.llm = vllm.LLM(
            model=settings.model,
            dtype=settings.dtype,
            max_num_seqs=settings.concurrency,
            max_model_len=settings.max_length,
            kv_cache_memory_bytes=kv_cache_bytes(settings),
            enable_prefix_caching=False,  # the same prompts come every round
            disable_log_stats=False,  # the counters of speculation are among them
            speculative_config=speculation,
        )

    def run(self, work: Work) -> Answers:
        before = self._counters()
        token_ids = dict(self._complete(work))
        steps, accepted = (after - then for after, then in zip(self._counters(), before, strict=True))
        return Answers([token_ids[i] for i in range(len(work.prompts))], steps, accepted)

    def _complete(self, work: Work) -> Iterator[tuple[int, list[int]]]:
        from vllm import SamplingParams, TokensPrompt

        engine, upcoming = self.llm.llm_engine, iter(enumerate(work.prompts))
        running: dict[str, int] = {}
        while True:
            for index, prompt in islice(upcoming, work.concurrency - len(running)):
                sampling = SamplingParams(
                    temperature=work.temperature, max_tokens=work.max_tokens, ignore_eos=True, seed=index, detokenize=False
                )
                engine.add_request(str(index), TokensPrompt(prompt_token_ids=prompt), sampling)
                running[str(index)] = index
            if not running:
                return
            for output in engine.step():
                if output.finished:
                    yield running.pop(output.request_id), list(output.outputs[0].token_ids)

    def _counters(self) -> tuple[int, int]:
        """Verifications and accepted draft tokens so far."""
        counters = {metric.name: metric.value for metric in self.llm.get_metrics() if hasattr(metric, "value")}
        return tuple(int(counters.get(f"vllm:spec_decode_num_{name}", 0)) for name in ("drafts", "accepted_tokens"))  # type: ignore[return-value]


def kv_cache_bytes(settings: Settings) -> int:
    """What ``concurrency`` requests need in vLLM's blocks, at most 128 tokens each, with a layer more for the draft head."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(settings.model).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * (config.num_hidden_layers + 1) * heads * head_size * getattr(torch, settings.dtype).itemsize
    return per_token * 128 * (settings.concurrency + 1) * (-(-(settings.max_length + settings.draft_tokens) // 128) + 1)


def batches(prompts: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(prompts), size):
        yield list(prompts[start : start + size])


BACKENDS: dict[str, Callable[[Settings], Backend]] = {
    "vsd-serve": Engine,
    "hf": Transformers,
    "ctranslate2": CTranslate2,
    "vllm": Vllm,
    "vllm-ngram": partial(Vllm, method="ngram"),
    "llama.cpp": LlamaCpp,
    "vllm-eagle3": partial(Vllm, method="eagle3"),
}

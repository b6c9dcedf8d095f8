"""Token equality on a real GPU: the engine against transformers, speculation against plain decoding. Needs pytest and torch only.

A GPU's matrix products round differently for different numbers of rows, so that two tokens whose scores are equal up to rounding may
change places; texts may part there and nowhere else.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kernels.noise import gumbel_noise
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.lean import LeanDecoder
from server.engine.target import Target
from server.engine.types import SamplingParams
from tests.engine.engines import Result, letter_tokenizer, random_head, run
from tests.engine.prompts import PROMPTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE = "cuda"
DEMO = Path(__file__).resolve().parents[3] / "drafts" / "demo"
NEW = 64
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128_256, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


@torch.inference_mode()
def check_same(
    model: PreTrainedModel, requests: list[tuple[list[int], SamplingParams]], ours: list[list[int]], expected: list[list[int]],
    rounding: float, most: int,
) -> None:  # fmt: skip
    """Equal texts, but for at most ``most`` that part between two tokens whose scores differ by less than ``rounding``."""
    parted = 0
    for (prompt, params), mine, other in zip(requests, ours, expected, strict=True):
        place = next((i for i, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            assert len(mine) == len(other)
            continue
        scores = model(torch.tensor([prompt + mine[:place]], device=model.device)).logits[0, -1].float()
        if not params.greedy:
            key = torch.tensor([params.seed], device=model.device), torch.tensor([len(prompt) + place], device=model.device)
            scores = scores / params.temperature + gumbel_noise(*key, len(scores))[0]
        gap = float((scores[mine[place]] - scores[other[place]]).abs())
        assert gap < rounding, f"token {place}: {mine[place]} and {other[place]} are {gap} apart"
        parted += 1
    assert parted <= most, f"{parted} of {len(requests)} texts part at a tie"


def texts(results: list[Result]) -> list[list[int]]:
    return [result.token_ids for result in results]


@pytest.fixture(scope="module")
def demo() -> dict[str, Engine]:
    paths = {"model": str(DEMO / "target"), "device": DEVICE, "dtype": "float32", "load_rule": False, "max_model_len": 192}
    return {
        "plain": Engine.from_config(EngineConfig(**paths, draft=None)),
        "speculative": Engine.from_config(EngineConfig(**paths, draft=str(DEMO / "vsd"))),
        # The target goes ahead of such trees, and prompts are computed along with them.
        "few nodes": Engine.from_config(EngineConfig(**paths, draft=str(DEMO / "vsd"), tree_nodes=4, max_num_seqs=6)),
    }


@pytest.fixture(scope="module")
def demo_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO / "target", dtype=torch.float32).to(DEVICE).eval()


@pytest.fixture(scope="module")
def greedy(demo: dict[str, Engine], demo_model: PreTrainedModel) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what ``generate`` writes after each."""
    prompts = [demo["plain"].tokenizer(prompt).input_ids for prompt in PROMPTS[::8]]
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=DEVICE)
        out = demo_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        texts.append(out[0, len(prompt) :].tolist())
    return prompts, texts


@pytest.mark.parametrize("kind", ["plain", "speculative", "few nodes"])
def test_demo_pair_equals_generate(
    kind: str, demo: dict[str, Engine], demo_model: PreTrainedModel, greedy: tuple[list[list[int]], list[list[int]]]
) -> None:
    requests = [(prompt, SamplingParams(max_tokens=NEW, temperature=0)) for prompt in greedy[0]]
    results = run(demo[kind], requests)
    check_same(demo_model, requests, texts(results), greedy[1], 1e-3, most=1)
    if kind != "plain":
        steps = sum(result.speculation.num_steps for result in results)
        assert sum(result.speculation.num_accepted_tokens for result in results) > steps // 2


@pytest.mark.parametrize("kind", ["speculative", "few nodes"])
def test_demo_pair_samples_the_same_text_with_and_without_speculation(
    kind: str, demo: dict[str, Engine], demo_model: PreTrainedModel
) -> None:
    kinds: list[dict] = [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 20, "repetition_penalty": 1.2}, {"min_p": 0.05}]
    requests = [
        (demo["plain"].tokenizer(prompt).input_ids, SamplingParams(max_tokens=NEW, seed=i, **kinds[i % len(kinds)]))
        for i, prompt in enumerate(PROMPTS[1::8])
    ]
    plain, speculative = (texts(run(demo[of], requests)) for of in ("plain", kind))
    unfiltered = [i for i in range(len(requests)) if i % len(kinds) == 0]
    check_same(
        demo_model, [requests[i] for i in unfiltered], [speculative[i] for i in unfiltered], [plain[i] for i in unfiltered], 1e-3, most=1
    )
    assert sum(mine != other for mine, other in zip(speculative, plain, strict=True)) <= 2


@pytest.mark.parametrize(("dtype", "rounding", "most"), [(torch.float32, 1e-3, 1), (torch.bfloat16, 0.1, 16)])
def test_random_model_of_a_billion_parameters(dtype: torch.dtype, rounding: float, most: int) -> None:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B)).to(dtype).eval()
    head = random_head(model).to(DEVICE, dtype)
    tokenizer = letter_tokenizer(26)
    config = EngineConfig(load_rule=False, max_num_seqs=8, max_model_len=256, tree_nodes=32, kv_cache_memory=2 << 30)
    prompts = torch.randint(0, LLAMA_1B["vocab_size"], (16, 20)).tolist()
    requests = [(prompt, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)) for prompt in prompts]
    decoder = LeanDecoder(model)
    plain = texts(run(Engine(Target(model, taps=False, decoder=decoder), None, tokenizer, config), requests))
    speculative = texts(run(Engine(Target(model, taps=True, decoder=decoder), head, tokenizer, config), requests))
    model.set_attn_implementation("sdpa")
    check_same(model, requests, speculative, plain, rounding, most)

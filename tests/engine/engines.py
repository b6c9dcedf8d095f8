"""Small models, heads and tokenizers, engines made of them, and runs to the end."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from drafts.eagle3 import Eagle3Config, Eagle3Head
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.target import Decoder, Target
from server.engine.types import RequestOutput, SamplingParams, SpeculationStats, StepStats, TokenLogprob

EOS = 256  # of the byte tokenizer
VOCAB = 260
POSITIONS = 256
POISON = 77  # a token whose embedding is NaN in poisoned_model
_SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "intermediate_size": 48}
_GROUPED = {**_SIZE, "num_key_value_heads": 2}
_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_TWO_KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_SLIDING = {"sliding_window": 6, "layer_types": _TWO_KINDS}
SHAPES: dict[str, dict] = {
    "llama": _HEAD_DIM,
    "mistral": {**_HEAD_DIM, "sliding_window": 6},
    "qwen2": {**_GROUPED, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 6},
    "qwen3": {**_HEAD_DIM, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 6},
    "gemma": {**_HEAD_DIM, "num_key_value_heads": 1},
    "gemma2": {**_HEAD_DIM, **_SLIDING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 20.0, "query_pre_attn_scalar": 5},
    "gemma3_text": {**_HEAD_DIM, **_SLIDING, "query_pre_attn_scalar": 5},
    "phi3": {**_GROUPED, "sliding_window": 6},
    "gpt_neox": _SIZE,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "mixtral": {**_GROUPED, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_HEAD_DIM, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
    "granite": {**_GROUPED, "attention_multiplier": 0.4, "residual_multiplier": 0.6, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "smollm3": {**_GROUPED, "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "layer_types": _TWO_KINDS, "sliding_window": 6},
    "cohere2": {**_GROUPED, **_SLIDING, "logit_scale": 1.0},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": POSITIONS, "n_inner": 48},
    "opt": {
        "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 48,
        "max_position_embeddings": POSITIONS,
    },
}  # fmt: skip
"""Configurations that differ from the plain Llama decoder in every way that their type allows; windows are small enough to matter."""


def tiny_model(model_type: str = "llama", seed: int = 0, spread: float = 0.25, **changes: object) -> PreTrainedModel:
    """A random float32 model whose logits are far enough apart that rounding does not decide; no end-of-sequence token."""
    torch.manual_seed(seed)
    ids = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    spreads = {"initializer_range": spread, "init_std": spread, "tie_word_embeddings": False}
    config = AutoConfig.for_model(model_type, **{**ids, **spreads, **SHAPES[model_type], **changes})
    # eager: the fused attention of older transformers drops Gemma 2's soft cap, and this model is what we are compared with
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def poisoned_model() -> PreTrainedModel:
    """A tiny Llama for which POISON makes NaN; it never generates that token."""
    model = tiny_model("llama", spread=0.15)
    model.model.embed_tokens.weight.data[POISON] = float("nan")
    model.lm_head.weight.data[POISON] = 0
    return model


def random_head(model: PreTrainedModel, **changes: int) -> Eagle3Head:
    """A head that fits the model and knows nothing."""
    torch.manual_seed(1)
    hidden = model.config.hidden_size
    shape = {
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "vocab_size": model.config.vocab_size, "draft_vocab_size": model.config.vocab_size, "target_hidden_size": hidden,
        "max_position_embeddings": model.config.max_position_embeddings,
    }  # fmt: skip
    head = Eagle3Head(Eagle3Config(**{**shape, **changes})).requires_grad_(False)
    head.share_embedding(model.get_input_embeddings().weight)
    return head


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that characters beyond ASCII are split; id = byte value, then <eos> and three fillers."""
    letters = {letter: i for i, letter in enumerate(_byte_letters())}
    vocab = {**letters, "<eos>": EOS, "<x>": 257, "<y>": 258, "<z>": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in for every byte, in the order of the bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def letter_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Tokens a, b, c, ..."""
    tokenizer = Tokenizer(models.WordLevel({chr(ord("a") + i): i for i in range(size)}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def build(
    model: PreTrainedModel,
    head: Eagle3Head | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    decoder: Callable[[PreTrainedModel], Decoder] | None = None,
    **config: object,
) -> Engine:
    """An engine over a copy of ``model``, so that the original stays as transformers made it. No load rule unless asked for."""
    options = {"load_rule": False, "max_num_seqs": 8, "block_size": 4, **config}
    copied = copy.deepcopy(model)
    if head is not None and head.embed_tokens is None:
        head.share_embedding(copied.get_input_embeddings().weight)
    target = Target(copied, head is not None, decoder(copied) if decoder else None)
    return Engine(target, head, tokenizer or byte_tokenizer(), EngineConfig(**options))


@dataclass
class Result:
    """All outputs of one request together."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    token_texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: RequestOutput | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None

    def add(self, output: RequestOutput) -> None:
        assert self.last is None or self.last.finish_reason is None, "an output after the last"
        assert len(output.token_ids) == len(output.token_texts)
        assert output.logprobs is None or len(output.logprobs) == len(output.token_ids)
        self.token_ids += output.token_ids
        self.text += output.text
        self.token_texts += output.token_texts
        self.logprobs += output.logprobs or []
        if output.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "prompt log-probabilities twice"
            self.prompt_logprobs = output.prompt_logprobs
        self.last = output

    @property
    def finish_reason(self) -> str | None:
        return None if self.last is None else self.last.finish_reason

    @property
    def speculation(self) -> SpeculationStats:
        assert self.last is not None
        assert self.last.speculation is not None
        return self.last.speculation


class Run:
    """Requests of one engine, by id, as they go."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.results: dict[str, Result] = {}
        self.stats: list[StepStats] = []

    def add(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        self.engine.add_request(request_id, prompt, params)
        self.results[request_id] = Result()

    def step(self) -> None:
        outputs, stats = self.engine.step()
        self.stats.append(stats)
        for output in outputs:
            self.results[output.request_id].add(output)

    def finish(self) -> dict[str, Result]:
        while self.engine.has_work():
            assert len(self.stats) < 100_000, "the engine makes no progress"
            self.step()
        assert self.engine.pool.usage == 0, "blocks leaked"
        return self.results


def run(engine: Engine, requests: Sequence[tuple[list[int], SamplingParams]]) -> list[Result]:
    """Everything at once, to the end; ids are the places in ``requests``. No request may fail."""
    going = Run(engine)
    for i, (prompt, params) in enumerate(requests):
        going.add(str(i), prompt, params)
    results = list(going.finish().values())
    assert [result.last.error for result in results if result.last is not None] == [None] * len(requests)
    return results

"""The demo target: a small Llama and its training loop."""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.demo.tokenizer import TURN_END
from tools.muon import Muon


def demo_config(tokenizer: PreTrainedTokenizerFast, context: int) -> LlamaConfig:
    """Deep and narrow: at this size a layer's fixed overhead sets its cost, and a one-layer draft head is then cheap."""
    eos = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)]
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
    )


def _rate(progress: float) -> float:
    """Warm up over 2 %, hold, fall linearly to zero over the second half."""
    return min(1.0, progress / 0.02, 2 * (1 - progress))


def train_model(model: LlamaForCausalLM, batches: Iterator[Tensor], minutes: float, checkpoint: Callable[[LlamaForCausalLM], None]) -> int:
    """Train ``model`` for ``minutes`` of wall time on ``batches`` (int64 [rows, context]); return the tokens seen."""
    model.train()
    device = model.device
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimisers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    base_rates = [0.02, 3e-3]
    tokens, start, last_checkpoint = 0, time.monotonic(), time.monotonic()
    smoothed = math.log(model.config.vocab_size)
    with tqdm(total=round(minutes * 60), unit="s", desc="training", mininterval=5) as bar:
        while (elapsed := time.monotonic() - start) < minutes * 60:
            batch = next(batches).to(device)
            for optimiser, rate in zip(optimisers, base_rates, strict=True):
                optimiser.param_groups[0]["lr"] = rate * max(1e-3, _rate(elapsed / (minutes * 60)))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            tokens += batch.numel()
            smoothed = 0.98 * smoothed + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smoothed:.3f}", tokens=f"{tokens / 1e6:.2f}M")
            bar.update(round(time.monotonic() - start) - bar.n)
            if time.monotonic() - last_checkpoint > 300:
                checkpoint(model)
                last_checkpoint = time.monotonic()
    model.eval()
    return tokens

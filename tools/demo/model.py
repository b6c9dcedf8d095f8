"""The demo target: a small Llama and its training loop."""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.demo.tokenizer import TURN_END


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


def _orthogonalise(matrix: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al., 2024) in float32: nearest semi-orthogonal matrix, roughly."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon in float32. torch's own iterates in bfloat16, which processors without it emulate fifty times slower."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.lerp_(weight.grad, 1 - group["momentum"])
                update = _orthogonalise(weight.grad.lerp(velocity, group["momentum"]))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


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

"""The training loop: one head, one objective, a budget in steps or minutes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from drafts.eagle3 import Eagle3Head
from tools.muon import Muon
from tools.train_vsd.data import Row, batches, collate, grouped
from tools.train_vsd.objectives import OBJECTIVES, agreement
from tools.train_vsd.teacher import Teacher
from tools.train_vsd.unroll import unroll

CHECKPOINT_SECONDS = 300
MUON_RATE = 0.02


@dataclass(frozen=True)
class TrainSettings:
    """``steps`` or ``minutes`` is the budget. ``depth``: unrolled steps. ``batch_tokens``: padded tokens of a batch.

    ``learning_rate``, of all but the layer's matrices: None scales with the width, 1e-3 at a hidden size of 256, 6e-5 at 4096.
    """

    objective: str = "eagle3"
    steps: int | None = None
    minutes: float | None = None
    depth: int = 5
    batch_tokens: int = 2048
    learning_rate: float | None = None
    seed: int = 0

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the budget that is spent. ``elapsed`` in seconds."""
        return elapsed / (60 * self.minutes) if self.minutes is not None else step / (self.steps or 1)


def rate(progress: float) -> float:
    """Warm up over 3 %, hold to the middle, fall linearly to zero."""
    return max(0.0, min(1.0, progress / 0.03 + 1e-3, 2 * (1 - progress)))


def train(
    head: Eagle3Head, teacher: Teacher, rows: Sequence[Row], settings: TrainSettings, checkpoint: Callable[[Eagle3Head], None]
) -> int:
    """Train ``head`` in place; return the number of steps. ``checkpoint`` is called every few minutes."""
    objective = OBJECTIVES[settings.objective]
    draft_ids = draft_vocabulary(head)
    device = head.fc.weight.device
    parameters = list(head.requires_grad_().train().parameters())
    base_rate = settings.learning_rate or 0.256 / head.config.hidden_size
    groups = optimisers(head, base_rate, teacher.feature_rms(collate(rows[:8]).to(device)).mean().item())
    base_rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in groups]
    smoothed: list[float] = []
    source = batches(rows, settings.batch_tokens, settings.seed)
    step, start = 0, time.monotonic()
    saved = start
    with tqdm(total=settings.steps, desc=settings.objective, mininterval=2) as bar:
        while (progress := settings.progress(step, time.monotonic() - start)) < 1:
            batch = next(source).to(device)
            features, distributions = teacher(batch, draft_ids)
            loss = objective(head, unroll(head, batch, features, settings.depth), batch, distributions)
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            for optimiser, rates in zip(groups, base_rates, strict=True):
                for group, group_rate in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = group_rate * rate(progress)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            step += 1
            smoothed = _smooth(smoothed, [loss.total.item(), *loss.accuracy.tolist()])
            accuracy = " ".join(f"{a:.2f}" for a in smoothed[1:])
            bar.set_postfix_str(f"{progress:.0%} loss {smoothed[0]:.3f} accuracy {accuracy}", refresh=False)
            bar.update()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                checkpoint(head)
                saved = time.monotonic()
    head.requires_grad_(False).eval()
    return step


def optimisers(head: Eagle3Head, learning_rate: float, feature_rms: float) -> list[torch.optim.Optimizer]:
    """Muon for the layer's four matrices, AdamW for the rest; the rate of ``fc`` is in units of the features that it reads."""
    matrices = [head.qkv_proj.weight, head.o_proj.weight, head.gate_up_proj.weight, head.down_proj.weight]
    apart = {id(weight) for weight in (*matrices, head.fc.weight)}
    adam = torch.optim.AdamW(
        [
            {"params": [head.fc.weight], "lr": learning_rate / feature_rms},
            {"params": [weight for weight in head.parameters() if id(weight) not in apart], "lr": learning_rate},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    return [Muon(matrices, lr=MUON_RATE, weight_decay=0.0), adam]


def _smooth(old: list[float], new: list[float]) -> list[float]:
    """Exponential averages; a short batch has fewer steps and leaves the later averages alone."""
    averaged = [0.9 * a + 0.1 * b for a, b in zip(old, new, strict=False)]
    return averaged + (old[len(new) :] or new[len(old) :])


def draft_vocabulary(head: Eagle3Head) -> torch.Tensor | None:
    """Target ids of a reduced draft vocabulary [Vd], None for the full one."""
    if head.d2t is None:
        return None
    return head.to_target_ids(torch.arange(head.config.draft_vocab_size, device=head.d2t.device))


@torch.no_grad()
def held_out_agreement(head: Eagle3Head, teacher: Teacher, rows: Sequence[Row], settings: TrainSettings) -> dict[str, float]:
    """Per step k on rows that were not trained on: ``accuracy_k``, the head's first choice is the target's (survival at temperature 0
    of a chain that survived so far), and ``overlap_k``, sum_v min(p, q) (acceptance by speculative sampling at temperature 1)."""
    sums = torch.zeros(settings.depth, 3)
    for group in grouped(sorted(rows, key=lambda row: len(row.answer)), settings.batch_tokens):
        batch = collate(group).to(head.fc.weight.device)
        features, distributions = teacher(batch, draft_vocabulary(head))
        sums += agreement(head, unroll(head, batch, features, settings.depth), batch, distributions)
    means = sums[:, 1:] / sums[:, :1].clamp(min=1)
    names = [(f"accuracy_{k}", f"overlap_{k}") for k in range(1, settings.depth + 1)]
    return {name: round(value, 4) for pair, mean in zip(names, means.tolist(), strict=True) for name, value in zip(pair, mean, strict=True)}

"""The training loop: one head, one objective; every step is an E-step on fresh rows and an M-step on its paths."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from drafts.eagle3 import Eagle3Head
from server.engine.target import Target
from tools.muon import Muon
from tools.train_vsd.data import Batches, Row, collate, grouped
from tools.train_vsd.e_step import PathBatch, PathSampler, target_rows, text_noise
from tools.train_vsd.m_step import OBJECTIVES, Objective, VsdSettings, overlap
from tools.train_vsd.teacher import Teacher

MUON_RATE = 0.02
WARM_RATE = 0.3  # of the rates, for heads that were trained before: at the full ones they lose first
CHUNK = 64  # paths whose logits are made at a time: they stay in the processor's cache and never exist all at once


@dataclass(frozen=True)
class TrainSettings:
    """``steps`` or ``minutes`` is the budget. ``depth``: unrolled steps. ``batch_tokens``: padded tokens of a batch; ``accumulate``:
    batches per optimiser step, shared out among the processes. ``anchors``: of every row, from which paths are drafted and verified;
    0: the E-step takes the target's text.

    ``learning_rate``, of all but the layer's matrices: None scales with the width, 1e-3 at a hidden size of 256, 6e-5 at 4096.
    ``warm``: the head was trained before, all rates are WARM_RATE times theirs.
    """

    objective: str = "vsd"
    steps: int | None = None
    minutes: float | None = None
    depth: int = 5
    batch_tokens: int = 2048
    accumulate: int = 1
    learning_rate: float | None = None
    warm: bool = False
    seed: int = 0
    anchors: int = 0
    vsd: VsdSettings = field(default_factory=VsdSettings)

    def progress(self, step: int, elapsed: float, prepared: float = 0.0) -> float:
        """Share of the budget that is spent, in seconds ``elapsed`` of training. Of ``minutes``, ``prepared`` seconds were gone before
        training began; a tenth is left for it in any case."""
        if self.minutes is None:
            return step / (self.steps or 1)
        return elapsed / max(60 * self.minutes - prepared, 6 * self.minutes)


def rate(progress: float) -> float:
    """Warm up over 3 %, then fall linearly to zero."""
    return max(0.0, min(progress / 0.03 + 1e-3, (1 - progress) / 0.97))


class Result(NamedTuple):
    """Of one optimiser step: mean loss per path, and per draft step the share of first choices that are the target's."""

    loss: float
    accuracy: list[float]


class Trainer:
    """A head in training. ``step`` is a pure function of the state that ``state_dict`` returns and of its arguments."""

    def __init__(self, head: Eagle3Head, teacher: Teacher, rows: Sequence[Row], settings: TrainSettings) -> None:
        self.head, self.teacher, self.settings = head.requires_grad_().train(), teacher, settings
        self.device = head.fc.weight.device
        self.objective: Objective = OBJECTIVES[settings.objective](settings.vsd)
        self.batches = Batches(rows, settings.batch_tokens, settings.seed)
        base_rate = settings.learning_rate or 0.256 / head.config.hidden_size
        size = teacher.feature_rms(collate(rows[:8]).to(self.device)).mean().item()
        self._new_optimisers = lambda: optimisers(head, base_rate, size)
        self.optimisers = self._new_optimisers()
        scale = WARM_RATE if settings.warm else 1.0
        self.base_rates = [[scale * group["lr"] for group in optimiser.param_groups] for optimiser in self.optimisers]
        self.steps = 0
        self.sampler = None
        if settings.anchors:
            with teacher.serving():
                target = Target(teacher.model, taps=False)
            self.sampler = PathSampler(target, settings.vsd.paths, settings.anchors, settings.vsd.law)

    def step(self, rate: float) -> Result:
        """Update the head once; ``rate`` multiplies all learning rates."""
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        sums = torch.zeros(1 + 2 * self.settings.depth, device=self.device)
        for i in range(self.settings.accumulate):
            batch = next(self.batches)
            if i % world == rank:
                sums += self._accumulate(batch.to(self.device)) / self.settings.accumulate
        parameters = [weight for weight in self.head.parameters() if weight.grad is not None]
        if world > 1:
            for tensor in (sums, *(weight.grad for weight in parameters if weight.grad is not None)):
                dist.all_reduce(tensor)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        for optimiser, rates in zip(self.optimisers, self.base_rates, strict=True):
            for group, group_rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = group_rate * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.steps += 1
        loss, *counts = sums.tolist()
        right, live = counts[::2], counts[1::2]
        return Result(loss, [a / b for a, b in zip(right, live, strict=True) if b])

    def _accumulate(self, batch: Any) -> Tensor:
        """Add the gradients of one batch; returns its loss, then right first choices and their number per draft step."""
        depth, share = self.settings.depth, 1 / self.settings.accumulate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features, p = self.teacher(batch, draft_vocabulary(self.head), self.head.config.temperature_sharpness)
            paths = target_rows(self.head, batch, features, p, depth)
            if self.settings.vsd.shared_noise:
                paths = paths._replace(noise=text_noise(self.head, batch))
            sums = backward(self.head, paths, self.objective, share)
            if self.sampler is not None:
                generator = torch.Generator(self.device).manual_seed(hash((self.settings.seed, self.steps, int(batch.first.sum()))))
                with self.teacher.serving():
                    drafted = self.sampler(self.head, batch, features, depth, generator)
                sums[0] += backward(self.head, drafted, self.objective, share)[0]
        return sums

    def restart(self, weights: dict[str, Tensor]) -> None:
        """Go on from these weights, with optimisers that remember nothing."""
        self.head.load_state_dict(weights)
        self.optimisers = self._new_optimisers()

    def state_dict(self) -> dict[str, Any]:
        """All that decides how training goes on."""
        return {
            "head": self.head.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "steps": self.steps,
            "passes": self.batches.passes,
            "position": self.batches.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.head.load_state_dict(state["head"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.steps = state["steps"]
        self.batches = Batches(self.batches.rows, self.batches.tokens, self.batches.seed, state["passes"], state["position"])


def backward(head: Eagle3Head, paths: PathBatch, objective: Objective, share: float = 1.0) -> Tensor:
    """Add the gradients of ``share`` times the mean loss over anchors to the head's weights, CHUNK paths of logits at a time.

    Returns float32 [1 + 2 K]: the mean loss, then per step the right first choices and their number, alternately.
    """
    states = paths.states.detach().requires_grad_()
    best = paths.p.argmax(-1)
    anchors = len(states) / paths.group
    loss_sum = torch.zeros((), device=states.device)
    right = torch.zeros(states.shape[1], device=states.device)
    for index, temperature in chunks(paths):
        # fp32 from here on: sums of probabilities and log1p(-Q) need it
        with torch.autocast(states.device.type, enabled=False):
            rows = paths.rows[index]
            condition = head.condition(min(temperature, 1.0))
            log_q = (head.logits(states[index].float(), condition) / (temperature or 1.0)).log_softmax(-1)
            loss = objective(log_q, paths.p[rows], paths.part(index, greedy=temperature == 0)).sum()
            (loss * (share / anchors)).backward()
        loss_sum += loss.detach() / anchors
        right += ((log_q.detach().argmax(-1) == best[rows]) & paths.live[index]).sum(0)
    paths.states.backward(states.grad)
    return torch.cat((loss_sum[None], torch.stack((right, paths.live.sum(0)), dim=1).flatten()))


def chunks(paths: PathBatch) -> list[tuple[Tensor, float]]:
    """Indices of at most about CHUNK paths each, all verified at one temperature; paths of one anchor stay together."""
    size = max(1, CHUNK // paths.group) * paths.group
    parts = []
    for temperature in paths.temperature.unique().tolist():
        index = (paths.temperature == temperature).nonzero()[:, 0]
        parts += [(part, temperature) for part in index.split(size)]
    return parts


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


def draft_vocabulary(head: Eagle3Head) -> Tensor | None:
    """Target ids of a reduced draft vocabulary [Vd], None for the full one."""
    if head.d2t is None:
        return None
    return head.to_target_ids(torch.arange(head.config.draft_vocab_size, device=head.d2t.device))


@torch.no_grad()
def held_out_agreement(head: Eagle3Head, teacher: Teacher, rows: Sequence[Row], settings: TrainSettings) -> dict[str, float]:
    """Per step k on rows that were not trained on: ``accuracy_k``, the head's first choice is the target's (survival at temperature 0
    of a chain that survived so far), and ``overlap_k``, sum_v min(p, q) (acceptance by speculative sampling at temperature 1)."""
    sums = torch.zeros(3, settings.depth)
    for group in grouped(sorted(rows, key=lambda row: len(row.answer)), settings.batch_tokens):
        batch = collate(group).to(head.fc.weight.device)
        features, p = teacher(batch, draft_vocabulary(head))
        paths = target_rows(head, batch, features, p, settings.depth)
        for index, temperature in chunks(paths):
            flat = head.logits(paths.states[index], head.condition(1.0))  # at temperature 0 heads differ in how sharp they are
            log_q = (flat / (temperature or 1.0)).log_softmax(-1)
            p_rows, live = paths.p[paths.rows[index]], paths.live[index]
            right = log_q.argmax(-1) == p_rows.argmax(-1)
            sums += torch.stack([(value * live).sum(0) for value in (live, right, overlap(log_q, p_rows))]).cpu()
    means = sums[1:] / sums[0].clamp(min=1)
    return {
        f"{name}_{k}": round(value, 4)
        for k, values in enumerate(means.T.tolist(), start=1)
        for name, value in zip(("accuracy", "overlap"), values, strict=True)
    }

"""Draft temperatures by maximum likelihood, and the acceptance length by tree size, for a head's metadata."""

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from drafts.eagle3 import DraftTemperature, Eagle3Head, HeadMetadata
from kernels.noise import gumbel_noise
from server.engine.engine import Engine
from server.engine.types import SamplingParams
from tools.prompts import PromptError
from tools.train_vsd.data import AnswerSettings, Row, collate, grouped
from tools.train_vsd.e_step import draft_ids, of_draft
from tools.train_vsd.evaluate import evaluate
from tools.train_vsd.generate import complete
from tools.train_vsd.teacher import Teacher
from tools.train_vsd.unroll import unroll

SIGMAS = torch.logspace(-1, 0.5, 31, dtype=torch.float64)  # 0.1 to 3.2, 12 % apart
NODES = (1, 2, 4, 8, 16, 32)
CHUNK = 256  # rows of logits that exist at a time
FITTED_TOKENS = 1024  # padded tokens of the target's forward passes


def calibrate(
    engine: Engine, metadata: HeadMetadata, fitted: Sequence[list[int]], measured: Sequence[list[int]], max_tokens: int, concurrency: int
) -> HeadMetadata:
    """``metadata`` with draft temperatures fitted on the target's answers to the prompts ``fitted``, and with the acceptance length at
    temperature 0 for each number of nodes on the prompts ``measured``. ``engine`` is built for the largest tree; it keeps the new
    draft temperatures.
    """
    full = engine.shape
    points = fit_served(engine, calibration_rows(engine, fitted, AnswerSettings(max_tokens=max_tokens), concurrency))
    if not points:
        raise PromptError(
            f"The target's answers to {len(fitted)} prompts are shorter than two tokens: calibrate on prompts that it answers."
        )
    engine.proposer.sigma = points
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0)
    lengths = {1: 1.0}
    for nodes in tqdm(NODES[1:], desc="acceptance by nodes"):
        engine.shape = full.shrunk(nodes)
        lengths[nodes] = round(float(evaluate(engine, measured, sampling, concurrency)["acceptance_length"]), 4)
    engine.shape = full
    return replace(metadata, draft_temperature=points, acceptance_length=lengths)


def calibration_rows(engine: Engine, prompts: Sequence[list[int]], settings: AnswerSettings, concurrency: int) -> list[Row]:
    """The target's answers to ``prompts``, every second one greedy, with what is needed to make their noise again."""
    requests = [(prompt, settings.sampling(i)) for i, prompt in enumerate(prompts)]
    completions = tqdm(complete(engine, requests, concurrency), desc="answers", total=len(requests))
    rows = []
    for completion in completions:
        prompt, sampling = requests[completion.index]
        if len(completion.token_ids) >= 2:
            rows.append(Row(prompt, completion.token_ids, sampling.temperature, sampling.seed))
    return rows


def fit_served(engine: Engine, rows: Sequence[Row]) -> DraftTemperature:
    """``fit_sigmas`` for the engine's own head and tree, with the engine's own target: a large model is not held twice."""
    assert engine.proposer.drafter is not None
    model = engine.steps.target.model
    head = copy.deepcopy(engine.proposer.drafter.head).float()
    head.share_embedding(model.get_input_embeddings().weight.float())
    served = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return fit_sigmas(head, Teacher(model), rows, engine.shape.depth)
    finally:
        model.set_attn_implementation(served)


@torch.no_grad()
def fit_sigmas(head: Eagle3Head, teacher: Teacher, rows: Sequence[Row], depth: int) -> DraftTemperature:
    """The draft temperatures of levels 1 to ``depth`` for every request temperature among ``rows``.

    sigma of a level maximises the likelihood of the tokens that verification chooses, softmax((log q + noise) / sigma) at the text's
    token, over all chains that are right so far. Sums of such scores are then log-probabilities of survival. ``rows`` are the target's
    own answers, best not trained on; sampled ones whose seed is not known are left out. ``head`` in float32, on the teacher's device.
    """
    by_temperature = defaultdict(list)
    for row in rows:
        if row.temperature == 0 or row.seed is not None:
            by_temperature[row.temperature].append(row)
    points: list[tuple[float, tuple[float, ...]]] = []
    for temperature, group in sorted(by_temperature.items()):
        losses = torch.zeros(depth, len(SIGMAS), dtype=torch.float64)
        for part in grouped(sorted(group, key=lambda row: len(row.prompt) + len(row.answer)), FITTED_TOKENS):
            losses += _losses(head, teacher, part, depth)
        sigmas = tuple(best_sigma(level) for level in losses if level.any())  # a level that no answer reaches has no loss
        if sigmas:
            points.append((temperature, sigmas))
    return tuple(points)


def _losses(head: Eagle3Head, teacher: Teacher, rows: list[Row], depth: int) -> Tensor:
    """``likelihood_loss`` of rows of one temperature, summed for every level, float64 [depth, len(SIGMAS)]."""
    device = head.fc.weight.device
    batch, temperature = collate(rows).to(device), rows[0].temperature
    features, _ = teacher(batch, None)
    condition = head.condition(min(temperature, 1.0))
    losses = torch.zeros(depth, len(SIGMAS), dtype=torch.float64)
    for level, states in enumerate(unroll(head, batch, features, depth)):
        ahead = torch.arange(states.shape[1], device=device) + level
        for chunk in (ahead < batch.chains[:, None]).nonzero().split(CHUNK):
            b, a = chunk.unbind(1)
            position = batch.first[b] + a + level + 2
            right = draft_ids(head, batch.tokens[b, position])
            logits = head.logits(states[b, a], condition).float()
            if temperature > 0:
                logits = logits / temperature + of_draft(head, gumbel_noise(batch.seed[b], position, head.config.vocab_size))
            drafted = right >= 0  # no draft can hit a token outside of a reduced vocabulary
            losses[level] += likelihood_loss(logits[drafted], right[drafted]).cpu()
    return losses


def likelihood_loss(logits: Tensor, right: Tensor) -> Tensor:
    """-log softmax(logits / sigma)[right] summed over rows for every sigma in SIGMAS, float64; logits [R, V], right int64 [R]."""
    logits = logits - logits.gather(1, right[:, None])
    return torch.stack([(logits / sigma).logsumexp(-1).sum(dtype=torch.float64) for sigma in SIGMAS.tolist()])


def best_sigma(losses: Tensor) -> float:
    """Where the parabola through the lowest of ``losses`` [len(SIGMAS)] and its neighbours has its minimum; the loss has one."""
    best = int(losses.argmin())
    shift = 0.0
    if 0 < best < len(losses) - 1:
        before, lowest, after = losses[best - 1 : best + 2].tolist()
        shift = 0.5 * (before - after) / (before - 2 * lowest + after)
    step = float((SIGMAS[1] / SIGMAS[0]).log())
    return round(float(SIGMAS[best]) * math.exp(shift * step), 4)

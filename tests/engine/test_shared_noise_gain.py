"""What the shared-noise rule is for: at temperature 1 its trees commit more per verification than a chain under the p/q rule."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from drafts.eagle3 import Eagle3Head, feature_layers
from server.engine.engine import Engine
from server.engine.types import SamplingParams
from tests.engine.engines import run
from tests.engine.reference_rules import chain_rejection, sample

NEW = 48
CHAINS = (3, 4, 5, 6, 7)
GAIN = 1.15


@dataclass
class Chain:
    """Chains of ``length`` drawn from the head and verified by the p/q rule, for one request at temperature 1; no cache, no engine."""

    model: PreTrainedModel
    head: Eagle3Head
    length: int
    uniforms: torch.Generator
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def acceptance(self, prompt: list[int], new: int) -> tuple[int, int]:
        """Tokens committed by verifications, and verifications."""
        eos = set(self.model.generation_config.eos_token_id)
        ids, committed, steps = list(prompt), 0, 0
        p, features = self._target(ids)
        ids.append(sample(p[-1], self._uniform(1)[0]))
        while len(ids) - len(prompt) < new and not eos & set(ids[len(prompt) :]):
            drafted, q = self._draft(ids, features[: len(ids) - 1])
            p, features = self._target(ids + drafted)
            tokens = chain_rejection(p[len(ids) - 1 :], q, drafted, self._uniform(self.length + 1))
            ids += tokens
            committed, steps = committed + len(tokens), steps + 1
        return committed, steps

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.uniforms, dtype=torch.float64)

    def _target(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Distributions [T, V] and features [T, 3 H]."""
        out = self.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        layers = feature_layers(self.model.config.num_hidden_layers)
        return out.logits[0].double().softmax(-1), torch.cat([out.hidden_states[layer][0] for layer in layers], dim=-1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of the newest rows over all rows so far, [T, heads, D]."""
        self.keys.append(k)
        self.values.append(v)
        keys, values = torch.cat(self.keys), torch.cat(self.values)
        mask = torch.ones(len(q), len(keys), dtype=torch.bool).tril(len(keys) - len(q))
        parts = (part.transpose(0, 1)[None] for part in (q, keys, values))
        return F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    def _draft(self, ids: list[int], features: Tensor) -> tuple[list[int], Tensor]:
        """A chain from softmax(draft logits), and the distributions [K, V] it was drawn from; features of all tokens but the last."""
        self.keys, self.values = [], []
        count = len(features)
        hidden = self.head.combine(features)
        warm = torch.ones(1)
        y = self.head(self.head.embed(torch.tensor(ids[1:])), hidden, torch.arange(count), self._attend, warm)[-1:]
        drafted, laws = [], []
        for depth in range(self.length):
            law = torch.zeros(self.model.config.vocab_size, dtype=torch.float64)
            draft_law = self.head.logits(y, warm)[0].double().softmax(-1)
            law[self.head.to_target_ids(torch.arange(len(draft_law)))] = draft_law
            drafted.append(sample(law, self._uniform(1)[0]))
            laws.append(law)
            if depth + 1 < self.length:
                y = self.head(self.head.embed(torch.tensor(drafted[-1:])), y, torch.tensor([count + depth]), self._attend, warm)
        return drafted, torch.stack(laws)


@torch.inference_mode()
def chain_acceptance(model: PreTrainedModel, head: Eagle3Head, prompts: list[list[int]], length: int) -> float:
    chain = Chain(model, head, length, torch.Generator().manual_seed(length))
    committed, steps = map(sum, zip(*(chain.acceptance(prompt, NEW) for prompt in prompts), strict=True))
    return committed / steps


def tree_acceptance(engine: Engine, prompts: list[list[int]]) -> float:
    results = run(engine, [(prompt, SamplingParams(max_tokens=NEW, temperature=1.0, seed=i)) for i, prompt in enumerate(prompts)])
    steps = sum(result.speculation.num_steps for result in results)
    return 1 + sum(result.speculation.num_accepted_tokens for result in results) / steps


def test_a_tree_of_16_with_shared_noise_beats_the_best_chain(
    demo_engine: Callable[..., Engine], demo_model: PreTrainedModel, demo_prompts: list[list[int]], record_property: Callable
) -> None:
    engine = demo_engine(tree_nodes=16, max_num_seqs=16)
    head = engine.proposer.drafter.head
    best = max(CHAINS, key=lambda length: chain_acceptance(demo_model, head, demo_prompts[1::20], length))
    prompts = [prompt for i, prompt in enumerate(demo_prompts) if i % 10 in (0, 3, 6, 8)]
    chain = chain_acceptance(demo_model, head, prompts, best)
    tree = tree_acceptance(engine, prompts)
    record_property("acceptance_length", {"tree": tree, "chain": chain, "chain_length": best})
    print(f"tokens per verification at temperature 1: tree {tree:.2f}, best chain (of {best}) {chain:.2f}, gain {tree / chain:.2f}")
    assert tree >= GAIN * chain

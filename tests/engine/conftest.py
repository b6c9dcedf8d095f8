"""The demo pair, loaded once, and transformers' own text for it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from drafts.eagle3 import Eagle3Head
from server.engine import engine as engine_module
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.graphs import Graphs, in_eighths, in_halves
from tests.engine.prompts import PROMPTS
from tests.engine.recorder import Recorded

NEW = 64


@pytest.fixture(scope="session")
def demo_model(demo: Path) -> PreTrainedModel:
    """The target as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(demo / "target", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def demo_prompts(demo: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(demo / "target")
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


@pytest.fixture(scope="session")
def demo_greedy(demo_model: PreTrainedModel, demo_prompts: list[list[int]]) -> list[list[int]]:
    """What ``generate`` writes after every prompt, one at a time: padding a batch would change the rounding."""
    texts = []
    for prompt in demo_prompts:
        ids = torch.tensor([prompt])
        out = demo_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        texts.append(out[0, len(prompt) :].tolist())
    return texts


@pytest.fixture(scope="session")
def demo_engine(demo: Path) -> Callable[..., Engine]:
    """Engines of the demo pair with any settings; what is on disk is read once, by ``Engine.from_config``."""
    paths = {"model": str(demo / "target"), "device": "cpu", "dtype": "float32", "load_rule": False, "max_model_len": 192}
    first = Engine.from_config(EngineConfig(**paths, draft=str(demo / "vsd")))

    def make(head: bool = True, **config: object) -> Engine:
        own: Eagle3Head | None = first.proposer.drafter.head if head and first.proposer.drafter else None
        return Engine(first.steps.target, own, first.tokenizer, EngineConfig(**{**paths, **config}))

    return make


@pytest.fixture
def recorded_prompts() -> Recorded:
    return Recorded()


@pytest.fixture
def recorded(recorded_prompts: Recorded, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Engines made in a test use graphs; those of trees are counted here."""
    counting = Recorded()
    both = Graphs(counting, in_halves), Graphs(recorded_prompts, in_eighths)
    monkeypatch.setattr(engine_module, "_graphs", lambda target, config: both)
    return counting

"""What ``evaluate`` reports is what the server counts for the same prompts, and the same every time."""

import re
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server.app import create_app
from server.engine.types import SamplingParams
from server.settings import Settings
from tools.prompts import read_prompts
from tools.train_vsd.evaluate import evaluate, measuring_engine

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "drafts" / "demo"
SEED = 7


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_servers_counters_give_the_same_acceptance_length(temperature: float) -> None:
    engine = measuring_engine(str(DEMO / "target"), str(DEMO / "vsd"), "cpu", 4)
    prompts = read_prompts(ROOT / "benchmarks" / "prompts" / "gsm8k_test.jsonl", engine.tokenizer, limit=5)
    sampling = SamplingParams(max_tokens=24, temperature=temperature, seed=SEED)
    figures = evaluate(engine, prompts, sampling, 4)
    assert evaluate(engine, prompts, sampling, 4)["acceptance_length"] == figures["acceptance_length"]
    app = create_app(lambda report: engine, Settings())
    with TestClient(app) as client:
        while not app.state.life.ready:
            time.sleep(0.01)
        for i, prompt in enumerate(prompts):
            body = {"prompt": prompt, "max_tokens": 24, "temperature": temperature, "seed": SEED + i}
            client.post("/v1/completions", json=body).raise_for_status()
        text = client.get("/metrics").text
    drafts, accepted = (
        float(re.findall(rf"^vsd_spec_decode_num_{name}_total\S* (\S+)$", text, re.MULTILINE)[0]) for name in ("drafts", "accepted_tokens")
    )
    assert drafts == figures["num_steps"] > 0
    assert 1 + accepted / drafts == pytest.approx(figures["acceptance_length"])

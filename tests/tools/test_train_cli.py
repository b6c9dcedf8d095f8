"""The trainer's commands end to end, on a target of a few thousand parameters."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from drafts.checkpoint import load_head, tokenizer_hash
from drafts.eagle3 import Eagle3Head
from server.engine.types import SamplingParams, SpeculationStats
from tests.tools.tiny_training import shrink
from tools.train_vsd import __main__ as cli
from tools.train_vsd import calibrate
from tools.train_vsd.data import AnswerSettings, read_answers, write_answers
from tools.train_vsd.evaluate import acceptance, evaluate, measuring_engine, repeated_8_grams
from tools.train_vsd.generate import Completion, complete
from tools.train_vsd.probe import Probe


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["train_vsd", *map(str, arguments)])
    cli.main()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch.setattr)


@pytest.fixture(scope="module")
def trained(target: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "head"
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        run(patch, "train", "--target", target, "--prompts", prompts, "--output", output, "--steps", 6, "--depth", 3, "--device", "cpu")
    return output


def load(target: Path, head: Path) -> Eagle3Head:
    model = LlamaForCausalLM.from_pretrained(target)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    embedding = model.get_input_embeddings().weight
    return load_head(head, model.config, tokenizer_hash=tokenizer_hash(tokenizer), embedding=embedding, device="cpu", dtype=torch.float32)


def test_a_trained_head_is_complete(target: Path, trained: Path) -> None:
    head = load(target, trained)
    assert head.metadata is not None
    assert head.metadata.objective == "vsd"
    assert head.temperature_shift is not None
    assert head.temperature_shift.any()
    expected = {f"{name}_{k}" for name in ("accuracy", "overlap") for k in (1, 2, 3)}
    assert head.metadata.held_out.keys() == expected | {"acceptance_length_t0", "acceptance_length_t1"}
    assert head.metadata.held_out["acceptance_length_t0"] >= 1
    assert [(temperature, len(sigmas)) for temperature, sigmas in head.metadata.draft_temperature] == [(0.0, 3), (1.0, 3)]
    assert head.metadata.acceptance_length.keys() == {1, 4}
    card = (trained / "README.md").read_text()
    assert head.metadata.target_hash in card
    assert "6 steps" in card
    assert len(list(Path(f"{trained}.data").glob("answers-*.jsonl"))) == 1


def test_training_continues_from_a_head(
    monkeypatch: pytest.MonkeyPatch, target: Path, prompts: Path, trained: Path, tmp_path: Path
) -> None:
    lengths = iter(range(1, 1000))
    monkeypatch.setattr(Probe, "lengths", lambda *_, **__: {"tau": float(next(lengths))})  # the last head is the best
    arguments = ("--target", target, "--prompts", prompts, "--output", tmp_path / "head", "--device", "cpu", "--depth", 2)
    run(monkeypatch, "train", *arguments, "--init", trained, "--minutes", 0.02)
    first, second = load(target, trained), load(target, tmp_path / "head")
    assert second.metadata is not None
    assert not torch.equal(first.fc.weight, second.fc.weight)
    assert torch.nn.functional.cosine_similarity(first.fc.weight.flatten(), second.fc.weight.flatten(), dim=0) > 0.5


@pytest.mark.parametrize("objective", ["eagle3", "lk", "vat"])
def test_every_objective_trains(monkeypatch: pytest.MonkeyPatch, target: Path, prompts: Path, tmp_path: Path, objective: str) -> None:
    arguments = ("--target", target, "--prompts", prompts, "--output", tmp_path / "head", "--device", "cpu", "--depth", 2, "--steps", 1)
    run(monkeypatch, "train", *arguments, "--objective", objective)
    head = load(target, tmp_path / "head")
    assert head.metadata is not None
    assert head.metadata.objective == objective
    assert head.temperature_shift is None, "the published layout where nothing else is needed"


def test_evaluate_writes_the_figures(monkeypatch: pytest.MonkeyPatch, target: Path, prompts: Path, trained: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    run(monkeypatch, "evaluate", "--target", target, "--draft", trained, "--prompts", prompts, "--limit", 3, "--max-tokens", 20,
        "--tree-nodes", 8, "--tree-depth", 3, "--temperature", 1, "--draft-temperature", 0.5, "--device", "cpu",
        "--json", figures)  # fmt: skip
    written = json.loads(figures.read_text())
    assert written.keys() >= {
        "acceptance_length", "acceptance_length_per_prompt_mean", "acceptance_length_ci95", "acceptance_by_depth", "num_steps",
        "num_tokens", "tokens_per_second", "temperature", "tree",
    }  # fmt: skip
    assert written["tree"] == {"nodes": 8, "depth": 3, "topk": 4, "draft_temperature": [[0.0, [0.5]]]}
    assert len(written["acceptance_by_depth"]) == 3
    assert written["num_prompts"] == 3


def test_evaluation_does_not_depend_on_concurrency(target: Path, trained: Path) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
    prompts = [[5, 6], [7, 8, 9], [10]]
    one, three = (evaluate(measuring_engine(str(target), str(trained), "cpu", n, tree_nodes=8), prompts, sampling, n) for n in (1, 3))
    for key in ("acceptance_length", "acceptance_by_depth", "num_tokens"):
        assert one[key] == three[key]


def test_calibrate_writes_into_the_head(
    monkeypatch: pytest.MonkeyPatch, target: Path, prompts: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "MEASURED_PROMPTS", 3)
    monkeypatch.setattr(cli, "MEASURED_TOKENS", 8)
    monkeypatch.setattr(cli, "FITTED_PROMPTS", 6)
    monkeypatch.setattr(calibrate, "NODES", (1, 2, 4, 8, 16, 32))
    before = load(target, trained).metadata
    run(monkeypatch, "calibrate", "--target", target, "--draft", trained, "--prompts", prompts, "--device", "cpu")
    after = load(target, trained).metadata
    assert before is not None
    assert after is not None
    assert after.held_out == before.held_out
    assert [(temperature, len(sigmas)) for temperature, sigmas in after.draft_temperature] == [(0.0, 5), (1.0, 5)]
    assert after.acceptance_length.keys() == {1, 2, 4, 8, 16, 32}
    assert after.acceptance_length[1] == 1.0
    assert "draft temperatures" in capsys.readouterr().out


def test_answers_resume_and_are_the_targets_own(target: Path, tmp_path: Path) -> None:
    engine = measuring_engine(str(target), None, "cpu", 2)
    settings = AnswerSettings(max_tokens=12)
    prompts = [[i, 3] for i in range(2, 8)]
    path = tmp_path / "answers.jsonl"
    whole = write_answers(path, engine, prompts, settings, in_flight=2)
    assert read_answers(path) == whole
    assert sorted(whole) == list(range(6))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:10])
    assert write_answers(path, engine, prompts, settings, in_flight=3) == whole
    assert read_answers(path) == whole
    model = LlamaForCausalLM.from_pretrained(target)
    greedy = model.generate(torch.tensor([prompts[0]]), max_new_tokens=12, do_sample=False)[0, 2:].tolist()
    assert whole[0] == greedy


def test_nothing_begins_after_the_deadline(target: Path) -> None:
    engine = measuring_engine(str(target), None, "cpu", 2)
    assert list(complete(engine, [([1], SamplingParams())], 2, deadline=0.0)) == []


def test_acceptance_counts_the_bonus_token() -> None:
    def completion(index: int, accepted: list[int]) -> Completion:
        stats = SpeculationStats()
        for count in accepted:
            stats.record(draft_nodes=7, accepted=count, depth=3)
        return Completion(index, speculation=stats)

    figures = acceptance([completion(0, [0, 3]), completion(1, [1, 1, 1, 1]), Completion(2)])
    assert figures["num_steps"] == 6
    assert figures["acceptance_length"] == pytest.approx((6 + 7) / 6)
    assert figures["acceptance_length_per_prompt_mean"] == pytest.approx(np.mean([5 / 2, 8 / 4]))
    assert figures["acceptance_by_depth"] == pytest.approx([5 / 6, 1 / 6, 1 / 6])
    low, high = figures["acceptance_length_ci95"]
    assert 2.0 <= low <= figures["acceptance_length"] <= high <= 2.5
    assert acceptance([Completion(0)])["acceptance_length"] == 1.0


def test_repeated_8_grams() -> None:
    assert repeated_8_grams(list(range(30))) == 0
    assert repeated_8_grams([1, 2] * 20) > 0.9
    assert repeated_8_grams([1]) == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (("evaluate", "--draft", "nowhere"), "nowhere is not a directory"),
    (("train", "--output", "out", "--steps", "1", "--prompts", "missing.jsonl"), "no prompt file at missing.jsonl"),
    (("calibrate", "--draft", "nowhere", "--target", "no-such-model"), "cannot load a model from 'no-such-model'"),
])  # fmt: skip
def test_errors_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, target: Path, prompts: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, arguments[0], "--target", target, "--prompts", prompts, "--device", "cpu", *arguments[1:])

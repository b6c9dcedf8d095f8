"""Optimiser steps, and the loop around them: what is kept, what is gone back to, what is refused."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from drafts.eagle3 import Eagle3Head
from tests.tools.tiny_training import VOCAB, tiny_head, tiny_teacher
from tools.prompts import PromptError, shared_passages
from tools.train_vsd import __main__ as cli
from tools.train_vsd import trainer
from tools.train_vsd.data import Row, collate
from tools.train_vsd.e_step import PathBatch, target_rows
from tools.train_vsd.loop import Loop, ResumeError, Run
from tools.train_vsd.m_step import Objective, Paths, VsdSettings, eagle3, overlap, vsd
from tools.train_vsd.teacher import Teacher
from tools.train_vsd.train import refuse_evaluation_prompts
from tools.train_vsd.trainer import Result, Trainer, TrainSettings, backward, chunks, held_out_agreement, rate


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return tiny_teacher()


def make_rows(count: int, longest: int = 14) -> list[Row]:
    generator = torch.Generator().manual_seed(count)

    def ids(n: int) -> list[int]:
        return torch.randint(VOCAB, (n,), generator=generator).tolist()

    return [Row(ids(1 + i % 4), ids(2 + i * 5 % longest), (0.0, 1.0, 0.0, 0.5)[i % 4], i) for i in range(count)]


def gradients(head: Eagle3Head) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in head.named_parameters() if weight.grad is not None}
    head.zero_grad(set_to_none=True)
    return found


def random_paths(head: Eagle3Head, anchors: int, group: int, states: Tensor) -> PathBatch:
    """Drafted paths of 2 steps, their states a function of the head's ``fc``."""
    generator = torch.Generator().manual_seed(0)
    count = anchors * group
    tokens = torch.randint(VOCAB, (count, 2), generator=generator)
    p = (2 * torch.randn(40, VOCAB, generator=generator)).softmax(-1)
    temperature = torch.tensor([0.0, 1.0, 0.7]).repeat_interleave(group).repeat(-(-anchors // 3))[:count]
    return PathBatch(
        head.combine(states), tokens, torch.ones_like(tokens, dtype=torch.bool), torch.rand(count, 2, generator=generator) < 0.5,
        torch.randint(40, (count, 2), generator=generator), p, temperature, group, False,
    )  # fmt: skip


@pytest.mark.parametrize(("group", "chunk"), [(1, 7), (1, 64), (3, 7), (3, 9), (5, 2)])
@pytest.mark.parametrize("objective", [eagle3, vsd(VsdSettings())])
def test_gradients_in_chunks_are_those_of_the_plain_loss(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, group: int, chunk: int, objective: Objective
) -> None:
    monkeypatch.setattr(trainer, "CHUNK", chunk)
    head = tiny_head(teacher).requires_grad_()
    states = torch.randn(11 * group, 2, 96, generator=torch.Generator().manual_seed(1))
    paths = random_paths(head, 11, group, states)
    parts = chunks(paths)
    assert sorted(torch.cat([index for index, _ in parts]).tolist()) == list(range(11 * group))
    for index, temperature in parts:
        assert len(index) <= max(chunk, group)
        assert (paths.temperature[index] == temperature).all()
        for anchor in (index // group).unique():
            assert (index // group == anchor).sum() == group, "the paths of an anchor stay together"
    sums = backward(head, paths, objective, share=0.25)
    ours = gradients(head)
    paths = random_paths(head, 11, group, states)
    whole = torch.zeros(())
    for a in range(11):
        index = torch.arange(a * group, (a + 1) * group)
        t = paths.temperature[index[0]].item()
        log_q = (head.logits(paths.states[index]) / (t or 1)).log_softmax(-1)
        part = Paths(paths.tokens[index], paths.live[index], paths.chosen[index], t == 0, group, False)
        whole = whole + objective(log_q, paths.p[paths.rows[index]], part).sum() / 11
    (0.25 * whole).backward()
    torch.testing.assert_close(sums[0], whole.detach())
    wanted = gradients(head)
    assert ours.keys() == wanted.keys() >= {"fc.weight", "norm", "lm_head.weight"}
    for name in ours:
        torch.testing.assert_close(ours[name], wanted[name], atol=1e-6, rtol=1e-4)


def test_a_step_of_eagle3_is_the_plain_formula(teacher: Teacher) -> None:
    """Cross-entropy of every chain and step, weighted by 0.8 ** step, averaged over the chains; more chains than a chunk has."""
    head = tiny_head(teacher).requires_grad_()
    batch = collate(make_rows(24, longest=20))
    features, p = teacher(batch, None)
    paths = target_rows(head, batch, features, p, 3)
    assert len(paths.states) > 2 * trainer.CHUNK
    sums = backward(head, paths, eagle3)
    ours = gradients(head)
    paths = target_rows(head, batch, features, p, 3)
    temperature = torch.where(paths.temperature > 0, paths.temperature, 1.0)
    loss, right, live = torch.zeros(()), [], []
    for k in range(3):
        logits = head.logits(paths.states[:, k]) / temperature[:, None]
        inside = paths.live[:, k]
        wanted = paths.p[paths.rows[:, k]]
        loss = loss + 0.8**k / (1 + 0.8 + 0.64) * F.cross_entropy(logits[inside], wanted[inside], reduction="sum") / len(logits)
        right.append((logits.argmax(-1) == wanted.argmax(-1))[inside].sum())
        live.append(inside.sum())
    loss.backward()
    torch.testing.assert_close(sums[0], loss.detach())
    assert sums[1::2].tolist() == torch.stack(right).tolist()
    assert sums[2::2].tolist() == torch.stack(live).tolist()
    for name, gradient in gradients(head).items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4)


def test_held_out_agreement(teacher: Teacher) -> None:
    head, rows = tiny_head(teacher), make_rows(9)
    found = held_out_agreement(head, teacher, rows, TrainSettings(depth=3, batch_tokens=60))
    batch = collate(rows)
    paths = target_rows(head, batch, *teacher(batch, None), 3)
    log_q = (head.logits(paths.states) / torch.where(paths.temperature > 0, paths.temperature, 1.0)[:, None, None]).log_softmax(-1)
    p, live = paths.p[paths.rows], paths.live
    for k in range(3):
        right = (log_q.argmax(-1) == p.argmax(-1))[:, k][live[:, k]].float().mean().item()
        assert found[f"accuracy_{k + 1}"] == pytest.approx(right, abs=1e-4)
        assert found[f"overlap_{k + 1}"] == pytest.approx(overlap(log_q, p)[:, k][live[:, k]].mean().item(), abs=1e-4)
        assert 0 < found[f"overlap_{k + 1}"] < 1


def settings(**changes: Any) -> TrainSettings:
    given = {"steps": 8, "depth": 2, "batch_tokens": 60, "anchors": 1, "vsd": VsdSettings(paths=3, shared_noise=0.1), "learning_rate": 1e-3}
    return TrainSettings(**(given | changes))


def test_answers_shorter_than_the_unroll(teacher: Teacher) -> None:
    result = Trainer(tiny_head(teacher), teacher, [Row([1, 2, 3], [4, 5])], settings(depth=4)).step(1.0)
    assert len(result.accuracy) == 1


def test_training_lowers_the_loss(teacher: Teacher) -> None:
    worker = Trainer(tiny_head(teacher), teacher, make_rows(4), settings(batch_tokens=500, anchors=0))
    losses = [worker.step(1.0).loss for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_trainer_goes_on_bit_for_bit_from_its_state(teacher: Teacher, tmp_path: Path) -> None:
    rows = make_rows(9)
    whole = Trainer(tiny_head(teacher, temperature_shift=True), teacher, rows, settings())
    losses = []
    for step in range(8):
        if step == 5:
            torch.save(whole.state_dict(), tmp_path / "state.pt")
        losses.append(whole.step(1 - step / 8))
    torch.manual_seed(7)
    other = tiny_head(teacher, temperature_shift=True)
    with torch.no_grad():
        for weight in other.parameters():
            weight.normal_()
    resumed = Trainer(other, teacher, rows, settings())
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [resumed.step(1 - step / 8) for step in range(5, 8)] == losses[5:]
    assert resumed.batches.passes > 0, "the run has gone into a second pass"
    for name, weight in whole.head.state_dict().items():
        assert torch.equal(weight, resumed.head.state_dict()[name]), name


def test_rate() -> None:
    rates = [rate(i / 1000) for i in range(1001)]
    assert 0 < rates[0] < 0.01
    assert max(rates) > 0.95
    assert all(b >= a for a, b in itertools.pairwise(rates[:30]))
    assert all(b <= a for a, b in itertools.pairwise(rates[30:]))
    assert rates[-1] == 0


class Fake:
    """A trainer whose weight counts its steps. ``nan_at``: the step whose loss is no number."""

    def __init__(self, settings: TrainSettings, nan_at: int = -1) -> None:
        self.settings, self.nan_at, self.steps = settings, nan_at, 0
        self.head, self.device = nn.Linear(1, 1, bias=False), torch.device("cpu")
        nn.init.zeros_(self.head.weight)
        self.rates: list[float] = []
        self.restarts: list[float] = []

    @property
    def weight(self) -> float:
        return self.head.weight.item()

    def step(self, rate: float) -> Result:
        self.rates.append(rate)
        self.steps += 1
        with torch.no_grad():
            self.head.weight += 1
        return Result(float("nan") if self.steps == self.nan_at else 1.0, [0.5])

    def restart(self, weights: dict[str, Tensor]) -> None:
        self.head.load_state_dict(weights)
        self.restarts.append(self.weight)

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.steps = state["steps"]


def scripted(tmp_path: Path, lengths: list[float], nan_at: int = -1, steps: int = 5) -> tuple[Fake, Run, list[float]]:
    """A run of ``steps`` steps, measured before the first and after every one; the weights that were kept."""
    fake, kept, given = Fake(TrainSettings(steps=steps), nan_at), [], iter(lengths)
    looped = Loop(
        fake,  # type: ignore[arg-type]
        tmp_path,
        measure=lambda: dict.fromkeys(("tau_t0", "tau_t1"), next(given)),
        keep=lambda: kept.append(fake.weight),
    )
    run = looped()
    assert next(given, None) is None, "every length was measured"
    return fake, run, kept


def test_the_best_head_is_kept_and_not_the_last(tmp_path: Path) -> None:
    fake, run, kept = scripted(tmp_path, [1.0, 1.5, 1.4, 1.8, 1.7, 1.75])
    assert kept == [0, 1, 3]
    assert fake.weight == 3
    assert not fake.head.weight.requires_grad
    assert run.best == 1.8
    assert fake.restarts == []
    assert run.rate_scale == 1
    assert [record["step"] for record in run.history] == list(range(6))
    assert [json.loads(line)["tau_t0"] for line in (tmp_path / "history.jsonl").read_text().splitlines()] == [1.0, 1.5, 1.4, 1.8, 1.7, 1.75]
    assert fake.rates == [rate(i / 5) for i in range(5)]


def test_a_run_whose_length_collapses_goes_back_and_slows_down(tmp_path: Path) -> None:
    fake, run, kept = scripted(tmp_path, [1.0, 2.0, 1.79, 1.9, 1.5, 2.5])
    assert fake.restarts == [1, 1], "0.9 of the best is the limit"
    assert kept == [0, 1, 2]  # the last one: one step from the best, after the second return
    assert fake.weight == 2
    assert run.rate_scale == pytest.approx(1 / 36)
    slowed = [r / rate(i / 5) for i, r in enumerate(fake.rates)]
    assert slowed == pytest.approx([1, 1, 1 / 6, 1 / 6, 1 / 36])


def test_a_loss_that_is_no_number_goes_back(tmp_path: Path) -> None:
    fake, run, kept = scripted(tmp_path, [1.0, 2.0, 1.95, 1.96, 1.97], nan_at=3)
    assert fake.restarts == [1]
    assert kept == [0, 1]
    assert fake.rates[3] == pytest.approx(rate(3 / 5) / 6)
    assert run.rate_scale == pytest.approx(1 / 6)


def test_ten_measurements_of_a_long_run(tmp_path: Path) -> None:
    _, run, _ = scripted(tmp_path, [1.0 + i / 100 for i in range(11)], steps=40)
    assert [record["step"] for record in run.history] == list(range(0, 41, 4))


def fake_loop(tmp_path: Path, **changes: Any) -> Loop:
    fake = Fake(TrainSettings(**({"steps": 5} | changes)))
    return Loop(fake, tmp_path, lambda: {"tau": 1.0 + fake.steps}, lambda: None, prepared=7.0)  # type: ignore[arg-type]


def test_a_run_does_not_go_on_with_other_settings(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"there is no .*state\.pt"):
        fake_loop(tmp_path).resume()
    fake_loop(tmp_path)()
    with pytest.raises(ResumeError, match=r"run with depth 5, seed 0, but depth 4, seed 3 was asked for"):
        fake_loop(tmp_path, depth=4, seed=3).resume()
    with pytest.raises(ResumeError, match=r"vsd \{.*'car': 0.1.* but vsd \{.*'car': 0.5"):
        fake_loop(tmp_path, vsd=VsdSettings(car=0.5)).resume()
    again = fake_loop(tmp_path)
    again.run.prepared = 99.0
    again.resume()
    assert again.trainer.steps == 5
    assert again.run.prepared == 7.0
    assert len(again.run.history) == 6
    assert again().best == 6


def test_a_budget_in_minutes() -> None:
    plan = TrainSettings(minutes=2)
    assert plan.progress(999, 30) == 0.25
    assert plan.progress(999, 30, prepared=60) == 0.5
    assert plan.progress(0, 6, prepared=1000) == 0.5, "a tenth is left to training"
    assert TrainSettings(steps=10).progress(4, 30, 60) == 0.4


def numeric(sharded: bool = False) -> dict[str, Any]:
    """Three steps of two batches each, shared by the processes that there are: losses, accuracies, weights."""
    teacher = tiny_teacher()
    if sharded:
        teacher.shard()
    worker = Trainer(tiny_head(teacher), teacher, make_rows(12), settings(accumulate=2, learning_rate=1e-4))
    results = [worker.step(0.5) for _ in range(3)]
    held = sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in teacher.model.parameters())
    return {"results": [tuple(result) for result in results], "head": worker.head.state_dict(), "target_weights": held}


def test_a_head_that_was_trained_before_learns_slower(teacher: Teacher) -> None:
    fresh, warm = (Trainer(tiny_head(teacher), teacher, make_rows(12), settings(warm=given)) for given in (False, True))
    before = fresh.head.qkv_proj.weight.detach().clone()
    torch.testing.assert_close(before, warm.head.qkv_proj.weight.detach())
    moved = []
    for worker in (fresh, warm):
        worker.step(0.5)
        moved.append((worker.head.qkv_proj.weight - before).norm().item())
    assert moved[1] == pytest.approx(trainer.WARM_RATE * moved[0], rel=1e-3)


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_evaluation_prompts_are_refused(tmp_path: Path) -> None:
    long = " ".join(f"word{i}" for i in range(20))
    ours = write(
        tmp_path / "ours.jsonl",
        {"prompt": "short one"},
        {"messages": [{"role": "system", "content": long}, {"role": "user", "content": "nothing shared here"}]},
        {"turns": ["before", f"Well, {long.upper()}?"]},
        {"prompt": " ".join(f"word{i}" for i in range(12))},
        {"messages": [{"role": "user", "content": f"{long}."}]},
    )
    theirs = write(tmp_path / "theirs.jsonl", {"prompt": "other"}, {"turns": [f"tell me: {long}"]}, {"prompt": "Short  one!"})
    assert shared_passages(ours, theirs) == [(1, 3), (3, 2), (5, 2)]
    with pytest.raises(PromptError, match=r"ours.jsonl holds .*theirs.jsonl evaluates on: line 1 \(line 3 there\), line 3 .*, line 5 "):
        refuse_evaluation_prompts(ours, [theirs])
    many = write(tmp_path / "many.jsonl", *[{"prompt": "Short one"}] * 7)
    with pytest.raises(PromptError, match=r"line 5 \(line 3 there\) and 2 more"):
        refuse_evaluation_prompts(many, [theirs])
    refuse_evaluation_prompts(ours, [])
    refuse_evaluation_prompts(ours, [write(tmp_path / "no.jsonl", {"prompt": "something else"})])
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + '\n{"turns": [1]}\n')
    with pytest.raises(PromptError, match=r"Line 2 of .*odd.jsonl is no prompt"):
        refuse_evaluation_prompts(odd, [theirs])


def test_greedy_text_sees_sharper_logits_of_head_and_target(teacher: Teacher) -> None:
    plain, sharp = tiny_head(teacher), tiny_head(teacher)
    sharp.config = dataclasses.replace(sharp.config, temperature_sharpness=2.0)
    features = torch.randn(6, 3 * sharp.config.target_hidden_size, generator=torch.Generator().manual_seed(3))
    states = features[:, None].expand(-1, 2, -1)

    def loss(head: Eagle3Head, temperature: float) -> float:
        paths = random_paths(head, 6, 1, states)
        return backward(head, paths._replace(temperature=torch.full((6,), temperature)), eagle3)[0].item()

    assert loss(sharp, 1.0) == pytest.approx(loss(plain, 1.0))
    cold = loss(sharp, 0.0)
    assert cold != pytest.approx(loss(plain, 0.0), rel=1e-3)
    with torch.no_grad():
        plain.lm_head.weight.mul_(2)
    assert cold == pytest.approx(loss(plain, 0.0), rel=1e-5)

    batch = collate([row for row in make_rows(8) if row.temperature in (0.0, 1.0)])
    (_, once), (_, twice) = teacher(batch, None), teacher(batch, None, 2.0)
    squared = once.square() / once.square().sum(-1, keepdim=True)
    greedy = (batch.temperature == 0).repeat_interleave(batch.chains)
    assert greedy.any()
    assert not greedy.all()
    torch.testing.assert_close(twice, torch.where(greedy[:, None], squared, once), rtol=1e-4, atol=1e-6)


def parsed(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> SimpleNamespace:
    monkeypatch.setattr("sys.argv", ["train_vsd", *map(str, arguments)])
    return SimpleNamespace(**vars(cli.parse_arguments()))


def test_a_configuration_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("target: T\nprompts: p.jsonl\noutput: out\nsteps: 7\ndepth: 3\nevaluation: [a.jsonl, b.jsonl]\nresume: false\n")
    args = parsed(monkeypatch, "train", "--config", config)
    assert (args.target, args.steps, args.depth, args.resume) == ("T", 7, 3, False)
    assert args.evaluation == [Path("a.jsonl"), Path("b.jsonl")]
    args = parsed(monkeypatch, "train", "--depth", 9, "--config", config, "--steps", 2, "--target", "U")
    assert (args.target, args.steps, args.depth, args.output) == ("U", 2, 9, Path("out"))
    assert parsed(monkeypatch, "--config", config, "train").steps == 7
    config.write_text("max_tokens: 5\ntarget: T\nprompts: p\ndraft: d\nall_turns: true\n")
    args = parsed(monkeypatch, "evaluate", "--config", config)
    assert (args.max_tokens, args.all_turns) == (5, True)
    config.write_text("target: T\nprompts: p\noutput: o\nsteps: 1\nspeed: 4\n")
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "train", "--config", config)
    assert "--speed" in capsys.readouterr().err
    for text in ("- a list\n", "{ no yaml: ["):
        config.write_text(text)
        monkeypatch.setattr("sys.argv", ["train_vsd", "train", "--config", str(config)])
        with pytest.raises(SystemExit, match="is no YAML file of options"):
            cli.main()
    monkeypatch.setattr("sys.argv", ["train_vsd", "train", "--config", str(tmp_path / "missing.yaml")])
    with pytest.raises(SystemExit, match=r"missing.yaml is no YAML file"):
        cli.main()

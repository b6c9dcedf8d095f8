"""lm-eval: the scores of the tasks beside this file are the same with speculation, without it by request, and without a draft head."""

import json
import re
from pathlib import Path
from typing import Any

import httpx

from tools.clients.checks import KEY, Setting, expect, run, server

TASKS = ("vsd_loglikelihood", "vsd_greedy", "vsd_sampled")
SAMPLES = 16  # of each task
NO_SPECULATION = {"speculation": {"enabled": False}}  # the server's own field, in every request that generates
Samples = dict[str, list[Any]]


def check_scores(setting: Setting) -> str:
    before = drafts(setting)
    speculating = evaluate(setting, setting.url, "speculating")
    speculated = drafts(setting)
    expect(speculated > before, "nothing was drafted")
    compare(speculating, evaluate(setting, setting.url, "off-by-request", NO_SPECULATION))
    expect(drafts(setting) == speculated, "speculation was off, and yet there were drafts")
    with server("none") as url:
        compare(speculating, evaluate(setting, url, "plain"))
    return f"{len(TASKS)} tasks of {SAMPLES} samples, {speculated - before:.0f} trees verified"


def drafts(setting: Setting) -> float:
    """Trees that the server has verified since its start."""
    text = httpx.get(f"{setting.url}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    (found,) = re.findall(r"^vsd_spec_decode_num_drafts_total\{.*\} (\S+)$", text, re.MULTILINE)
    return float(found)


def evaluate(setting: Setting, url: str, name: str, generation: dict[str, Any] | None = None) -> Samples:
    """By task, what the server answered to each sample, in order."""
    folder = setting.folder / "lm-eval" / name
    model = {"model": "demo", "base_url": f"{url}/v1/completions", "num_concurrent": 4, "max_length": 512, "auth_token": KEY}
    run(
        setting,
        "lm-eval", "run",
        "--model", "local-completions",
        "--model_args", json.dumps(model),
        "--include_path", str(Path(__file__).parent / "tasks"),
        "--tasks", ",".join(TASKS),
        "--limit", str(SAMPLES),
        *(("--gen_kwargs", json.dumps(generation)) if generation else ()),
        "--log_samples",
        "--output_path", str(folder),
        environment={"OPENAI_API_KEY": KEY},
        where=Path.cwd(),  # from which the tasks find their prompts
    )  # fmt: skip
    return {task: _read(folder, task) for task in TASKS}


def _read(folder: Path, task: str) -> list[Any]:
    newest = max(folder.rglob(f"samples_{task}_*.jsonl"))  # named by the time
    samples = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
    expect(len(samples) == SAMPLES, f"{task} has {len(samples)} samples, not {SAMPLES}")
    return [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def compare(ours: Samples, others: Samples) -> None:
    """ClientError at the first sample that differs."""
    for task in TASKS:
        for number, (one, other) in enumerate(zip(ours[task], others[task], strict=True)):
            expect(one == other, f"{task}, sample {number}: {one} with speculation, {other} without")

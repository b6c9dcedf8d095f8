"""guidellm: concurrent streams of synthetic prompts, none of which ends in an error."""

import json
from pathlib import Path

from tools.clients.checks import KEY, TARGET, Setting, expect, run

ROUTES = ("/v1/completions", "/v1/chat/completions")
SECONDS, STREAMS = 10, 4  # of each route
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 48


def check_load(setting: Setting) -> str:
    return ", ".join(f"{load(setting, route)} requests to {route}" for route in ROUTES)


def load(setting: Setting, route: str) -> int:
    """How many requests were answered. ClientError if one was not as it should be."""
    report = setting.folder / f"guidellm{route.replace('/', '-')}.json"
    run(
        setting,
        "guidellm", "run",
        "--backend", f"kind=openai_http,target={setting.url},model=demo,api_key={KEY},request_format={route}",
        "--profile", f"kind=concurrent,streams={STREAMS}",
        "--constraint", f"kind=max_duration,seconds={SECONDS}",
        "--tokenizer", f"kind=huggingface_auto,model={Path(TARGET).absolute()}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        "--output", f"kind=json,path={report}",
        "--disable-console-interactive",
    )  # fmt: skip
    (benchmark,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    totals, answered = benchmark["metrics"]["request_totals"], benchmark["requests"]["successful"]
    expect(totals["errored"] == 0, f"{totals['errored']} requests to {route} ended in an error: {benchmark['requests']['errored'][:3]}")
    expect(len(answered) >= STREAMS, f"only {len(answered)} requests to {route} were answered in {SECONDS} s")
    expect(totals["incomplete"] <= STREAMS, f"{totals['incomplete']} requests to {route} did not end")
    lengths = {request["output_tokens"] for request in answered}
    expect(lengths == {OUTPUT_TOKENS}, f"{route} was asked for {OUTPUT_TOKENS} tokens and gave {sorted(lengths)}")
    return len(answered)

"""schemathesis: every answer is one that /openapi.json declares, and requests that it forbids are refused.

Not asked for: that every request which the document allows is accepted. Much that is refused depends on several fields, on the model, or on
what a grammar can keep to, and no schema says so.
"""

import json
from collections import Counter
from pathlib import Path

from tools.clients.checks import KEY, Setting, expect, run

EXAMPLES = 5  # random requests to an operation, beside those of the schemas' boundaries


def check_document(setting: Setting) -> str:
    report = setting.folder / "schemathesis.har"
    run(
        setting,
        "schemathesis", "run", f"{setting.url}/openapi.json",
        "--header", f"Authorization: Bearer {KEY}",
        "--phases", "examples,coverage,fuzzing",
        "--exclude-checks", "positive_data_acceptance",
        "--max-examples", str(EXAMPLES),
        "--seed", "0",
        "--generation-database", "none",
        "--request-timeout", "120",
        "--continue-on-failure",
        "--no-color",
        "--report-har-path", str(report),
    )  # fmt: skip
    return summary(report)


def summary(report: Path) -> str:
    """ClientError unless the run met what it is there for."""
    answers = [entry["response"] for entry in json.loads(report.read_text(encoding="utf-8"))["log"]["entries"]]
    statuses = Counter(answer["status"] for answer in answers)
    streams = sum(answer["content"]["mimeType"].startswith("text/event-stream") for answer in answers)
    for status in (200, 400, 401, 404, 405):
        expect(statuses[status], f"no answer had status {status}: {dict(statuses)}")
    expect(streams, "no answer was a stream")
    told = ", ".join(f"{count} of status {status}" for status, count in sorted(statuses.items()))
    return f"{len(answers)} requests: {told}; {streams} streams"

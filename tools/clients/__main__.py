"""python -m tools.clients: other people's HTTP clients against the running server with the demo pair.

Nothing is fetched. The clients' programs come from an environment of their own, which `make conformance-clients` makes; openai-python is
the one that this program runs in. Prints a table; the status is 1 when anything failed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.bench.rounds import BenchError
from tools.clients import openai_python
from tools.clients.checks import DRAFT, ClientError, Setting, server
from tools.clients.guidellm import check_load
from tools.clients.lm_eval import check_scores
from tools.clients.schemathesis import check_document

Check = Callable[[Setting], str]
CHECKS: dict[str, dict[str, Check]] = {
    "schemathesis": {"answers are as /openapi.json says": check_document},
    "lm-eval": {"the same scores with and without speculation": check_scores},
    "guidellm": {"no stream under load ends in an error": check_load},
    "openai-python": {
        "whole answers and streams": openai_python.check_answers,
        "asynchronous, many at once": openai_python.check_asynchronous,
        "structured output, parsed": openai_python.check_structured,
        "tools: forced, named, streamed": openai_python.check_tools,
        "classes of errors": openai_python.check_errors,
        "retries after 503, as Retry-After says": openai_python.check_retries,
    },
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.clients", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=Path, default=Path("build/clients/venv/bin"), help="folder of the clients (default %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("build/clients/run"), help="for logs and reports (default %(default)s)")
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(CHECKS)}; all by default")
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.clients) - set(CHECKS)):
        parser.error(f"no client is called {unknown[0]!r}; there are {', '.join(CHECKS)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    with server(DRAFT) as url:
        setting = Setting(url, arguments.programs.absolute(), arguments.folder.absolute())
        for client in arguments.clients or CHECKS:
            for what, check in CHECKS[client].items():
                failures += judge(client, what, check, setting)
    print(f"{failures} of the checks failed" if failures else "all checks passed")
    return int(failures > 0)


def judge(client: str, what: str, check: Check, setting: Setting) -> int:
    """Runs one check and prints its row. 1 where it failed."""
    start, fault = time.monotonic(), None
    try:
        found = check(setting)
    except Exception as error:  # whatever a client's library raises is a finding, and the others still run
        fault = f"{error}" if isinstance(error, ClientError) else f"{type(error).__name__}: {error}"
        found = fault.splitlines()[0] if fault else "failed"
    print(f"{'ok' if fault is None else 'FAILED':6} {client:13} {what:45} {time.monotonic() - start:4.0f} s  {found}", flush=True)
    if fault is not None:
        print(fault, file=sys.stderr, flush=True)
    return int(fault is not None)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"error: {error}")

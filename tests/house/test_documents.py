"""Documents against the repository: commands, flags, links, paths, options, request fields, metrics."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from server.engine.config import EngineConfig
from server.engine.target import SUPPORTED
from server.metrics import Metrics
from server.openai.chat_protocol import ChatRequest
from server.openai.completion_protocol import CompletionRequest
from server.openai.protocol import GenerationRequest, SpeculationMetrics
from server.settings import DEMO_NAME, Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += sorted((ROOT / "benchmarks").rglob("*.md"))
README = (ROOT / "README.md").read_text()
HTTP = (ROOT / "docs/http.md").read_text()
# What a command or a user makes, or the user names.
NOT_IN_THE_REPOSITORY = {"config.json", "model.safetensors", "result.json", "build/demo/prompts.jsonl", "data/HumanEval.jsonl.gz"}
NOT_IN_THE_REPOSITORY |= {"grade_school_math/data/test.jsonl", "FILE.jsonl", "grade_school_math/data/train.jsonl"}
NOT_IN_THE_REPOSITORY |= {"structured_outputs.json"}  # a field of requests


def code(text: str) -> list[str]:
    """Code blocks and code spans, continued lines joined."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + spans


def table(text: str, heading: str) -> dict[str, list[str]]:
    """Rows of the first table below ``heading``, by the code in their first cell; a cell with several names gives several rows."""
    lines = text[text.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    rows = {}
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        rows |= dict.fromkeys(re.findall(r"`([^`]+)`", first), rest)
    return rows


@cache
def usage(module: str) -> str:
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-m", *module.split()], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_exist(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not link.startswith("http"):
            assert (document.parent / link).exists(), link
    for path in re.findall(r"(?<![\w/.-])[\w.][\w./-]*\.(?:md|py|ya?ml|toml|txt|jsonl|json|gz)\b", "\n".join(code(text))):
        assert path in NOT_IN_THE_REPOSITORY or (ROOT / path).exists() or (document.parent / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code(document.read_text()):
        if made := re.match(r"make((?: [a-z-]+)+)", line):
            assert set(made[1].split()) <= targets, line


def commands() -> list[str]:
    lines = [line for document in DOCUMENTS for line in code(document.read_text())]
    return sorted({match[1] for line in lines if (match := re.search(r"python -m (.*)", line)) and " " in match[1]})


@pytest.mark.parametrize("command", commands())
def test_commands_take_these_flags(command: str) -> None:
    words = command.split("#")[0].split()
    module = words[0]
    if not module.startswith(("server", "tools")):
        pytest.skip("not a program of this project")
    if module == "tools.train_vsd":
        module += f" {words[1]}"
    help_text = usage(f"{module} --help")
    for flag in re.findall(r"(?<!\S)--[\w-]+", command):
        assert re.search(rf"{flag}\b", help_text), flag


def test_makefile_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    listed = subprocess.run(["make", "--no-print-directory"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert re.findall(r"^make ([\w-]+) ", listed, re.MULTILINE) == phony[1].split()


def own_fields(request: type[GenerationRequest]) -> dict[str, FieldInfo]:
    return {name: field for name, field in request.model_fields.items() if name not in GenerationRequest.model_fields}


def test_server_flags_are_documented_as_they_are() -> None:
    documented = table(HTTP, "## Options")
    for name, field in Settings.model_fields.items():
        flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
        default = "-" if field.default is None else f"`{field.default}`"
        assert documented.pop(flag) == [f"`VSD_{name.upper()}`", default, field.description]
    assert not documented


def test_environment_variables_exist() -> None:
    for document in DOCUMENTS:
        for name in re.findall(r"\bVSD_([A-Z_]+)\b", document.read_text()):
            assert name.lower() in Settings.model_fields, name


@pytest.mark.parametrize(
    ("heading", "fields"),
    [
        ("## Generating", GenerationRequest.model_fields),
        ("## Completions", own_fields(CompletionRequest)),
        ("## Chat completions", own_fields(ChatRequest)),
    ],
)
def test_request_fields_are_documented(heading: str, fields: dict[str, FieldInfo]) -> None:
    documented = table(HTTP, heading)
    assert set(documented) == set(fields)
    for name, field in fields.items():
        default = documented[name][0]
        if default.startswith("`"):
            assert json.loads(default.strip("`")) == field.default, name
        else:
            assert field.is_required() or field.default is None or name in ("stream_options", "speculation", "response_format"), name


def test_speculation_statistics_are_documented() -> None:
    assert set(table(HTTP, "### Speculation statistics")) == set(SpeculationMetrics.model_fields)


def test_metrics_are_documented_as_they_are() -> None:
    documented = table(HTTP, "## Metrics")
    for family in Metrics("m").registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert documented.pop(name) == [family.type, family.documentation]
    assert not documented


def test_routes_are_documented() -> None:
    """Both ways; the application is never started, so any engine will do."""
    from server.app import operations
    from server.openai import chat, completions, models, tokenization

    routers = (operations, completions.router, chat.router, models.router, tokenization.router)
    routes = {route.path for router in routers for route in router.routes}
    documented = {path.split()[-1].replace("/NAME", "/{model_id:path}") for path in table(HTTP, "## Routes")}
    assert documented - {"/openapi.json"} == routes


def test_supported_models_are_those_of_the_engine() -> None:
    listed = re.search(r"Supported model types: (.*?)\. Anything", README, re.DOTALL)
    assert listed
    assert tuple(re.findall(r"`(\w+)`", listed[1])) == SUPPORTED


def test_readme_describes_the_default_tree() -> None:
    defaults = EngineConfig()
    assert f"{defaults.tree_nodes} nodes, depth {defaults.tree_depth}" in README
    assert f"keeps the best {defaults.tree_nodes}." in README
    assert f'model="{DEMO_NAME}"' in README


def test_requests_of_the_readme_are_valid() -> None:
    completion, chat = re.findall(r"-d '(\{.*?\})'", README, re.DOTALL)
    assert CompletionRequest.model_validate_json(completion).prompt == ["Once upon a time"]
    assert ChatRequest.model_validate_json(chat).max_completion_tokens == 64

"""Dockerfile, compose files and Prometheus configuration against the repository. Nothing here needs a container engine."""

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.engine.types import FinishReason
from server.metrics import Metrics
from server.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILES = ("docker-compose.yml", "deploy/compose.gpu.yml")
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
GPU_SERVER = yaml.safe_load((ROOT / "deploy/compose.gpu.yml").read_text())["services"]["server"]
PROMETHEUS = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
GROUPS = yaml.safe_load((ROOT / "deploy/rules.yml").read_text())["groups"]


class Instruction(NamedTuple):
    name: str
    text: str


def dockerfile() -> list[Instruction]:
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    return [Instruction(*line.split(None, 1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def arguments(name: str) -> list[str]:
    return [text for instruction, text in dockerfile() if instruction == name]


def environment() -> dict[str, str]:
    """The environment of the last stage."""
    names = [instruction for instruction, _ in dockerfile()]
    last_stage = dockerfile()[len(names) - names[::-1].index("FROM") :]
    return dict(pair.split("=", 1) for name, text in last_stage if name == "ENV" for pair in text.split())


def build_arguments() -> dict[str, str]:
    return {name: default for name, _, default in (text.partition("=") for text in arguments("ARG"))}


# Dockerfile


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for text in arguments("COPY") if "--from" not in text for source in text.split()[:-1]]
    assert set(copied) == set(allowed)
    for source in copied:
        assert (ROOT / source).exists(), source


def test_image_has_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {path.name for path in ROOT.iterdir() if path.is_dir() and any(fnmatch(path.name, pattern) for pattern in patterns)}
    copied = {source for text in arguments("COPY") if "--from" not in text for source in text.split()[:-1]}
    assert packages <= copied
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= copied


def test_every_torch_build_has_its_constraints() -> None:
    pip = [text for text in arguments("RUN") if "pip install" in text]
    assert any("--constraint constraints/$TORCH.txt" in text for text in pip)
    makefile = re.search(r"^TORCH \?= .*echo (\w+) \|\| echo (\w+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert makefile
    compose = SERVICES["server"]["build"]["args"]["TORCH"]
    default = re.fullmatch(r"\$\{TORCH:-(\w+)\}", compose)
    assert default
    builds = {build_arguments()["TORCH"], default[1], GPU_SERVER["build"]["args"]["TORCH"], *makefile.groups()}
    assert builds == {file.stem for file in (ROOT / "constraints").glob("*.txt")}


def test_runs_as_a_user_of_its_own_whose_home_holds_the_caches() -> None:
    names = [name for name, _ in dockerfile()]
    (user,) = arguments("USER")
    created = next(text for text in arguments("RUN") if "useradd" in text)
    assert f"--uid {user} --create-home" in created
    assert int(user) > 0
    assert names.index("USER") < names.index("ENTRYPOINT")
    home = environment()["HOME"]
    assert home == f"/home/{created.split()[-1]}"
    assert arguments("WORKDIR")[-1] == home
    assert SERVICES["server"]["volumes"] == [f"home:{home}"]


def test_command_line_is_one_that_the_server_takes() -> None:
    (entrypoint,) = arguments("ENTRYPOINT")
    assert json.loads(entrypoint) == ["python", "-m", "server"]
    (command,) = arguments("CMD")
    assert json.loads(command) == SERVICES["server"]["command"]
    settings = load_settings(json.loads(command))
    assert settings.host == "0.0.0.0"
    assert arguments("EXPOSE") == [str(settings.port)]


@contextmanager
def probe(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server on a free port that gives every GET this status: its port, and the paths asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, paths
        server.shutdown()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_health_check_follows_readiness(status: int, healthy: bool) -> None:
    (check,) = arguments("HEALTHCHECK")
    python, *options = json.loads(check[check.index("CMD") + 3 :])
    assert python == "python"
    with probe(status) as (port, paths):
        command = [option.replace(f":{arguments('EXPOSE')[0]}/", f":{port}/") for option in options]
        done = subprocess.run([sys.executable, *command], capture_output=True)
    assert paths == ["/readyz"]
    assert (done.returncode == 0) is healthy


# Compose


@pytest.mark.parametrize("file", COMPOSE_FILES)
def test_compose_file_is_valid(file: str) -> None:
    """Against the Compose specification's schema, which check-jsonschema carries."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(ROOT / file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_names_what_exists() -> None:
    server = SERVICES["server"]
    for build in (server["build"], GPU_SERVER["build"]):
        assert set(build["args"]) <= set(build_arguments())
    assert (ROOT / server["build"]["context"] / "Dockerfile").exists()
    for variable in server["environment"]:
        if variable.startswith("VSD_"):
            assert variable.removeprefix("VSD_").lower() in Settings.model_fields, variable
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (ROOT / source).is_file() if source.startswith(".") else source in COMPOSE["volumes"], volume


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    for port in service["ports"]:
        assert port.startswith("127.0.0.1:")


def test_server_is_published_where_it_listens() -> None:
    port = arguments("EXPOSE")[0]
    assert SERVICES["server"]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_gpu_file_reserves_a_gpu_for_a_service_that_exists() -> None:
    (device,) = GPU_SERVER["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert "server" in SERVICES


# Prometheus


def samples() -> dict[str, set[str]]:
    """Every series that the server exports, with its label names. Counters without a value yet are exported by `_total` all the same."""
    metrics = Metrics("m")
    metrics.count_rejected()
    return {
        sample.name: set(sample.labels) for family in text_string_to_metric_families(metrics.render().decode()) for sample in family.samples
    }


def rules() -> list[dict]:
    return [rule for group in GROUPS for rule in group["rules"]]


def test_prometheus_scrapes_the_server_and_reads_the_rules() -> None:
    (job,) = PROMETHEUS["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{arguments('EXPOSE')[0]}"]}]
    assert "server" in SERVICES
    mounted = dict(volume.split(":")[:2] for volume in SERVICES["prometheus"]["volumes"])
    assert mounted["./deploy/prometheus.yml"] == "/etc/prometheus/prometheus.yml"
    for file in PROMETHEUS["rule_files"]:
        assert mounted[f"./deploy/{file}"] == f"/etc/prometheus/{file}"


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or rule["alert"])
def test_rules_name_series_and_labels_that_exist(rule: dict) -> None:
    exported = samples()
    recorded = {other["record"] for other in rules() if "record" in other}
    used = re.findall(r"\bvsd[_:][\w:]+", rule["expr"])
    assert used or 'up{job="vsd"}' in rule["expr"]
    for name in used:
        assert name in exported or name in recorded, name
    for name, label, value in re.findall(r"(\w+)\{(\w+)=\"(\w+)\"\}", rule["expr"]):
        if name != "up":
            assert label in exported[name]
            assert label != "outcome" or value in (*get_args(FinishReason), "rejected")


def test_alerts_watch_the_job_that_is_scraped() -> None:
    jobs = {job["job_name"] for job in PROMETHEUS["scrape_configs"]}
    watched = {job for rule in rules() for job in re.findall(r'job="(\w+)"', rule["expr"])}
    assert watched == jobs
    for rule in rules():
        if "alert" in rule:
            assert rule["annotations"]["summary"]
            assert rule["labels"]["severity"] in ("warning", "critical")

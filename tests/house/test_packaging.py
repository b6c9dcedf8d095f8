"""pyproject.toml against what the code imports, and the wheel against the source tree."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("server", "kernels", "drafts", "tools")
# Development tools that are run, not imported.
RUN = {"check-jsonschema", "mypy", "pytest-timeout", "pytest-xdist", "ruff", "setuptools", "types-pyyaml"}

# What tools/bench measures this project against, each in an environment of its own.
PEERS = {"ctranslate2", "gguf", "llama-cpp", "vllm"}


def declared(*extras: str) -> set[str]:
    """Names of the requirements of the project (no argument) or of some extras, those of nested extras included."""
    lines = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]] if extras else PROJECT["dependencies"]
    names = set()
    for requirement in map(Requirement, lines):
        names |= declared(*requirement.extras) if requirement.name == PROJECT["name"] else {canonicalize_name(requirement.name)}
    return names


def imported(*paths: str) -> set[str]:
    """Distributions of all modules outside the standard library and the project that the files below ``paths`` import."""
    modules = set()
    for path in paths:
        top = ROOT / path
        for file in [top] if top.is_file() else sorted(top.rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    modules.add(str(node.module).partition(".")[0])
    known = packages_distributions()
    own = {*PACKAGES, "tests", "conftest", *sys.stdlib_module_names}
    return {canonicalize_name(known.get(module, [module])[0]) for module in modules - own}


def test_runtime_imports_are_declared_and_used() -> None:
    assert imported("server", "kernels", "drafts") == declared() | declared("triton"), "the modules import without Triton too"


@pytest.mark.parametrize(
    ("extra", "paths"), [("train", ["tools/train_vsd", "tools/demo"]), ("bench", ["tools/bench"])], ids=["train", "bench"]
)
def test_tool_imports_are_declared_and_used(extra: str, paths: list[str]) -> None:
    assert imported(*paths, "tools/prompts.py") - declared() - PEERS == declared(extra)


def test_test_imports_are_declared_and_used() -> None:
    beside = declared() | declared("train", "bench") | RUN
    assert imported("tests") - beside == declared("dev") - beside


def test_constraints_allow_what_the_project_asks_for() -> None:
    wanted = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}
    for file in (ROOT / "constraints").glob("*.txt"):
        for line in file.read_text().splitlines():
            if line and not line.startswith("#"):
                constraint = Requirement(line)
                for version in (part.version for part in constraint.specifier):
                    assert wanted[constraint.name].specifier.contains(version), f"{file.name}: {line}"


def test_wheel_holds_the_packages_and_the_demo_pair_only(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.checkpoint"))
    expected = {str(file.relative_to(source)) for name in PACKAGES for file in (source / name).rglob("*") if file.is_file()}
    (source / "drafts/demo/x.checkpoint").mkdir()
    (source / "drafts/demo/x.checkpoint/model.safetensors").touch()
    (source / "tests").mkdir()
    (source / "tests/test_x.py").touch()
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not re.match(r"[^/]+\.dist-info/", name)}
    assert held == expected
    assert "drafts/demo/target/tokenizer.json" in held

"""A target and prompts that are trained on in seconds."""

from pathlib import Path

import pytest

from tests.tools.tiny_training import tiny_prompts, tiny_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")

"""What runs on a machine that has torch, transformers and pytest, and not this project's other dependencies."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "kernels.bench", "server.engine.engine", "tests.engine.engines", "tests.engine.prompts", "tests.kernels.check_tree_kernels",
    "tests.kernels.check_tree_verify", "tests.kernels.check_draft_level", "tests.kernels.check_layer_kernels", "tools.gpu_check",
    "tools.bench.gpu", "tools.train_vsd.train",
)  # fmt: skip
MISSING = ("fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings", "prometheus_client", "llguidance", "openai")


def test_engine_kernels_and_trainer_import_without_the_rest() -> None:
    lines = [
        "import sys",
        *(f"sys.modules[{name!r}] = None" for name in MISSING),
        *(f"import {name}" for name in MODULES),
    ]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]

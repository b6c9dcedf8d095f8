"""The Triton kernels without a GPU: against their references in Triton's interpreter, and compiled for GPUs that are not there.

Triton decides when a kernel is defined whether it is interpreted, so that each file runs in a process of its own. By hand:
``TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted/test_tree_mask.py``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = {"interpreted": "1", "compiled": "0"}  # value of TRITON_INTERPRET


@pytest.mark.parametrize("file", [f"{folder}/{path.name}" for folder in FILES for path in sorted((HERE / folder).glob("test_*.py"))])
def test_without_a_gpu(file: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": FILES[file.partition("/")[0]]}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

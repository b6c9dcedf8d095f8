"""The kernels of ``native``: C++ that is compiled where it runs, by the compiler that is found there, for its processor."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.user_cache import user_cache

logger = logging.getLogger(__name__)
SOURCES = Path(__file__).with_name("native")
# Sums in any order and no traps let loops become vector instructions; unlike -ffast-math, NaN and infinity keep their meaning.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros",
    "-shared", "-fPIC", "-fvisibility=hidden",
    *(["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []),  # where there are such; compilers prefer 256
)  # fmt: skip
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_POINTER, _INDEX, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
ARGUMENTS = {
    "linear": [*4 * [_POINTER], *3 * [_INDEX], _POINTER],
    "int8_linear": [*4 * [_POINTER], *3 * [_INDEX], _POINTER],
    "add_rms_norm": [*3 * [_POINTER], _FLOAT, *2 * [_INDEX], *2 * [_POINTER]],
    "gated_silu": [_POINTER, *2 * [_INDEX], _POINTER],
    "rope_store": [_POINTER, _INDEX, _POINTER, _INDEX, *5 * [_POINTER], *4 * [_INDEX], *3 * [_POINTER]],
    "tree_attention": [_POINTER, *3 * [_INDEX], *3 * [_POINTER], *4 * [_INDEX], _FLOAT, _POINTER],
    "decode": [*3 * [_POINTER], _INDEX, *2 * [_POINTER], _INDEX, _POINTER, *5 * [_INDEX], *2 * [_FLOAT], _POINTER],
    "head_rows": [*11 * [_POINTER], *6 * [_INDEX], *2 * [_FLOAT], *2 * [_POINTER]],
    "catch_up": [*3 * [_POINTER], _INDEX, *6 * [_POINTER], *2 * [_INDEX], _POINTER, *5 * [_INDEX], *2 * [_FLOAT], *3 * [_POINTER]],
    "grow": [*2 * [_POINTER], *4 * [_INDEX], *2 * [_FLOAT], *7 * [_POINTER]],
    "kv_commit": [*2 * [_POINTER], *3 * [_INDEX], _POINTER, *2 * [_INDEX], *2 * [_POINTER], *3 * [_INDEX]],
    "tree_verify": [*2 * [_POINTER], *2 * [_INDEX], *8 * [_POINTER], *3 * [_INDEX], *4 * [_POINTER]],
    "draft_level": [*3 * [_POINTER], _INDEX, _POINTER, _INDEX, *2 * [_POINTER], *4 * [_INDEX], *6 * [_POINTER]],
    "gumbel_noise": [*2 * [_POINTER], *2 * [_INDEX], _POINTER],
    "tree_mask": [_POINTER, *3 * [_INDEX], *2 * [_POINTER]],
    "best_nodes": [*4 * [_POINTER], *3 * [_INDEX], _FLOAT, *2 * [_POINTER]],
}


def serves(x: Tensor) -> bool:
    """Whether there are kernels for ``x``: on a CPU, of a type that they have, where no gradient is wanted and a compiler was found."""
    return x.device.type == "cpu" and x.dtype in NAMES and not torch.is_grad_enabled() and library() is not None


def has(name: str, dtype: torch.dtype) -> bool:
    """Whether there is this kernel for elements of ``dtype`` on this machine."""
    return library() is not None and _address(name, dtype) is not None


def launch(name: str, dtype: torch.dtype | None, *arguments: Tensor | float | None) -> int:
    """Run a kernel, for elements of ``dtype`` where there are several, on the memory of tensors; None is no memory. ``best_nodes`` alone
    returns something.
    """
    return _kernel(name, dtype)(*[part.data_ptr() if isinstance(part, Tensor) else part for part in arguments])


@cache
def _kernel(name: str, dtype: torch.dtype | None) -> Callable[..., int]:
    address = _address(name, dtype)
    assert address is not None, f"there is no kernel {name} for {dtype}"
    return ctypes.CFUNCTYPE(_INDEX, *ARGUMENTS[name])(address)


@cache
def _address(name: str, dtype: torch.dtype | None) -> int | None:
    loaded, full = library(), name if dtype is None else f"{name}_{NAMES[dtype]}"
    assert loaded is not None
    loaded.kernel.restype = _POINTER
    return loaded.kernel(full.encode())


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, and a warning, where that fails: then the references run in their place."""
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning("the CPU kernels cannot be compiled, so that torch's operations run in their place, which are slower: %s", said)
        return None


def version() -> str:
    """Changes with what the kernels are compiled from, and by."""
    loaded = library()
    return "no kernels" if loaded is None else Path(loaded._name).stem


def _compiled() -> Path:
    """The file of the compiled kernels."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"no C++ compiler was found by the name of {compiler[0]}; install one, or set CXX")
    command = [*compiler, *FLAGS, str(SOURCES / "kernels.cpp"), "-o"]
    its_version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [path.read_text() for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(
        "\n".join((*sources, *command, its_version, platform.machine(), processor("flags", "Features"))).encode()
    ).hexdigest()[:16]
    directory = _directory()
    path = directory / f"kernels-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=directory) as own:  # several processes may do this at once
            room = os.environ | {"TMPDIR": own}  # for the compiler's own files: nothing else may be writable
            subprocess.run([*command, f"{own}/kernels.so"], capture_output=True, text=True, check=True, env=room)
            os.replace(f"{own}/kernels.so", path)
    return path


def _directory() -> Path:
    """The user's cache, or if it cannot be written a directory of this process alone."""
    directory = user_cache()
    try:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            if os.access(directory, os.W_OK):
                return directory
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="vsd-serve-"))


def processor(*names: str) -> str:
    """What Linux tells of the processor under one of these names, elsewhere what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = [line.partition(":")[2].strip() for line in lines if line.startswith(names)]
    return told[0] if told else platform.processor() or platform.machine()

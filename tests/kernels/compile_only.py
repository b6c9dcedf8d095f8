"""Compiles what a launcher would launch, for GPUs that are not there."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes per block, by compute capability
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Launches:
    """Stands in for a kernel and keeps the arguments that it would have been launched with."""

    kernel: JITFunction
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: self.calls.append((arguments, options))


def check_launches(module: ModuleType, launch: Callable[[], object], capability: int, tmp_path: Path) -> list[str]:
    """Compile every kernel of ``module`` that ``launch`` launches; return the PTX of each.

    Tensors may lie on the device "meta". Raises AssertionError where a kernel spills registers or takes too much shared memory.
    """
    recorded = {name: Launches(kernel) for name, kernel in vars(module).items() if isinstance(kernel, JITFunction)}
    known_capability = {"compute_capability": lambda device: capability} if hasattr(module, "compute_capability") else {}
    with patch.multiple(module, **recorded, **known_capability):
        launch()
    made = [(launches.kernel, *call) for launches in recorded.values() for call in launches.calls]
    assert made, "nothing was launched"
    return [_check(kernel, arguments, options, capability, tmp_path / "kernel.cubin") for kernel, arguments, options in made]


def _check(kernel: JITFunction, arguments: tuple, options: dict[str, Any], capability: int, cubin: Path) -> str:
    launch_options = {name: value for name, value in options.items() if name not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def specialised(value: Any, path: tuple[int, ...], is_constexpr: bool, by_value: bool = True) -> Any:
        """Triton's name for the type of an argument; a tuple of names for a tuple. Fills the two tables above."""
        if isinstance(value, tuple):
            parts = (specialised(part, (*path, i), is_constexpr) for i, part in enumerate(value))
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if is_constexpr or value is None or (by_value and isinstance(value, int) and value == 1):
            constexprs[path] = value
            return "constexpr"
        if by_value and _aligned(value):
            attributes[path] = [["tt.divisibility", 16]]
        return _type(value)

    signature = {
        parameter.name: specialised(values[parameter.name], (i,), parameter.is_constexpr, not parameter.do_not_specialize)
        for i, parameter in enumerate(kernel.params)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch_options)
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([NVIDIA_TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    what = f"{kernel.__name__} for sm_{capability}: {found}, {compiled.metadata.shared} bytes of shared memory"
    print(what)
    assert found["STACK"] == found["LOCAL"] == "0", f"{what}: it spills registers"
    assert compiled.metadata.shared <= SHARED_LIMIT[capability], what
    return compiled.asm["ptx"]


def _type(value: object) -> str:
    """Triton's name for the type of an argument."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _aligned(value: object) -> bool:
    """Whether Triton's launcher would specialise on a multiple of 16; tensors as torch allocates them are."""
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)

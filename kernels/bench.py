"""python -m kernels.bench: the time of every kernel on this GPU, against the bytes that it must move and a copy of the same machine.

Times are medians of CUDA-graph replays between events, so that they hold no host work, with a cold L2 cache.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kernels.best_nodes import best_nodes
from kernels.draft_level import draft_level
from kernels.gated_silu import gated_silu
from kernels.kv_commit import kv_commit
from kernels.linear import gated_linear, linear
from kernels.merge_pools import merge_pools
from kernels.noise import Noise, NoiseKey
from kernels.rms_norm import add_rms_norm
from kernels.rope_store import rope_store, rope_store_reference
from kernels.sampling import Filters, SamplingBatch
from kernels.tree_attention import tree_attention
from kernels.tree_layout import TreeLayout
from kernels.tree_mask import tree_mask
from kernels.tree_verify import tree_verify

REPLAYS = 20
BLOCK_SIZE = 16
VOCAB, DRAFT_VOCAB = 128_256, 32_000
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DEVICE, DTYPE = "cuda", torch.bfloat16


@dataclass(frozen=True)
class Case:
    """``run`` moves ``bytes`` at least; ``baseline`` is what one would run instead of the kernel, where there is something.

    ``kernels``: those whose own times are wanted too, where ``run`` launches several.
    """

    name: str
    bytes: int
    run: Callable[[], object]
    baseline: Callable[[], object] | None = None
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of the table; ``share_of_copy``: of the rate at which this GPU copies, bytes read and written counted.

    ``kernels``: microseconds of single ones, without what lies between them.
    """

    name: str
    microseconds: float | None
    bytes: int
    gigabytes_per_second: float | None = None
    share_of_copy: float | None = None
    baseline_microseconds: float | None = None
    kernels: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def microseconds(run: Callable[[], object]) -> float:
    """Median over replays of a graph of one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still make what is read
    with torch.inference_mode(), torch.cuda.stream(stream):  # compiles, and lets libraries allocate outside the capture
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph, stream=stream):
        run()
    cold = torch.zeros(64 << 20, device=DEVICE)
    times = []
    for _ in range(REPLAYS):
        cold.amax()  # read, not written: what is written would still have to leave the cache
        times.append(_timed(graph.replay))
    return median(times)


def kernel_microseconds(run: Callable[[], object], names: tuple[str, ...]) -> dict[str, float]:
    """Of single kernels, on average."""
    run()
    torch.cuda.synchronize()
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(REPLAYS):
            run()
        torch.cuda.synchronize()
    averages = {event.key: event.self_device_time_total / max(1, event.count) for event in profiled.key_averages()}
    return {name: averages[name] for name in names if name in averages}


def _timed(run: Callable[[], object]) -> float:
    """Microseconds of the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def parents(batch: int, nodes: int) -> Tensor:
    """A tree in level order, eight nodes a level, int64 [B, N]."""
    node = torch.arange(nodes, device=DEVICE)
    return torch.where(node <= 8, 0, node - 8 - (node - 1) % 8 + 3 * node % 8).expand(batch, -1).contiguous()


def attention(batch: int, context: int, nodes: int = 32) -> Case:
    per_request = -(-(context + nodes) // BLOCK_SIZE)
    blocks = batch * per_request
    k, v = (torch.randn(blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    q = torch.randn(batch, nodes, HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    ancestors, depth = tree_mask(parents(batch, nodes), 8)
    tables = torch.randperm(blocks, device=DEVICE).view(batch, per_request)
    lengths = torch.full((batch,), context, device=DEVICE)
    layout = TreeLayout(tables, lengths, depth, ancestors, None, BLOCK_SIZE, context)
    columns = context + nodes
    group = HEADS // KV_HEADS
    # The rows of the heads that share a KV head, so that the baseline reads K and V once as well.
    rows = torch.randn(batch, KV_HEADS, group * nodes, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    keys, values = (torch.randn(batch, KV_HEADS, columns, HEAD_DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    mask = torch.zeros(batch, 1, group * nodes, columns, device=DEVICE, dtype=DTYPE)
    return Case(
        f"tree_attention, batch {batch}, context {context}",
        batch * (columns * KV_HEADS * 2 + nodes * HEADS * 2) * HEAD_DIM * DTYPE.itemsize,
        lambda: tree_attention(q, k, v, layout, HEAD_DIM**-0.5),
        lambda: F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask),
    )


def noise_of(batch: int) -> Noise:
    seeds = torch.arange(batch, device=DEVICE)
    return Noise(NoiseKey(seeds, seeds + 100, torch.ones_like(seeds, dtype=torch.bool)), 9, VOCAB)


def verification(kind: str, batch: int = 32, nodes: int = 64) -> Case:
    logits = torch.randn(batch, nodes, VOCAB, device=DEVICE, dtype=DTYPE)
    parent = parents(batch, nodes)
    ancestors, depth = tree_mask(parent, 8)
    tokens = torch.randint(VOCAB, (batch, nodes), device=DEVICE)
    ones = torch.ones(batch, device=DEVICE)
    filters = Filters(ones.long() * VOCAB, ones * 0.9, ones * 0) if kind == "top-p" else None
    options = SamplingBatch(ones, filters, None, None, None)
    noise = None if kind == "T = 0" else noise_of(batch)
    return Case(
        f"tree_verify, {kind}, batch {batch}, {nodes} nodes",
        logits.nbytes,
        lambda: tree_verify(logits, options, noise, tokens, parent, depth, ancestors, 8),
        lambda: logits.argmax(-1),
    )


def drafting(batch: int = 32, topk: int = 8) -> Iterator[Case]:
    logits = torch.randn(batch, topk, DRAFT_VOCAB, device=DEVICE, dtype=DTYPE)
    ones = torch.ones(batch, device=DEVICE)
    target_ids = torch.randperm(VOCAB, device=DEVICE)[:DRAFT_VOCAB].sort().values
    scores = torch.zeros(batch, topk, device=DEVICE)
    options = SamplingBatch(ones, None, None, None, None)
    for kind, noise in (("T = 0", None), ("T = 1", noise_of(batch))):
        yield Case(
            f"draft_level, {kind}, batch {batch}, {topk} rows",
            logits.nbytes,
            lambda noise=noise: draft_level(logits, options, noise, 2, ones, target_ids, scores, topk),  # type: ignore[misc]
            lambda: logits.float().log_softmax(-1).topk(topk),
            ("segments_kernel", "row_children_kernel", "best_children_kernel"),
        )
    drafted = topk + 7 * topk**2
    pool = torch.randn(batch, drafted, device=DEVICE).cumsum(1).neg()
    index = torch.zeros(batch, drafted, dtype=torch.long, device=DEVICE)
    yield Case(
        f"best_nodes, batch {batch}", batch * drafted * 20, lambda: best_nodes(index[:, 0].contiguous(), pool, index, index, 64, 0.0)
    )
    more = index[:, :15].contiguous(), pool[:, :15].contiguous()
    yield Case(
        f"merge_pools, batch {batch}, {drafted} and 15 nodes", batch * (drafted + 15) * 40,
        lambda: merge_pools(pool, index, index, more[1], more[0], more[0], 8),
    )  # fmt: skip


def bookkeeping(batch: int = 32, nodes: int = 64, layers: int = 32, accepted: int = 4) -> Iterator[Case]:
    parent = parents(batch, nodes)
    yield Case(f"tree_mask, batch {batch}, {nodes} nodes", 3 * parent.nbytes, lambda: tree_mask(parent, 8))
    per_request = -(-(1024 + nodes) // BLOCK_SIZE)
    k, v = (torch.randn(layers, batch * per_request, BLOCK_SIZE, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    tables = torch.randperm(batch * per_request, device=DEVICE).view(batch, per_request)
    lengths = torch.full((batch,), 1000, device=DEVICE)
    path = torch.full((batch, 9), -1, device=DEVICE)
    path[:, : accepted + 1] = torch.arange(accepted + 1, device=DEVICE) * 8
    moved = layers * batch * accepted * KV_HEADS * HEAD_DIM * DTYPE.itemsize * 4
    yield Case(f"kv_commit, batch {batch}, {layers} layers", moved, lambda: kv_commit(k, v, tables, lengths, path))


def layer(rows: int = 32, hidden: int = 4096, neurons: int = 14336) -> Iterator[Case]:
    x, delta = (torch.randn(rows, hidden, device=DEVICE, dtype=DTYPE) for _ in range(2))
    weight = torch.ones(hidden, device=DEVICE, dtype=DTYPE)
    yield Case(
        f"add_rms_norm, {rows} rows", 4 * x.nbytes, lambda: add_rms_norm(x, delta, weight, 1e-5),
        lambda: F.rms_norm(x + delta, (hidden,), weight, 1e-5),
    )  # fmt: skip
    gate_up = torch.randn(rows, 2 * neurons, device=DEVICE, dtype=DTYPE)
    yield Case(
        f"gated_silu, {rows} rows", 3 * gate_up.nbytes // 2, lambda: gated_silu(gate_up),
        lambda: F.silu(gate_up[:, :neurons]) * gate_up[:, neurons:],
    )  # fmt: skip
    qkv = torch.randn(rows, HEADS + 2 * KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    caches = [torch.zeros(64, BLOCK_SIZE, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE) for _ in range(2)]
    cos, sin = (torch.randn(rows, 1, HEAD_DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    slots, rotated = torch.randperm(64 * BLOCK_SIZE, device=DEVICE)[:rows], HEADS + KV_HEADS

    def rotate(run: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: run(qkv[:, :rotated], qkv[:, rotated:], cos, sin, slots, None, *caches)

    yield Case(f"rope_store, {rows} rows", 2 * qkv.nbytes, rotate(rope_store), rotate(rope_store_reference))


def products(hidden: int = 4096, neurons: int = 14336) -> Iterator[Case]:
    """The matrices of a decoder layer, for a plain step of one request and for a tree."""
    shapes = {"q, k, v": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, hidden), "o": (hidden, hidden), "down": (hidden, neurons)}
    for rows in (1, 32):
        for name, (outputs, size) in shapes.items():
            yield product(f"linear, {name}", rows, outputs, size, linear)
        yield product(
            "gated_linear, gate and up", rows, 2 * neurons, hidden, gated_linear, lambda y: F.silu(y[:, :neurons]) * y[:, neurons:]
        )


def product(
    name: str,
    rows: int,
    outputs: int,
    size: int,
    run: Callable[[nn.Linear, Tensor], Tensor],
    then: Callable[[Tensor], Tensor] | None = None,
) -> Case:
    """``then`` is what ``run`` does after the product."""
    layer = nn.Linear(size, outputs, bias=False, device=DEVICE, dtype=DTYPE)
    x = torch.randn(rows, size, device=DEVICE, dtype=DTYPE)
    return Case(f"{name}, {rows} rows", layer.weight.nbytes, lambda: run(layer, x), lambda: then(layer(x)) if then else layer(x))


def cases() -> Iterator[Callable[[], Iterator[Case]]]:
    """Groups of cases, each made when its turn comes, so that their tensors do not pile up."""
    for batch in (1, 32):
        for context in (1024, 4096, 16384, 32768):
            yield lambda batch=batch, context=context: iter([attention(batch, context)])  # type: ignore[misc]
    for kind in ("T = 0", "T = 1", "top-p"):
        yield lambda kind=kind: iter([verification(kind)])  # type: ignore[misc]
    yield drafting
    yield bookkeeping
    yield layer
    yield products


def copy_rate() -> float:
    """Gigabytes per second of a device copy, read and written."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median(_timed(lambda: target.copy_(source)) for _ in range(REPLAYS)) / 1000


def measure(case: Case, copy: float) -> Row:
    try:
        time = microseconds(case.run)
        rate = case.bytes / time / 1000
        baseline = microseconds(case.baseline) if case.baseline else None
        kernels = kernel_microseconds(case.run, case.kernels) if case.kernels else {}
    except Exception as error:  # one kernel's failure must not hide the others' times
        return Row(case.name, None, case.bytes, error=f"{type(error).__name__}: {error}"[:500])
    return Row(case.name, time, case.bytes, rate, rate / copy, baseline, kernels)


def table(rows: list[Row]) -> str:
    lines = [f"{'':48}{'µs':>10}{'MB':>10}{'GB/s':>8}{'of copy':>9}{'baseline µs':>13}"]
    for row in rows:
        if row.microseconds is None or row.gigabytes_per_second is None or row.share_of_copy is None:
            lines.append(f"{row.name:48}  {row.error}")
            continue
        line = f"{row.name:48}{row.microseconds:10.1f}{row.bytes / 1e6:10.2f}{row.gigabytes_per_second:8.0f}{row.share_of_copy:9.0%}"
        lines.append(line + ("" if row.baseline_microseconds is None else f"{row.baseline_microseconds:13.1f}"))
        lines += [f"  of which {name:37}{time:10.1f}" for name, time in row.kernels.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels.bench needs an NVIDIA GPU, and torch finds none.", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    copy = copy_rate()
    rows = [measure(case, copy) for group in cases() for case in group()]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy moves {copy:.0f} GB/s\n{table(rows)}")
    if arguments.json:
        result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gigabytes_per_second": copy}
        arguments.json.write_text(json.dumps(result | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())

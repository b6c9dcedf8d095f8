"""The CPU's kernels against their references."""

import logging
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernels import cpu
from kernels.best_nodes import best_nodes_cpu
from kernels.cpu_linear import padded, panel_linear, panel_linear_cpu, panel_linear_reference, panels_of
from kernels.draft_level import draft_level_cpu
from kernels.gated_silu import gated_silu_cpu
from kernels.kv_commit import kv_commit_cpu
from kernels.noise import Noise, NoiseKey, gumbel_noise_cpu
from kernels.rms_norm import add_rms_norm, rms_norm_cpu
from kernels.rope_store import rope_store_cpu
from kernels.sampling import SamplingBatch
from kernels.tree_attention import tree_attention, tree_attention_cpu
from kernels.tree_mask import tree_mask, tree_mask_cpu
from kernels.tree_verify import tree_verify, tree_verify_cpu
from tests.kernels.check_draft_level import check_best_nodes, check_draft_level
from tests.kernels.check_layer_kernels import check_gated_silu, check_rms_norm, check_rope_store
from tests.kernels.check_tree_kernels import AttentionCase, check_kv_commit, check_tree_mask, random_forest
from tests.kernels.check_tree_verify import check_noise, check_ties_infinities_and_nan, check_tree_verify, random_parents
from tests.kernels.trees import forests, words

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="there is no C++ compiler")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.sampled_from([1, 24, 80, 1000, 1024, 2050])
CONTEXTS = st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33, 64, 70])
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 2), (20, 1)])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@given(st.integers(1, 40), SIZES, DTYPES)
def test_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    check_rms_norm(rows, size, dtype, "cpu", rms_norm_cpu)


@given(st.integers(1, 40), SIZES, DTYPES)
def test_gated_silu(rows: int, size: int, dtype: torch.dtype) -> None:
    check_gated_silu(rows, size, dtype, "cpu", gated_silu_cpu)


def test_gated_silu_of_large_numbers_and_nan() -> None:
    gate = torch.tensor([-1e4, -88.5, -87.0, 88.5, 1e4, torch.inf, torch.nan])
    found = gated_silu_cpu(torch.cat((gate, torch.ones(7))))
    torch.testing.assert_close(found, torch.nn.functional.silu(gate), equal_nan=True, rtol=1e-6, atol=1e-30)


@given(st.integers(1, 40), HEADS, st.sampled_from([8, 80, 96, 128]), DTYPES, st.booleans())
def test_rope_store(rows: int, heads: tuple[int, int], size: int, dtype: torch.dtype, padded: bool) -> None:
    check_rope_store(rows, heads, size, dtype, padded, "cpu", rope_store_cpu)


@given(st.integers(1, 40), st.sampled_from([1, 31, 32, 40, 130]), st.sampled_from([1, 3, 64, 300]), DTYPES, st.booleans(), st.booleans())
@settings(max_examples=40)
def test_products(rows: int, outputs: int, size: int, dtype: torch.dtype, biased: bool, eight_bits: bool) -> None:
    assume(eight_bits or cpu.has("linear", dtype))
    generator = torch.Generator().manual_seed(rows + outputs + size)
    x = torch.randn(rows, 1, size, generator=generator)
    weight = torch.randn(outputs, size, generator=generator) / size**0.5
    bias = padded(torch.randn(outputs, generator=generator)) if biased else None
    scale, x = None, x.to(dtype)
    if not eight_bits:
        weight = weight.to(dtype)
    else:
        weight = (40 * weight).round().clamp(-127, 127).to(torch.int8)
        scale = padded(torch.rand(outputs, generator=generator) / 40)
    arguments = x, panels_of(weight), outputs, bias, scale
    found, expected = panel_linear_cpu(*arguments), panel_linear_reference(*arguments)
    tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not cpu.has("linear", torch.bfloat16), reason="the processor has no tiles")
def test_a_row_of_bfloat16_is_the_same_beside_others() -> None:
    x, panels = torch.randn(70, 200).bfloat16(), panels_of(torch.randn(50, 200).bfloat16())
    whole = panel_linear_cpu(x, panels, 50, None, None)
    for rows in (1, 16, 31, 32, 33):
        assert torch.equal(panel_linear_cpu(x[:rows], panels, 50, None, None), whole[:rows])


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 33])
def test_products_of_a_large_matrix(rows: int) -> None:
    """Which is read at several places at once, if there are few rows; its size is no multiple of their number."""
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 1027), torch.randn(700, 1027) / 32
    found = panel_linear_cpu(x, panels_of(weight), 700, None, None)
    torch.testing.assert_close(found, x @ weight.t(), rtol=1e-5, atol=1e-5)


@given(forests(max_batch=3, max_nodes=12), st.data())
@settings(max_examples=60)
def test_attention_over_trees(forest: list[list[int]], data: st.DataObject) -> None:
    contexts = data.draw(st.lists(CONTEXTS, min_size=len(forest), max_size=len(forest)))
    ancestors, depth = words(forest)
    case = AttentionCase.make(
        contexts, depth, ancestors, heads=data.draw(HEADS), size=data.draw(st.sampled_from([8, 24, 64, 128, 256])),
        block_size=data.draw(st.sampled_from([1, 3, 16, 48])), dtype=data.draw(DTYPES), kernel=tree_attention_cpu,
    )  # fmt: skip
    case.check(data.draw(st.sampled_from([None, 1, 2, 5, 40])))


@pytest.mark.parametrize("nodes", [1, 63, 64, 65, 128])
@pytest.mark.parametrize("window", [None, 9])
def test_attention_over_full_trees(nodes: int, window: int | None) -> None:
    """A random tree and a chain."""
    generator = torch.Generator().manual_seed(nodes)
    tree = [0, *(int(torch.randint(0, node, (), generator=generator)) for node in range(1, nodes))]
    ancestors, depth = words([tree, [max(0, node - 1) for node in range(nodes)]])
    AttentionCase.make([37, 0], depth, ancestors, heads=(2, 1), kernel=tree_attention_cpu).check(window)


@given(st.lists(st.tuples(CONTEXTS, st.integers(0, 70)), min_size=1, max_size=3), HEADS, st.sampled_from([None, 1, 7, 50]), DTYPES)
def test_attention_over_chunks(chunks: list[tuple[int, int]], heads: tuple[int, int], window: int | None, dtype: torch.dtype) -> None:
    contexts, counts = [list(part) for part in zip(*chunks, strict=True)]
    width = max(1, *counts)
    live = torch.arange(width) < torch.tensor(counts)[:, None]
    depth = torch.arange(width).expand(len(chunks), -1)
    kernel = tree_attention_cpu
    AttentionCase.make(contexts, depth, None, live, heads=heads, block_size=5, dtype=dtype, kernel=kernel).check(window)


@pytest.mark.parametrize("first_column", [3, 12, 62])
def test_attention_from_a_later_level(first_column: int) -> None:
    generator = torch.Generator().manual_seed(first_column)
    seen = torch.randint(0, 1 << first_column, (2, 1), generator=generator) | 1 << first_column
    depth, kernel = torch.full((2, 1), 3), tree_attention_cpu
    AttentionCase.make([20, 0], depth, seen, first_column=first_column, kernel=kernel).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_same_beside_others(dtype: torch.dtype) -> None:
    ancestors, depth = words([[0, 0, 1, 1, 2, 4]] * 3)
    AttentionCase.make([100, 700, 9], depth, ancestors, heads=(2, 1), dtype=dtype, kernel=tree_attention_cpu).check_neighbours()


@pytest.mark.parametrize("with_kernels", [True, False])
def test_attention_of_the_live_rows_alone(with_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is dead: nodes that a grammar forbids, with all below them, or the last ones of small trees."""
    ancestors, depth = words([[0, 0, 1, 1, 2, 4]] * 3)
    live = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()
    whole = AttentionCase.make([20, 0, 9], depth, ancestors, live=live)
    if not with_kernels:
        monkeypatch.setattr(cpu, "library", lambda: None)
        whole.k.nan_to_num_(0.0), whole.v.nan_to_num_(0.0)
    alone = whole.q.flatten(0, 1)[live.flatten()]
    found = tree_attention(alone, whole.k, whole.v, whole.layout, 0.3)
    expected = tree_attention(whole.q, whole.k, whole.v, whole.layout, 0.3)[live]
    torch.testing.assert_close(found, expected)


def test_a_nan_of_a_request_stays_its_own() -> None:
    ancestors, depth = words([[0, 0, 1]] * 2)
    case = AttentionCase.make([20, 20], depth, ancestors, kernel=tree_attention_cpu)
    case.v[int(case.layout.block_tables[0, 0]), 3] = torch.nan
    broken = case.run().isnan()
    assert broken[0].all()
    assert not broken[1].any()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(2, 12), st.data())
def test_kv_commit(contexts: list[int], nodes: int, data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, nodes - 1))
    rows = st.lists(st.integers(1, nodes - 1), max_size=depth, unique=True)
    paths = [[0, *sorted(data.draw(rows))] for _ in contexts]
    path = torch.tensor([own + [-1] * (depth + 1 - len(own)) for own in paths])
    check_kv_commit(contexts, path, nodes, data.draw(st.sampled_from([1, 3, 16])), 2, (2, 8), data.draw(DTYPES), "cpu", kv_commit_cpu)


@given(forests(max_batch=4, max_nodes=64))
def test_tree_mask(forest: list[list[int]]) -> None:
    check_tree_mask(torch.tensor(forest), len(forest[0]), tree_mask_cpu)


def test_tree_mask_of_two_words() -> None:
    check_tree_mask(random_forest(2, 128, 3), 128, tree_mask_cpu)


@given(
    st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([5, 90, 1300]), st.integers(1, 5), DTYPES, st.booleans(), st.booleans(),
)  # fmt: skip
def test_draft_level(seed: int, rows: int, vocab: int, topk: int, dtype: torch.dtype, reduced: bool, sampled: bool) -> None:
    check_draft_level(seed, 2, rows, vocab, topk, dtype, "", reduced, sampled, "cpu", draft_level_cpu)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_children(odd: float) -> None:
    """NaN and infinity leave none of its row; the other row's are as they were."""
    logits = torch.randn(1, 2, 100)
    logits[0, 0, 70] = odd
    if odd < 0:
        logits[0, 0] = odd
    level = draft_level_cpu(logits, SamplingBatch(*[None] * 5), None, 0, torch.ones(1), None, torch.zeros(1, 2), 3)
    assert level.scores[0, :3].isneginf().all()
    torch.testing.assert_close(level.scores[0, 3:], logits[0, 1].log_softmax(-1).topk(3).values)
    assert level.best_rows.tolist() == [[1, 1, 1]]


def test_no_child_is_better_than_its_parent() -> None:
    """Whatever the logits round to: a tree would be cut between the two."""
    torch.manual_seed(0)
    logits = torch.randn(8, 4, 500) * 20
    logits[..., 0] += 60
    scores = -torch.rand(8, 4)
    level = draft_level_cpu(logits, SamplingBatch(*[None] * 5), None, 0, torch.full((8,), 0.4), None, scores, 3)
    assert (level.scores.view(8, 4, 3) <= scores[:, :, None]).all()


def test_best_nodes_never_lose_a_parent() -> None:
    scores, parents = torch.tensor([[-1.0, -0.5, -0.4, -2.0]] * 2), torch.tensor([[0, 1, 2, 0]] * 2)
    tokens, parent = best_nodes_cpu(torch.tensor([50, 51]), scores, torch.tensor([[1, 2, 3, 4]] * 2), parents, 3, 0.0)
    assert tokens.tolist() == [[50, -1, -1], [51, -1, -1]]
    assert parent.tolist() == [[0, 0, 0]] * 2
    tokens, parent = best_nodes_cpu(torch.tensor([50]), scores[:1], torch.tensor([[1, 2, 3, 4]]), parents[:1], 1, 0.0)
    assert (tokens.tolist(), parent.tolist()) == ([[50]], [[0]])


def test_products_of_no_rows() -> None:
    assert panel_linear_cpu(torch.empty(0, 8), panels_of(torch.randn(5, 8)), 5, None, None).shape == (0, 5)


@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.sampled_from([2, 5, 16, 64]),
    st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_best_nodes(seed: int, batch: int, topk: int, levels: int, nodes: int, node_price: float) -> None:
    check_best_nodes(seed, batch, topk, levels, nodes, node_price, "cpu", best_nodes_cpu)


@pytest.mark.parametrize("vocab", [1, 3, 255, 256, 257, 5000])
def test_noise(vocab: int) -> None:
    check_noise(30, vocab, "cpu", gumbel_noise_cpu)


@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([1, 2, 7, 16, 64]), st.sampled_from([5, 33, 1000]), DTYPES, st.booleans())
def test_verification(seed: int, batch: int, nodes: int, vocab: int, dtype: torch.dtype, sampled: bool) -> None:
    check_tree_verify(seed, batch, nodes, vocab, dtype, "", sampled, "cpu", tree_verify_cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verification_of_ties_infinities_and_nan(dtype: torch.dtype) -> None:
    check_ties_infinities_and_nan(dtype, "cpu", tree_verify_cpu)


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
def test_verification_of_the_live_nodes_alone(sampled: bool, with_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = random_parents(random.Random(1), 4, 9)
    ancestors, depth = tree_mask(parent, 9)
    live = torch.rand(4, 9) < 0.6
    live[:, 0] = True
    tokens = torch.where(live, torch.randint(0, 5, (4, 9)), -1)
    logits = torch.randn(4, 9, 5)
    noise = Noise(NoiseKey(torch.arange(4), torch.arange(4), torch.tensor([True, False, True, True])), 9, 5) if sampled else None
    options = SamplingBatch(torch.tensor([0.5, 1.0, 2.0, 1.0]), None, None, None, None)
    if not with_kernels:
        monkeypatch.setattr(cpu, "library", lambda: None)
    tree = tokens, parent, depth, ancestors, 8
    places = live.flatten().nonzero()[:, 0]
    found = tree_verify(logits.flatten(0, 1)[places], options, noise, *tree, places)
    for ours, expected in zip(found, tree_verify(logits, options, noise, *tree), strict=True):
        assert torch.equal(ours, expected)


def test_where_a_gradient_is_wanted_the_reference_runs() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.randn(2, 8, requires_grad=True)
        total, normed = add_rms_norm(x, x, torch.ones(8), 1e-5)
        (total + normed).sum().backward()
    assert x.grad is not None


def test_threads_are_torchs() -> None:
    """Two libraries of threads would fight for the cores: how many there are is set for both at once."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux tells what is loaded")
    libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line or "iomp" in line}
    assert len(libraries) == 1


def test_without_a_compiler_the_references_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert cpu.library.__wrapped__() is None
    assert "no C++ compiler was found" in caplog.text
    monkeypatch.setattr(cpu, "library", lambda: None)
    x, panels = torch.randn(3, 8), panels_of(torch.randn(5, 8))
    assert torch.equal(panel_linear(x, panels, 5, None, None), panel_linear_reference(x, panels, 5, None, None))


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\ncase "$1" in --version) exit 0;; esac\necho no such flag >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert cpu.library.__wrapped__() is None
    assert "no such flag" in caplog.text


def test_what_was_compiled_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cpu._compiled()
    assert path.parent == tmp_path / "vsd-serve"

    def fails(command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[1:] == ["--version"], "it is compiled once more"
        return run(command, capture_output=True, text=True, check=True)

    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", fails)
    assert cpu._compiled() == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_where_the_cache_cannot_be_written_each_process_has_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = cpu._compiled()
    assert path.exists()
    assert tmp_path not in path.parents
    shutil.rmtree(path.parent)

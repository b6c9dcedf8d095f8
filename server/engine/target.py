"""Any transformers decoder over the paged cache: one forward pass for all new rows of all requests."""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from drafts.eagle3 import feature_layers
from kernels.tree_attention import tree_attention
from kernels.tree_layout import Rows, TreeLayout
from kernels.tree_mask import tree_mask
from server.engine.config import EngineError
from server.engine.graphs import LEAST_CONTEXT, Graphs, graph_context
from server.engine.kv_cache import PagedTensors

SUPPORTED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt_neox", "olmo", "olmo2", "mixtral", "qwen3_moe",
    "granite", "smollm3", "cohere2", "gpt2", "opt",
)  # fmt: skip
"""Model types compared with eager attention on trees, with and without a committed prefix (tests/engine)."""
SHORT_NODES, SHORT_CONTEXT = 8, 256  # of trees, and the context that these are recorded for beside LEAST_CONTEXT
PROMPT_CONTEXT = 4096  # of a prompt's graph at least: few are longer, and what is not there costs next to nothing


@dataclass
class ForwardContext:
    """What our attention needs beside q, k and v; transformers hands it through to every layer.

    ``parts``: layouts whose rows lie one after the other; ``rows``: which of a part's B * N rows are computed, int64 [R], None for all.
    """

    parts: list[TreeLayout]
    rows: list[Tensor | None]
    slots: Tensor  # int64 [T], of all computed rows
    live: Tensor | None  # bool [T], False for padding among them
    cache: PagedTensors


def attend(q: Tensor, layer: int, scale: float, window: int | None, softcap: float | None, tree: ForwardContext) -> Tensor:
    """Attend from q [T, Hq, D] over the cache of ``layer``, which has K and V of these rows already; the result has q's shape."""
    keys, values = tree.cache.k[layer], tree.cache.v[layer]
    results, first = [], 0
    for layout, rows in zip(tree.parts, tree.rows, strict=True):
        count = layout.depth.numel() if rows is None else len(rows)
        part = q[first : first + count]
        part = part.unflatten(0, layout.depth.shape) if rows is None else part
        out = tree_attention(part, keys, values, layout, scale, window, softcap)
        results.append(out.flatten(0, 1) if rows is None else out)
        first += count
    return results[0] if len(results) == 1 else torch.cat(results)


def paged_tree_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, tree: ForwardContext | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention signature: query [1, Hq, B * N, D], key and value [1, Hkv, B * N, D] -> [1, B * N, Hq, D]."""
    assert tree is not None, "this attention runs inside Target.forward only"
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    tree.cache.write(layer, tree.slots, k, v, tree.live)
    return attend(q, layer, scale, sliding_window, softcap, tree)[None], None


AttentionInterface.register("paged_tree", paged_tree_attention)


def refuse_unsupported(config: Any) -> None:
    """Raise EngineError for what would be silently wrong over a paged tree cache."""
    layers = set(getattr(config, "layer_types", None) or ())
    rope = getattr(config, "rope_parameters", None) or {}
    rope_types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    reasons = {
        f"layers of type {sorted(layers - {'full_attention', 'sliding_attention'})}": bool(
            layers - {"full_attention", "sliding_attention"}
        ),
        "chunked attention": getattr(config, "attention_chunk_size", None) is not None,
        "multi-head latent attention (MLA)": getattr(config, "kv_lora_rank", None) is not None,
        "attention sinks": config.model_type == "gpt_oss",
        "RoPE that depends on the longest sequence of a batch": bool(rope_types & {"dynamic", "longrope"}),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise EngineError(
            f"model type {config.model_type!r} uses {', '.join(found)}, which this engine cannot serve losslessly; "
            f"supported model types: {', '.join(SUPPORTED)}"
        )
    if config.model_type not in SUPPORTED:
        raise EngineError(f"model type {config.model_type!r} is not supported; expected one of {', '.join(SUPPORTED)}")


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of decoder layers, whatever the architecture calls it."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)


def _own_config(model: PreTrainedModel) -> None:
    """Give all modules of the model one copy of its config: set_attn_implementation writes into it, and other models may share it."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


class Decoder(Protocol):
    """A forward pass as ``LeanDecoder`` is."""

    def __call__(
        self, tokens: Tensor, positions: Tensor, context: ForwardContext, keep: Tensor | None, taps: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor]]: ...

    def at_once(self, parts: list[Rows], cache: PagedTensors, taps: tuple[int, ...]) -> list[tuple[Tensor, Tensor | None]] | None:
        """``Target.forward_parts``, with the logits of live rows alone; None where that is not possible."""


class Target:
    """A causal LM with its paged cache.

    ``taps``: collect the low, middle and high hidden states for a draft head. ``decoder``: the forward pass of ``model``, where it is not
    transformers' own. ``graphs``: replays it for trees; ``prompt_graphs``: for pieces of prompts, over memory of its own, since trees are
    still looked at while prompts are computed.
    """

    def __init__(self, model: PreTrainedModel, taps: bool, decoder: Decoder | None = None) -> None:
        refuse_unsupported(model.config)
        self.model = model.eval().requires_grad_(False)
        _own_config(model)
        self.model.set_attn_implementation("paged_tree")
        config = model.config
        self.device, self.dtype = model.device, model.dtype
        self.vocab_size: int = config.vocab_size
        self.max_positions: int = config.max_position_embeddings
        self.num_layers: int = config.num_hidden_layers
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.taps = feature_layers(self.num_layers) if taps else ()
        self.decoder = decoder
        self.graphs: Graphs | None = None
        self.prompt_graphs: Graphs | None = None
        self._features: list[Tensor] | None = None  # a list while our own forward pass runs: others may use the model too
        if decoder is None:
            layers = decoder_layers(model, self.num_layers)
            for index in self.taps:
                layers[index].register_forward_pre_hook(self._tap, with_kwargs=True)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.kv_heads * self.head_size * self.dtype.itemsize

    def new_cache(self, blocks: int, block_size: int) -> PagedTensors:
        return PagedTensors(self.num_layers, blocks, block_size, self.kv_heads, self.head_size, self.dtype, self.device)

    def _tap(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._features is not None:
            self._features.append(args[0] if args else kwargs["hidden_states"])

    def forward(self, tokens: Tensor, layout: TreeLayout, cache: PagedTensors, keep: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``forward_parts`` of a single part."""
        return self.forward_parts([Rows(tokens, layout, keep)], cache)[0]

    def forward_parts(self, parts: list[Rows], cache: PagedTensors) -> list[tuple[Tensor, Tensor | None]]:
        """One pass over the rows of all parts; what a part gets does not depend on the others beside it. By graphs there is one for each,
        but for prompts in pieces and the trees after them.

        Returns for each part logits [K or B * N, V] and, with taps, the features [B, N, 3 * H]; both are 0 at rows that are not live.
        """
        if self.graphs is None or self.decoder is None:
            return self._pass(parts, cache)
        are_trees = [part.layout.ancestors is not None for part in parts]
        if are_trees == [False, True]:
            return self._replay_together(parts[0], parts[1], cache)
        alone = sum(are_trees) == 1
        return [
            self._replay(part, cache, alone) if is_tree else self._replay_prompts(part, cache)
            for part, is_tree in zip(parts, are_trees, strict=True)
        ]

    def _replay(self, part: Rows, cache: PagedTensors, alone: bool) -> tuple[Tensor, Tensor | None]:
        """``forward`` of trees without padding rows; the results of one that is ``alone`` are gone with the next."""
        assert self.graphs is not None
        assert part.keep is part.layout.live is None
        layout = part.layout
        # Attention of few rows splits its columns from 512 on: up to 256 it needs no sum over splits.
        least = SHORT_CONTEXT if part.tokens.shape[1] <= SHORT_NODES else LEAST_CONTEXT
        logits, features = self.graphs.run(
            self._trees, part.tokens, layout.block_tables, layout.context_lens, layout.depth, layout.ancestors,
            cache=cache, block_size=layout.block_size, max_context=graph_context(layout.max_context, least),
        )  # fmt: skip
        if not alone:
            logits, features = logits.clone(), None if features is None else features.clone()
        return logits.flatten(0, 1), features

    def _trees(
        self, tokens: Tensor, tables: Tensor, lengths: Tensor, depth: Tensor, ancestors: Tensor, cache: PagedTensors, block_size: int,
        max_context: int,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As a function for graphs: logits [B, N, V] and features [B, N, 3 * H]."""
        layout = TreeLayout(tables, lengths, depth, ancestors, None, block_size, max_context)
        logits, features = self._pass([Rows(tokens, layout)], cache)[0]
        return logits.unflatten(0, tokens.shape), features

    def _replay_together(self, prompts: Rows, trees: Rows, cache: PagedTensors) -> list[tuple[Tensor, Tensor | None]]:
        """``forward`` of prompts in pieces and of trees by the graph of so many trees."""
        assert prompts.keep is not None
        chains, count = as_chains(prompts, trees.tokens.shape[1]), len(trees.tokens)
        logits, features = self._replay(beside(trees, chains), cache, alone=True)
        logits, others = logits.split([trees.tokens.numel(), chains.tokens.numel()])
        own = others.index_select(0, prompts.keep), None
        if features is None:
            return [own, (logits, None)]
        tapped = features[count:].reshape(*prompts.tokens.shape, -1).clone()  # drafting ahead overwrites them
        return [(own[0], tapped), (logits, features[:count])]

    def _replay_prompts(self, part: Rows, cache: PagedTensors) -> tuple[Tensor, Tensor | None]:
        """``forward`` of prompts in pieces of one width; ``keep`` names last live rows of some pieces."""
        assert self.prompt_graphs is not None
        if part.keep is None:  # all rows' logits, which few requests want
            return self._pass([part], cache)[0]
        layout = part.layout
        logits, features = self.prompt_graphs.run(
            self._pieces, part.tokens, layout.block_tables, layout.context_lens, layout.live,
            cache=cache, block_size=layout.block_size, max_context=graph_context(layout.max_context, PROMPT_CONTEXT),
        )  # fmt: skip
        return logits.index_select(0, part.keep // part.tokens.shape[1]), None if features is None else features.clone()

    def _pieces(
        self, tokens: Tensor, tables: Tensor, lengths: Tensor, live: Tensor, cache: PagedTensors, block_size: int, max_context: int
    ) -> tuple[Tensor, Tensor | None]:
        """As a function for graphs: logits [B, V] of every piece's last live row, and features [B, N, 3 * H]."""
        rows = torch.arange(tokens.shape[1], device=tokens.device)
        layout = TreeLayout(tables, lengths, rows.expand(len(tokens), -1), None, live, block_size, max_context)
        keep = torch.arange(len(tokens), device=tokens.device) * len(rows) + live.sum(1).clamp(min=1) - 1
        return self._pass([Rows(tokens, layout, keep)], cache)[0]

    def _pass(self, parts: list[Rows], cache: PagedTensors) -> list[tuple[Tensor, Tensor | None]]:
        if self.decoder is not None and (at_once := self.decoder.at_once(parts, cache, self.taps)) is not None:
            return [(_all_logits(part, logits), features) for part, (logits, features) in zip(parts, at_once, strict=True)]
        rows = [_computed(part.layout) for part in parts]
        tokens, positions, slots = (
            _picked([part.tokens for part in parts], rows),
            _picked([part.layout.positions for part in parts], rows).clamp(max=self.max_positions - 1),  # such nodes are never accepted
            _picked([part.layout.slots for part in parts], rows),
        )
        live = None
        if any(part.layout.live is not None and picked is None for part, picked in zip(parts, rows, strict=True)):
            ones = torch.ones((), dtype=torch.bool, device=self.device)
            live = _picked([ones.expand_as(p.tokens) if p.layout.live is None else p.layout.live for p in parts], rows)
        context = ForwardContext([part.layout for part in parts], rows, slots, live, cache)
        keep, counts = _kept(parts, rows)
        run = self.decoder or self._transformers
        logits, taken = run(tokens, positions, context, keep, self.taps)
        features = torch.cat(taken, dim=-1) if taken else None
        results, first_row, first_logit = [], 0, 0
        for part, picked, count in zip(parts, rows, counts, strict=True):
            width = part.tokens.numel() if picked is None else len(picked)
            own = logits[first_logit : first_logit + count]
            own = own if part.keep is not None else spread(own, part.tokens.numel(), picked)
            tapped = None
            if features is not None:
                tapped = spread(features[first_row : first_row + width], part.tokens.numel(), picked).unflatten(0, part.tokens.shape)
            results.append((own, tapped))
            first_row, first_logit = first_row + width, first_logit + count
        return results

    def _transformers(
        self, tokens: Tensor, positions: Tensor, context: ForwardContext, keep: Tensor | None, taps: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """transformers' own forward pass, as a ``Decoder``; hooks collect the features."""
        taken: list[Tensor] = []
        self._features = taken
        logits = self.model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, tree=context, logits_to_keep=0 if keep is None else keep
        ).logits[0]
        self._features = None
        return logits, [part[0] for part in taken]


def as_chains(prompts: Rows, nodes: int) -> Rows:
    """Prompts in pieces as trees of ``nodes`` nodes without a branch. Those in which no row is live are nobody's, and what is padding
    in the others goes to slots that are written before they are read.
    """
    layout, (pieces, width) = prompts.layout, prompts.tokens.shape
    assert layout.live is not None
    parts, rows = width // nodes, torch.arange(nodes, device=prompts.tokens.device)
    live = layout.live[:, ::nodes].flatten()
    lengths = (layout.context_lens[:, None] + torch.arange(0, width, nodes, device=rows.device)).flatten()
    tables = layout.block_tables[:, None].expand(-1, parts, -1).flatten(0, 1)
    ancestors = (2 << rows) - 1
    return Rows(
        prompts.tokens.view(-1, nodes),
        TreeLayout(
            tables * live[:, None], lengths * live, rows.expand(pieces * parts, -1), ancestors.expand(pieces * parts, -1), None,
            layout.block_size, layout.max_context + width,
        ),
    )  # fmt: skip


def beside(trees: Rows, others: Rows) -> Rows:
    """Both as one batch of trees of as many nodes."""
    own, new = trees.layout, others.layout
    assert own.ancestors is not None
    assert new.ancestors is not None
    pairs = (
        (own.block_tables, new.block_tables),
        (own.context_lens, new.context_lens),
        (own.depth, new.depth),
        (own.ancestors, new.ancestors),
    )
    tables, lengths, depth, ancestors = map(torch.cat, pairs)
    longest = max(own.max_context, new.max_context)
    return Rows(torch.cat((trees.tokens, others.tokens)), TreeLayout(tables, lengths, depth, ancestors, None, own.block_size, longest))


def _computed(layout: TreeLayout) -> Tensor | None:
    """The flat rows to compute, None for all: on a CPU padding costs as much as anything, elsewhere less than leaving it out."""
    return None if layout.live is None or layout.live.is_cuda else layout.live_rows


def _picked(values: list[Tensor], rows: list[Tensor | None]) -> Tensor:
    """The computed rows of all parts one after the other, [T]; values [B, N] each."""
    flat = [value.flatten() if picked is None else value.flatten()[picked] for value, picked in zip(values, rows, strict=True)]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _kept(parts: list[Rows], rows: list[Tensor | None]) -> tuple[Tensor | None, list[int]]:
    """The computed rows whose logits are wanted, None for all, and how many of them each part has."""
    kept, first, device = [], 0, parts[0].tokens.device
    for part, picked in zip(parts, rows, strict=True):
        count = part.tokens.numel() if picked is None else len(picked)
        own = torch.arange(count, device=device) if part.keep is None else part.keep
        if part.keep is not None and picked is not None:
            own = torch.searchsorted(picked, part.keep).clamp(max=len(picked) - 1)  # of an entry that graphs have filled up: whatever
        kept.append(own + first)
        first += count
    everything = all(part.keep is None for part in parts)
    return None if everything else torch.cat(kept), [len(own) for own in kept]


def _all_logits(part: Rows, logits: Tensor) -> Tensor:
    """With zeros at rows that are not live, if those of all rows are wanted."""
    everywhere = part.keep is None and part.layout.live is not None
    return spread(logits, part.tokens.numel(), part.layout.live_rows) if everywhere else logits


def spread(values: Tensor, size: int, rows: Tensor | None) -> Tensor:
    """values [R, ...] at their places ``rows`` among ``size``, zeros elsewhere."""
    return values if rows is None else values.new_zeros(size, *values.shape[1:]).index_copy_(0, rows, values)


@torch.inference_mode()
def self_check(target: Target, block_size: int) -> None:
    """Compare prefix + branching tree through our attention with eager attention on every root-to-node path; raise on mismatch."""
    device, size = target.device, 4
    generator = torch.Generator().manual_seed(0)
    prefix, nodes = (
        torch.randint(target.vocab_size, (2 * block_size + 3,), generator=generator),
        torch.randint(target.vocab_size, (size,), generator=generator),
    )
    parent = torch.tensor([[0, 0, 0, 1]], device=device)
    ancestors, depth = tree_mask(parent, 2)
    blocks = -(-(len(prefix) + size) // block_size)
    table = torch.arange(1, blocks + 1, device=device)[None]
    cache = target.new_cache(blocks + 1, block_size)
    length = torch.tensor([len(prefix)], device=device)
    chunk = TreeLayout(table, torch.zeros_like(length), torch.arange(len(prefix), device=device)[None], None, None, block_size, 0)
    target.forward(prefix[None].to(device), chunk, cache)
    tree = TreeLayout(table, length, depth, ancestors, None, block_size, len(prefix))
    ours, _ = target.forward(nodes[None].to(device), tree, cache)
    target.model.set_attn_implementation("eager")
    paths = torch.stack([torch.cat((prefix, nodes[[0, 1, 3]])), torch.cat((prefix, nodes[[0, 2, 2]]))]).to(device)
    reference = target.model(input_ids=paths, use_cache=False).logits[:, len(prefix) :]
    target.model.set_attn_implementation("paged_tree")
    expected = torch.stack([reference[0, 0], reference[0, 1], reference[1, 1], reference[0, 2]])
    error = ((ours - expected).abs().max() / expected.abs().max()).item()
    limit = 1e-3 if target.dtype == torch.float32 else 0.1
    if not error < limit:
        raise EngineError(
            f"self-check failed: logits of {target.model.config.model_type!r} over the paged tree cache differ from eager attention "
            f"by {error:.2g} of the largest logit, expected below {limit}; this model cannot be served losslessly"
        )

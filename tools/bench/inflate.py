"""The demo pair at the cost of a large one: the same text, logits and acceptance from a target and head of any larger Llama shape.

Layers, neurons, heads, hidden entries and tokens are added that contribute exactly zero (see inflation.py). In float32 logits differ
by rounding alone, and greedy text and, for a seed, sampled text stay the same. bfloat16 rounds what is scaled: norm weights unless
the hidden size grows by a power of 4, queries unless the head size does.
"""

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from drafts.checkpoint import DraftError, find_head, read_head, save_head, target_hash
from drafts.eagle3 import Eagle3Head
from tools.bench.inflation import Axes, InflateError, Inflater, Shape, check_growth, join, layer_order, shared_constant

LIKE = {
    "125m": Shape(768, 2048, 12, 12, 6, 64, 32000),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
}
"""``125m``: the size of small GPT-2. ``llama-3.1-8b``: every size of that model, and so its 8.03 billion parameters."""

DRAFT_SHARE = 4  # a published EAGLE-3 head drafts from 32000 of Llama 3.1's 128256 tokens
SHARD_BYTES = 4 * 10**9
ROPE_TYPES = ("default", "linear", "llama3")  # whose angles depend on their frequency alone


def parse_shape(text: str, own: Shape) -> Shape:
    """A name of LIKE, or ``hidden_size=512,num_hidden_layers=12``: other sizes stay, and the query heads of a key and value head."""
    if text in LIKE:
        return LIKE[text]
    names = [f.name for f in fields(Shape)]
    sizes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in names or not value.isdecimal():
            raise InflateError(
                f"--like {text}: expected {' or '.join(LIKE)}, or sizes as in hidden_size=512,num_hidden_layers=12 of {', '.join(names)}."
            )
        sizes[name] = int(value)
    if "num_key_value_heads" not in sizes and (heads := sizes.get("num_attention_heads")):
        if heads % own.group:
            raise InflateError(
                f"num_attention_heads {heads} was asked for, but the target has {own.group} to one key and value head: give a multiple."
            )
        sizes["num_key_value_heads"] = heads // own.group
    return replace(own, **sizes)


def inflated_layer(model: PreTrainedModel, index: int | None, inflater: Inflater, axes: Axes) -> dict[str, Tensor]:
    """The tensors of a decoder layer by their names in it; ``index`` None: of an added layer."""
    old = {} if index is None else model.model.layers[index].state_dict()
    attended, neurons = (axes.attended, axes.neurons) if old else (axes.attended.silent(), axes.neurons.silent())
    sides = {
        "self_attn.q_proj": (axes.query, axes.hidden),
        "self_attn.k_proj": (axes.kv, axes.hidden),
        "self_attn.v_proj": (axes.kv, axes.hidden),
        "self_attn.o_proj": (axes.hidden, attended),
        "mlp.gate_proj": (axes.neurons, axes.hidden),
        "mlp.up_proj": (axes.neurons, axes.hidden),
        "mlp.down_proj": (axes.hidden, neurons),
    }
    if old:
        old["self_attn.q_proj.weight"] = inflater.queries(old["self_attn.q_proj.weight"])
    layer = {f"{name}.weight": inflater.matrix(old.get(f"{name}.weight"), *both) for name, both in sides.items()}
    return layer | {f"{name}.weight": inflater.norm(old.get(f"{name}.weight")) for name in ("input_layernorm", "post_attention_layernorm")}


def inflated_target(model: PreTrainedModel, inflater: Inflater) -> Iterator[dict[str, Tensor]]:
    """The tensors of the inflated target, float32, in parts of one layer at most."""
    axes = Axes.between(inflater.old, inflater.new)
    yield {"model.embed_tokens.weight": inflater.embedding(model.get_input_embeddings().weight.detach())}
    order = layer_order(inflater.old.num_hidden_layers, inflater.new.num_hidden_layers)
    for place, index in enumerate(tqdm(order, desc="inflating", unit="layer", delay=2)):
        layer = inflated_layer(model, index, inflater, axes)
        yield {f"model.layers.{place}.{name}": tensor for name, tensor in layer.items()}
    yield {"model.norm.weight": inflater.final_norm(model.model.norm.weight.detach())}
    yield {"lm_head.weight": inflater.output(model.get_output_embeddings().weight.detach(), inflater.new.vocab_size, axes.hidden)}


@torch.no_grad()
def inflated_head(head: Eagle3Head, inflater: Inflater) -> Eagle3Head:
    """``head``, whose hidden size is the target's, at one layer of the new shape; its vocabulary at least 1 / DRAFT_SHARE."""
    config, new, hidden = head.config, inflater.new, inflater.old.hidden_size
    old = Shape.of(config, inflater.old.num_hidden_layers)
    check_growth("draft head", old, new)
    inflater = replace(inflater, old=old)
    axes = Axes.between(old, new)
    drafted = max(config.draft_vocab_size, new.vocab_size // DRAFT_SHARE)
    sizes = {name: size for name, size in asdict(new).items() if name != "num_hidden_layers"}
    eps = inflater.eps(config.rms_norm_eps)
    large = Eagle3Head(replace(config, **sizes, draft_vocab_size=drafted, target_hidden_size=new.hidden_size, rms_norm_eps=eps))
    large.metadata = head.metadata

    fc = inflater.matrix(head.fc.weight, axes.hidden, join(axes.hidden, axes.hidden, axes.hidden))
    fc[hidden : hidden + 1, 2 * new.hidden_size + hidden : 2 * new.hidden_size + hidden + 1] = 1  # the constant goes on
    query = config.num_attention_heads * config.head_dim
    qkv = torch.cat((inflater.queries(head.qkv_proj.weight[:query]), head.qkv_proj.weight[query:].float()))
    for own, value in {
        large.fc.weight: fc,
        large.qkv_proj.weight: inflater.matrix(qkv, join(axes.query, axes.kv, axes.kv), join(axes.hidden, axes.hidden)),
        large.o_proj.weight: inflater.matrix(head.o_proj.weight, axes.hidden, axes.attended),
        large.gate_up_proj.weight: inflater.matrix(head.gate_up_proj.weight, join(axes.neurons, axes.neurons), axes.hidden),
        large.down_proj.weight: inflater.matrix(head.down_proj.weight, axes.hidden, axes.neurons),
        large.lm_head.weight: inflater.output(head.lm_head.weight, drafted, axes.hidden),
        large.input_layernorm: inflater.norm(head.input_layernorm),
        large.hidden_norm: inflater.norm(head.hidden_norm),
        large.post_attention_layernorm: inflater.norm(head.post_attention_layernorm),
        large.norm: inflater.final_norm(head.norm),
    }.items():
        own.copy_(value)
    if head.temperature_shift is not None and large.temperature_shift is not None:
        large.temperature_shift[:hidden] = head.temperature_shift
    if head.embed_tokens is not None and large.embed_tokens is not None:
        large.embed_tokens.copy_(inflater.embedding(head.embed_tokens))
    if large.d2t is not None:
        ids = head.to_target_ids(torch.arange(config.draft_vocab_size))
        unused = torch.ones(new.vocab_size, dtype=torch.bool).index_fill(0, ids, False).nonzero().flatten()
        large.d2t.copy_(torch.cat((ids, unused[: drafted - len(ids)])) - torch.arange(drafted))
    return large


def write_shards(path: Path, parts: Iterator[dict[str, Tensor]], dtype: torch.dtype) -> int:
    """Write ``parts`` as transformers does, one file or several with an index; holds one file in memory. Returns the parameters."""
    files: list[dict[str, int]] = []  # of each file, tensors and their sizes
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(pending, path / f"{len(files)}.partial", metadata={"format": "pt"})
        files.append({name: tensor.numel() for name, tensor in pending.items()})
        pending.clear()

    for part in parts:
        part = {name: tensor.to(dtype) for name, tensor in part.items()}
        if pending and dtype.itemsize * sum(tensor.numel() for tensor in (pending | part).values()) > SHARD_BYTES:
            flush()
        pending |= part
    flush()
    count = len(files)
    names = ["model.safetensors"] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for i, name in enumerate(names):
        (path / f"{i}.partial").rename(path / name)
    parameters = sum(size for file in files for size in file.values())
    if count > 1:
        index = {tensor: name for name, file in zip(names, files, strict=True) for tensor in file}
        text = json.dumps({"metadata": {"total_size": parameters * dtype.itemsize}, "weight_map": index}, indent=2)
        (path / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    return parameters


def inflated_config(config: PreTrainedConfig, inflater: Inflater, dtype: torch.dtype, context: int) -> PreTrainedConfig:
    new = copy.deepcopy(config)
    new.update({**asdict(inflater.new), "rms_norm_eps": inflater.eps(config.rms_norm_eps), "tie_word_embeddings": False, "dtype": dtype})
    new.max_position_embeddings = max(context, config.max_position_embeddings)
    return new


def read_pair(target: str, draft: str) -> tuple[PreTrainedConfig, Eagle3Head]:
    """What is to be inflated, after the checks that need no target weights."""
    config = AutoConfig.from_pretrained(target)
    if config.model_type != "llama":
        raise InflateError(f"the target is of {config.model_type}, but only plain Llama models can be inflated: give one.")
    if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        raise InflateError(f"the target has biases or activation {config.hidden_act}, but only silu without biases can be inflated.")
    head = read_head(find_head(draft), config)
    for what, rope in (("target", config.rope_parameters), ("draft head", head.config.rope_parameters)):
        if rope.get("rope_type") not in ROPE_TYPES or rope.get("partial_rotary_factor", 1) != 1:
            raise InflateError(
                f"the {what} has RoPE settings {dict(rope)}, but only {', '.join(ROPE_TYPES)} on whole heads can be inflated."
            )
    if head.config.hidden_size != config.hidden_size or head.config.norm_output or head.config.norm_before_residual:
        raise InflateError(
            f"the draft head has hidden size {head.config.hidden_size}, norm_output {head.config.norm_output} and norm_before_residual "
            f"{head.config.norm_before_residual}, but only the target's {config.hidden_size} without either can be inflated."
        )
    return config, head


def plan_inflation(target: str, draft: str, like: str, device: torch.device) -> tuple[PreTrainedConfig, Eagle3Head, Inflater]:
    """The pair to inflate and how; raises InflateError, or DraftError for the head. ``device``: where large matrices are made."""
    config, head = read_pair(target, draft)
    own = Shape.of(config)
    shape = parse_shape(like, own)
    check_growth("target", own, shape)
    layer_order(own.num_hidden_layers, shape.num_hidden_layers)
    constant = shared_constant(own, (config.rms_norm_eps, head.config.rms_norm_eps))
    return config, head, Inflater(own, shape, constant, torch.Generator(device).manual_seed(0))


def inflate(target: str, draft: str, like: str, output: Path, dtype: torch.dtype, context: int = 0) -> None:
    """Write OUTPUT/target and OUTPUT/draft, of ``context`` positions at least, and say what they are.

    Raises InflateError, or DraftError for the head.
    """
    if taken := [path for path in (output / "target", output / "draft") if path.exists()]:
        raise InflateError(f"{taken[0]} exists: give another --output, or remove it.")
    config, head, inflater = plan_inflation(target, draft, like, torch.device("cpu"))
    large = inflated_head(head, inflater)
    new_config = inflated_config(config, inflater, dtype, context)
    if large.metadata is not None:
        large.metadata = replace(large.metadata, target_hash=target_hash(new_config))
    save_head(output / "draft", large, dtype)
    draft_parameters = sum(p.numel() for p in large.parameters())
    del large
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, use_safetensors=True)
    (output / "target").mkdir(parents=True)
    parameters = write_shards(output / "target", inflated_target(model, inflater), dtype)
    new_config.save_pretrained(output / "target")
    AutoTokenizer.from_pretrained(target).save_pretrained(output / "target")
    if model.can_generate():
        assert isinstance(model.generation_config, GenerationConfig)
        model.generation_config.save_pretrained(output / "target")
    print(f"{output / 'target'}: {parameters / 1e6:,.1f}M parameters; {output / 'draft'}: {draft_parameters / 1e6:,.1f}M. {inflater.new}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.inflate", description=__doc__)
    parser.add_argument("--target", required=True, help="the Llama to inflate: directory or hub id")
    parser.add_argument("--draft", required=True, metavar="HEAD", help="its EAGLE-3 head: directory or hub id")
    parser.add_argument("--like", required=True, metavar="SHAPE", help=f"{', '.join(LIKE)}, or sizes as in hidden_size=512,vocab_size=8192")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets target/ and draft/")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights on disk (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=0, metavar="N", help="positions to allow, if the target has fewer: beyond its own it says anything"
    )
    args = parser.parse_args(argv)
    try:
        inflate(args.target, args.draft, args.like, args.output, getattr(torch, args.dtype), args.context)
    except (InflateError, DraftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

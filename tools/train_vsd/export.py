"""Write a head in the layout that another server reads, and check that what was written is the same head."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from drafts.checkpoint import DraftError, find_head, read_head, save_head
from drafts.eagle3 import Eagle3Head, rotated
from drafts.formats import Verifier, unserved

LAYER_TENSORS = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"{name}.weight" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")),
)
ROWS = 16  # of the comparison after writing


def export_head(draft: str, layout: str, output: Path, target: str | None = None) -> None:
    """Write the head ``draft``, of any layout, as ``layout`` (one of ``formats.LAYOUTS``) into the new directory ``output``.

    ``target``, which the speculators layout names, also checks the head against its target. Weights keep the type they are stored
    in. Raises DraftError where the servers of that layout would not compute the same head.
    """
    source = find_head(draft)
    target_config = None if target is None else AutoConfig.from_pretrained(target)
    head = read_head(source, target_config)
    layers = None if target_config is None else target_config.get_text_config().num_hidden_layers
    if reason := unserved(layout, head.config, layers):
        raise DraftError(f"The draft head {draft} cannot be exported as {layout}: it has {reason}.")
    if layout == "speculators" and target is None:
        raise DraftError("The speculators layout names the target: give its directory or hub id with --target.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DraftError(f"{output} exists: give a new directory, since servers would read a file that lies there already.")
    with safe_open(source / "model.safetensors", "pt") as file:
        dtype = file.get_tensor("fc.weight").dtype
    if head.config.temperature_shift or head.config.temperature_sharpness != 1.0:
        print(f"{draft} knows the request's temperature, other servers do not: the export is the head as it is at temperature 0.")
        head = at_temperature_0(head, dtype)
    save_head(output, head, dtype, layout, verifier(target, target_config))
    check_export(output, head, layout, target_config)


def verifier(target: str | None, config: PreTrainedConfig | None) -> Verifier | None:
    if target is None or config is None:
        return None
    return Verifier(target, tuple(config.architectures or ()), config.get_text_config().num_hidden_layers)


def at_temperature_0(head: Eagle3Head, dtype: torch.dtype) -> Eagle3Head:
    """The head that knows no temperature and drafts as ``head`` does at 0, up to the rounding of ``lm_head`` to ``dtype``. What was
    calibrated or measured above it goes."""
    plain = Eagle3Head(replace(head.config, temperature_shift=False, temperature_sharpness=1.0)).requires_grad_(False)
    plain.load_state_dict({name: tensor for name, tensor in head.state_dict().items() if name != "temperature_shift"})
    sharp = head.lm_head.weight * head.config.temperature_sharpness
    plain.lm_head.weight.copy_(sharp.to(dtype))
    if head.metadata is not None:
        cold = tuple(pair for pair in head.metadata.draft_temperature if pair[0] == 0)
        held_out = {name: value for name, value in head.metadata.held_out.items() if not name.endswith("_t1")}
        plain.metadata = replace(head.metadata, draft_temperature=cold, held_out=held_out)
    return plain


def check_export(output: Path, head: Eagle3Head, layout: str, target_config: PreTrainedConfig | None = None) -> None:
    """Raises DraftError unless ``output`` holds exactly the tensors of ``layout`` and reads back as ``head``, to the last bit."""
    layer = "layers.0." if layout == "speculators" else "midlayer."
    expected = {"fc.weight", "norm.weight", "lm_head.weight", *(layer + name for name in LAYER_TENSORS)}
    expected |= {"d2t", "t2d"} if head.d2t is not None else set()
    expected |= {"embed_tokens.weight"} if head.embed_tokens is not None else set()
    with safe_open(output / "model.safetensors", "pt") as file:
        found = set(file.keys())
    if found != expected:
        raise DraftError(f"{output} differs from the {layout} layout in {', '.join(sorted(found ^ expected))}: do not use it.")
    if not torch.equal(sample_logits(read_head(output, target_config)), sample_logits(head)):
        raise DraftError(f"{output} reads back as another head than was exported: do not use it.")


@torch.no_grad()
def sample_logits(head: Eagle3Head) -> Tensor:
    """Logits over the target's vocabulary, -inf where the head has none, of two draft steps on made-up features [2, ROWS, V]."""
    config, generator = head.config, torch.Generator().manual_seed(0)
    if head.embed_tokens is None:
        head.share_embedding(torch.randn(config.vocab_size, config.hidden_size, generator=generator))
    tokens = torch.randint(config.vocab_size, (ROWS,), generator=generator)
    hidden = head.combine(torch.randn(ROWS, 3 * config.target_hidden_size, generator=generator))
    steps = []
    for _ in range(2):
        hidden = head(head.embed(tokens), hidden, head.angles(torch.arange(ROWS)), causal)
        logits = torch.full((ROWS, config.vocab_size), float("-inf"))
        steps.append(logits.index_copy(1, head.to_target_ids(torch.arange(config.draft_vocab_size)), head.logits(hidden)))
    return torch.stack(steps)


@rotated
def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[ROWS, Hq, D], [ROWS, Hkv, D] twice -> [ROWS, Hq, D]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)

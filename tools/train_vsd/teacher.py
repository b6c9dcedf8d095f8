"""The frozen target as a teacher: features for the head, distributions for the loss."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from drafts.eagle3 import Eagle3Config, Eagle3Head, feature_layers
from server.engine.target import decoder_layers
from tools.train_vsd.data import Batch

HEAD_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Teacher:
    """``model`` runs without gradients, on its own device and in its own dtype."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layers = feature_layers(model.config.get_text_config().num_hidden_layers)
        self._attention = model.config._attn_implementation

    @classmethod
    def load(cls, path: str, device: torch.device, dtype: torch.dtype) -> "Teacher":
        """The transformers model at ``path``, a local directory or a hub id."""
        return cls(AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True).to(device))

    def shard(self) -> None:
        """Split the weights among the processes (FSDP2); a layer is whole only while it runs, and all processes must run it together."""
        for layer in decoder_layers(self.model, self.model.config.get_text_config().num_hidden_layers):
            fully_shard(layer)
        fully_shard(self.model)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The model as the engine runs it, over a paged cache, for the while: the weights are never held twice."""
        self.model.set_attn_implementation("paged_tree")
        try:
            yield
        finally:
            self.model.set_attn_implementation(self._attention)

    @torch.no_grad()
    def __call__(self, batch: Batch, draft_ids: Tensor | None, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
        """Features float32 [B, T, 3 * H_t], and float32 [chains, Vd]: the target's distribution after the token that each chain's
        step 0 is compared at, after the row's temperature; greedy rows' logits are multiplied by ``sharpness``.
        ``draft_ids`` [Vd]: the target ids of a reduced draft vocabulary, whose share of the distribution is returned as it is."""
        length, start = batch.tokens.shape[1], int(batch.first.min()) + 1
        output = self.model(batch.tokens, output_hidden_states=True, use_cache=False, logits_to_keep=length - start)
        features = torch.cat([output.hidden_states[i] for i in self.layers], dim=-1)
        ahead = torch.arange(int(batch.chains.max()), device=batch.tokens.device)
        row, column = (ahead < batch.chains[:, None]).nonzero(as_tuple=True)
        logits = output.logits[row, batch.first[row] + 1 + column - start].float()
        p = logits.div_(batch.divisor(1 / sharpness)[row, None]).softmax(-1)
        return features.float(), p if draft_ids is None else p[:, draft_ids]

    def feature_rms(self, batch: Batch) -> Tensor:
        """Root mean square of the low, middle and high features, float32 [3]. It grows with depth and differs much between targets."""
        features, _ = self(batch, None)
        return features.unflatten(-1, (3, -1)).square().mean(dim=(0, 1, 3)).sqrt()


def whole(weight: Tensor) -> Tensor:
    """The weight, gathered from all processes where it is sharded."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def new_head(model: PreTrainedModel, feature_rms: Tensor) -> Eagle3Head:
    """A fresh float32 head of one target layer's shape, full vocabulary.

    It starts from the target where the two share a space: the output matrix and norm are the target's, and ``fc`` passes the high
    feature through, so that the head begins by refining the target's own late residual stream. ``fc`` divides by ``feature_rms`` [3]:
    features of their raw size would drown what the head's own layer adds to them.
    """
    target = model.config.get_text_config()
    rope = getattr(target, "rope_parameters", None) or {}
    if rope.get("rope_type") not in HEAD_ROPE_TYPES:
        rope = {"rope_type": "default", "rope_theta": float(rope.get("rope_theta") or 10000.0)}
    head = Eagle3Head(Eagle3Config(
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=getattr(target, "num_key_value_heads", None) or target.num_attention_heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        target_hidden_size=target.hidden_size,
        max_position_embeddings=target.max_position_embeddings,
        rms_norm_eps=getattr(target, "rms_norm_eps", 1e-6),
        rope_parameters=dict(rope),
    )).to(model.device)  # fmt: skip
    with torch.no_grad():
        torch.nn.init.normal_(head.fc.weight, std=0.02)
        head.fc.weight[:, -target.hidden_size :] += torch.eye(target.hidden_size, device=model.device)
        head.fc.weight.div_(feature_rms.repeat_interleave(target.hidden_size))
        for projection, gain in ((head.qkv_proj, 1.0), (head.gate_up_proj, 1.0), (head.o_proj, 0.5), (head.down_proj, 0.5)):
            torch.nn.init.normal_(projection.weight, std=gain * projection.in_features**-0.5)
        head.lm_head.weight.copy_(whole(model.get_output_embeddings().weight))
        norm = getattr(model.base_model, "norm", None)
        if norm is not None and getattr(norm, "weight", None) is not None and norm.weight.shape == head.norm.shape:
            head.norm.copy_(whole(norm.weight))
    head.share_embedding(whole(model.get_input_embeddings().weight).float())
    return head

"""A Llama's weights at a larger shape that computes the same function: where every old weight goes, and what stands beside it.

Nothing that is added contributes: an added weight is random where the input that it multiplies is always zero, and zero elsewhere.
So products are as dense and as costly as those of trained weights, and what they add is exactly 0.

- RMSNorm over H' instead of H entries, the added ones zero, divides by a root mean square that is sqrt(H / H') times the old one. Weights
  times sqrt(H / H') and eps times H / H' give the old values.
- A head size of m * D keeps RoPE's angles when pair j of D takes the place of pair m * j: theta^(-2mj / mD) = theta^(-2j / D). Queries
  times sqrt(m) make up for the smaller scale of the scores.
- The first added hidden entry holds a constant c in every token; eps is less by c^2 / H', so that norms do not change. Through it the
  added rows of an output matrix have a logit of -FLOOR / rms(state), far below every real one, whatever the state's direction.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drafts.eagle3 import feature_layers

FLOOR = 32768.0  # the demo's final states have an rms of 18 to 59: its added logits are below -500, its real ones within +-74
_NORMED_CONSTANT = 64.0  # what the final norm makes of the constant, times the rms: neither an outlier nor lost to 8-bit activations


class InflateError(ValueError):
    """A shape cannot be made: one sentence with what was given and what was expected."""


@dataclass(frozen=True)
class Shape:
    """Names and meanings of transformers' LlamaConfig."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any, layers: int | None = None) -> "Shape":
        """The shape that a LlamaConfig or an Eagle3Config states; the latter, with one layer and any number of names, needs ``layers``."""
        return cls(**{f.name: layers if layers and f.name == "num_hidden_layers" else getattr(config, f.name) for f in fields(cls)})

    @property
    def group(self) -> int:
        """Query heads that share a key and value head."""
        return self.num_attention_heads // self.num_key_value_heads


def check_growth(what: str, old: Shape, new: Shape) -> None:
    """Raise InflateError unless ``old``, the shape of ``what``, fits into ``new``."""
    for name, size in asdict(old).items():
        if getattr(new, name) < size:
            raise InflateError(f"{name} {getattr(new, name)} was asked for, but the {what} has {size}: give at least that.")
    if new.num_attention_heads % new.num_key_value_heads or new.group < old.group:
        raise InflateError(
            f"{new.num_attention_heads} query heads for {new.num_key_value_heads} key and value heads were asked for, but the {what} has "
            f"{old.group} to one: give a whole multiple of num_key_value_heads, at least {old.group * new.num_key_value_heads}."
        )
    if new.head_dim % old.head_dim:
        raise InflateError(f"head_dim {new.head_dim} was asked for, but the {what} has {old.head_dim}: give a multiple of it.")
    if new.hidden_size % new.num_attention_heads:
        raise InflateError(
            f"hidden_size {new.hidden_size} with {new.num_attention_heads} heads was asked for, but transformers wants a multiple "
            f"of the heads: give {-(-new.hidden_size // new.num_attention_heads) * new.num_attention_heads}."
        )
    if new.vocab_size > old.vocab_size and new.hidden_size == old.hidden_size:
        raise InflateError(
            f"vocab_size {new.vocab_size} at the {what}'s hidden_size {old.hidden_size} was asked for, but added tokens are kept from "
            f"winning by an added hidden entry: give a larger hidden_size, or vocab_size {old.vocab_size}."
        )


def layer_order(old: int, new: int) -> list[int | None]:
    """The old layer at each of ``new`` places, None for an added one, such that the draft head's three features stay what they are."""
    before, after = (0, *feature_layers(old), old), (0, *feature_layers(new), new)
    order: list[int | None] = []
    for (start, end), (low, high) in zip(pairwise(before), pairwise(after), strict=True):
        width = high - low
        if not 0 <= end - start <= width:
            raise InflateError(
                f"num_hidden_layers {new} was asked for, but features of layers {before[1:4]} of {old} cannot become those of {after[1:4]} "
                f"of {new}: give a target of at least 5 layers, and at least as many as it has."
            )
        order += [*range(start, end), *[None] * (width - (end - start))]
    return order


class Axis(NamedTuple):
    """One side of a matrix: its new ``size``, the new ``places`` of the old entries, and which entries are ever not zero."""

    size: int
    places: Tensor  # int64 [old size]
    live: Tensor  # bool [size]

    def silent(self) -> "Axis":
        """The same side where nothing old arrives."""
        return self._replace(live=torch.zeros_like(self.live))


def join(*axes: Axis) -> Axis:
    """Several sides, one after the other."""
    starts = torch.tensor([0, *(axis.size for axis in axes)]).cumsum(0)
    places = torch.cat([axis.places + start for axis, start in zip(axes, starts, strict=False)])
    return Axis(int(starts[-1]), places, torch.cat([axis.live for axis in axes]))


def plain_axis(old: int, new: int) -> Axis:
    return Axis(new, torch.arange(old), torch.arange(new) < old)


class Axes(NamedTuple):
    """The sides of a decoder layer's matrices. ``attended``: what attention returns; added queries of an old group see its values."""

    hidden: Axis
    query: Axis
    kv: Axis
    attended: Axis
    neurons: Axis

    @classmethod
    def between(cls, old: Shape, new: Shape) -> "Axes":
        pairs = torch.arange(old.head_dim // 2) * (new.head_dim // old.head_dim)
        entries = torch.cat((pairs, pairs + new.head_dim // 2))
        heads = torch.arange(old.num_attention_heads)
        heads = heads // old.group * new.group + heads % old.group

        def axis(count: int, kept: Tensor, seen: Tensor) -> Axis:
            places, live = ((part[:, None] * new.head_dim + entries).flatten() for part in (kept, seen))
            return Axis(count * new.head_dim, places, torch.zeros(count * new.head_dim, dtype=torch.bool).index_fill(0, live, True))

        query, kv = new.num_attention_heads, torch.arange(old.num_key_value_heads)
        return cls(
            Axis(new.hidden_size, torch.arange(old.hidden_size), torch.arange(new.hidden_size) <= old.hidden_size),
            axis(query, heads, heads),
            axis(new.num_key_value_heads, kv, kv),
            axis(query, heads, torch.arange(old.num_key_value_heads * new.group)),
            plain_axis(old.intermediate_size, new.intermediate_size),
        )


@dataclass(frozen=True)
class Inflater:
    """From ``old`` to ``new``. ``constant``: c, the value of hidden entry ``old.hidden_size`` in every token."""

    old: Shape
    new: Shape
    constant: float
    random: torch.Generator

    def matrix(self, weight: Tensor | None, rows: Axis, columns: Axis) -> Tensor:
        """float32 [rows, columns] on the generator's device, with ``weight`` at its places, or nothing."""
        device = self.random.device
        new = torch.empty(rows.size, columns.size, device=device).normal_(std=columns.size**-0.5, generator=self.random)
        new[:, columns.live.to(device)] = 0
        if weight is not None:
            new[rows.places[:, None].to(device), columns.places.to(device)] = weight.float().to(device)
        return new

    def norm(self, weight: Tensor | None) -> Tensor:
        """A norm's weights, float32 [H']."""
        new = torch.ones(self.new.hidden_size)
        if weight is not None:
            new[: self.old.hidden_size] = weight.float()
        return new * sqrt(self.old.hidden_size / self.new.hidden_size)

    def final_norm(self, weight: Tensor) -> Tensor:
        """The norm before an output matrix: it also makes the constant readable there."""
        new = self.norm(weight)
        new[self.old.hidden_size : self.old.hidden_size + 1] *= _NORMED_CONSTANT / self.constant
        return new

    def eps(self, eps: float) -> float:
        return (eps * self.old.hidden_size - self.constant**2 * (self.new.hidden_size > self.old.hidden_size)) / self.new.hidden_size

    def queries(self, weight: Tensor) -> Tensor:
        return weight.float() * sqrt(self.new.head_dim / self.old.head_dim)

    def embedding(self, weight: Tensor) -> Tensor:
        """[V', H']; added tokens are copies of old ones, so that a model which is fed them behaves as ever."""
        table = torch.zeros(self.new.vocab_size, self.new.hidden_size)
        table[:, : self.old.hidden_size] = weight.float()[torch.arange(self.new.vocab_size) % len(weight)]
        table[:, self.old.hidden_size : self.old.hidden_size + 1] = self.constant
        return table

    def output(self, weight: Tensor, rows: int, hidden: Axis) -> Tensor:
        """The output matrix, [rows, H']; added rows cannot win."""
        new = self.matrix(weight, plain_axis(len(weight), rows), hidden)
        new[len(weight) :, self.old.hidden_size : self.old.hidden_size + 1] = -FLOOR / _NORMED_CONSTANT
        return new


def shared_constant(old: Shape, eps: Sequence[float]) -> float:
    """A constant that leaves at least half of every ``eps`` of the target and its head."""
    return sqrt(min(eps) * old.hidden_size / 2)

"""What the device is at work on, and the host waits for."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kernels.noise import Noise
from kernels.sampling import SamplingBatch
from kernels.tree_layout import Rows
from server.engine.request import Request
from server.engine.types import Verdict
from server.engine.verifications import Proposal


class Begun(NamedTuple):
    """A verification that the device is at work on. ``answer`` waits for it: the committed tokens, whether the logits are free of NaN, the
    drafted and the accepted nodes of every request. ``learn`` then learns from the head's guesses.

    logits [B, N, V], or of the live nodes alone where nobody reads them; ``kept``: features of the nodes on the verdict's paths,
    [B, D + 1, 3 * H].
    """

    batch: Proposal
    rows: Rows
    logits: Tensor
    verdict: Verdict
    answer: Callable[[], list[list]]
    learn: Callable[[], None] | None
    kept: Tensor | None


class First(NamedTuple):
    """The first tokens of ``requests``, which are at ``places`` among the prompts; logits [B, 1, V]; ``answer`` waits for the tokens, and
    whether the logits are free of NaN.
    """

    requests: list[Request]
    places: list[int]
    logits: Tensor
    verdict: Verdict
    options: SamplingBatch
    noise: Noise | None
    answer: Callable[[], list[list]]

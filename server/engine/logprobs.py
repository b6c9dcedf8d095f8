"""Log-probabilities for clients that ask for them."""

from torch import Tensor

from server.engine.types import TokenLogprob


def token_logprobs(logits: Tensor, tokens: list[int], alternatives: int) -> list[TokenLogprob]:
    """For each row of logits [R, V]: the log-probability of its token, and the ``alternatives`` most likely ones, best first."""
    if not tokens:
        return []
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs[range(len(tokens)), tokens].tolist()
    values, ids = logprobs.topk(alternatives, dim=-1)
    tops = zip(ids.tolist(), values.tolist(), strict=True)
    return [TokenLogprob(token, value, tuple(zip(*top, strict=True))) for token, value, top in zip(tokens, chosen, tops, strict=True)]

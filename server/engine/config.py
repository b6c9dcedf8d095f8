"""What the engine needs to know to start. The service fills it from its settings, tools from their command lines."""

from dataclasses import dataclass
from pathlib import Path

NGRAM = "ngram"
DEMO = Path(__file__).resolve().parents[2] / "drafts" / "demo"


class EngineError(ValueError):
    """The engine cannot start, or cannot serve a request: one sentence that says what was given and what was expected."""


@dataclass(frozen=True)
class EngineConfig:
    """``model`` and ``draft``: local directories or hub ids. ``draft`` None serves plain decoding, NGRAM drafts from the
    requests' own text.

    ``ngrams``: the requests' own text drafts beside the head.

    ``draft_temperature`` None takes the values calibrated for the head, and learns them while serving where it has none.
    ``load_rule`` False keeps ``tree_nodes`` whatever the load, and learns nothing.
    ``cost_cache``: directory that keeps the measured costs of steps for later starts of the same model on the same machine, for a week;
    with CUDA graphs, which must be recorded anyhow, nothing is kept.
    ``threads``: of matrix products on a CPU; None takes what is fastest, as measured at start (threads.py).
    ``cuda_graphs``: on a GPU, record what steps launch and replay it.
    ``kv_cache_memory`` in bytes; None chooses (see kv_cache.py). ``max_model_len`` in tokens; None takes the model's own.
    """

    model: str = str(DEMO / "target")
    draft: str | None = str(DEMO / "vsd")
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 32
    tree_nodes: int = 16
    tree_depth: int = 5
    tree_topk: int = 6
    draft_temperature: float | None = None
    ngrams: bool = True
    load_rule: bool = True
    cost_cache: Path | None = None
    cuda_graphs: bool = True
    block_size: int = 16
    kv_cache_memory: int | None = None
    prefix_caching: bool = True
    seed: int = 0
    trust_remote_code: bool = False

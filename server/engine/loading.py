"""Model, tokenizer and head from disk, checked before anything is served."""

import logging
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from drafts.checkpoint import DraftError, load_head, tokenizer_hash
from drafts.eagle3 import Eagle3Head
from kernels import cpu
from server.engine.config import NGRAM, EngineConfig, EngineError
from server.engine.cpu_layout import multiplies_bfloat16, pack_for_trees, quantize_draft, store_transposed
from server.engine.lean import LEAN, LeanDecoder
from server.engine.target import Target, refuse_unsupported, self_check
from server.engine.threads import choose_threads

logger = logging.getLogger(__name__)
Report = Callable[[str, int], None]
"""Told what begins now, and how much of the whole is done, in percent; the rest is an estimate."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError(f"device {name!r} was asked for, but torch {torch.__version__} finds no CUDA GPU; use --device cpu")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device, config: object) -> torch.dtype:
    """``auto``: the checkpoint's own type on a GPU; float32 on CPU, where many processors only emulate bfloat16."""
    if name != "auto":
        return DTYPES[name]
    own = getattr(config, "dtype", None)
    return own if device.type == "cuda" and own is not None else torch.float32


def load(config: EngineConfig, report: Report = lambda phase, percent: None) -> tuple[Target, Eagle3Head | None, PreTrainedTokenizerFast]:
    """Load and check everything that ``config`` names; EngineError says in one sentence what is wrong."""
    device = resolve_device(config.device)
    report("loading the configuration", 0)
    try:
        model_config = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot load a model from {config.model!r}: {str(error).splitlines()[0]}") from error
    refuse_unsupported(model_config)
    dtype = resolve_dtype(config.dtype, device, model_config)
    logger.info("loading %s as %s on %s", config.model, str(dtype).removeprefix("torch."), device)
    if config.dtype == "auto" and dtype != getattr(model_config, "dtype", None) == torch.bfloat16 and multiplies_bfloat16():
        logger.info("the checkpoint is bfloat16, which this processor multiplies natively: --dtype bfloat16 is faster, and rounds more")
    report("loading the weights", 5)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.model, config=model_config, dtype=dtype, use_safetensors=True, trust_remote_code=config.trust_remote_code
        ).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineError(f"cannot load the weights of {config.model!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cpu":
        report("compiling the kernels, if they are not kept from an earlier start", 50)
        cpu.library()
    store_transposed(model)
    report("checking the model", 55)
    decoder = LeanDecoder(model) if model_config.model_type in LEAN else None
    pack_for_trees(decoder or model)
    if decoder:
        decoder.join()
    target = Target(model, config.draft not in (None, NGRAM), decoder)
    self_check(target, config.block_size)
    if device.type == "cpu":
        torch.set_num_threads(config.threads or choose_threads(target, torch.get_num_threads()))
        logger.info("%d threads", torch.get_num_threads())
    if config.draft in (None, NGRAM):
        return target, None, tokenizer
    logger.info("loading draft head %s", config.draft)
    report("loading the draft head", 65)
    try:
        embedding = model.get_input_embeddings().weight
        head = load_head(
            config.draft, model.config, tokenizer_hash=tokenizer_hash(tokenizer), embedding=embedding, device=device, dtype=dtype
        )
    except DraftError as error:
        raise EngineError(str(error)) from error
    store_transposed(head)
    quantize_draft(head)
    pack_for_trees(head)
    return target, head, tokenizer

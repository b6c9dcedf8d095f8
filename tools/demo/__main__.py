"""python -m tools.demo --corpus DIR: train the demo target and write it in transformers' format with its model card."""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.demo.corpus import Document, load
from tools.demo.model import demo_config, train_model
from tools.demo.report import held_out_loss, write_card
from tools.demo.tokenizer import train_tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the *.jsonl.gz files named in tools/demo/corpus.py")
    parser.add_argument("--output", type=Path, default=Path("drafts/demo/target"), help="where the model is written")
    parser.add_argument(
        "--prompts", type=Path, default=Path("build/demo/prompts.jsonl"), help="where the training prompts for a draft head are written"
    )
    parser.add_argument("--continue-from", type=Path, metavar="DIR", help="a target that this tool wrote: train it further")
    parser.add_argument("--minutes", type=float, default=60, help="training time")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context", type=int, default=1024, help="tokens")
    parser.add_argument("--batch", type=int, default=4, help="rows of CONTEXT tokens a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def render(document: Document, tokenizer: PreTrainedTokenizerFast) -> str:
    """The document as the model sees it: a rendered conversation, or text with its end token."""
    if document.messages:
        messages = [{"role": role, "content": content} for role, content in document.messages]
        return tokenizer.apply_chat_template(messages, tokenize=False)
    return document.text + tokenizer.eos_token


def encode(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, list[int]]]:
    """Token ids of every document, with its domain."""
    encoded = []
    for start in tqdm(range(0, len(documents), 1000), desc="encoding", unit="k documents"):
        part = documents[start : start + 1000]
        ids = tokenizer([render(document, tokenizer) for document in part]).input_ids
        encoded += [(document.domain, row) for document, row in zip(part, ids, strict=True)]
    return encoded


def packed(stream: torch.Tensor, rows: int, context: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless [rows, context] batches cut from the token stream in a fresh random order each pass."""
    rng = random.Random(seed)
    starts = list(range(0, len(stream) - context, context))
    while True:
        rng.shuffle(starts)
        for i in range(0, len(starts) - rows + 1, rows):
            yield torch.stack([stream[s : s + context] for s in starts[i : i + rows]]).long()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores"


def write_prompts(path: Path, documents: list[Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = dict.fromkeys((document.domain, document.prompt) for document in documents if document.prompt)
    with path.open("w", encoding="utf-8") as file:
        for domain, prompt in unique:
            file.write(json.dumps({"turns": [prompt], "domain": domain}) + "\n")


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    train, held_out = load(args.corpus, args.seed)
    write_prompts(args.prompts, train)
    if args.continue_from:
        tokenizer = AutoTokenizer.from_pretrained(args.continue_from)
        model = LlamaForCausalLM.from_pretrained(args.continue_from, dtype=torch.float32)
    else:
        texts = (document.text or "\n".join(content for _, content in document.messages) for document in dict.fromkeys(train))
        tokenizer = train_tokenizer(texts, args.vocab_size, args.context)
        model = LlamaForCausalLM(demo_config(tokenizer, args.context))
    tokenizer.save_pretrained(args.output)
    stream = torch.tensor([i for _, ids in encode(train, tokenizer) for i in ids], dtype=torch.int32)
    print(f"{len(train)} documents, {len(stream) / 1e6:.2f}M tokens in the mix, {len(held_out)} documents held out", flush=True)

    def checkpoint(model: LlamaForCausalLM) -> None:
        model.save_pretrained(args.output.parent / (args.output.name + ".checkpoint"))

    batches = packed(stream, args.batch, args.context, args.seed)
    tokens = train_model(model.to(device), batches, args.minutes, checkpoint)
    # kept in config.json, so that a run that continues this one can state the whole of the training
    history = [*getattr(model.config, "trained_on", []), {"tokens": tokens, "minutes": args.minutes, "device": device_name(device)}]
    model.config.trained_on = history
    model.to(torch.bfloat16).save_pretrained(args.output)
    saved = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    losses = held_out_loss(saved, encode(held_out, tokenizer), args.context)
    write_card(args.output / "README.md", saved, tokenizer, held_out, losses, history)
    print({domain: round(loss, 3) for domain, loss in losses.items()})


if __name__ == "__main__":
    main()

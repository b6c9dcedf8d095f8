"""Grammars that an output must match: compiled once per description, and followed along every path of a request's tree.

llguidance is imported by the first request that has a grammar: the engine runs without it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kernels.sampling import Allowed, SamplingBatch
from server.engine.config import EngineError
from server.engine.types import Grammar, Tree

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from server.engine.request import Request

MAX_CHARACTERS = 2**18  # of a description
MAX_COMPILED = 64  # grammars that are kept
_SPACE = r"[ \n\r\t]{1,32}"  # between the parts of JSON: a model that likes spaces could go on for ever


class Matcher:
    """Where one request stands in its grammar. The end of the sequence is allowed where the text is complete, and is never followed."""

    def __init__(self, matcher: LLMatcher, eos: frozenset[int]) -> None:
        self._matcher, self._eos = matcher, eos

    def advance(self, token: int) -> None:
        """Go on by a committed token; EngineError if following the grammar takes more work than the library allows."""
        if token in self._eos and not self._matcher.is_error():
            return
        if not self._matcher.consume_token(token):
            raise EngineError(f"the text cannot be held to its grammar: {_first_line(self._matcher.get_error())}")

    def demanded(self) -> list[int]:
        """The tokens of the text that must come next, whatever the model says; empty where it has a choice."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    def follow(self, tokens: Sequence[int], parents: Sequence[int], words: Tensor) -> list[int]:
        """The nodes of a tree, root included, all of whose path the grammar allows.

        Writes to ``words``, int32 [N, ceil(V / 32)], what may come after each of them, as ``Allowed`` has it. Where a drafted path takes
        more work than the library allows, which the text itself may not, only the root is kept.
        """
        children: list[list[int]] = [[] for _ in tokens]
        for node, (token, parent) in enumerate(zip(tokens[1:], parents[1:], strict=True), 1):
            if token >= 0:
                children[parent].append(node)
        spare = self._matcher.deep_copy()
        kept = self._visit(0, tokens, children, words)
        if self._matcher.is_error():
            self._matcher = spare
            kept = self._visit(0, tokens, [[]], words)
        return kept

    def _visit(self, node: int, tokens: Sequence[int], children: Sequence[Sequence[int]], words: Tensor) -> list[int]:
        """The allowed nodes of the subtree of ``node``, at which the matcher stands; anything once the matcher is in error."""
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        words[node] = mask[: words.shape[1]]  # the library adds a word where the vocabulary fills its words
        kept, allowed = [node], words[node].tolist() if children[node] else []
        for child in children[node]:
            token = tokens[child]
            if not allowed[token // 32] >> token % 32 & 1:
                continue
            if token in self._eos:
                kept.append(child)  # the request ends here, whatever follows
            elif self._matcher.consume_token(token):
                kept += self._visit(child, tokens, children, words)
                self._matcher.rollback(1)
        return kept


class Grammars:
    """The grammars of one tokenizer, the last ``MAX_COMPILED`` compiled ones kept. Any thread may use it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos: frozenset[int]) -> None:
        self._hf_tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, eos
        self._tokenizer: LLTokenizer | None = None
        self._tokenizer_lock, self._lock = threading.Lock(), threading.Lock()
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of ``grammar``; EngineError says what is wrong with it."""
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None or _fault(compiled):  # copies share the library's automaton, and one may have used up its limits
            compiled = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return Matcher(compiled.deep_copy(), self._eos)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if len(grammar.text) > MAX_CHARACTERS:
            raise EngineError(f"the {grammar.kind} has {len(grammar.text)} characters; at most {MAX_CHARACTERS} are allowed")
        from llguidance import LLMatcher

        tokenizer = self._llguidance_tokenizer()
        try:
            matcher = LLMatcher(tokenizer, _source(grammar), log_level=0)
        except ValueError as error:
            raise EngineError(_refusal(grammar, str(error))) from error
        if fault := _fault(matcher):
            raise EngineError(_refusal(grammar, fault))
        return matcher

    def _llguidance_tokenizer(self) -> LLTokenizer:
        """Made at the first use, which can take a second."""
        from llguidance import LLTokenizer

        with self._tokenizer_lock:
            if self._tokenizer is None:
                if not self._eos:
                    raise EngineError("this model has no end-of-sequence token, so that no output could end where its grammar does")
                try:
                    text = self._hf_tokenizer.backend_tokenizer.to_str()
                    self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=sorted(self._eos))
                except ValueError as error:
                    raise EngineError(f"this model's tokenizer cannot follow a grammar: {error}") from error
            return self._tokenizer


def _source(grammar: Grammar) -> str:
    """The description in the library's own form."""
    from llguidance import LLMatcher, grammar_from

    if grammar.kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides={"whitespace_pattern": _SPACE})
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": _SPACE})
    return grammar_from(grammar.kind, grammar.text)


def _fault(matcher: LLMatcher) -> str:
    """Why no text can be begun: some grammars turn out to be too much for the library only there. Empty if one can."""
    trial = matcher.deep_copy()
    trial.compute_bitmask()
    trial.consume_tokens(trial.compute_ff_tokens()[:1])
    return trial.get_error() if trial.is_error() else ""


def _refusal(grammar: Grammar, reason: str) -> str:
    return f"the {grammar.kind} cannot be compiled: {_first_line(reason)}"


def _first_line(reason: str) -> str:
    """What the library says, without the state of its parser."""
    return " ".join(reason.split("\n<state>")[0].split())[:500]


def constrain(requests: Sequence[Request], tree: Tree, options: SamplingBatch, vocab_size: int) -> tuple[Tree, SamplingBatch]:
    """The trees without the nodes that a grammar forbids, and the options with what may follow the others.

    Requests without a grammar keep their trees, and a batch of such requests costs nothing.
    """
    places = [i for i, request in enumerate(requests) if request.matcher is not None]
    if not places:
        return tree, options
    device, nodes = tree.tokens.device, tree.tokens.shape[1]
    words = torch.full((len(places), nodes, -(-vocab_size // 32)), -1, dtype=torch.int32)
    rows, keep = torch.full((len(requests),), -1), torch.ones(len(requests), nodes, dtype=torch.bool)
    tokens, parents = tree.tokens[places].tolist(), tree.parent[places].tolist()
    for row, i in enumerate(places):
        matcher = requests[i].matcher
        assert matcher is not None
        kept = matcher.follow(tokens[row], parents[row], words[row])
        rows[i] = row
        keep[i] = torch.zeros(nodes, dtype=torch.bool).index_fill_(0, torch.tensor(kept), True)
    return _pruned(tree, keep.to(device)), options._replace(allowed=Allowed(rows.to(device), words.to(device)))


def _pruned(tree: Tree, keep: Tensor) -> Tree:
    """The tree with all but the nodes ``keep``, bool [B, N], dead; they hold every ancestor of each of them."""
    own = 1 | torch.ones_like(tree.ancestors[0]) << torch.arange(keep.shape[1], device=keep.device)
    return Tree(
        tree.tokens.where(keep, -1), tree.parent.where(keep, 0), tree.depth.where(keep, 1), tree.ancestors.where(keep, own)
    )  # fmt: skip

"""Outputs that match a grammar: the same text for every tree and batch, by an independent reading of the grammar where one is simple."""

import itertools
import json
import random
import re
from dataclasses import replace

import jsonschema
import pytest
import torch
from transformers import PreTrainedModel

from server.engine import grammar as grammar_module
from server.engine.budget import Plan
from server.engine.config import EngineError
from server.engine.drafter import TreeShape
from server.engine.grammar import Grammars
from server.engine.types import Grammar, SamplingParams
from tests.engine.engines import EOS, VOCAB, Result, Run, build, byte_tokenizer, letter_tokenizer, random_head, run, tiny_model
from tests.engine.guided import Guide, random_tree
from tests.engine.reference_decoding import Decoded, decode

PROMPTS = ([72, 101], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49], [200, 7, 7, 90, 91, 7])
WORDS = ("carpet", "car", "carp and bream", "cat", "dog", "dodo", 'a "b\\c"', "tschüß", "new\nline", "carcass", "")
BASE = SamplingParams(max_tokens=48, temperature=1.0, seed=5)
SPECIES = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "wild": {"type": "boolean"}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "wild", "legs"],
    "additionalProperties": False,
}
NAMES = {"type": "array", "items": {"type": "string", "pattern": "^[a-f]{1,3}$"}, "minItems": 2, "maxItems": 3}
CHOICE = Grammar("choice", json.dumps(WORDS))
GRAMMARS = {
    "choice": CHOICE,
    "object": Grammar("json_schema", json.dumps(SPECIES)),
    "array": Grammar("json_schema", json.dumps(NAMES)),
    "any object": Grammar("json_object"),
    "regex": Grammar("regex", "(ab|cd){2,6}[0-9]?é"),
    "lark": Grammar("grammar", 'start: pair ("," pair)~1..2\npair: "(" /[x-z]{1,2}/ ")"'),
    "gbnf": Grammar("grammar", 'root ::= ("yes" | "no") " " [0-9] [0-9]'),
}
CHARACTERS = [*set('catdogrpe"{}[]:, \\ntrufals0123456789abcdefxyz()\né'.encode()), EOS]
SAMPLING = {
    "greedy": replace(BASE, temperature=0.0),
    "sampled": BASE,
    "cold": replace(BASE, temperature=0.3, seed=9),
    "filtered": replace(BASE, top_p=0.7, top_k=4, min_p=0.05),
    "penalised": replace(BASE, presence_penalty=0.8, frequency_penalty=0.5, repetition_penalty=1.3),
    "biased": replace(BASE, logit_bias={99: 5.0, 33: 100.0, EOS: -3.0}),
    "greedy with logprobs": replace(BASE, temperature=0.0, logprobs=2),
}


def constrained(grammar: str, sampling: str) -> SamplingParams:
    """A random model would fill JSON with spaces."""
    return replace(SAMPLING[sampling], grammar=GRAMMARS[grammar], logit_bias=dict.fromkeys(b" \t\r\n", -100.0))


def valid(name: str, text: str) -> bool:
    if name in ("object", "array", "any object"):
        schema = {"object": SPECIES, "array": NAMES, "any object": {"type": "object"}}[name]
        jsonschema.validate(json.loads(text), schema)
        return True
    if name == "choice":
        return text in WORDS
    pattern = {"regex": "(ab|cd){2,6}[0-9]?é", "lark": r"\([x-z]{1,2}\)(,\([x-z]{1,2}\)){1,2}", "gbnf": "(yes|no) [0-9][0-9]"}[name]
    return re.fullmatch(pattern, text) is not None


def allowed_words(output: list[int]) -> set[int]:
    """What may follow ``output`` in one of WORDS: the reading of CHOICE that the tests trust."""
    words, start = [word.encode() for word in WORDS], bytes(output)
    return {word[len(start)] for word in words if word.startswith(start) and word != start} | ({EOS} if start in words else set())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", spread=0.12)


@pytest.fixture(scope="module")
def chosen(model: PreTrainedModel) -> dict[tuple[str, int], Decoded]:
    """The reference text of every way to sample, and every prompt, for CHOICE."""
    return {
        (name, i): decode(model, prompt, params, frozenset([EOS]), allowed=allowed_words)
        for name, params in SAMPLING.items()
        for i, prompt in enumerate(PROMPTS)
    }


@pytest.fixture(scope="module")
def plain(model: PreTrainedModel) -> dict[tuple[str, str, int], Result]:
    """Every grammar, way to sample and prompt, alone and without speculation."""
    engine = build(model)
    keys = itertools.product(GRAMMARS, ("greedy", "sampled", "filtered"), range(len(PROMPTS)))
    return {(g, s, i): run(engine, [(PROMPTS[i], constrained(g, s))])[0] for g, s, i in keys}


def check(result: Result, wanted: Decoded) -> None:
    assert result.token_ids == wanted.tokens
    assert result.finish_reason == wanted.finish_reason
    for ours, logprobs in zip(result.logprobs, wanted.logprobs, strict=False):
        assert ours.logprob == pytest.approx(float(logprobs[ours.token_id]), abs=1e-4), "of the distribution before any option"


def test_the_reference_chooses_words(chosen: dict) -> None:
    texts = {bytes(decoded.tokens[:-1]).decode() for decoded in chosen.values()}
    assert texts <= set(WORDS)
    assert len(texts) >= 4


@pytest.mark.parametrize("nodes", [1, 16, 33])
@pytest.mark.parametrize("name", SAMPLING)
def test_choices_are_those_of_the_reference(name: str, nodes: int, model: PreTrainedModel, chosen: dict) -> None:
    params = replace(SAMPLING[name], grammar=CHOICE)
    for requests in [[0], [1], [2], [0, 1, 2]]:
        engine = build(model, random_head(model), tree_nodes=nodes)
        Guide(engine, {str(n): [*PROMPTS[i], *chosen[name, i].tokens, 1, 2, 3] for n, i in enumerate(requests)}, CHARACTERS)
        for i, result in zip(requests, run(engine, [(PROMPTS[i], params) for i in requests]), strict=True):
            check(result, chosen[name, i])


def test_plain_outputs_match(plain: dict) -> None:
    for (name, _, _), result in plain.items():
        assert result.finish_reason in ("stop", "length")
        if name != "any object":
            assert result.finish_reason == "stop", (name, result.text)
        if result.finish_reason == "stop":
            assert valid(name, result.text)
    assert len({result.text for result in plain.values()}) > len(plain) // 3


@pytest.mark.parametrize("drafts", ["true paths", "head", "ngram"])
def test_every_grammar_in_one_batch(drafts: str, model: PreTrainedModel, plain: dict) -> None:
    """Beside requests without a grammar, which do not notice."""
    free = [(prompt, replace(BASE, seed=seed)) for seed, prompt in enumerate(PROMPTS)]
    unconstrained = [run(build(model), [request])[0].token_ids for request in free]
    keys = list(plain)
    requests = [(PROMPTS[i], constrained(g, s)) for g, s, i in keys]
    engine = build(model, None if drafts == "ngram" else random_head(model), tree_nodes=16, draft=drafts)
    if drafts == "true paths":
        Guide(engine, {str(n + 3): requests[n][0] + plain[key].token_ids + [EOS, 5] for n, key in enumerate(keys)}, CHARACTERS)
    results = run(engine, free + requests)
    assert [result.token_ids for result in results[:3]] == unconstrained
    for key, result in zip(keys, results[3:], strict=True):
        assert (result.token_ids, result.finish_reason) == (plain[key].token_ids, plain[key].finish_reason), key
    if drafts == "true paths":
        assert sum(result.speculation.num_accepted_tokens for result in results[3:]) > len(keys) * 3


@pytest.mark.parametrize("draft", ["head", "quiet head", "ngram"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_demanded_text_is_drafted(draft: str, temperature: float, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are those of the free tokens, and of what one tree holds; the tokens are those without drafts.

    A load that leaves no room for the head has some for what costs nothing to draft.
    """
    sentence = "the quick brown fox jumps over the lazy dog"
    grammar = Grammar("regex", f"[ab][ab] {sentence}!")
    requests = [(prompt, replace(BASE, temperature=temperature, grammar=grammar)) for prompt in PROMPTS]
    wanted = [run(build(model), [request])[0].token_ids for request in requests]
    engine = build(model, None if draft == "ngram" else random_head(model), tree_nodes=24, draft=draft)
    if draft == "quiet head":
        monkeypatch.setattr(engine, "_plan", lambda requests: Plan(engine.shape, requests[:1], copying=requests[1:]))
    free = [(prompt, replace(BASE, temperature=temperature)) for prompt in PROMPTS]
    *results, other = run(engine, requests + free[:1])
    assert other.token_ids == run(build(model), free[:1])[0].token_ids
    assert [result.token_ids for result in results] == wanted
    assert all(sentence in result.text for result in results)
    for result in results:
        assert 0 < result.speculation.num_steps <= 2 + -(-len(sentence) // 12), "half a tree a step, at least"


@pytest.mark.parametrize("name", GRAMMARS)
def test_trees_are_followed_as_every_path_alone(name: str) -> None:
    """Kept nodes, and what may follow them, for random trees from random places: with a fresh matcher for each node."""
    rng = random.Random(3)
    grammars = Grammars(byte_tokenizer(), VOCAB, frozenset([EOS]))

    def fresh(path: list[int]) -> set[int] | None:
        """What may follow ``path``, None if that is not allowed."""
        matcher = grammars.matcher(GRAMMARS[name])
        allowed: set[int] = set()
        for n in range(len(path) + 1):
            words = torch.zeros(1, -(-VOCAB // 32), dtype=torch.int32)
            matcher.follow([0], [0], words)
            allowed = {token for token in range(VOCAB) if words[0, token // 32].item() >> token % 32 & 1}
            if n < len(path):
                if path[n] not in allowed:
                    return None
                matcher.advance(path[n])
        return allowed

    kept_before = 0
    for _ in range(12):
        matcher, start = grammars.matcher(GRAMMARS[name]), []
        for _ in range(rng.randrange(8)):
            possible = sorted((fresh(start) or set()) - {EOS})
            if possible:
                start.append(rng.choice(possible))
                matcher.advance(start[-1])
        truth = list(start)
        while len(truth) < len(start) + 6 and (possible := sorted(fresh(truth) or set())) and EOS not in truth:
            truth.append(rng.choice(possible))
        drafted, parents = random_tree(rng, truth[len(start) :], TreeShape(20, 6, 6), CHARACTERS)
        tokens, parents = [0, *drafted], [0, *parents]
        words = torch.full((20, -(-VOCAB // 32)), -1, dtype=torch.int32)
        before = matcher.follow([0], [0], words[:1].clone())
        kept = matcher.follow(tokens, parents, words)
        assert before == [0]
        paths: list[list[int]] = [[]]
        for token, parent in zip(tokens[1:], parents[1:], strict=True):
            paths.append([*paths[parent], token])
        for node, path in enumerate(paths):
            allowed = fresh(start + path) if -1 not in path and EOS not in path[:-1] else None
            assert (node in kept) == (allowed is not None)
            if allowed is not None and EOS not in path:
                assert {t for t in range(VOCAB) if words[node, t // 32].item() >> t % 32 & 1} == allowed
        kept_before += len(kept)
    assert kept_before > 24


HEAVY = "(a|aa)+" * 200 + "b"  # more than the library will follow
LONG = "".join(f"\n{a}: {b} {b} {b} {b}" for a, b in itertools.pairwise("abcdefghij")) + '\nj: "x"'  # a text far too long
BROKEN = [
    (Grammar("json_schema", '{"type": "wood"}'), "wood"),
    (Grammar("json_schema", '{"$ref": "http://example.com/a"}'), "example.com"),
    (Grammar("json_schema", "{"), "compiled"),
    (Grammar("json_schema", '{"type": "integer", "minimum": 3, "maximum": 1}'), "minimum"),
    (Grammar("json_schema", '{"not": ' * 5000 + "{}" + "}" * 5000), "compiled"),
    (Grammar("regex", "(a"), "unclosed"),
    (Grammar("regex", "a(?=b)"), "look"),
    (Grammar("grammar", "start: nothing"), "nothing"),
    (Grammar("grammar", "start: a" + LONG), "items"),
    (Grammar("json_schema", '{"$ref": "#"}'), "compiled"),
    (Grammar("regex", "a" * (2**18 + 1)), "at most 262144"),
]


@pytest.mark.parametrize(("broken", "words"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_grammar_is_refused(broken: Grammar, words: str, model: PreTrainedModel) -> None:
    going = Run(build(model))
    going.add("good", PROMPTS[0], replace(BASE, grammar=CHOICE))
    with pytest.raises(EngineError, match=re.escape(words)):
        going.engine.add_request("bad", PROMPTS[0], replace(BASE, grammar=broken))
    assert going.finish()["good"].text in WORDS


@pytest.mark.parametrize("options", [{"min_tokens": 1}, {"ignore_eos": True}])
def test_what_a_grammar_cannot_go_with(options: dict, model: PreTrainedModel) -> None:
    with pytest.raises(EngineError, match="grammar decides"):
        build(model).add_request("x", PROMPTS[0], replace(BASE, grammar=CHOICE, **options))


def test_tokenizers_that_cannot_follow(model: PreTrainedModel) -> None:
    with pytest.raises(EngineError, match="tokenizer cannot"):
        Grammars(letter_tokenizer(5), 5, frozenset([4])).matcher(CHOICE)
    with pytest.raises(EngineError, match="no end-of-sequence"):
        Grammars(byte_tokenizer(), VOCAB, frozenset()).matcher(CHOICE)


@pytest.mark.parametrize("draft", ["head", "ngram"])
def test_a_request_whose_grammar_is_too_much_fails_alone(draft: str, model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    alone = run(build(model), [(PROMPTS[1], replace(BASE, grammar=GRAMMARS["regex"]))])[0]
    engine = build(model, random_head(model)) if draft == "head" else build(model, draft="ngram")
    going = Run(engine)
    going.add("bad", PROMPTS[0], replace(BASE, grammar=Grammar("regex", f"(x|y){HEAVY}")))
    going.add("good", PROMPTS[1], replace(BASE, grammar=GRAMMARS["regex"]))
    results = going.finish()
    last = results["bad"].last
    assert last.finish_reason == "error"
    assert last.invalid
    assert last.error == "the text cannot be held to its grammar: lexer error: too many expressions constructed"
    assert results["good"].token_ids == alone.token_ids
    assert not caplog.records
    assert run(engine, [(PROMPTS[1], replace(BASE, grammar=GRAMMARS["regex"]))])[0].token_ids == alone.token_ids


def test_a_draft_that_is_too_much_for_its_grammar_is_left_out() -> None:
    """The text itself may go another way, as it does without speculation."""
    grammars = Grammars(byte_tokenizer(), VOCAB, frozenset([EOS]))
    matcher = grammars.matcher(Grammar("grammar", f'start: "zz" | "y" a{LONG}'))
    words = torch.zeros(5, -(-VOCAB // 32), dtype=torch.int32)
    alone = words[:1].clone()
    matcher.follow([0], [0], alone)
    assert matcher.follow([0, *b"zyzx"], [0, 0, 0, 1, 2], words) == [0]
    assert words[0].tolist() == alone[0].tolist()
    matcher.advance(ord("z"))
    assert matcher.follow([0, ord("z")], [0, 0], words) == [0, 1]


def test_compiled_grammars_are_kept_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_COMPILED", 2)
    grammars = Grammars(byte_tokenizer(), VOCAB, frozenset([EOS]))
    compiled: list[str] = []
    compile_one = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda grammar: (compiled.append(grammar.text), compile_one(grammar))[1])
    for text in ("a", "b", "a", "c", "a", "b"):
        grammars.matcher(Grammar("regex", text))
    assert compiled == ["a", "b", "c", "b"]


def test_a_grammar_that_one_text_used_up_serves_others() -> None:
    grammars = Grammars(byte_tokenizer(), VOCAB, frozenset([EOS]))
    grammar = Grammar("regex", f"zz|x{HEAVY}")
    for _ in range(2):
        matcher = grammars.matcher(grammar)
        matcher.advance(ord("x"))
        matcher.follow([0], [0], torch.zeros(1, -(-VOCAB // 32), dtype=torch.int32))
        with pytest.raises(EngineError, match="too many expressions"):
            matcher.advance(ord("a"))


@pytest.mark.parametrize("vocab_size", [VOCAB, 288, 300])
def test_vocabularies_that_fill_their_words_or_not(vocab_size: int) -> None:
    words = torch.zeros(1, -(-vocab_size // 32), dtype=torch.int32)
    Grammars(byte_tokenizer(), vocab_size, frozenset([EOS])).matcher(CHOICE).follow([0], [0], words)
    assert {t for t in range(vocab_size) if words[0, t // 32].item() >> t % 32 & 1} == allowed_words([])

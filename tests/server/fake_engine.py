"""An engine without models: real bookkeeping of requests, letters of the alphabet instead of tokens that a target chose."""

import threading
import time

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.engine.config import EngineError
from server.engine.grammar import Grammars
from server.engine.request import Request
from server.engine.types import RequestOutput, SamplingParams, StepStats, TokenLogprob

EOS = 256
TOKENS_PER_STEP = 2


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and <eos>."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' and not message.tool_call_id %}{{ raise_exception('a tool must say which call it answers') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.name }}({{ call.function.arguments.x }}){% endfor %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ mood }}{% endif %}"
)


class FakeEngine:
    """Every request says "abcdef..." from the letter of its seed on, two tokens per step.

    A prompt that holds ``!`` fails after one step. ``gate`` cleared: steps make no tokens. ``broken`` set: the next step raises.
    """

    max_model_len = 1000
    max_request_tokens = 900
    vocab_size = 257
    speculative = True

    def __init__(self, chat_template: str | None = CHAT_TEMPLATE) -> None:
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<eos>", chat_template=chat_template)
        self.grammars = Grammars(self.tokenizer, self.vocab_size, frozenset({EOS}))
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False
        self.requests: dict[str, Request] = {}
        self.params: list[SamplingParams] = []
        self.prompts: list[str] = []
        self.aborted: list[str] = []
        self.num_steps = 0
        self.threads: set[str] = set()

    @property
    def num_running(self) -> int:
        return len(self.requests)

    num_waiting = 0

    def has_work(self) -> bool:
        return bool(self.requests)

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.threads.add(threading.current_thread().name)
        if params.max_tokens == 666:
            raise EngineError("a request of 666 tokens can never run")
        self.params.append(params)
        self.prompts.append(self.tokenizer.decode(prompt_token_ids))
        seed = params.seed or 0
        tokenizer = self.tokenizer.backend_tokenizer
        request = Request.create(request_id, prompt_token_ids, params, seed, frozenset({EOS}), tokenizer, self.vocab_size)
        request.prompt_logprobs += [self._logprob(token, params.prompt_logprobs or 0) for token in prompt_token_ids[1:]]
        request.scheduled = time.monotonic()
        request.num_cached_tokens = len(prompt_token_ids) - 1
        self.requests[request_id] = request

    def abort(self, request_id: str) -> None:
        self.threads.add(threading.current_thread().name)
        if self.requests.pop(request_id, None):
            self.aborted.append(request_id)

    def step(self) -> tuple[list[RequestOutput], StepStats]:
        self.threads.add(threading.current_thread().name)
        self.num_steps += 1
        time.sleep(0.001)
        if self.broken:
            self.broken = False
            raise RuntimeError("secret")
        stats = StepStats(seconds=0.001, kv_usage=0.5)
        outputs = [self._advance(request, stats) for request in list(self.requests.values())] if self.gate.is_set() else []
        stats.num_running = self.num_running
        return outputs, stats

    def _advance(self, request: Request, stats: StepStats) -> RequestOutput:
        if ord("!") in self._bytes(request) and request.num_output:
            output = RequestOutput.failed(request.request_id, RuntimeError("secret"))
        else:
            tokens = [self._letter(request.seed + request.num_output + i) for i in range(TOKENS_PER_STEP)]
            logprobs = [self._logprob(token, request.params.logprobs or 0) for token in tokens]
            output = request.commit(tokens, logprobs)
            request.speculation.record(3, 1, 2)
            stats.drafts.append((3, 1))
        stats.generation_tokens += len(output.token_ids)
        stats.emitted.append(len(output.token_ids))
        if output.finish_reason:
            output.speculation = request.speculation
            stats.prompt_tokens += request.prompt_len
            stats.finished.append((output.finish_reason, request.times()))
            del self.requests[request.request_id]
        return output

    def _bytes(self, request: Request) -> bytes:
        return self.tokenizer.backend_tokenizer.decode(request.token_ids[: request.prompt_len]).encode()

    def _letter(self, i: int) -> int:
        token: int = self.tokenizer.backend_tokenizer.token_to_id(chr(ord("a") + i % 26))
        return token

    def _logprob(self, token: int, alternatives: int) -> TokenLogprob:
        return TokenLogprob(token, -1.0, tuple((other, -0.5 - i) for i, other in enumerate(range(alternatives))))

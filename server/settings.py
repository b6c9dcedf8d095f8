"""Every option of the server, once: flag, environment variable, YAML key, default and help."""

import math
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    CliPositionalArg,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)
from yaml import YAMLError

from kernels.user_cache import user_cache
from server import faults
from server.engine.config import NGRAM, EngineConfig

DEFAULTS = EngineConfig()
DEMO_NAME = "vsd-demo"


class ConfigFile(YamlConfigSettingsSource):
    """Reads the YAML file that a flag or the environment named: both are sources of higher priority, thus known here."""

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if path is None:
            return {}
        try:
            values = self._read_file(Path(path))
        except OSError as error:
            raise SettingsError(f"config: cannot read {path}: {error.strerror}") from error
        except (ValueError, YAMLError) as error:
            raise SettingsError(f"config: {path} is not YAML in UTF-8: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise SettingsError(f"config: {path} must hold `option: value` lines, found {type(values).__name__}")
        return {str(key).replace("-", "_"): value for key, value in values.items()}


class Settings(BaseSettings):
    """Serve a language model, with batched tree speculative decoding, over the OpenAI API."""

    model_config = SettingsConfigDict(
        env_prefix="VSD_",
        extra="forbid",
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_parse_none_str="null",
        cli_show_env_vars=True,
        protected_namespaces=(),
    )

    model: CliPositionalArg[str | None] = Field(
        None, description="local directory or hub id of the target; without it the demo pair is served"
    )
    draft: str | None = Field(
        None,
        description="draft head (local directory or hub id), `ngram` for drafts from the request's own text, or `none` for plain decoding",
    )
    ngrams: CliImplicitFlag[bool] = Field(DEFAULTS.ngrams, description="draft from a request's own text beside the draft head")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the models run")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="number format of the weights")
    threads: int | None = Field(None, ge=1, description="threads of matrix products on a CPU; measured at start by default")
    max_model_len: int | None = Field(None, ge=2, description="most tokens of prompt and completion; the model's own limit by default")
    max_num_seqs: int = Field(DEFAULTS.max_num_seqs, ge=1, description="most requests that run together")
    max_queued_requests: int = Field(512, ge=0, description="most requests that wait; further ones are answered 503")
    max_queued_tokens: int | None = Field(
        None, ge=0, description="most prompt tokens that wait to be computed; requests beyond are answered 503; no limit by default"
    )
    max_logprobs: int = Field(20, ge=0, description="most alternatives per token that a request may ask for")
    tree_nodes: int = Field(
        DEFAULTS.tree_nodes, ge=1, le=64, description="most nodes that one verification holds per request, root included"
    )
    tree_depth: int = Field(DEFAULTS.tree_depth, ge=1, le=64, description="levels of drafted tokens in a tree")
    tree_topk: int = Field(DEFAULTS.tree_topk, ge=1, le=64, description="children that a drafted node may have")
    draft_temperature: float | Literal["auto"] = Field(
        "auto", description="temperature at which nodes are ranked; auto takes the values calibrated for the head, or learns them"
    )
    cost_cache: Literal["auto", "none"] | Path = Field(
        "auto",
        description="directory that keeps the measured costs of steps for later starts of the same model on the same machine, for a "
        "week; auto: vsd-serve in the user's cache directory; none measures at every start, as with CUDA graphs",
    )
    cuda_graphs: CliImplicitFlag[bool] = Field(DEFAULTS.cuda_graphs, description="on a GPU, record what steps launch and replay it")
    block_size: int = Field(DEFAULTS.block_size, ge=1, le=1024, description="tokens in a block of the KV cache")
    kv_cache_memory: ByteSize | None = Field(
        None, gt=0, description="bytes for the KV cache (units such as 2GiB allowed); chosen by default"
    )
    prefix_caching: CliImplicitFlag[bool] = Field(
        DEFAULTS.prefix_caching, description="keep computed blocks, so that prompts that begin alike are computed once"
    )
    api_key: SecretStr | None = Field(
        None, min_length=1, description="key that clients must send, or several with commas between; no check without it"
    )
    api_key_file: Path | None = Field(None, description="file with further keys, one in a line")
    allow_unauthenticated: CliImplicitFlag[bool] = Field(
        False, description="listen without a key on an address that other machines can reach"
    )
    cors_origin: str | None = Field(
        None, description="origins whose web pages may use the server, with commas between, or `*`; none by default"
    )
    ssl_certfile: Path | None = Field(None, description="certificate chain in PEM form: serve https")
    ssl_keyfile: Path | None = Field(None, description="private key of the certificate, unless it is in the same file")
    client_timeout: float = Field(
        30, gt=0, description="seconds after which a client is cut off that has not sent its whole request, or reads nothing"
    )
    step_timeout: float = Field(300, gt=0, description="seconds that an engine step may take; then /livez answers 503")
    drain_timeout: float = Field(30, ge=0, description="seconds that running requests get to finish once the server is told to end")
    trust_request_chat_template: CliImplicitFlag[bool] = Field(
        False, description="take chat templates from requests; they run in a sandbox, but may use any amount of memory"
    )
    tool_call_parser: Literal["hermes", "llama3_json"] | None = Field(
        None, description="how the model writes calls of functions; without it, requests with tools must force their calls"
    )
    served_model_name: str | None = Field(None, min_length=1, description="model name in the API; directory name or hub id by default")
    seed: int = Field(DEFAULTS.seed, description="seed of requests that bring none")
    faults: str | None = Field(None, description="faults to inject, to test what the server survives: point:kind[:probability],...")
    config: Path | None = Field(None, description="YAML file with any of these options; flags and environment win")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, ConfigFile(settings_cls)

    @field_validator("faults")
    @classmethod
    def _known_faults(cls, value: str | None) -> str | None:
        if value is not None:
            faults.parse(value)
        return value

    @field_validator("draft_temperature", mode="before")
    @classmethod
    def _auto_or_positive(cls, value: Any) -> Any:
        if value == "auto":
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError("must be `auto` or a number above 0")
        return number

    @model_validator(mode="after")
    def _tree_fits_one_word(self) -> "Settings":
        if (self.tree_depth - 1) * self.tree_topk > 64:
            raise ValueError(f"(tree-depth - 1) x tree-topk must be at most 64, got ({self.tree_depth} - 1) x {self.tree_topk}")
        return self

    @model_validator(mode="after")
    def _reachable_with_a_key_only(self) -> "Settings":
        if not (self.api_keys or self.allow_unauthenticated or _is_loopback(self.host)):
            raise ValueError(
                f"host: other machines can reach {self.host}, so an --api-key is expected, "
                f"or --allow-unauthenticated where something else keeps strangers out"
            )
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError(f"ssl-keyfile {self.ssl_keyfile} was given without ssl-certfile")
        return self

    @cached_property
    def api_keys(self) -> tuple[str, ...]:
        """Every key that clients may send. Raises ValueError for a list or a file without one."""
        keys = self.api_key.get_secret_value().split(",") if self.api_key else []
        if not all(key.strip() for key in keys):
            raise ValueError("api-key: a key is empty")
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text().split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"api-key-file: cannot read {self.api_key_file} as text in UTF-8") from error
            if not any(line.strip() for line in lines):
                raise ValueError(f"api-key-file: {self.api_key_file} has no key")
            keys += [line for line in lines if line.strip()]
        return tuple(key.strip() for key in keys)

    @property
    def cors_origins(self) -> list[str]:
        return [origin.strip() for origin in (self.cors_origin or "").split(",") if origin.strip()]

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.model is None:
            return DEMO_NAME
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    def engine_config(self) -> EngineConfig:
        """A model of the user's own is decoded plainly unless a draft head is named with it."""
        draft = DEFAULTS.draft if self.model is None else None
        if self.draft is not None:
            draft = {"none": None, NGRAM: NGRAM}.get(self.draft.lower(), self.draft)
        return EngineConfig(
            model=self.model or DEFAULTS.model,
            draft=draft,
            ngrams=self.ngrams,
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            tree_nodes=self.tree_nodes,
            tree_depth=self.tree_depth,
            tree_topk=self.tree_topk,
            draft_temperature=None if self.draft_temperature == "auto" else self.draft_temperature,
            cost_cache=user_cache() if self.cost_cache == "auto" else None if self.cost_cache == "none" else Path(self.cost_cache),
            cuda_graphs=self.cuda_graphs,
            block_size=self.block_size,
            kv_cache_memory=self.kv_cache_memory,
            prefix_caching=self.prefix_caching,
            seed=self.seed,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings(argv: list[str]) -> Settings:
    """Flags over environment over YAML over defaults. Raises SettingsError with one sentence; ``--help`` and unknown flags exit."""
    try:
        return Settings(_cli_parse_args=argv)  # type: ignore[call-arg]
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(item["loc"], item["msg"], item["input"]) for item in error.errors())) from error


def _sentence(location: tuple[int | str, ...], message: str, given: object) -> str:
    message = message.removeprefix("Value error, ")
    if not location:
        return message
    option = str(location[0]).replace("_", "-")
    return f"{option}: {message}" if option == "api-key" else f"{option}: {message}, got {given!r}"

"""Options: where they come from, which are refused, what the engine gets."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic_settings import SettingsError

from server.__main__ import main
from server.engine.config import DEMO, NGRAM, EngineConfig
from server.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"VSD_{name.upper()}", raising=False)


def test_defaults_serve_the_demo_pair() -> None:
    settings = load_settings([])
    assert replace(settings.engine_config(), cost_cache=None) == EngineConfig()
    assert settings.model_name == "vsd-demo"
    assert (settings.host, settings.port, settings.api_key) == ("127.0.0.1", 8000, None)
    assert (settings.max_queued_requests, settings.max_queued_tokens, settings.max_logprobs) == (512, None, 20)
    assert settings.trust_request_chat_template is False


@pytest.mark.parametrize(
    ("argv", "draft"),
    [
        ([], str(DEMO / "vsd")),
        (["--draft", "none"], None),
        (["--draft", "mine"], "mine"),
        (["--draft", "ngram"], NGRAM),
        (["some/model", "--draft", "NGram"], NGRAM),
        (["some/model"], None),
        (["some/model", "--draft", "mine"], "mine"),
        (["some/model", "--draft", "NONE"], None),
    ],
)
def test_draft(argv: list[str], draft: str | None) -> None:
    assert load_settings(argv).engine_config().draft == draft


def test_model_name(tmp_path: Path) -> None:
    assert load_settings(["org/name"]).model_name == "org/name"
    assert load_settings([str(tmp_path)]).model_name == tmp_path.name
    assert load_settings([str(tmp_path), "--served-model-name", "other"]).model_name == "other"


def test_flag_over_environment_over_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("port: 1\nhost: file\nallow-unauthenticated: true\ntree-nodes: 3\ntree_depth: 2\n")
    monkeypatch.setenv("VSD_PORT", "2")
    monkeypatch.setenv("VSD_HOST", "environment")
    settings = load_settings(["--config", str(file), "--port", "4"])
    assert (settings.port, settings.host, settings.tree_nodes, settings.tree_depth, settings.tree_topk) == (4, "environment", 3, 2, 6)
    monkeypatch.setenv("VSD_CONFIG", str(file))
    assert load_settings([]).tree_nodes == 3


@pytest.mark.parametrize(("argv", "value"), [([], True), (["--prefix-caching"], True), (["--no-prefix-caching"], False)])
def test_a_switch_is_a_flag_and_a_value_elsewhere(argv: list[str], value: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(argv).prefix_caching is value
    file = tmp_path / "options.yaml"
    file.write_text("prefix-caching: false\n")
    assert load_settings([*argv, "--config", str(file)]).prefix_caching is (value and bool(argv))
    monkeypatch.setenv("VSD_PREFIX_CACHING", "false")
    assert load_settings(argv).prefix_caching is (value and bool(argv))


def test_every_option_reaches_the_engine() -> None:
    argv = "m --draft d --device cpu --dtype bfloat16 --max-model-len 99 --max-num-seqs 3 --tree-nodes 8 --tree-depth 3 --tree-topk 2"
    argv += " --draft-temperature 0.5 --block-size 32 --kv-cache-memory 1MiB --no-prefix-caching --seed -1 --threads 3"
    argv += " --no-ngrams --cost-cache c --no-cuda-graphs"
    assert load_settings(argv.split()).engine_config() == EngineConfig(
        "m", "d", "cpu", "bfloat16", threads=3, max_model_len=99, max_num_seqs=3, tree_nodes=8, tree_depth=3, tree_topk=2,
        draft_temperature=0.5, ngrams=False, block_size=32, kv_cache_memory=2**20,
        prefix_caching=False, cost_cache=Path("c"), cuda_graphs=False, seed=-1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "home", "directory"),
    [
        ([], "/cache", Path("/cache/vsd-serve")),
        ([], "", Path.home() / ".cache" / "vsd-serve"),
        (["--cost-cache", "none"], "/cache", None),
        (["--cost-cache", "auto/x"], "/cache", Path("auto/x")),
    ],
)
def test_where_costs_are_kept(argv: list[str], home: str, directory: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert load_settings(argv).engine_config().cost_cache == directory


def test_times() -> None:
    settings = load_settings([])
    assert (settings.step_timeout, settings.drain_timeout, settings.client_timeout) == (300, 30, 30)


def test_limits_and_trust() -> None:
    settings = load_settings(["--max-queued-tokens", "7", "--max-logprobs", "5", "--trust-request-chat-template"])
    assert (settings.max_queued_tokens, settings.max_logprobs, settings.trust_request_chat_template) == (7, 5, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "http"], "port: .*'http'"),
        (["--port", "70000"], "port: .*65535.*'70000'"),
        (["--tree-nodes", "65"], "tree-nodes: .*64.*'65'"),
        (["--tree-nodes", "0"], "tree-nodes: .*1.*'0'"),
        (["--tree-depth", "18", "--tree-topk", "4"], r"at most 64, got \(18 - 1\) x 4"),
        (["--draft-temperature", "hot"], "draft-temperature: must be `auto` or a number above 0, got 'hot'"),
        (["--draft-temperature", "0"], "above 0"),
        (["--dtype", "int8"], "dtype: .*'int8'"),
        (["--max-num-seqs", "0"], "max-num-seqs"),
        (["--max-queued-tokens", "-1"], "max-queued-tokens: .*0.*'-1'"),
        (["--max-logprobs", "-1"], "max-logprobs: .*0.*'-1'"),
        (["--step-timeout", "0"], "step-timeout: .*0.*'0'"),
        (["--drain-timeout", "-1"], "drain-timeout"),
        (["--ssl-keyfile", "key.pem"], "ssl-keyfile key.pem was given without ssl-certfile"),
        (["--faults", "draft:raise:2"], "faults: 'draft:raise:2' is no fault: point:kind"),
        (["--config", "/does/not/exist"], "cannot read /does/not/exist"),
    ],
)
def test_refused(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(argv)


@pytest.mark.parametrize(
    ("text", "message"), [("prot: 3", "prot"), ("- 3", "must hold"), ("{", "not YAML"), ("port: x", "port"), (b"\xff\xff\xff", "not YAML")]
)
def test_refused_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError, match=message):
        load_settings(["--config", str(file)])


def test_empty_key_is_refused_rather_than_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("", "a,,b", " "):
        with pytest.raises(SettingsError, match="api-key"):
            load_settings(["--api-key", given])
    monkeypatch.setenv("VSD_API_KEY", "")
    with pytest.raises(SettingsError, match="api-key"):
        load_settings([])


def test_keys_of_flag_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("three\n\n four, five \n")
    assert load_settings([]).api_keys == ()
    assert load_settings(["--api-key", "one, two", "--api-key-file", str(file)]).api_keys == ("one", "two", "three", "four, five")
    file.write_text("\n")
    with pytest.raises(SettingsError, match=f"{file} has no key"):
        load_settings(["--api-key-file", str(file)])
    with pytest.raises(SettingsError, match="api-key-file: cannot read"):
        load_settings(["--api-key-file", str(tmp_path)])


def test_keys_are_in_no_message(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("Hidden")
    settings = load_settings(["--api-key", "Secret", "--api-key-file", str(file)])
    assert settings.api_keys
    assert not {"Secret", "Hidden"} & set(re.findall(r"\w+", repr(settings)))
    with pytest.raises(SettingsError) as refused:
        load_settings(["--api-key", "Secret,", "--port", "http"])
    assert "Secret" not in str(refused.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.3", "example.org", ""])
def test_strangers_need_a_key(host: str) -> None:
    with pytest.raises(SettingsError, match="--allow-unauthenticated"):
        load_settings(["--host", host])
    for argv in (["--api-key", "k"], ["--allow-unauthenticated"]):
        assert load_settings(["--host", host, *argv]).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert load_settings(["--host", host]).api_keys == ()


def test_origins() -> None:
    assert load_settings([]).cors_origins == []
    assert load_settings(["--cors-origin", "https://a.org, http://b.org"]).cors_origins == ["https://a.org", "http://b.org"]


@pytest.mark.parametrize("argv", [["--port", "http"], ["--nonsense"], ["a", "b"]])
def test_wrong_options_exit_with_2(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["server", *argv])
    try:
        status = main()
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert "error:" in capsys.readouterr().err

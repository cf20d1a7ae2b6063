import dataclasses
from typing import Any

import pytest

from megatransformer_jax.config.option import ConfigError, options_of, rules_of
from megatransformer_jax.config.serving import (
    ChatRequestConfig,
    CompletionRequestConfig,
    ServingConfig,
    check_end_ids,
    is_loopback,
    name_of_folder,
)

# The rule, the class, what is given, the option in the error.
BROKEN: list[tuple[str, type, dict[str, Any], str]] = [
    ("_host_is_an_address", ServingConfig, {"host": "http://a"}, "host"),
    ("_host_is_an_address", ServingConfig, {"host": ""}, "host"),
    ("_name_can_be_written", ServingConfig, {"name": "a b"}, "name"),
    ("_criteria_differ", ServingConfig, {"criteria": ("kl", "kl")}, "criteria"),
    (
        "_anchor_needs_two_slots",
        ServingConfig,
        {"cache_sharing": "anchor", "cache_slots": 1},
        "cache_sharing",
    ),
    ("_slots_fit_the_depth", ServingConfig, {"cache_slots": 9, "max_depth": 8}, "cache_slots"),
    (
        "_exited_reads_need_exits",
        ServingConfig,
        {"criteria": ("fixed",), "cache_exited_reads": "skip"},
        "cache_exited_reads",
    ),
    ("_no_more_wait_than_there_are", ServingConfig, {"rows": 2, "min_waiting": 3}, "min_waiting"),
    ("_new_tokens_fit_a_row", ServingConfig, {"capacity": 64, "max_tokens": 64}, "max_tokens"),
    ("_hosts_are_names", ServingConfig, {"allowed_hosts": ("a.org:80",)}, "allowed_hosts"),
    ("_origins_are_origins", ServingConfig, {"cors_origins": ("a.org",)}, "cors_origins"),
    ("_origins_are_origins", ServingConfig, {"cors_origins": ("https://a/b",)}, "cors_origins"),
    ("_something_is_asked_for", CompletionRequestConfig, {"max_tokens": 0}, "max_tokens"),
    (
        "_fewest_are_not_more_than_most",
        CompletionRequestConfig,
        {"max_tokens": 3, "min_tokens": 4},
        "min_tokens",
    ),
    (
        "_fewest_are_not_more_than_most",
        ChatRequestConfig,
        {"max_completion_tokens": 3, "min_tokens": 4},
        "min_tokens",
    ),
    (
        "_one_name_is_enough",
        ChatRequestConfig,
        {"max_completion_tokens": 3, "max_tokens": 3},
        "max_tokens",
    ),
    (
        "_likeliest_come_with_log_probabilities",
        ChatRequestConfig,
        {"top_logprobs": 0},
        "top_logprobs",
    ),
]


@pytest.mark.parametrize(("name", "config_class", "values", "path"), BROKEN)
def test_a_broken_rule_names_the_option(
    name: str, config_class: type, values: dict[str, Any], path: str
) -> None:
    assert name in {check.__name__ for check in rules_of(config_class)}
    with pytest.raises(ConfigError) as caught:
        config_class(**values)
    assert caught.value.path == path


def test_every_rule_is_broken_once() -> None:
    for config_class in (ServingConfig, CompletionRequestConfig, ChatRequestConfig):
        broken = {name for name, owner, *_ in BROKEN if owner is config_class}
        assert broken == {check.__name__ for check in rules_of(config_class)}


def test_the_defaults_serve_this_machine_alone() -> None:
    config = ServingConfig()
    assert config.is_local and config.cors_origins == () and config.api_key_file is None
    assert all(option.meaning for option in options_of(ServingConfig))


@pytest.mark.parametrize(
    ("options", "allowed", "refused"),
    [
        (
            {},
            ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "127.9.9.9", "localhost."],
            ["evil.org", "evil.org:8000", "", "127.0.0.1.evil.org", "localhost.evil.org"],
        ),
        ({"host": "0.0.0.0"}, ["evil.org", "10.0.0.5:80"], []),
        ({"allowed_hosts": ("a.org",)}, ["a.org", "A.org:80"], ["localhost", "b.a.org", ""]),
        ({"allowed_hosts": ("*",)}, ["anything", ""], []),
        ({"host": "::1"}, ["[::1]:80", "localhost"], ["[::2]:80"]),
    ],
)
def test_hosts_that_a_request_may_name(
    options: dict[str, Any], allowed: list[str], refused: list[str]
) -> None:
    config = ServingConfig(**options)
    assert [config.allows_host(host) for host in allowed] == [True] * len(allowed)
    assert [config.allows_host(host) for host in refused] == [False] * len(refused)


def test_addresses_of_this_machine() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "::1", "127.1.2.3")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "example.org", "")))


@pytest.mark.parametrize("folder", ["my run (2)", "", "/", "über", "x" * 200, "-", "a@b"])
def test_any_folder_gives_a_name(folder: str) -> None:
    assert ServingConfig(name=name_of_folder(folder)).name
    assert name_of_folder("runs-2/a.b@c") == "runs-2/a.b@c"


def test_options_of_a_core_are_for_a_core() -> None:
    ServingConfig(rows=2).check_model_without_core()
    with pytest.raises(ConfigError, match="max_depth: 4 would be ignored"):
        dataclasses.replace(ServingConfig(), max_depth=4).check_model_without_core()


def test_so_many_tokens_may_end_a_text() -> None:
    check_end_ids((5, 6, 7), (2,))
    check_end_ids((5, 6, 7, 2), (2,))
    with pytest.raises(ConfigError, match="5 tokens would end a text"):
        check_end_ids((5, 6, 7, 8), (2,))

import dataclasses

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import (
    options_of,
    rules_of,
    section_rules,
    sections_of,
    unknown_key,
)
from megatransformer_jax.config.run_kinds import AllOptions


def test_every_field_is_an_option_or_a_section() -> None:
    paths = [option.path for option in options_of(AllOptions)]
    sections = [path for path, *_ in sections_of(AllOptions)]
    classes = [AllOptions, *(owner for _, owner, _ in sections_of(AllOptions))]
    assert len(set(paths)) == len(paths)
    assert len(paths) + len(sections) == sum(len(dataclasses.fields(owner)) for owner in classes)


def test_options_of_a_class_come_before_its_sections() -> None:
    """As on the options page, which shows a class's own options in one table."""
    for owner in {AllOptions, *(owner for _, owner, _ in sections_of(AllOptions))}:
        depths = ["." in option.path for option in options_of(owner)]
        assert depths == sorted(depths)


def test_an_option_knows_its_type_default_and_rules() -> None:
    options = {option.path: option for option in options_of(AllOptions)}
    kv_heads = options["model.attention.num_kv_heads"]
    assert (kv_heads.declared, kv_heads.default) == (int | None, None)
    assert kv_heads.rules == ("Divides num_heads.",)
    assert options["model.recurrence.core_width"].rules != ()


def test_every_rule_is_about_a_known_path_and_says_what_it_wants() -> None:
    owners = [
        ("", AllOptions),
        *((f"{path}.", owner) for path, owner, _ in sections_of(AllOptions)),
    ]
    known = {option.path for option in options_of(AllOptions)} | set(section_rules(AllOptions))
    for prefix, owner in owners:
        for check in rules_of(owner):
            assert check.__doc__, check
            assert {prefix + path for path in check.rule_paths} <= known  # type: ignore[attr-defined]


def test_an_unknown_key_without_a_near_name_lists_what_there_is() -> None:
    error = unknown_key("model.zzz", ["width", "remat"])
    assert str(error) == "model.zzz: no such option; 'model' has: width, remat."
    assert "there are: a" in str(unknown_key("zzz", ["a"]))


def test_options_can_be_listed_from_any_section() -> None:
    assert next(iter(options_of(ModelConfig))).path == "vocab_size"

import pathlib

from megatransformer_jax.config.generation import GenerationConfig, flag_name
from megatransformer_jax.config.option import options_of
from megatransformer_jax.config.options_page import options_page
from megatransformer_jax.config.run_kinds import AllOptions
from megatransformer_jax.config.serving import (
    ChatRequestConfig,
    CompletionRequestConfig,
    ServingConfig,
)


def test_the_page_in_docs_is_current(repository: pathlib.Path) -> None:
    page = (repository / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == options_page(), (
        "docs/options.md is old; run: python -m megatransformer_jax.config.options_page"
    )


def test_every_option_has_a_row_with_its_meaning() -> None:
    rows = [line for line in options_page().splitlines() if line.startswith("| `")]
    named = [(option.path, option) for option in options_of(AllOptions)]
    named += [(f"--{flag_name(option.path)}", option) for option in options_of(GenerationConfig)]
    named += [(f"--{option.path}", option) for option in options_of(ServingConfig)]
    for fields in (CompletionRequestConfig, ChatRequestConfig):
        named += [(option.path, option) for option in options_of(fields)]
    assert len(rows) == len(named)
    for row, (name, option) in zip(rows, named, strict=True):
        assert row.startswith(f"| `{name}` |")
        assert option.meaning and option.meaning.replace("|", "\\|") in row


def test_rules_stand_with_the_options_they_concern() -> None:
    page = options_page()
    row = next(line for line in page.splitlines() if "`model.attention.num_kv_heads`" in line)
    assert "Divides num_heads." in row
    assert "For the whole section: keep the default when core_layers=0." in page

"""Commands, options and files that the documentation names are there."""

import re

import pytest
from markdown_pages import experiment_commands, pages

from megatransformer_jax.cli import flags, lm_eval
from megatransformer_jax.cli.commands import find_command
from megatransformer_jax.config.build import build, save_config
from megatransformer_jax.config.option import UserError, options_of, sections_of
from megatransformer_jax.config.run import RunConfig

OPTIONS = {option.path for option in options_of(RunConfig)}
SECTIONS = {path for path, _, _ in sections_of(RunConfig)}


def check(command: list[str]) -> None:
    """Parses a command such as ['train', '--config=...']."""
    name, *words = command
    if name.replace("_", "-") != "lm-eval":
        flags.parse(find_command(name.replace("_", "-")), words)
    elif words:
        lm_eval.parse([word for word in words if word not in (lm_eval.ONLINE, lm_eval.DEBUG)])


def test_commands_are_accepted(repository, tmp_path, monkeypatch):
    (tmp_path / "experiments").symlink_to(repository / "experiments")
    (tmp_path / "runs" / "recurrent").mkdir(parents=True)
    save_config(build({}), tmp_path / "runs" / "recurrent" / "config.json")
    monkeypatch.chdir(tmp_path)
    count = 0
    for page in pages(repository):
        for command in experiment_commands(page.read_text()):
            try:
                check(command)
            except UserError as error:
                pytest.fail(f"{page.name}: {' '.join(command)}: {error}")
            count += 1
    assert count >= 15


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--config.preset=tiny", "--config.train.step=1"],
        ["train", "--config.preset=tiny", "--absent=1"],
        ["inspect", "--config.preset=absent"],
        ["compare", "runs/a", "--absent=1"],
        ["generate", "--workdir=runs/a", "--prompt=a", "--absent=1"],
        ["evaluate", "--from=runs/a", "--absent=1"],
        ["lm_eval", "run", "--model", "megatransformer", "--model_args", "path=a,absent=1"],
    ],
)
def test_a_wrong_command_is_seen(command):
    with pytest.raises(UserError):
        check(command)


def test_commands_are_found_whole():
    text = (
        "    . x && nohup python -m experiments.train --a=1 > log 2>&1 &\n"
        "`python -m experiments.train --inline`\n"
        "```\npython -m experiments.inspect --fenced\n```\n"
        "    python -m experiments.train --b=2 \\\n        --c=\"('d', 'e')\"  # words\n"
        '    gcloud ssh --command="cd f &&\n'
        '      python -m experiments.train --g=3 \\\n      --h=4"\n'
    )
    assert list(experiment_commands(text)) == [
        ["train", "--a=1"],
        ["train", "--b=2", "--c=('d', 'e')"],
        ["inspect", "--fenced"],
        ["train", "--g=3", "--h=4"],
    ]


def test_options_exist(repository):
    unknown = []
    for page in pages(repository):
        text = page.read_text()
        named = re.findall(r"--(?:no)?config\.([a-z_][a-z0-9_.]*[a-z0-9_])", text)
        unknown += [f"{page.name}: {name}" for name in named if name not in OPTIONS]
        sections = "|".join(section for section in SECTIONS if "." not in section)
        dotted = re.findall(rf"`((?:{sections})\.[a-z_.]*[a-z_])[`=]", text)
        known = OPTIONS | SECTIONS
        unknown += [
            f"{page.name}: {name}"
            for name in dotted
            if name not in known and name != "train.log"  # A file of the workdir.
        ]
    assert unknown == []


def test_files_exist(repository):
    """Names with a slash; capitals stand for something else, and a path may begin anywhere."""
    folders = ("megatransformer_jax", "experiments", "tests", "docs", "benchmarks")
    paths = [path for folder in folders for path in (repository / folder).rglob("*")]
    there = [f"/{path.relative_to(repository)}" for path in paths]
    absent = []
    for page in pages(repository):
        for name in re.findall(r"`([\w.]+/[\w/.]*\.(?:py|md|ipynb))`", page.read_text()):
            is_example = name != name.lower() or name.startswith(("runs/", "my/", "../"))
            if not is_example and not any(path.endswith(f"/{name}") for path in there):
                absent.append(f"{page.name}: {name}")
    assert absent == []

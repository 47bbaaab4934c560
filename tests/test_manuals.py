"""The manuals against the repository: every path, key and command line that they name is there.

Nothing is run: a command line is given to the parser of its command. A file that no folder holds must be one that our code
writes, so its name must stand in the code.
"""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest

import higgs_voice_pipeline
from preprocess.config import PreprocessConfig
from train.config import TrainConfig

ROOT = Path(higgs_voice_pipeline.ROOT)
MANUALS = ["README.md", "CONTRIBUTING.md", "preprocess/README.md", "train/README.md", "tools/README.md"]
COMMANDS = ("preprocess", "train", "inspect-shards", "checkpoints", "speak", "evaluate", "tiny", "bench", "serve")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
PATH = re.compile(r"(\.\./)?[\w.-]+(/[\w.-]+)*(\.(py|md|toml|txt|json|jsonl|html|npy|service)|/)")
PLACEHOLDER = re.compile(r"[A-Z]{2,}|[xX]\.|a\.|metadata\.|chatml\.")  # OUT/..., RUN/..., and lists of the user
KEY = re.compile(r"([a-z]+)\.(?!py$)([a-z_]+)( = .*)?")
SECTIONS = {
    section.name: {key.name for key in msgspec.structs.fields(section.type)}
    for config in (PreprocessConfig, TrainConfig)
    for section in msgspec.structs.fields(config)
}


# --- what a manual says --------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    return FENCE.sub("", text)


def blocks(text: str, *languages: str) -> Iterator[str]:
    for language, block in FENCE.findall(text):
        if language in languages:
            yield block


def command_lines(text: str) -> Iterator[list[str]]:
    """Words of every command of ours in the fenced blocks, as the shell splits them."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            yield from our_commands(list(lexer))


def our_commands(words: list[str]) -> Iterator[list[str]]:
    """Behind `srun ...` and `torchrun ... -m`, too; a pipe or a redirection ends a command."""
    command: list[str] | None = None
    for word in [*words, "|"]:
        if set(word) <= set("|&;<>"):
            if command:
                yield command
            command = None
        elif command is not None:
            command.append(word)
        elif word in COMMANDS:
            command = [word]


def missing_paths(text: str, folder: Path, written: str) -> list[str]:
    """Paths in backticks, in links and in the trees of files that are neither there nor written by a command."""
    missing = []
    lines = [(line, SPAN.findall(line)) for line in prose(text).splitlines()]
    for block in blocks(text, "text"):
        lines += [
            (line, re.findall(r"(?<!\S)[\w./-]+(?:\.py|\.md|(?<=\w)/)(?=[,;:]?(?:\s|$))", line))
            for line in block.splitlines()
        ]
    for line, spans in lines:
        beside = [ROOT, folder]
        links = [link for link in LINK.findall(line) if "://" not in link]
        missing += [link for link in links if not (folder / link).exists()]
        for span in spans:
            if not PATH.fullmatch(span) or PLACEHOLDER.match(span):
                continue
            found = [place / span for place in beside if (place / span).exists()]
            if found:
                beside.append(found[0].parent if found[0].is_file() else found[0])
            elif f'{Path(span).name}"' not in written:
                missing.append(span)
    return missing


# --- what our commands know ----------------------------------------------------------------------------------------


def click_command(name: str) -> click.Command:
    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(higgs_voice_pipeline, "run", called.append)
        getattr(higgs_voice_pipeline, name.replace("-", "_"))()
    return importlib.import_module(called[0]).main


def fault_of(words: list[str], *, complete: bool = True) -> str:
    """Why the parser refuses a command line, "" if it does not. `complete`: no argument may be missing."""
    command, rest = click_command(words[0]), words[1:]
    context = click.Context(command, info_name=words[0])
    try:
        while isinstance(command, click.Group):
            name, found, rest = command.resolve_command(context, rest)
            assert found is not None
            command, context = found, click.Context(found, parent=context, info_name=name)
        values, too_many, _ = command.make_parser(context).parse_args(list(rest))
        for parameter in command.params:
            value = values.get(parameter.name)
            if (
                isinstance(parameter, click.Argument)
                and parameter.required
                and not isinstance(value, str | tuple)
                and complete
            ):
                return f"{parameter.name} is missing"
            if isinstance(parameter.type, click.Choice) and isinstance(value, str):
                parameter.type.convert(value, parameter, context)
    except click.UsageError as error:
        return error.format_message()
    if too_many:
        return f"too many arguments: {too_many}"
    keys = [value.split("=")[0] for value in values.get("overrides") or ()]
    return "; ".join(f"no key {key}" for key in keys if not is_key(key))


def is_key(dotted: str) -> bool:
    section, _, key = dotted.partition(".")
    return key in SECTIONS.get(section, ())


def known_options() -> set[str]:
    def walk(command: click.Command) -> Iterator[str]:
        for parameter in command.params:
            yield from [*parameter.opts, *parameter.secondary_opts]
        for inner in getattr(command, "commands", {}).values():
            yield from walk(inner)

    return {option for name in COMMANDS for option in walk(click_command(name))} | {"--help"}


# --- the tests -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=MANUALS)
def manual(request: pytest.FixtureRequest) -> Path:
    return ROOT / request.param


@pytest.fixture(scope="module")
def code() -> str:
    files = [path for floor in ("shards", "preprocess", "train", "tools") for path in (ROOT / floor).rglob("*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_every_path_in_a_manual_is_there(manual: Path, code: str):
    assert missing_paths(manual.read_text(encoding="utf-8"), manual.parent, code) == []


def test_every_command_line_in_a_manual_parses(manual: Path):
    lines = list(command_lines(manual.read_text(encoding="utf-8")))
    assert {shlex.join(line): fault for line in lines if (fault := fault_of(line))} == {}
    assert lines or manual.name == "CONTRIBUTING.md"


def test_every_command_within_a_sentence_parses(manual: Path):
    spans = [shlex.split(span) for span in SPAN.findall(prose(manual.read_text(encoding="utf-8"))) if "'" not in span]
    ours = [span for span in spans if len(span) > 1 and span[0] in COMMANDS]
    assert {shlex.join(line): fault for line in ours if (fault := fault_of(line, complete=False))} == {}


def test_every_option_within_a_sentence_is_one(manual: Path):
    spans = [span.split()[0] for span in SPAN.findall(prose(manual.read_text(encoding="utf-8"))) if span.strip()]
    foreign = {"--max-restarts", "--signal", "--signals-to-handle"}  # torchrun's and Slurm's
    options = {span.split("=")[0] for span in spans if span.startswith("--")} - foreign
    options = {option for option in options if "_" not in option}  # ours have hyphens; these are other trainers'
    assert options - known_options() == set()


def test_every_key_in_a_manual_is_in_the_configuration(manual: Path):
    spans = SPAN.findall(prose(manual.read_text(encoding="utf-8")))
    keys = [f"{found[1]}.{found[2]}" for span in spans if (found := KEY.fullmatch(span)) and found[1] in SECTIONS]
    assert [key for key in keys if not is_key(key)] == []


def test_every_make_target_in_a_manual_is_one(manual: Path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z-]+)", manual.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= targets


def test_every_line_of_where_is_what_names_a_file():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where is what")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20
    places = [SPAN.findall(row.strip("| ").split(" | ")[1]) for row in rows]
    assert all(any(PATH.fullmatch(span) for span in spans) for spans in places)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("checkpoints mend out/run", "mend"),
        ("checkpoints merge out/run out/merged --layuot boson", "--layuot"),
        ("checkpoints merge out/run out/merged --layout higgs", "higgs"),
        ("checkpoints merge out/run", "out is missing"),
        ("tiny out/tiny out/more", "too many"),
        ("train out/shards out/run --set train.learning_rat=1", "train.learning_rat"),
        ("srun --nodes 2 train out/shards out/run --gpu 2", "--gpu"),
        ("speak out/merged --reference a.wav --text x --stream | ffplay -", ""),
    ],
)
def test_a_command_line_that_nothing_knows_is_found(line: str, fault: str):
    (words,) = command_lines(f"```sh\n{line}   # why\n```\n")
    found = fault_of(words)
    assert fault in found
    assert bool(fault) == bool(found)


def test_a_path_that_is_gone_is_found():
    text = "`train/loop.py` and `loops.py` there; [a manual](train/READ.md), `OUT/x.json`, `dataset.json`\n"
    tree = "```text\ntrain/wing/   x\n```\n"
    assert missing_paths(text + tree, ROOT, 'open("dataset.json")') == ["train/READ.md", "loops.py", "train/wing/"]

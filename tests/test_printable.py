"""What is shown is printable and holds no token: `shards.printable`, `shards.terminal`, and the commands that use them."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import signal
import sys
import unicodedata

import msgspec
import pytest
from train_process import train_arguments

from shards.printable import is_harmful, printable, printable_json, printable_lines, redact, redact_values
from shards.terminal import LineFormatter

CLIPBOARD = "\x1b]52;c;Y3VybCBldmlsfHNo\x07"
HOSTILE = [
    "[/b]",
    "x[/x][bold red]",
    f"ليلى{CLIPBOARD}",
    "\x1b[2J\x1b[Hgone",
    "\x9b31mred\x9d0;title\x9c",  # C1: one character opens a sequence
    "name\r\n12:00:00 step 9/9 | forged",
    "gnp.\u202eexe",
    "a\u2066b\u2069\u2028c\x00\x7f\x85",
    "\udcff undecodable \U000e0041 tag",
    "{curly} %s %n $(id) `id`",
]
ARABIC = "قَالَ: «مِتر\u200cها؟» \u200fنعم\u061c ١٢٣، ـــ ﷺ"
TOKEN = "s3cr3tT0ken"


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_a_terminal_obeys_is_left(text: str):
    shown = printable(text)
    assert not any(is_harmful(letter) for letter in shown)
    assert not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in shown)
    shown.encode("utf-8")


def test_letters_of_every_script_stay():
    for text in (ARABIC, "Ünïcödé 漢字 हिन्दी 👩‍👧 é", r"C:\new\table", "plain [x] text"):
        assert printable(text) == text


def test_a_line_break_in_a_name_cannot_pass_for_a_line():
    assert printable_lines("a\n12:00:00 done") == "a\n  12:00:00 done"
    record = logging.LogRecord("train", logging.INFO, "", 0, "%s", ("x\n12:00:00 \x1b[31mforged",), None)
    line = LineFormatter("%(message)s").format(record)
    assert line == "x\n  12:00:00 \\x1b[31mforged"


def test_json_is_lossless_and_printable():
    rng = random.Random(5)
    letters = [chr(n) for n in range(0x250)] + [chr(n) for n in range(0x2000, 0x2070)] + list(ARABIC) + ["\U000e0041"]
    for text in [*HOSTILE, *("".join(rng.choices(letters, k=40)) for _ in range(200))]:
        shown = printable_json({text: [text]})
        assert json.loads(shown) == {text: [text]}
        assert not any(is_harmful(letter) for letter in shown)
    assert "\n" in printable_json({"a": 1}, indent=1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (f"https://me:{TOKEN}@host/a/b.tar", "https://***@host/a/b.tar"),
        (f"s3://{TOKEN}@bucket/x", "s3://***@bucket/x"),
        (f"https://h/x?token={TOKEN}&part=3", "https://h/x?token=***&part=***"),
        (
            f"https://h/x?X-Amz-Credential=A%2FB&X-Amz-Signature={TOKEN}",
            "https://h/x?X-Amz-Credential=***&X-Amz-Signature=***",
        ),
        (f"https://h?{TOKEN}", "https://h?***"),
        (f"https://h/x#access_token={TOKEN}", "https://h/x#access_token=***"),
        (f"two https://a:{TOKEN}@h/x, https://h/y?sig={TOKEN} urls", "two https://***@h/x, https://h/y?sig=*** urls"),
        (f"https://h/x@v1/y?sig={TOKEN}::simplecache", "https://h/x@v1/y?sig=***"),
        (f"--set wandb.api_key={TOKEN}", "--set wandb.api_key=***"),
        (f'{{"password": "{TOKEN}"}}', '{"password": "***"}'),
        (f"AccountKey={TOKEN};", "AccountKey=***;"),
        (f"Authorization: Bearer {TOKEN}", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnopqrstuvwxyz", "***"),
        ("set --set train.batch_tokens=4096 and a token: x", "set --set train.batch_tokens=4096 and a token: x"),
        ("https://host/data/{000..009}.tar", "https://host/data/{000..009}.tar"),
        ("model.tokenizer=a/b", "model.tokenizer=a/b"),
    ],
)
def test_tokens_are_hidden_and_the_rest_stays(given: str, expected: str):
    assert redact(given, {}) == expected


def test_what_the_environment_calls_a_secret_is_hidden_anywhere():
    environment = {
        "HF_TOKEN": TOKEN,
        "AWS_SECRET_ACCESS_KEY": "abc/def+ghi",
        "TOKENIZERS_PARALLELISM": "parallel-value",
    }
    environment |= {"HF_TOKEN_PATH": "/home/me/token", "PASSWORD": "ab"}
    shown = redact(f"401 for {TOKEN}xyz with abc/def+ghi, parallel-value of /home/me/token, about", environment)
    assert shown == "401 for ***xyz with ***, parallel-value of /home/me/token, about"
    assert redact_values({"a": [f"https://u:{TOKEN}@h"], "b": 3, "c": None}) == {
        "a": ["https://***@h"],
        "b": 3,
        "c": None,
    }


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, make_dataset, make_sample):
    """A data set whose speakers, ids, texts, paths and warnings are hostile, in a folder with such a name."""
    samples = []
    for seed, text in enumerate(HOSTILE):
        text = text.encode("utf-8", "replace").decode()  # JSON of a shard holds no lone surrogate
        sample = make_sample(seed, 5, 8, speaker=text)
        facts = sample.facts
        texts = [*facts.texts]
        texts[facts.target_text] = f"{ARABIC}{text}"
        facts = msgspec.structs.replace(
            facts,
            id=text,
            texts=texts,
            warnings=[text],
            extra={text: text},
            target=msgspec.structs.replace(facts.target, path=text),
        )
        samples.append(dataclasses.replace(sample, facts=facts))
    return make_dataset(tmp_path_factory.mktemp("hostile") / "x[/x]\x1b[31m\u202e", samples)


@pytest.mark.parametrize("words", [["summary"], ["list"], ["show", "KEY"], ["show", "KEY", "--sequence"], ["verify"]])
def test_inspect_shards_shows_hostile_data_harmlessly(run_command, hostile, words, tiny_dir):
    arguments = [word.replace("KEY", "000000000002") for word in words]
    config = ["--config", tiny_dir / "pipeline.toml"] if "--sequence" in words else []
    done = run_command("inspect-shards", arguments[0], hostile, *arguments[1:], *config)
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert not any(is_harmful(letter) for letter in shown.replace("\n", "")), shown
    if words[0] == "list":
        assert ARABIC in shown
        assert len(done.stdout.splitlines()) == len(HOSTILE), "a line per sample"
    if words[0] == "summary":
        assert "[/b] 1" in shown


def test_json_of_inspect_shards_keeps_every_character(run_command, hostile):
    done = run_command("inspect-shards", "list", hostile, "--json")
    speakers = [json.loads(line)["speaker"] for line in done.stdout.splitlines()]
    assert speakers == [text.encode("utf-8", "replace").decode() for text in HOSTILE]


def test_errors_and_arabic_survive_any_terminal(run_command, hostile, tmp_path):
    for name in ("list", "show"):
        folder = tmp_path / "none\x1b]0;t\x07[/b]"
        done = run_command("inspect-shards", name, *([folder] if name == "list" else [folder, "k"]))
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
        assert "\x1b" not in done.stderr
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = run_command("inspect-shards", "list", hostile, env=ascii_only)
    assert done.returncode == 0, done.stderr


def test_a_fault_of_the_program_prints_its_traceback_harmlessly(run_command):
    import subprocess

    code = "from shards.terminal import explained\nwith explained():\n    raise KeyError('\\x1b[31m' + 'https://u:pw-pw@h/x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "KeyError" in done.stderr
    assert "\x1b" not in done.stderr
    assert "pw-pw" not in done.stderr.splitlines()[-1]


def test_a_job_into_a_folder_with_markup_ends_well(run_command, tiny_dir, arabic_mini, tmp_path):
    out = tmp_path / "my [/x] out"
    done = run_command("preprocess", arabic_mini, out, "--limit", 2, "--config", tiny_dir / "pipeline.toml")
    assert done.returncode == 0, done.stderr
    assert f"inspect-shards summary '{out}'" in done.stderr, "the next command can be pasted"


def test_no_token_of_a_url_reaches_a_run(run_command, http_server, short_data, tiny_dir, tmp_path):
    address = http_server(short_data).replace("http://", f"http://me:{TOKEN}@")
    run, other = tmp_path / "run", "0ther-s3cret-value"
    settings = [f"train.cache_dir={tmp_path / 'cache'}", "train.max_steps=2", "train.packs_per_step=2"]
    settings += ["wandb.mode=offline"]
    arguments = train_arguments(address, run, tiny_dir, *settings)  # pyright: ignore[reportArgumentType]
    done = run_command("train", *arguments, env={"HF_TOKEN": other, "WANDB_SILENT": "true"})
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "environment.json").read_text())["command"].count("http://***@127.0.0.1") == 1
    done = run_command("train", *train_arguments(f"{address}/{other}", run, tiny_dir), env={"HF_TOKEN": other})  # pyright: ignore[reportArgumentType]
    assert done.returncode == 1
    assert "http://***@127.0.0.1" in done.stderr
    assert TOKEN not in done.stderr
    assert other not in done.stderr
    for path in run.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
            assert other.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("text", ["_" * 50_000, "ص" * 50_000, "a" * 50_000 + "://", "x." * 25_000 + "token"])
def test_hiding_secrets_takes_no_longer_than_the_text_is_long(text):
    """The square of it would be minutes; the alarm is far beyond what a slow machine needs."""

    def too_long(*_: object) -> None:
        raise AssertionError("not linear")

    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        assert redact(text, {}) == text
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize(
    "name", ["token", "x.token", "HF_TOKEN", "my-api_key", "--password", "étoken", "_secret", "a.b.signature"]
)
def test_a_secret_is_hidden_under_every_name_that_ends_in_one(name):
    assert redact(f"run {name}=abc123 on", {}) == f"run {name}=*** on"


def test_words_that_only_hold_a_secrets_name_stay():
    assert redact("mytoken=abc tokens=5 num_tokens=7", {}) == "mytoken=abc tokens=5 num_tokens=7"

"""`evaluate` from list to results: nothing dropped, resumed alike, exit statuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from shards.errors import ConfigError, DataError
from tools.evaluate.cli import main
from tools.evaluate.conditions import broken, parse_condition
from tools.evaluate.speaking import wave_name
from train.evaluation.metric_models import ModelIdentity, NotInstalled
from train.evaluation.speaker_encoders import unit

VOICES = ("s0", "s1", "s2", "s3", "s4", "s5")
TEXTS = ("مرحبا بكم جميعا", "صباح الخير يا صديقي", "رقم ٣٤٥ هنا")


def voice(number: int, seconds: float, seed: int) -> np.ndarray:
    """A tone of a pitch of its own, with a little noise: what the encoder below tells apart."""
    times = np.arange(round(seconds * 24000)) / 24000
    noise = np.random.default_rng(seed).normal(0, 0.01, len(times))
    return (0.3 * np.sin(2 * np.pi * (200 + 150 * number) * times) + noise).astype(np.float32)


class Bands:
    """A speaker encoder that needs no package: power in bands."""

    identity = ModelIdentity("bands", "1", "0" * 64)

    def embed(self, wave: np.ndarray) -> np.ndarray:
        power = np.abs(np.fft.rfft(wave)) ** 2
        bands = [part.sum() for part in np.array_split(power[: len(power) // 4], 40)]
        return unit(np.sqrt(np.array(bands)))


class Knows:
    """A recognizer that knows the recordings by length, and hears nothing else."""

    identity = ModelIdentity("knows", "1", "1" * 64)

    def text_of(self, wave: np.ndarray) -> str:
        return {32000: TEXTS[0], 33600: TEXTS[1], 35200: TEXTS[2]}.get(len(wave), "")


class Loud:
    """A MOS predictor that likes loud waves."""

    identity = ModelIdentity("loud", "1", "2" * 64)

    def values(self, wave: np.ndarray) -> dict[str, float]:
        return {"loud": 1 + 4 * float(np.abs(wave).max())}


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch):
    def encoder(name: str) -> Bands:
        if name == "bands":
            return Bands()
        raise NotInstalled(f"{name}: not installed; pip install it")

    def predictor(name: str, _: str) -> Loud:
        if name == "loud":
            return Loud()
        raise NotInstalled(f"{name}: not installed; pip install it")

    for kind in ("encoder", "predictor", "recognizer"):
        monkeypatch.setattr(f"tools.evaluate.cli.check_{kind}", lambda name: None)  # the names below are none outside
    monkeypatch.setattr("tools.evaluate.metric_passes.load_encoder", encoder)
    monkeypatch.setattr("tools.evaluate.metric_passes.load_predictor", predictor)
    monkeypatch.setattr(
        "tools.evaluate.metric_passes.load_recognizer", lambda name, *_: Knows() if name == "knows" else None
    )


@pytest.fixture
def waves(tmp_path: Path) -> Path:
    """A list of six voices with three sentences each, and a folder `other` with another system's waves."""
    lines = []
    for number, name in enumerate(VOICES):
        for sentence, text in enumerate(TEXTS):
            seconds = 2 + sentence / 10
            for folder, seed in (("real", 1), ("other", 2), ("prompts", 3)):
                path = tmp_path / folder / f"{name}-{sentence}.wav"
                path.parent.mkdir(exist_ok=True)
                soundfile.write(path, voice(number, seconds, seed), 24000)
            row = {"id": f"{name}-{sentence}", "speaker": name, "messages": messages(tmp_path, name, sentence, text)}
            lines.append(json.dumps(row))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    return tmp_path


def messages(folder: Path, name: str, sentence: int, text: str) -> list[dict[str, Any]]:
    from shards.cloning import cloning_messages

    prompt = (sentence + 1) % 3
    reference = str(folder / "prompts" / f"{name}-{prompt}.wav")
    return cloning_messages(TEXTS[prompt], reference, text, str(folder / "real" / f"{name}-{sentence}.wav"))


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def score(waves: Path, out: Path, *more: object) -> dict[str, Any]:
    asked = ("--only-score", waves / "other", waves / "list.jsonl", out, "--similarity", "bands", "--asr", "knows")
    status, output = run(*asked, "--players", 2, *more)  # two seconds of MP3 otherwise
    assert status == 0, output
    return json.loads((out / "results.json").read_text())


def test_waves_of_another_system_are_scored_beside_the_real(waves: Path):
    results = score(waves, waves / "out")
    scores = results["scores"]
    assert list(scores) == ["real", "other", "shuffled"]
    assert scores["other"]["cer"]["strict"]["corpus"] == 0
    assert scores["other"]["utterances"] == 18
    alike = {name: part["similarity"]["bands"] for name, part in scores.items()}
    assert alike["shuffled"]["share_of_the_way"] == 0
    assert alike["real"]["share_of_the_way"] == 1
    assert alike["other"]["share_of_the_way"] > 0.9
    assert alike["other"]["to_another_clip"] > 0.9
    assert results["models"]["asr"]["sha256"] == "1" * 64
    assert set(results["protocols"]) == {"raw", "strict", "oualb"}
    assert results["groups"]["digits"]["other"]["utterances"] == 6
    assert len(results["speakers"]) == 6
    assert results["seen"].startswith("not checked")


def test_matched_text_is_below_shuffled_text(waves: Path):
    """The shuffled system plays somebody else's sentence."""
    scores = score(waves, waves / "out", "--limit", 17)["scores"]
    assert scores["real"]["cer"]["strict"]["corpus"] < scores["shuffled"]["cer"]["strict"]["corpus"]


def test_speed_is_that_of_all_utterances_together(waves: Path):
    """Speech that grows faster is seen; one that broke off after 40 ms does not stand for all."""
    lengths = {path.stem: soundfile.info(path).frames for path in (waves / "other").iterdir()}
    soundfile.write(waves / "other" / "s0-0.wav", voice(0, 0.04, 2), 24000)
    scores = score(waves, waves / "out")["scores"]
    characters = len(VOICES) * sum(map(len, TEXTS))
    seconds = sum(lengths.values()) / 24000
    assert scores["real"]["characters_per_second"] == pytest.approx(characters / seconds, abs=1e-5)
    assert scores["other"]["characters_per_second"] == pytest.approx(characters / (seconds - 1.96), abs=1e-5)


def test_a_missing_wave_is_an_error_row(waves: Path):
    whole = score(waves, waves / "whole")
    (waves / "other" / "s0-0.wav").unlink()
    soundfile.write(waves / "other" / "s1-0.wav", np.zeros(48000), 24000)
    soundfile.write(waves / "other" / "s2-0.wav", voice(2, 9, 0), 24000)
    (waves / "other" / "s3-0.wav").write_bytes(b"")
    results = score(waves, waves / "holes")
    before, after = whole["scores"]["other"], results["scores"]["other"]
    assert after["utterances"] == before["utterances"] == 18
    assert after["cer"]["strict"]["length"] == before["cer"]["strict"]["length"]
    assert after["cer"]["strict"]["deletions"] == 4 * len(TEXTS[0])
    assert after["failures"] == {"share": round(4 / 18, 6), "missing": 2, "silent": 1, "runaway": 1}
    assert {row["item"] for row in after["failed"]} == {"s0-0", "s1-0", "s2-0", "s3-0"}
    assert after["similarity"]["bands"]["to_reference"] < before["similarity"]["bands"]["to_reference"]
    assert {row["item"] for row in results["worst"][:4]} == {"s0-0", "s1-0", "s2-0", "s3-0"}
    compared = next(row for row in results["comparisons"] if row["metric"] == "failures")
    assert compared["num_items"] == 18


def test_the_differences_carry_interval_and_verdict(waves: Path):
    for number in range(6):
        for sentence in range(3):
            path = waves / "other" / f"s{number}-{sentence}.wav"
            soundfile.write(path, voice(number + 7, 2 + sentence / 10, number), 24000)
    results = score(waves, waves / "out")
    row = next(row for row in results["comparisons"] if row["metric"] == "similarity bands")
    assert (row["first"], row["second"], row["num_speakers"]) == ("other", "real", 6)
    assert row["high"] < 0
    assert row["verdict"] == "worse"
    assert row["p_worse"] > 0.95


def test_what_was_not_measured_is_said(waves: Path):
    status, output = run(
        "--only-score", waves / "other", waves / "list.jsonl", waves / "out", "--similarity", "resemblyzer"
    )
    assert status == 0
    assert "skipped: similarity by resemblyzer: not installed; pip install it" in output
    skipped = json.loads((waves / "out" / "results.json").read_text())["not_measured"]
    assert [line.split(":")[0] for line in skipped] == [
        "similarity by resemblyzer",
        "CER and WER",
        "MOS by dnsmos",
        "MOS by distillmos",
        "base model",
    ]


@pytest.mark.parametrize(
    ("condition", "status"),
    [("cer > 0.1", 0), ("cer < 10%", 1), ("similarity > 50%", 1), ("failures > 0", 0), ("cer_difference > 0", 1)],
)
def test_conditions_decide_the_exit_status(waves: Path, condition: str, status: int):
    """A difference to a base that was not evaluated is not measured, and fails."""
    arguments = ["--only-score", waves / "other", waves / "list.jsonl", waves / "out", "--similarity", "bands"]
    assert run(*arguments, "--asr", "knows", "--fail-if", condition)[0] == status


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cer",
        "cer > x",
        "speed > 1",
        "cer == 1",
        "cer > 1..2",
        "CER > 1",
        "cer > .",
        "cer > nan",
        "> 1",
        "cer > 1 > 0",
    ],
)
def test_what_is_no_condition_is_refused(text: str):
    with pytest.raises(ConfigError, match="fail-if"):
        parse_condition(text)


def test_a_value_that_is_no_number_passes_no_condition():
    results = {
        "systems": [{"name": "other", "kind": "waves", "perturb": ""}],
        "scores": {"other": {"failures": {"share": float("nan")}}},
        "comparisons": [],
    }
    assert broken([parse_condition("failures > 0.5")], results) == [
        "other: failures was not measured, and --fail-if asks for it"
    ]


def test_json_goes_to_stdout(waves: Path):
    arguments = ["--only-score", f"mine={waves / 'other'}", waves / "list.jsonl", waves / "out", "--similarity", "none"]
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert list(json.loads(done.stdout)["scores"]) == ["real", "mine", "shuffled"]


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b"]])
def test_too_few_arguments_are_a_usage_error(arguments: list[str]):
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_another_evaluation_is_not_mixed_in(waves: Path):
    score(waves, waves / "out")
    status, output = run("--only-score", f"mine={waves / 'real'}", waves / "list.jsonl", waves / "out", "--limit", 3)
    assert status == 1
    assert "holds an evaluation of other items and systems; give a new OUT" in output


def test_a_folder_without_any_wave_is_a_wrong_folder(waves: Path):
    status, output = run("--only-score", f"x={waves}", waves / "list.jsonl", waves / "out", "--similarity", "bands")
    assert status == 1
    assert "no wave of any of the 18 items is there; expected files named by id, like s0-0.wav" in output


def test_what_was_mended_is_read_again(waves: Path):
    sound = (waves / "real" / "s0-0.wav").read_bytes()
    (waves / "real" / "s0-0.wav").write_bytes(sound[:20])
    (waves / "other" / "s1-1.wav").rename(waves / "away.wav")
    before = score(waves, waves / "out")
    assert [before["scores"][name]["failures"].get("missing") for name in ("real", "other")] == [1, 1]
    assert "item s0-0: its recording could not be read" in " ".join(before["not_measured"])
    (waves / "real" / "s0-0.wav").write_bytes(sound)
    wave, rate = soundfile.read(waves / "away.wav")
    soundfile.write(waves / "other" / "s1-1.flac", wave, rate)
    after = score(waves, waves / "out")
    assert [after["scores"][name]["failures"] for name in ("real", "other")] == [{"share": 0.0}] * 2


def test_scores_follow_a_wave_that_changed(waves: Path):
    score(waves, waves / "out")
    (waves / "other" / "s0-0.wav").unlink()
    assert score(waves, waves / "out")["scores"]["other"]["failures"]["missing"] == 1


def test_mos_is_shown_as_a_difference_to_the_recording(waves: Path):
    """Half as loud is worse by this predictor; a wave that is missing gets the lowest of its scale."""
    for path in (waves / "other").iterdir():
        wave, rate = soundfile.read(path)
        soundfile.write(path, wave / 2, rate)
    (waves / "other" / "s0-0.wav").unlink()
    results = score(waves, waves / "out", "--mos", "loud")
    rows = [json.loads(line) for line in (waves / "out" / "utterances.jsonl").read_text().splitlines()]
    found = {(row["system"], row["item"]): row["mos_difference"] for row in rows}
    assert found["other", "s1-0"]["loud"] == pytest.approx(-0.66, abs=0.06)
    assert found["other", "s0-0"]["loud"] == pytest.approx(-1.32, abs=0.12)
    assert found["real", "s1-0"]["loud"] == 0
    assert found["shuffled", "s1-0"] == {}
    assert results["scores"]["other"]["mos_difference"]["loud"]["utterances"] == 18
    assert "mos_difference" not in results["scores"]["real"]
    row = next(row for row in results["comparisons"] if row["metric"] == "mos loud")
    assert (row["verdict"], row["num_items"]) == ("worse", 18)
    assert results["models"]["mos"] == [{"name": "loud", "version": "1", "sha256": "2" * 64}]


def test_mos_without_recordings_is_not_measured(waves: Path):
    for path in (waves / "real").iterdir():
        path.unlink()
    lines = [f"s{number}-0|{TEXTS[1]}|{waves}/prompts/s{number}-1.wav|{TEXTS[0]}" for number in range(len(VOICES))]
    (waves / "list.lst").write_text("\n".join(lines))
    arguments = ["--only-score", waves / "other", waves / "list.lst", waves / "out", "--similarity", "bands"]
    status, output = run(*arguments, "--mos", "loud")
    assert status == 0
    assert "MOS predictors: they are shown as a difference to the real recording" in output
    assert "mos" not in json.dumps(json.loads((waves / "out" / "results.json").read_text())["scores"])


@pytest.mark.parametrize(("more", "draws"), [((), 3), (("--greedy",), 1), (("--seeds", 2), 2)])
def test_three_draws_unless_they_would_be_equal(waves: Path, more: tuple[object, ...], draws: int):
    assert score(waves, waves / "out", "--limit", 1, *more)["draws"] == draws


def test_draws_of_greedy_speech_are_a_usage_error(waves: Path):
    assert run("a", "b", waves / "out", "--greedy", "--seeds", 2)[0] == 2


def test_out_that_is_a_file_is_a_usage_error(waves: Path):
    status, output = run("--only-score", waves / "other", waves / "list.jsonl", waves / "list.jsonl")
    assert (status, "is a file; expected a folder" in " ".join(output.split())) == (2, True)


# --- the data themselves --------------------------------------------------------------------------------------------


def checked(waves: Path, out: Path, *more: object) -> dict[str, Any]:
    status, output = run("--data-only", waves / "list.jsonl", out, "--similarity", "bands", "--asr", "knows", *more)
    assert status == 0, output
    return json.loads((out / "data.json").read_text())


def test_sound_data_are_alike_and_say_their_texts(waves: Path):
    found = checked(waves, waves / "out")
    assert {name: part["cer"] for name, part in found["clips"].items()} == {"reference": 0, "target": 0}
    assert found["agreement"]["bands"]["suspected"] == []
    assert found["agreement"]["bands"]["mean"] > found["agreement"]["bands"]["strangers_mean"]
    assert (found["validation"]["rows"], found["validation"]["usable"]) == (18, 18)
    assert {name: len(rows) for name, rows in found["worst"].items()} == {"text": 1, "voice bands": 1}


def test_wrong_speakers_texts_and_files_are_each_found(waves: Path):
    """A reference of somebody else, a text that is not said, a file that is none, a silent one."""
    soundfile.write(waves / "prompts" / "s4-2.wav", voice(1, 2.2, 9), 24000)
    soundfile.write(waves / "real" / "s2-0.wav", voice(2, 3.0, 9), 24000)  # its length is no sentence the stub knows
    (waves / "real" / "s3-1.wav").write_bytes(b"RIFF no wave")
    soundfile.write(waves / "real" / "s5-1.wav", np.zeros(48000), 24000)
    found = checked(waves, waves / "out")
    assert found["agreement"]["bands"]["suspected"] == ["s3-1", "s4-1", "s5-1"]
    assert found["clips"]["target"]["failures"] == {"missing": 2}  # stage one reads no silent file either
    assert found["clips"]["target"]["clips"] == 18
    rows = {row["item"]: row for row in map(json.loads, (waves / "out" / "rows.jsonl").read_text().splitlines())}
    assert len(rows) == 18
    assert [name for name, row in rows.items() if row["target"]["recognised"] == ""] == ["s2-0", "s3-1", "s5-1"]
    assert found["validation"]["usable"] == 16
    page = (waves / "out" / "data.html").read_text()
    assert "Worst 1 %, by voice bands" in page


def test_a_data_check_resumed_gives_the_same(waves: Path):
    checked(waves, waves / "out")
    files = [waves / "out" / name for name in ("data.json", "rows.jsonl", "data.html")]
    before = [path.read_bytes() for path in files]
    checked(waves, waves / "out")
    assert [path.read_bytes() for path in files] == before
    assert run("--data-only", waves / "list.jsonl", waves / "out", "--limit", 2)[0] == 1


def test_data_without_models_say_what_was_skipped(waves: Path):
    status, output = run("--data-only", waves / "list.jsonl", waves / "out", "--similarity", "none", "--limit", 2)
    assert status == 0
    assert "skipped: similarity: no encoder was named" in output
    assert "skipped: CER and WER: no recognizer" in output
    assert "target clips: 2, none failed, not recognised" in output


def test_a_data_set_is_checked_through_its_codec(short_data: Path, tiny_dir: Path, tmp_path: Path):
    arguments = ["--data-only", short_data, tmp_path / "out", "--config", tiny_dir / "pipeline.toml"]
    status, output = run(*arguments, "--similarity", "bands", "--limit", 3)
    assert status == 0, output
    found = json.loads((tmp_path / "out" / "data.json").read_text())
    assert (found["clips"]["target"]["clips"], found["agreement"]["bands"]["rows"]) == (3, 3)
    assert found["validation"] is None
    assert "it is made of rows that passed them" in " ".join(found["not_measured"])


@pytest.mark.parametrize("more", [["model"], ["--only-score", "x"], ["--fail-if", "cer > 1"], ["--perturb", "phone8k"]])
def test_a_data_check_takes_data_and_out_alone(more: list[str]):
    assert run("--data-only", *more, "data", "out")[0] == 2


# --- with a model ---------------------------------------------------------------------------------------------------


def spoken(data: Path, tiny: Path, out: Path, *more: object) -> dict[str, Any]:
    status, output = run(
        tiny / "model", data, out, "--config", tiny / "pipeline.toml", "--similarity", "bands", "--asr", "knows", *more
    )
    assert status == 0, output
    return json.loads((out / "results.json").read_text())


def test_base_and_tuned_stand_between_ceiling_and_floor(short_data: Path, tiny_dir: Path, tmp_path: Path):
    asked = ("--seeds", 2, "--limit", 2, "--perturb", "noise10dB,phone8k")
    results = spoken(short_data, tiny_dir, tmp_path / "out", *asked)
    worse = [f"{name} +{how}" for how in ("noise10dB", "phone8k") for name in ("base", "tuned")]
    assert list(results["scores"]) == ["real", "base", "tuned", *worse, "shuffled"]
    assert results["scores"]["tuned"]["utterances"] == 4
    assert results["scores"]["tuned"]["text_reached_the_model"] == 1
    assert results["scores"]["tuned"]["longest_copy_of_the_prompt_s"] is not None
    same = [row for row in results["comparisons"] if (row["first"], row["second"]) == ("tuned", "base")]
    assert same
    assert all(row["difference"] == 0 for row in same)  # MODEL is the base here, and draws share their seeds
    pairs = {(row["first"], row["second"]) for row in results["comparisons"] if "+" in row["first"]}
    assert pairs == {(name, name.split(" +")[0]) for name in worse} | {
        (name, name.replace("tuned", "base")) for name in worse if "tuned" in name
    }
    item = results["worst"][0]["item"]
    for name in ("reference", "tuned"):
        files = [tmp_path / "out" / wave_name(name + how, 0, item) for how in ("", " +noise10dB", " +phone8k")]
        assert len({path.read_bytes() for path in files}) == 3, name
    assert all(row["system"] == "tuned" for row in results["worst"])
    report = (tmp_path / "out" / "report.html").read_text()
    table = report.split("Worse references, side by side")[1].split("By speaker")[0]
    assert table.count("<audio") == 2 * 2 * 3  # of two items and two perturbations: the reference, base, tuned


def test_a_resumed_evaluation_equals_an_uninterrupted_one(
    short_data: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = tmp_path / "whole"
    spoken(short_data, tiny_dir, whole, "--limit", 3, "--no-base", "--seeds", 1)
    cut = tmp_path / "cut"
    from tools.evaluate import speaking

    said = speaking.speak_item
    calls = []

    def stops(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return said(*arguments)

    monkeypatch.setattr(speaking, "speak_item", stops)
    arguments = [
        "--config",
        tiny_dir / "pipeline.toml",
        "--similarity",
        "bands",
        "--limit",
        3,
        "--no-base",
        "--seeds",
        1,
    ]
    assert run(tiny_dir / "model", short_data, cut, *arguments)[0] == 130
    with (cut / "speech.jsonl").open("ab") as file:
        file.write(b'{"system":"base","dra')  # what a kill leaves of a row
    monkeypatch.setattr(speaking, "speak_item", said)
    spoken(short_data, tiny_dir, cut, "--limit", 3, "--no-base", "--seeds", 1)
    for name in ("results.json", "utterances.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    spoken_rows = (cut / "speech.jsonl").read_text().splitlines()
    assert len(spoken_rows) == len(
        {tuple(json.loads(row)[k] for k in ("system", "draw", "item")) for row in spoken_rows}
    )


def test_a_damaged_row_is_named(waves: Path):
    score(waves, waves / "out")
    path = waves / "out" / "speech.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    status, output = run("--only-score", waves / "other", waves / "list.jsonl", waves / "out")
    assert status == 1
    assert "line 1 is no row of this evaluation" in output


def test_a_run_is_evaluated_on_what_it_held_out(short_data: Path, short_config, tiny_dir: Path, tmp_path: Path):
    from train.loop import RunOptions, train

    overrides = ("train.max_steps=1", "train.validation_fraction=0.3", "train.eval_every=1")
    assert train(short_config(*overrides), short_data, tmp_path / "run", RunOptions())
    environment = tmp_path / "run" / "environment.json"
    environment.write_text(json.dumps({**json.loads(environment.read_text()), "command": f"train {short_data} run"}))
    status, output = run(
        tmp_path / "run", tmp_path / "run", tmp_path / "out", "--similarity", "bands", "--limit", 1, "--greedy"
    )
    assert status == 0, output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["data"]["kind"].startswith("held-out speakers")
    assert results["seen"].startswith("unseen: none of the 1 speakers"), (
        "its own data set is known without --train-data"
    )
    assert results["data"]["speakers"] == 1
    assert {s["name"]: bool(s["adapter"]) for s in results["systems"]} == {"real": False, "base": False, "tuned": True}
    assert "shuffled speakers (floor): all items are of one speaker" in results["not_measured"]
    shutil.rmtree(tmp_path / "out")


def test_a_text_that_the_tokenizer_changes_is_told(waves: Path, tiny_dir: Path):
    """A letter is lost on its way, as in chatterbox's issue 555: heard, that would be the model's fault."""
    shutil.copytree(tiny_dir / "model", waves / "lossy")
    path = waves / "lossy" / "tokenizer.json"
    lossy = {"type": "Replace", "pattern": {"String": "ص"}, "content": ""}
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": lossy}))
    arguments = [
        waves / "lossy",
        waves / "list.jsonl",
        waves / "out",
        "--no-base",
        "--config",
        tiny_dir / "pipeline.toml",
    ]
    status, output = run(*arguments, "--similarity", "none", "--mos", "none", "--limit", 3, "--seeds", 2)
    assert status == 0, output
    scores = json.loads((waves / "out" / "results.json").read_text())["scores"]
    assert scores["tuned"]["text_reached_the_model"] == pytest.approx(2 / 3, abs=1e-6)
    assert scores["tuned"]["changed_texts"] == [
        {"item": "s0-1", "asked": TEXTS[1], "reached": TEXTS[1].replace("ص", "")}
    ]
    assert scores["real"]["changed_texts"] == []
    assert "tuned: the text of 1 items did not reach the model as it was asked; the first, s0-1" in output
    assert "Texts that did not reach the model" in (waves / "out" / "report.html").read_text()


def test_a_quantized_model_stands_beside_its_base(short_data: Path, tiny_dir: Path, tmp_path: Path):
    pytest.importorskip("torchao", reason="pip install -c constraints.txt -e '.[quantize]'")
    from tools.checkpoints.cli import main as checkpoints

    arguments = ["quantize", tiny_dir / "model", tmp_path / "q4", "--int4"]
    made = CliRunner().invoke(checkpoints, [str(argument) for argument in arguments])
    assert made.exit_code == 0, made.output
    arguments = [tmp_path / "q4", short_data, tmp_path / "out", "--config", tiny_dir / "pipeline.toml", "--limit", 2]
    status, output = run(*arguments, "--similarity", "bands", "--mos", "none", "--greedy")
    assert status == 0, output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    systems = {system["name"]: system["weights"] for system in results["systems"]}
    assert systems["tuned"] != systems["base"]
    assert results["scores"]["tuned"]["utterances"] == results["scores"]["base"]["utterances"] == 2
    assert "missing" not in results["scores"]["tuned"]["failures"]


def test_a_model_that_is_none_is_refused(short_data: Path, tiny_dir: Path, tmp_path: Path):
    status, output = run(tmp_path, short_data, tmp_path / "out", "--config", tiny_dir / "pipeline.toml")
    assert status == 1
    assert "no model here" in output


def test_what_cannot_be_spoken_is_a_failure(waves: Path, tiny_dir: Path):
    (waves / "prompts" / "s0-1.wav").write_text("no wave")
    results = spoken(waves / "list.jsonl", tiny_dir, waves / "out", "--limit", 1, "--seeds", 1)
    assert results["scores"]["tuned"]["failures"]["missing"] == 1
    assert "s0-1.wav" in results["scores"]["tuned"]["failed"][0]["why"]
    assert "item s0-0: its reference could not be read" in " ".join(results["not_measured"])


class Fragile(Bands):
    """An encoder that raises, or gives what is no number, for some waves."""

    def __init__(self, fails: Callable[[np.ndarray], bool], how: str) -> None:
        self.fails, self.how = fails, how

    def embed(self, wave: np.ndarray) -> np.ndarray:
        if not self.fails(wave):
            return super().embed(wave)
        if self.how == "raises":
            raise IndexError("index 7 is out of\nbounds")
        return np.full(40, np.nan, np.float32)


@pytest.mark.parametrize("how", ["raises", "NaN"])
def test_a_metric_that_fails_midway_costs_its_waves_alone(waves: Path, monkeypatch: pytest.MonkeyPatch, how: str):
    whole = score(waves, waves / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("tools.evaluate.metric_passes.load_encoder", lambda _: Fragile(lambda w: len(w) == 35200, how))
        results = score(waves, waves / "out")
    alike = results["scores"]["other"]["similarity"]["bands"]["to_reference"]
    assert 0 < alike < whole["scores"]["other"]["similarity"]["bands"]["to_reference"]
    assert results["scores"]["other"]["utterances"] == 18
    (said,) = [line for line in results["not_measured"] if line.startswith("similarity by bands")]
    assert "it failed on 18 of " in said
    assert ("IndexError: index 7 is out of bounds" if how == "raises" else "not finite") in said
    again = score(waves, waves / "out")  # mended: what failed is tried again, and nothing of it stays
    assert again["scores"] == whole["scores"]
    assert again["not_measured"] == whole["not_measured"]


def test_a_metric_that_fails_on_all_waves_is_not_measured(waves: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tools.evaluate.metric_passes.load_encoder", lambda _: Fragile(lambda _: True, "raises"))
    results = score(waves, waves / "out")
    assert results["scores"]["other"]["similarity"] == {}
    assert results["models"]["similarity"] == []
    assert "similarity by bands: it failed on all " in " ".join(results["not_measured"])
    assert results["scores"]["other"]["cer"]["strict"]["corpus"] == 0


def test_a_deleted_wave_is_said_again(waves: Path, tiny_dir: Path):
    asked = ("--limit", 2, "--seeds", 1, "--no-base", "--perturb", "phone8k")
    before = spoken(waves / "list.jsonl", tiny_dir, waves / "out", *asked)
    for path in ("tuned/0/s0-0.wav", "tuned-phone8k/0/s0-1.wav", "real/0/s0-0.wav", "reference/0/s0-1.wav"):
        (waves / "out" / "waves" / path).unlink()
    assert spoken(waves / "list.jsonl", tiny_dir, waves / "out", *asked) == before
    assert (waves / "out" / "waves" / "tuned" / "0" / "s0-0.wav").is_file()


@pytest.mark.parametrize("name", ["جملة ١", "a/b/c", "../../up", "x" * 400, "a\u202eb", "CON"])
def test_an_unusual_id_is_spoken_and_kept(waves: Path, tiny_dir: Path, name: str):
    rows = [json.loads(line) for line in (waves / "list.jsonl").read_text().splitlines()[:1]]
    (waves / "odd.jsonl").write_text(json.dumps({**rows[0], "id": name}))
    results = score_of(waves, waves / "odd.jsonl", waves / "out")
    assert results["scores"]["real"]["utterances"] == 1
    assert results["scores"]["real"]["failures"] == {"share": 0.0}
    inside = {path.resolve().is_relative_to((waves / "out").resolve()) for path in (waves / "out").rglob("*.wav")}
    assert inside == {True}
    assert (waves / "out" / "report.html").is_file()


def score_of(waves: Path, data: Path, out: Path) -> dict[str, Any]:
    """Of recordings alone: no model, no other waves."""
    from tools.evaluate.report import write_report
    from tools.evaluate.request import Request
    from tools.evaluate.run import evaluate
    from tools.evaluate.systems import read_evaluate_config
    from train.model.generate import Sampling

    request = Request(data=data, out=out, with_base=False, encoders=["bands"], asr="knows")
    results, rows, plan = evaluate(request, read_evaluate_config(None, (), ()), Sampling())
    write_report(out, results, rows, plan, 3)
    return json.loads((out / "results.json").read_text())


def test_the_form_of_the_results_stays(waves: Path):
    """What scripts read; another form needs another number in `format`."""
    results = score(waves, waves / "out", "--mos", "loud")
    assert results["format"] == 1
    assert set(results) == {
        *("format", "seen", "data", "draws", "sampling", "protocols", "headline", "models", "not_measured", "systems"),
        *("scores", "comparisons", "groups", "speakers", "worst"),
    }
    assert set(results["scores"]["other"]) == {
        *("utterances", "failures", "failed", "cer", "wer", "empty_transcripts", "similarity", "mos_difference"),
        *("duration_ratio", "characters_per_second", "leading_silence_s", "trailing_silence_s", "changed_texts"),
        *("longest_copy_of_the_prompt_s", "text_reached_the_model"),
    }
    assert set(results["comparisons"][0]) == {
        *("first", "second", "metric", "difference", "low", "high", "p_worse", "num_items", "num_speakers"),
        *("speakers_needed", "method", "verdict", "words"),
    }
    assert "NaN" not in (waves / "out" / "results.json").read_text()


def test_a_row_file_refuses_other_content(tmp_path: Path):
    from tools.evaluate.speaking import speech_file

    (tmp_path / "speech.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="delete the file"):
        speech_file(tmp_path)

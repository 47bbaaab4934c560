"""Waves of every system, one row each as they come: OUT/speech.jsonl beside OUT/waves/SYSTEM/DRAW/ITEM.wav.

In: items and systems. Out: `Spoken` rows. What cannot be spoken or read is a row with an error, which the scores count as a
failure. Every system says an item with the same seed in the same draw, so that systems differ by their weights alone. One
model is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from preprocess.segment import WHOLE
from shards.errors import DataError, PipelineError
from shards.printable import file_name
from tools.evaluate.dataset_items import StoredSamples, in_words_of, read_samples
from tools.evaluate.items import Item, Items
from tools.evaluate.perturb import parse_perturbation, perturbed
from tools.evaluate.row_file import Key, RowFile
from tools.evaluate.systems import REFERENCE, EvaluateConfig, System, find_wave, strangers
from tools.evaluate.waves import RUNAWAY, longest_copy, read_wave

if TYPE_CHECKING:
    from shards.sample import Sample
    from tools.speaker import Speaker
    from train.model.generate import Sampling

SPARE_FRAMES = 12  # beyond RUNAWAY, so that a runaway is seen as one


class Spoken(msgspec.Struct, frozen=True, kw_only=True):
    """One wave of one system."""

    system: str
    draw: int
    item: str
    wave: str  # file; below OUT where it is not absolute
    ended: bool | None = None  # by itself; None: nobody knows
    copied_frames: int | None = None  # longest run of the prompt's codes
    text_reached: bool | None = None  # the model's text tokens spell the text that was asked
    text_of_model: str = ""  # what they spell instead
    error: str = ""

    @property
    def key(self) -> Key:
        return self.system, self.draw, self.item


def speech_file(out: Path) -> RowFile[Spoken]:
    return RowFile(out / "speech.jsonl", Spoken, lambda row: row.key)


def wave_name(system: str, draw: int, item: str) -> str:
    """Folders of perturbed and numbered systems keep words that a person knows: "tuned +phone8k" is tuned-phone8k."""
    folder = "-".join(re.findall(r"[\w.]+", system))
    return f"waves/{file_name(folder)}/{draw}/{file_name(item)}.wav"


# --- recordings -----------------------------------------------------------------------------------------------------


def write_recordings(items: Items, config: EvaluateConfig, out: Path, rows: RowFile[Spoken], device: str) -> None:
    """The references and the real recordings, as waves at 24 kHz."""
    wanted = [(role, item) for item in items.items for role in (REFERENCE, "real")]
    if all(is_done(rows, (role, 0, item.id), out) or is_absent(role, item) for role, item in wanted):
        return
    if items.items[0].row is not None:
        write_decoded(items, config, out, rows, device)
        return
    for role, item in wanted:
        if is_done(rows, (role, 0, item.id), out) or is_absent(role, item):
            continue
        name, segment = (
            (item.reference, item.reference_segment) if role == REFERENCE else (item.real or "", item.real_segment)
        )
        error = write_recording(name, segment, out / wave_name(role, 0, item.id))
        rows.add(Spoken(system=role, draw=0, item=item.id, wave=wave_name(role, 0, item.id), error=error))


def is_done(rows: RowFile[Spoken], key: Key, out: Path) -> bool:
    """What had an error is tried again: its cause may have been mended since. So is what somebody has deleted."""
    row = rows.rows.get(key)
    return row is not None and not row.error and (out / row.wave).is_file()


def is_absent(role: str, item: Item) -> bool:
    return role == "real" and item.real is None


def write_recording(name: str, segment: object, path: Path) -> str:
    """Read, check and write one recording; the fault in words, or ""."""
    from preprocess.audio import CODEC_RATE, AudioFault, AudioLimits, decode, read_bytes
    from shards.encoders.codec import write_wave

    try:
        audio = decode(read_bytes(name), AudioLimits(0.0, 600.0, 1.0), segment)  # pyright: ignore[reportArgumentType]
    except AudioFault as fault:
        return f"{name}: {fault.detail}"
    write_wave(path, audio.at(CODEC_RATE))
    return ""


def write_decoded(items: Items, config: EvaluateConfig, out: Path, rows: RowFile[Spoken], device: str) -> None:
    """The recordings of a data set, through its codec."""
    from shards.artifacts import codec_fingerprint, resolve
    from shards.encoders.codec import load_codec, write_wave
    from shards.errors import ShardError
    from shards.manifest import decoder_of, open_dataset

    folder = resolve(config.model.codec, config.model.codec_revision, "model.codec")
    ours = codec_fingerprint(folder)
    for source in dict.fromkeys(item.dataset for item in items.items):
        made_with = decoder_of(open_dataset(Path(source))[0].fingerprints.codec)
        if made_with != ours:
            raise ShardError(f"{source}: its codes were made with codec {made_with[:16]}, model.codec is another")
    codec = load_codec(folder, device)
    for item, sample in read_samples(items):
        for role, codes in ((REFERENCE, sample.reference_codes), ("real", sample.target_codes)):
            if not is_done(rows, (role, 0, item.id), out):
                name = wave_name(role, 0, item.id)
                write_wave(out / name, codec.decode(codes))
                rows.add(Spoken(system=role, draw=0, item=item.id, wave=name))


# --- systems --------------------------------------------------------------------------------------------------------


def point_at_waves(system: System, items: list[Item], rows: RowFile[Spoken]) -> None:
    """Rows of other systems' waves, and of shuffled speakers: nothing is spoken. Files may have come since the last time.

    Raises DataError where a folder holds no wave of any item: that is another folder or other names, not a failed system.
    """
    others = strangers(items) if system.kind == "shuffled" else None
    pointed = []
    for number, item in enumerate(items):
        if others:
            stranger = items[others[number]]
            role = "real" if ("real", 0, stranger.id) in rows.rows else REFERENCE
            source = rows.rows[role, 0, stranger.id]
            pointed.append(Spoken(system=system.name, draw=0, item=item.id, wave=source.wave, error=source.error))
        else:
            wave = find_wave(Path(system.folder), item.id).absolute()
            pointed.append(Spoken(system=system.name, draw=0, item=item.id, wave=str(wave)))
    if system.kind == "waves" and not any(Path(row.wave).is_file() for row in pointed):
        raise DataError(
            f"--only-score {system.folder}: no wave of any of the {len(items)} items is there; expected files named by id, "
            f"like {Path(pointed[0].wave).name}"
        )
    for row in pointed:
        if rows.rows.get(row.key) != row:
            rows.add(row)


def expected_seconds(item: Item, out: Path, rows: dict[Key, Spoken]) -> float | None:
    """How long the text should take: as long as its recording, else at the reference's characters per second."""
    lengths = {}
    for role in ("real", REFERENCE):
        row = rows.get((role, 0, item.id))
        if row and not row.error:
            lengths[role] = wave_seconds(out / row.wave)
    if lengths.get("real"):
        return lengths["real"]
    if lengths.get(REFERENCE) and item.reference_text:
        return lengths[REFERENCE] * max(1, len(item.text)) / len(item.reference_text)
    return None


def wave_seconds(path: Path) -> float:
    import soundfile

    try:
        return float(soundfile.info(path).duration)
    except (soundfile.SoundFileError, OSError):
        return 0.0


def speak(
    systems: list[System],
    items: Items,
    config: EvaluateConfig,
    out: Path,
    rows: RowFile[Spoken],
    sampling: Sampling,
    draws: int,
    device: str,
) -> Iterator[Spoken]:
    """Say every item that has no row yet, `draws` times; yields each row, those that
    are there already first. The model is let go at the end.

    `systems`: of one model, which is loaded once.
    """
    from tools.speaker import load_speaker

    todo = []
    for system, draw, item in itertools.product(systems, range(draws), items.items):
        if is_done(rows, (key := (system.name, draw, item.id)), out):
            yield rows.rows[key]
        else:
            todo.append((system, draw, item))
    if not todo:
        return
    first = systems[0]
    speaker = load_speaker(Path(first.model), Path(first.adapter) if first.adapter else None, config.speak, device)
    stored = StoredSamples()  # read one by one: all of them would be gigabytes
    for system, draw, item in todo:
        drawn = dataclasses.replace(sampling, seed=sampling.seed + draw)
        longest = round((RUNAWAY * (expected_seconds(item, out, rows.rows) or 15.0)) * 25) + SPARE_FRAMES
        name = wave_name(system.name, draw, item.id)
        row = Spoken(system=system.name, draw=draw, item=item.id, wave=name)
        try:
            prompt = prompt_sample(speaker, system, item, stored.of(item), out, stored.rules_of(item))
            row = speak_item(speaker, prompt, longest, drawn, row, out)
        except (PipelineError, ValueError) as error:
            row = msgspec.structs.replace(row, error=str(error) or type(error).__name__)
        rows.add(row)
        yield row
    del speaker
    gc.collect()


def prompt_sample(
    speaker: Speaker, system: System, item: Item, sample: Sample | None, out: Path, made_with: list[str] | None = None
) -> Sample:
    """What the model is asked: a data set's sample as it is stored, a list's from its file, with texts cleaned as in training.

    `made_with`: `text.normalize` of the data set; where the voice was trained with another one, the texts go through that.
    A perturbed reference is made of the reference's wave in OUT, which of a data set went through the codec once already.
    Raises DataError.
    """
    from preprocess.audio import AudioFault, AudioLimits, decode, read_bytes

    if sample is not None and not system.perturb:
        if made_with is None or made_with == list(speaker.rules.normalize):
            return sample
        return in_words_of(sample, speaker.rules, speaker.tokenizer)
    name, segment, said, limits = item.reference, item.reference_segment, item.reference_text, AudioLimits()
    if system.perturb:
        path, said = write_perturbed(system, item, out)
        name, segment, limits = (
            str(path),
            WHOLE,
            AudioLimits(0.0, 600.0, 1.0),
        )  # it was checked before it was made worse
    try:
        audio = decode(read_bytes(name), limits, segment)
    except AudioFault as fault:
        raise DataError(f"{name}: {fault.detail}") from None
    return speaker.sample(speaker.reference([audio], said), item.text)


def write_perturbed(system: System, item: Item, out: Path) -> tuple[Path, str | None]:
    """The perturbed reference, a file that can be heard, and its text (None: not given). Raises DataError."""
    from preprocess.audio import CODEC_RATE
    from shards.encoders.codec import write_wave

    wave, facts = read_wave(out / wave_name(REFERENCE, 0, item.id))
    if facts.error:
        raise DataError(f"reference: {facts.error}")
    seed = f"{system.perturb} {item.id}"
    changed, said = perturbed(parse_perturbation(system.perturb), wave, CODEC_RATE, item.reference_text, seed)
    path = out / wave_name(f"{REFERENCE} +{system.perturb}", 0, item.id)
    write_wave(path, changed)
    return path, said


def speak_item(speaker: Speaker, sample: Sample, max_frames: int, sampling: Sampling, row: Spoken, out: Path) -> Spoken:
    """Say one item and write its wave."""
    from shards.encoders.codec import write_wave
    from train.model.generate import generate

    said = sample.facts.texts[sample.facts.target_text]
    speech = generate(speaker.model, speaker.builder.prompt(sample), max_frames, sampling)
    wave = speaker.codec.decode(speech.codes)
    write_wave(out / row.wave, wave)
    ids = sample.text_item_ids(sample.facts.target_text)
    reached = speaker.tokenizer.decode(ids.tolist(), skip_special_tokens=False).strip()
    return msgspec.structs.replace(
        row,
        ended=bool(speech.stopped),
        copied_frames=longest_copy(speech.codes.astype(np.int64), sample.reference_codes.astype(np.int64)),
        text_reached=reached == said.strip(),
        text_of_model="" if reached == said.strip() else reached,
    )

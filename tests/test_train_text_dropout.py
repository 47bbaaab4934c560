"""Training without the reference's text: off is as before, on is the same on every rank, after every restart and in speech."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile
import torch
from speech_server import CLIP, SpeechServer

from shards.cloning import INSTRUCTION, cloning_sample
from shards.config import RELEASED_SYSTEM_PROMPT, SequenceSection, read_config
from shards.errors import ConfigError, PipelineError
from shards.index import INDEX_DTYPE
from shards.label_shift import IGNORE
from shards.manifest import open_dataset
from shards.reader import SampleReader
from shards.sequence import EOT, SequenceBuilder
from tools.checkpoints.merge import merge_checkpoint
from tools.inference import HiggsAudioInference
from tools.speaker import SpeakConfig, load_speaker, read_voice
from train.config import LossSection, TrainSection
from train.data.loader import LoaderShare
from train.data.planned_source import PlannedSource
from train.data.streamed_source import StreamedSource
from train.data.text_dropout import TextDropout
from train.loop import RunOptions, train
from train.model.loss import LossCounts, step_losses
from train.model.weights import load_model
from train.run_folder.identity import differences, read_identity

# Of packs and of their losses, made by the version before there was reference_text_dropout.
PACKS_BEFORE = "f3811eaf8d60c76e0825723601b003ce1b7e55e8881aa36c5611d4a4ce9426a0"
LOSSES_BEFORE = [22.341234, 22.115383, 22.204779]
ALONE_HERE = LoaderShare()
STEPS = 8  # three epochs and a part of the fourth


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make_dataset, make_sample) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), [make_sample(n, 4 + n % 5, 6 + n) for n in range(20)])


def source_of(dataset: Path, tokenizer, share: float | None = None, **values) -> PlannedSource:
    section = TrainSection(**{"batch_tokens": 700, "packs_per_step": 2, "max_steps": STEPS, **values})
    source = PlannedSource(str(dataset), section)
    sequence = SequenceSection() if share is None else SequenceSection(reference_text_dropout=share)
    source.prepare(SequenceBuilder(tokenizer, sequence))
    return source


def batches_of(source: PlannedSource, first: int = 0, share: LoaderShare = ALONE_HERE) -> list:
    """From step `first` to the last, one rank's."""
    packs = source.loaded_packs(first, share)
    num_packs = (STEPS - first) * source.planner.settings.packs_per_step // share.world_size
    return [loaded.batch for loaded in itertools.islice(packs, num_packs)]


def digest(batches: list) -> str:
    found = hashlib.sha256()
    for batch in batches:
        found.update(" ".join(batch.keys).encode())
        for part in (
            batch.text_ids,
            batch.codes,
            batch.positions,
            batch.text_rows,
            batch.text_targets,
            batch.audio_rows,
        ):
            found.update(part.numpy().tobytes())
        for part in (
            batch.audio_targets,
            batch.segments,
            batch.speakers,
            batch.documents.order,
            batch.documents.bounds,
        ):
            found.update(part.numpy().tobytes())
    return found.hexdigest()


def test_off_means_the_packs_and_losses_of_before(dataset, tokenizer, model_dir):
    for share in (None, 0.0):
        batches = batches_of(source_of(dataset, tokenizer, share))
        assert digest(batches) == PACKS_BEFORE
    model = load_model(model_dir, torch.float32)
    with torch.no_grad():
        found = [
            step_losses(model(batch), LossCounts.of([batch]), LossSection(), 1.0).total.item() for batch in batches[:3]
        ]
    assert found == pytest.approx(LOSSES_BEFORE, abs=1e-5)


def kept(batch) -> dict[str, bool]:
    """Which samples of a pack have their reference's text: its system turn does not end behind an audio."""
    order, found = batch.documents.order.tolist(), {}
    starts = batch.documents.bounds.tolist()
    for key, start in zip(batch.keys, starts, strict=False):  # bounds end with the pack, and fillers have no key
        row = order[start : start + 10_000]
        first_end = next(i for i, r in enumerate(row) if r < len(batch.text_ids) and batch.text_ids[r] == EOT)
        found[key] = all(r < len(batch.text_ids) for r in row[:first_end])
    return found


def test_on_samples_lose_their_text_as_planned(dataset, tokenizer, make_sample):
    """A sample whose built length is not the planned one would be reported as damaged and leave its pack."""
    source = source_of(dataset, tokenizer, 0.4)
    loaded = list(itertools.islice(source.loaded_packs(0, LoaderShare()), 2 * STEPS))
    assert not [fault for one in loaded for fault in one.faults]
    found = {(one.epoch, key): has for one in loaded for key, has in kept(one.batch).items()}
    assert {epoch for epoch, _ in found} >= {0, 1}
    for epoch in (0, 1):
        rows = TextDropout(source._builder, 0).with_text(source.index, epoch)
        expected = {(epoch, f"{row:012d}"): bool(has) for row, has in enumerate(rows)}
        assert {place: has for place, has in found.items() if place[0] == epoch} == expected
    by_epoch = [[found[epoch, f"{row:012d}"] for row in range(20)] for epoch in (0, 1)]
    assert by_epoch[0] != by_epoch[1], "drawn anew"
    assert all(0 < sum(has) < 20 for has in by_epoch)
    assert sum(
        one.batch.num_tokens for one in loaded if one.epoch == 0 and one.batch.keys
    ) == source.planner.epoch_tokens(0)


def test_ranks_and_a_resume_at_any_step_draw_the_same(dataset, tokenizer):
    whole = batches_of(source_of(dataset, tokenizer, 0.4, num_workers=0))
    assert digest(whole) != PACKS_BEFORE
    for first in (1, 3, 6):
        assert digest(batches_of(source_of(dataset, tokenizer, 0.4), first)) == digest(whole[2 * first :])
    ranks = [batches_of(source_of(dataset, tokenizer, 0.4), 0, LoaderShare(rank, 2, 1)) for rank in (0, 1)]
    assert digest([batch for both in zip(*ranks, strict=True) for batch in both]) == digest(whole)
    assert digest(batches_of(source_of(dataset, tokenizer, 0.4, seed=1))) != digest(whole)


def test_the_share_is_the_one_that_was_asked_for(tokenizer):
    index = np.zeros(20_000, INDEX_DTYPE)
    index["shard"], index["offset"] = np.divmod(np.arange(20_000), 1000)
    index["offset"] *= 10_240
    draws = {}
    for share in (0.0, 0.15, 1.0):
        dropout = TextDropout(SequenceBuilder(tokenizer, SequenceSection(reference_text_dropout=share)), 3)
        draws[share] = [~dropout.with_text(index, epoch) for epoch in range(3)]
        assert all(abs(drawn.mean() - share) < 0.01 for drawn in draws[share])
        named = [dropout.with_text_of(f"s-{n % 7}.tar", f"{n}", n % 3) for n in range(4000)]
        assert 1 - np.mean(named) == pytest.approx(share, abs=0.02)
    one, other, _ = draws[0.15]
    assert (one & other).mean() == pytest.approx(0.15**2, abs=0.005), "an epoch's draw says nothing of the next one's"


def test_a_sample_too_long_with_its_text_never_comes(dataset, tokenizer):
    """What fits a pack is the same in every epoch, or an epoch would have other samples than the last."""
    source = source_of(dataset, tokenizer, 0.5)
    builder = source._builder
    both = [builder.lengths(source.index, np.full(20, has)) for has in (True, False)]
    assert (both[0] != both[1]).all()
    budget = int(np.sort(np.maximum(*both))[12])
    narrow = source_of(dataset, tokenizer, 0.5, batch_tokens=budget)
    assert narrow.planner.num_too_long == int((np.maximum(*both) > budget).sum()) > 0
    for epoch in range(3):
        assert len(narrow.planner.window(epoch, 0).rows) == narrow.planner.num_samples


@pytest.mark.parametrize("system_prompt", [RELEASED_SYSTEM_PROMPT, "Speak.", "", f"{RELEASED_SYSTEM_PROMPT} Calmly."])
def test_a_voice_without_text_stands_in_the_scene(tokenizer, make_sample, system_prompt):
    section = SequenceSection(reference_text_dropout=0.1, system_prompt=system_prompt)
    builder, sample = SequenceBuilder(tokenizer, section), make_sample(4, 6, 9)
    sequence, full = builder.training(sample, with_reference_text=False), builder.training(sample)
    asked = sample.facts.texts[sample.facts.target_text]
    own = sample.facts.texts[sample.facts.system_text] if not system_prompt else ""
    scene = "<|scene_desc_end|>"
    if system_prompt == RELEASED_SYSTEM_PROMPT:
        before = system_prompt.removesuffix(f"\n{scene}") + "\n\nSPEAKER0: "
    else:
        before = f"{own}{system_prompt}\n\n<|scene_desc_start|>\nSPEAKER0: "
    audio = ["<|AUDIO_OUT|>" * (frames + 9) for frames in (6, 9)]
    text = (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{before}<|audio_bos|>{audio[0]}<|audio_eos|>"
        f"\n{scene}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{asked}<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>{audio[1]}<|audio_eos|><|eot_id|>"
    )
    assert tokenizer.decode(sequence.token_ids.tolist(), skip_special_tokens=False) == text
    assert (sequence.codes == full.codes).all(), "both audios, in the same order"
    assert (sequence.next_codes == full.next_codes).all()
    learned = [part.next_token[part.next_token != IGNORE].tolist() for part in (sequence, full)]
    assert learned[0] == learned[1], "labels are those of the other form"


def test_speech_without_text_is_asked_as_it_was_trained(tokenizer, make_sample):
    sample = make_sample(4, 6, 9)
    asked = sample.facts.texts[sample.facts.target_text].removeprefix(INSTRUCTION)
    request = cloning_sample(tokenizer, None, sample.reference_codes, asked)
    builders = [SequenceBuilder(tokenizer, SequenceSection(reference_text_dropout=share)) for share in (0.0, 0.1)]
    off, on = (builder.prompt(request).token_ids.tolist() for builder in builders)
    trained = builders[1].training(
        cloning_sample(tokenizer, "مرحبا", sample.reference_codes, asked, sample.target_codes), False
    )
    assert on == trained.token_ids[: len(on)].tolist()
    assert off != on, "a model that was not trained so is asked as before"
    with_text = cloning_sample(tokenizer, "مرحبا", sample.reference_codes, asked)
    assert builders[0].prompt(with_text).token_ids.tolist() == builders[1].prompt(with_text).token_ids.tolist()


def test_a_voice_never_trained_with_text_is_never_asked_with_one(tokenizer, tiny_speaker, make_sample, caplog):
    """At a share of 1: held-out losses, the vote, lengths and speech all have the one form that was trained."""
    sample = make_sample(4, 6, 9)
    builder = SequenceBuilder(tokenizer, SequenceSection(reference_text_dropout=1.0))
    trained = builder.training(sample, False).token_ids.tolist()
    assert builder.training(sample).token_ids.tolist() == trained
    prompt = builder.prompt(sample).token_ids.tolist()
    assert prompt == trained[: len(prompt)]
    asked = sample.facts.texts[sample.facts.target_text].removeprefix(INSTRUCTION)
    with_text = cloning_sample(tokenizer, "مرحبا", sample.reference_codes, asked)
    without = cloning_sample(tokenizer, None, sample.reference_codes, asked)
    assert builder.prompt(with_text).token_ids.tolist() == builder.prompt(without).token_ids.tolist()
    speaker = dataclasses.replace(tiny_speaker, builder=builder)
    speaker.reference([], "مرحبا", codes=sample.reference_codes)
    assert "the reference's text is not used" in caplog.text


def test_lengths_of_a_share_of_one_are_those_built(dataset, tokenizer):
    builder = SequenceBuilder(tokenizer, SequenceSection(reference_text_dropout=1.0))
    _, index = open_dataset(dataset)
    lengths = builder.lengths(index)
    built = [len(builder.training(SampleReader(dataset).read(row))) for row in index]
    assert lengths.tolist() == built


def test_turns_as_they_were_written_are_never_changed(tokenizer):
    with pytest.raises(ConfigError, match=r'reference_text_dropout = 0.2 needs sequence.layout "clone"'):
        SequenceBuilder(tokenizer, SequenceSection(layout="as_written", reference_text_dropout=0.2))


def test_a_stream_draws_by_shard_key_and_pass(dataset, tokenizer):
    section = TrainSection(
        batch_tokens=700, packs_per_step=1, max_steps=9, loader="stream", shuffle_buffer=1, num_workers=0
    )
    found = []
    for _ in range(2):
        source = StreamedSource(str(dataset), section)
        source.prepare(SequenceBuilder(tokenizer, SequenceSection(reference_text_dropout=0.5)))
        loaded = list(itertools.islice(source.loaded_packs(0, LoaderShare()), 9))
        assert not [fault for one in loaded for fault in one.faults]
        found.append([kept(one.batch) for one in loaded])
    assert found[0] == found[1]
    drawn = [has for pack in found[0] for has in pack.values()]
    assert 0.2 < sum(drawn) / len(drawn) < 0.8


def test_a_run_of_another_share_is_not_continued(tmp_path, short_data, short_config, tiny_dir, run_command):
    train(short_config("train.max_steps=2"), short_data, tmp_path / "run", RunOptions())
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    before = read_identity(folder)
    settings = {k: v for k, v in before.settings.items() if k != "sequence.reference_text_dropout"}
    older = msgspec.structs.replace(before, settings=settings)
    assert not list(differences(older, before)), "an older checkpoint was trained with 0"
    on = short_config("train.max_steps=4", "sequence.reference_text_dropout=0.5")
    with pytest.raises(PipelineError, match=r"sequence.reference_text_dropout: trained with 0.0, now 0.5"):
        train(on, short_data, tmp_path / "run", RunOptions())
    last = train(on, short_data, tmp_path / "other", RunOptions())
    assert last
    merge_checkpoint(tmp_path / "other", tmp_path / "merged")
    voice = read_voice(tmp_path / "merged")
    assert voice
    assert voice.sequence.reference_text_dropout == 0.5
    merge_checkpoint(tmp_path / "run", tmp_path / "plain")
    for name, share in (("merged", 0.5), ("plain", 0.0)):
        speaks_without_text_as_trained(tmp_path / name, share, tiny_dir, run_command)


def speaks_without_text_as_trained(model: Path, share: float, tiny_dir: Path, run_command) -> None:
    """`speak` as a process and `serve` over a socket say what the trained form of the prompt gives, not what the other does."""
    config = read_config(SpeakConfig, tiny_dir / "pipeline.toml")
    speaker = load_speaker(model, None, config, "cpu")
    waves = {}
    for form in (0.0, 0.5):
        section = msgspec.structs.replace(config.sequence, reference_text_dropout=form, conditioning="codes")
        other = dataclasses.replace(speaker, builder=SequenceBuilder(speaker.tokenizer, section))
        said = HiggsAudioInference.of(other).generate_speech(CLIP, "نعم يا أخي", seed=3, max_seconds=0.48)
        waves[form], _ = said
    expected, foreign = waves[share], waves[0.5 - share]
    assert expected.shape != foreign.shape or np.abs(expected - foreign).max() > 1e-3, "the forms can be told apart"

    options = ("--config", tiny_dir / "pipeline.toml", "--device", "cpu", "--reference", CLIP, "--text", "نعم يا أخي")
    result = run_command("speak", model, *options, "--seed", 3, "--max-seconds", 0.48, "--out", model / "said.wav")
    assert result.returncode == 0, result.stderr
    assert ("clones are better" in result.stderr) == (share == 0)
    wave, _ = soundfile.read(model / "said.wav", dtype="float32")
    np.testing.assert_allclose(wave, expected, atol=1e-4)

    with SpeechServer(speaker, model / "voices", has_voice=False) as server:
        server.wait(lambda: server.queue.state == "ready")
        coded = f"data:audio/flac;base64,{base64.b64encode(CLIP.read_bytes()).decode()}"
        answer = server.speak(input="نعم يا أخي", voice=None, ref_audio=coded, response_format="pcm")
    assert answer.status_code == 200, answer.text
    wave = np.frombuffer(answer.content, "<i2").astype(np.float32) / 32767
    np.testing.assert_allclose(wave, expected, atol=1e-3)

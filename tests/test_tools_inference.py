"""The Python interface: what goes in as a voice, what comes out, alone, beside others and piece by piece."""

from __future__ import annotations

import io
import json
import logging
import resource
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import AddedToken, Tokenizer, normalizers

from preprocess.text import Normalizer, TextSection, clean
from shards.cloning import cloning_messages
from shards.errors import ConfigError, DataError
from shards.manifest import open_dataset, text_rules
from shards.reader import SampleReader
from shards.sequence import encode_text
from tools.cross_fade import CrossFade
from tools.inference import KEPT_REFERENCES, HiggsAudioInference, SpeechRequest
from tools.prompt_text import longest_s
from tools.reference import read_recordings
from tools.utterance import Utterance
from train.model.generation.engine import Engine

TEXT = "هل تعرف الطريق إلى المحطة؟"
CLIP = "spk_00_36.flac"


@pytest.fixture(scope="module")
def voice(tiny_dir: Path) -> HiggsAudioInference:
    return HiggsAudioInference(tiny_dir / "model", config=tiny_dir / "pipeline.toml", device="cpu", num_slots=3)


@pytest.fixture(scope="module")
def clip(repository: Path) -> Path:
    return repository / "tests/data/arabic-mini" / CLIP


def ask(clip: Path, seed: int = 0, text: str = TEXT, **settings) -> SpeechRequest:
    return SpeechRequest(
        reference_audio=clip, target_text=text, reference_text="الجسر", seed=seed, **{"max_seconds": 1.0, **settings}
    )


def test_speech_has_wave_rate_codes_and_reason(voice, clip):
    speech = voice.generate_speech(clip, TEXT, "الجسر الجديد", speaker_name="a", max_seconds=0.4, seed=3)
    assert speech.codes.shape[0] == 8
    assert speech.codes.shape[1] <= 10
    wave, sample_rate = speech
    assert sample_rate == 24000
    assert wave.dtype == np.float32
    assert len(wave) == 960 * speech.codes.shape[1]
    np.testing.assert_array_equal(wave, voice.decode_codes(speech.codes).waveform)
    assert speech.stop_reason in ("end", "max_seconds")
    assert speech.speaker_name == "a"


def test_every_form_of_a_reference_is_the_same_voice(voice, clip):
    wave, rate = soundfile.read(clip, dtype="int16")
    assert wave.ndim == 1
    stereo = np.stack([wave, wave])
    forms = [str(clip), clip.read_bytes(), io.BytesIO(clip.read_bytes()), clip.open("rb"), (wave, rate), (rate, wave)]
    forms += [(wave / 32768, rate), (stereo, rate), (stereo.T, rate), [clip], {"array": wave, "sampling_rate": rate}]
    forms.append((torch.from_numpy(wave / 32768).requires_grad_(), rate))
    expected = voice.generate_speech(clip, TEXT, "الجسر", max_seconds=0.2)
    for form in forms:
        said = voice.generate_speech(form, TEXT, "الجسر", max_seconds=0.2)
        np.testing.assert_array_equal(said.codes, expected.codes)
    bare = voice.generate_speech(wave, TEXT, "الجسر", max_seconds=0.2, sample_rate=rate)
    np.testing.assert_array_equal(bare.codes, expected.codes)


def test_several_recordings_are_one_reference(voice, clip, repository):
    other = repository / "tests/data/arabic-mini/spk_03_06.flac"
    seconds = [soundfile.info(path).duration for path in (clip, other)]
    joined = voice.speaker.reference(read_recordings([clip, other]), "الجسر الجديد كم")
    assert joined.codes.shape[1] == -(-round((sum(seconds) + 0.2) * 24000) // 960)
    with pytest.raises(DataError, match="together, at most 30 s"):
        read_recordings([clip] * 20)


def closed_file() -> io.BytesIO:
    file = io.BytesIO(b"RIFF")
    file.close()
    return file


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere.wav", "reference nowhere.wav: no such file"),
        (b"not audio", "reference number 1: 9 bytes"),
        (io.BytesIO(b""), "nothing left to read"),
        (io.StringIO("text"), "mode 'rb'"),
        (np.zeros(48000, np.float32), "without its rate"),
        ((np.zeros(48000, np.float32), 24000), "peak"),
        ((np.full(48000, np.nan), 24000), "NaN"),
        ((np.ones((3, 4, 5)), 24000), "array"),
        ((np.sin(np.arange(100.0)), 24000), "at least"),
        ((np.sin(np.arange(48000.0)), 0), "no recording"),
        ((np.sin(np.arange(48000.0)), 24000, 1), "tuple"),
        ((np.sin(np.arange(48000.0)), 24000.0), "sample rate 24000.0: expected whole Hz"),
        ((torch.zeros(48000, dtype=torch.bfloat16), 24000), "peak"),
        (closed_file(), "closed file; give an open file"),
        ([], "empty list"),
        (None, "expected a path"),
        ({"path": "x"}, "expected a path"),
    ],
)
def test_what_is_no_reference_is_named(voice, reference, message):
    with pytest.raises(DataError, match=message):
        voice.generate_speech(reference, TEXT, "نص")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 2.5},
        {"max_seconds": 0},
        {"max_seconds": -1.0},
        {"max_seconds": float("inf")},
        {"ras_win_max_num_repeat": 0},
        {"ras_win_len": -1},
        {"seed": -1},
        {"seed": "1"},
        {"part_chars": 0},
        {"part_chars": 10**6},
        {"top_k": 10**20},
        {"ras_win_max_num_repeat": 1 << 40},
        {"temperature": 1e39},
        {"seed": 10**400},
        {"sample_rate": 24000.0},
        {"sample_rate": "24000"},
    ],
)
def test_a_wrong_number_is_named_with_what_was_expected(clip, wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"^{name} = .*: expected"):
        ask(clip, **wrong)


def test_a_batch_says_what_each_says_alone(voice, clip, repository):
    other = repository / "tests/data/arabic-mini/spk_03_06.flac"
    requests = [
        ask(clip, 1),
        ask(other, 2, "نعم"),
        ask(clip, 3, temperature=0.0),
        ask(other, 4),
        ask(clip, 1, "لا. " * 9),
    ]
    requests[4] = ask(clip, 1, "نعم يا أخي. " * 3, part_chars=14, max_seconds=0.6)
    together = voice.generate_batch(requests)
    for request, beside in zip(requests, together, strict=True):
        (alone,) = voice.generate_batch([request])
        np.testing.assert_array_equal(alone.codes, beside.codes)
        assert alone.stop_reason == beside.stop_reason
    assert (together[0].codes[:, :5] != together[3].codes[:, :5]).any()


def test_streamed_pieces_join_to_the_whole_wave(voice, clip):
    text = "نعم يا أخي. كم السعر؟"
    settings = {"reference_text": "الجسر", "part_chars": 12, "max_seconds": 4.2, "temperature": 1.3}
    whole = voice.generate_speech(clip, text, seed=1, **settings)
    pieces = list(voice.stream_speech(clip, text, seed=1, **settings))
    assert len(pieces) > 1
    np.testing.assert_allclose(np.concatenate(pieces), whole.waveform, atol=1e-5)
    early = list(voice.stream_speech(clip, text, seed=1, first_chunk=4, **settings))
    assert len(np.concatenate(early)) == len(whole.waveform)
    assert len(early[0]) < len(pieces[0])


def test_a_closed_stream_frees_its_slot(tiny_dir, clip):
    voice = HiggsAudioInference(tiny_dir / "model", config=tiny_dir / "pipeline.toml", device="cpu")
    before = voice.generate_speech(clip, TEXT, "الجسر", max_seconds=0.4, seed=9)
    long = {"max_seconds": 60.0, "temperature": 3.0, "top_p": 1.0, "top_k": 0, "seed": 1}
    stream = voice.stream_speech(clip, "كلمة " * 45, "الجسر", first_chunk=4, **long)
    next(stream)
    assert voice.engine.num_free_slots == 0
    stream.close()
    after = voice.generate_speech(clip, TEXT, "الجسر", max_seconds=0.4, seed=9)
    np.testing.assert_array_equal(before.codes, after.codes)
    assert voice.engine.num_free_slots == 1


def test_a_stream_closed_before_its_first_piece_keeps_no_slot(voice, clip):
    for end in ("close", "drop"):
        stream = voice.stream_speech(clip, TEXT, "الجسر", max_seconds=60.0)
        assert voice.engine.has_work
        if end == "close":
            stream.close()
        del stream
        voice.engine.advance()
        assert not voice.engine.has_work, end


def test_a_stream_closed_between_parts_begins_no_other(voice, clip):
    """Its first part has come to its end by somebody else's advance when it is closed."""
    text, short = "نعم يا أخي. كم السعر؟", {"part_chars": 12, "max_seconds": 60.0, "top_k": 1}
    stream = voice.stream_speech(clip, text, "الجسر", first_chunk=2, **short)
    next(stream)
    (request,) = [one for one in voice.engine._requests if one is not None]
    while not request.is_done:
        voice.engine.advance()
    stream.close()
    voice.engine.advance()
    assert not voice.engine.has_work


def test_a_request_that_cannot_join_is_over_for_its_owner(voice, clip, monkeypatch):
    stream = voice.stream_speech(clip, TEXT, "الجسر", max_seconds=0.4)

    def full(*_: object) -> None:
        raise MemoryError("no room for the prompt")

    with monkeypatch.context() as patched:
        patched.setattr(voice.engine._cache, "reserve", full)
        with pytest.raises(MemoryError):
            voice.generate_batch([ask(clip)])
    assert sum(len(piece) for piece in stream) == 0, "it ends instead of waiting for ever"
    voice.engine.advance()
    assert not voice.engine.has_work


def test_threads_take_turns(voice, clip):
    """A short request that comes while a long one is spoken is done before it."""
    order: list[str] = []
    begun = threading.Event()

    def long() -> None:
        for number, _ in enumerate(voice.stream_speech(clip, "كلمة " * 20, "الجسر", max_seconds=6.0, top_k=1)):
            if number == 0:
                begun.set()
        order.append("long")

    def short() -> None:
        begun.wait(60)
        voice.generate_speech(clip, TEXT, "الجسر", max_seconds=0.2)
        order.append("short")

    threads = [threading.Thread(target=work) for work in (long, short)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert order == ["short", "long"]


def test_a_word_without_end_is_refused_before_memory_is_taken(voice, clip):
    with pytest.raises(DataError, match="20000 characters without a place to split"):
        voice.generate_speech(clip, "ا" * 20000, "الجسر")
    with pytest.raises(DataError, match="1204 characters without a place to split"):
        voice.generate_speech(clip, "كلمة " + "😀 " * 600, "الجسر")
    assert not voice.engine.has_work


def test_garbled_texts_are_a_warning(voice, clip, caplog):
    with caplog.at_level(logging.WARNING):
        voice.generate_speech(clip, "نعم".encode().decode("cp1252"), "الجسر ???? الجديد", max_seconds=0.04)
    assert "the text: " in caplog.text
    assert "the reference's text: '????' stands where words may have been" in caplog.text


def test_a_wrong_request_leaves_nothing_in_the_engine(voice, clip):
    with pytest.raises(DataError, match="eot_id"):
        voice.generate_batch([ask(clip, 1), ask(clip, 2, "نص <|eot_id|>")])
    voice.engine.advance()
    assert not voice.engine.has_work


def test_without_reference_text_it_speaks_and_warns(voice, clip, caplog):
    with caplog.at_level(logging.WARNING):
        voice.generate_speech(clip, TEXT, max_seconds=0.1)
    assert "clones are better" in caplog.text
    with_text, without = (
        voice.speaker.prompt(voice.speaker.reference(read_recordings(clip), text), TEXT) for text in ("الجسر", None)
    )
    num_tokens = len(encode_text(voice.speaker.tokenizer, "الجسر"))
    assert len(with_text) == len(without) + num_tokens


def test_a_runaway_is_cut_with_its_reason(voice, clip, caplog, monkeypatch):
    """The tiny model never ends here: end of speech is drawn out of 1026 likely codes."""
    import tools.utterance

    monkeypatch.setattr(tools.utterance, "longest_s", lambda text, rules: 0.2)
    with caplog.at_level(logging.WARNING):
        speech = voice.generate_speech(clip, "نعم يا أخي. كم السعر؟", "الجسر", part_chars=12, top_k=1, seed=0)
    cut = [part.stop_reason for part in speech.parts]
    assert len(cut) == 2
    assert speech.is_complete
    assert speech.stop_reason == "text_ceiling"
    assert "cut there" in caplog.text
    with caplog.at_level(logging.WARNING):
        speech = voice.generate_speech(clip, "نعم يا أخي. كم السعر؟", "الجسر", part_chars=12, top_k=1, max_seconds=0.1)
    assert speech.stop_reason == "max_seconds"
    assert not speech.is_complete
    assert "9 more characters were not begun" in caplog.text


def test_the_ceiling_grows_with_the_text(voice):
    rules = voice.speaker.rules
    assert longest_s("نعم", rules) < longest_s("نعم " * 10, rules) < longest_s("نعم " * 50, rules)
    assert longest_s("٣٤٥٦٧", rules) > longest_s("خمسة", rules)


def test_a_cross_fade_is_the_same_however_it_is_fed():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=n).astype(np.float32) for n in (5000, 700, 0, 2401)]

    def join(size: int) -> np.ndarray:
        fade, out = CrossFade(24000), []
        for number, part in enumerate(parts):
            if number:
                out.append(fade.end_part())
            out += [fade.feed(part[start : start + size]) for start in range(0, len(part), size)]
        return np.concatenate([*out, fade.finish()])

    whole = join(10000)
    assert len(whole) == 5000 + 700 + 2401 - 700 - 1200
    np.testing.assert_array_equal(whole[:3800], parts[0][:3800])
    np.testing.assert_array_equal(whole[-1201:], parts[3][-1201:])
    for size in (1, 333, 1200):
        np.testing.assert_array_equal(join(size), whole)


def test_prompts_are_what_stage_one_stores(voice, tiny_dir, tmp_path, run_command):
    """Marks and tatweel: the ids that are spoken are those that a row of the same texts is trained with."""
    said, wanted = "  الجـــسر\u200f الجديد\u202b يربط", "هل\ufeff تعــرف   الطريق إلى ٣ محطات؟ "
    audio = [f"tests/data/arabic-mini/{name}" for name in (CLIP, "spk_00_08.flac")]
    row = {"id": "a", "speaker": "s", "messages": cloning_messages(said, audio[0], wanted, audio[1])}
    (tmp_path / "list.json").write_text(json.dumps([row]))
    options = ("--config", tiny_dir / "pipeline.toml", "--set", 'text.normalize=["tatweel", "digits"]', "--workers", 1)
    result = run_command("preprocess", tmp_path / "list.json", tmp_path / "shards", *options)
    assert result.returncode == 0, result.stderr
    dataset, index = open_dataset(tmp_path / "shards")
    rules = TextSection(normalize=cast(list[Normalizer], text_rules(dataset)))
    assert rules.normalize == ["tatweel", "digits"]
    stored = voice.speaker.builder.prompt(SampleReader(tmp_path / "shards").read(index[0]))
    speaker = replace(voice.speaker, rules=rules)
    spoken = speaker.prompt(speaker.reference(read_recordings([audio[0]]), said), wanted)
    np.testing.assert_array_equal(spoken.token_ids, stored.token_ids)
    np.testing.assert_array_equal(spoken.codes, stored.codes)
    other = voice.speaker.prompt(voice.speaker.reference(read_recordings([audio[0]]), said), wanted)
    assert len(other) > len(spoken)


@pytest.mark.parametrize(
    ("normalize", "text"),
    [
        (["nfc", "presentation_forms"], "\ufe8e\u0653 \u0645\ufe7d\u064e"),  # marks in an order that NFC would change
        (["tatweel"], "\u0646\u0639\u0645 \u0640\u200c\u0645"),  # without its tatweel the non-joiner is a loose one
    ],
)
def test_a_text_is_cleaned_once_as_in_training(voice, clip, normalize, text):
    rules = TextSection(normalize=normalize)
    trained = clean(text, rules)[0].strip()
    assert clean(trained, rules)[0].strip() != trained
    speaker = replace(voice.speaker, rules=rules)
    asked = []
    reference = speaker.reference(read_recordings(clip), None)
    request = SpeechRequest(reference_audio=clip, target_text=text)
    Utterance(speaker, cast(Engine, SimpleNamespace(submit=asked.append)), reference, request)
    assert asked[0].prompt.token_ids.tolist() == speaker.part_prompt(reference, trained).token_ids.tolist()
    assert asked[0].prompt.token_ids.tolist() == speaker.prompt(reference, text).token_ids.tolist()


def test_other_spellings_of_control_tokens_stay_letters(voice, clip, tiny_dir):
    """With the released kind of tokenizer; one that normalizes what it reads is found by the ids that it gives."""
    forms = ["＜|eot_id|＞", "<｜eot_id｜>", "<|eot\n_id|>", "<|eot _id|>", "< |eot_id|>", "<|EOT_ID|>", "﹤|eot_id|﹥"]
    assert all(encode_text(voice.speaker.tokenizer, form).max() < 128000 for form in forms)

    loose = Tokenizer.from_file(str(tiny_dir / "model" / "tokenizer.json"))
    loose.normalizer = normalizers.Replace("~", "<|eot_id|>")  # pyright: ignore
    loose.add_special_tokens([AddedToken("<|eot_id|>", normalized=True, special=True)])
    assert 128009 in encode_text(loose, "~").tolist()
    speaker = replace(voice.speaker, tokenizer=loose)
    reference = speaker.reference(read_recordings(clip), "الجسر")
    with pytest.raises(DataError, match="token 128009"):
        speaker.prompt(reference, "مرحبا ~")


@pytest.mark.slow
def test_memory_stays_flat_over_hundreds_of_requests(voice, repository):
    """Texts and lengths of all kinds, and more voices than are kept: after each has been there, nothing grows."""

    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 1e6

    def size(path: Path) -> int:
        return path.stat().st_size

    clips = sorted((repository / "tests/data/arabic-mini").glob("*.flac"), key=size)[: KEPT_REFERENCES + 2]
    first = clips[0]

    def speak(requests: list[SpeechRequest]) -> None:
        for start in range(0, len(requests), 3):
            voice.generate_batch(requests[start : start + 3])

    def made(i: int, clip: Path) -> SpeechRequest:
        return ask(clip, i, "كلمة " * (1 + i % 5), max_seconds=0.04 * (1 + i % 5))

    speak([made(0, clip) for clip in clips] + [made(i, first) for i in range(30)])
    before = resident_mb()
    speak([made(i, clips[i // 16 % len(clips)] if i % 16 == 0 else first) for i in range(300)])
    assert len(voice._references) == KEPT_REFERENCES
    assert resident_mb() - before < 30


def test_cuda_graphs_are_refused_on_a_cpu(voice: HiggsAudioInference):
    with pytest.raises(ConfigError, match="cuda_graphs: expected a model on a GPU, got one on cpu"):
        HiggsAudioInference.of(voice.speaker, cuda_graphs=True)

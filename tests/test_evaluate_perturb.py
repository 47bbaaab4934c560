"""References made worse on purpose, and MOS predictors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from shards.errors import ConfigError
from tools.evaluate.mos import KNOWN, load_predictor
from tools.evaluate.perturb import parse_perturbation, parse_perturbations, perturbed
from train.evaluation.metric_models import NotInstalled

RATE = 24000


def speech(seconds: float = 4.0) -> np.ndarray:
    """Tones of 200 Hz and 6 kHz with a pause behind."""
    times = np.arange(round(seconds * RATE)) / RATE
    wave = 0.4 * np.sin(2 * np.pi * 200 * times) + 0.3 * np.sin(2 * np.pi * 1000 * times)
    wave += 0.2 * np.sin(2 * np.pi * 6000 * times)
    wave[len(wave) // 2 :] = 0
    return wave.astype(np.float32)


def worse(name: str, wave: np.ndarray, text: str | None = "a b", seed: str = "0") -> tuple[np.ndarray, str | None]:
    return perturbed(parse_perturbation(name), wave, RATE, text, seed)


def test_names_with_commas_are_read_once_each():
    found = parse_perturbations(("noise10dB, phone8k", "short3s,noise10dB"))
    assert [one.name for one in found] == ["noise10dB", "phone8k", "short3s"]
    assert [parse_perturbation(name).name for name in ("noise-5dB", "noise2.50dB", "short1.5s")] == [
        "noise-5dB",
        "noise2.5dB",
        "short1.5s",
    ]


def test_without_its_text_the_reference_stays_what_it_is():
    wave = speech()
    assert parse_perturbation("notext").name == "notext"
    found, text = worse("notext", wave)
    assert text is None
    assert (found == wave).all()


@pytest.mark.parametrize(
    "name",
    ["notext1s", "", "noise", "noise10", "noise10db", "phone8", "short0s", "short99s", "phone1k", "noise1e3dB", "echo"],
)
def test_what_is_no_perturbation_is_refused(name: str):
    with pytest.raises(ConfigError, match="--perturb"):
        parse_perturbation(name)


@pytest.mark.parametrize("snr_db", [0, 10, 30])
def test_noise_is_as_far_below_the_speech_as_asked(snr_db: int):
    wave = speech() / 4
    noise = worse(f"noise{snr_db}dB", wave)[0] - wave
    spoken = wave[: len(wave) // 2]  # the pause does not make the noise quieter
    assert 10 * np.log10(np.mean(spoken**2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.5)


def test_a_perturbation_is_the_same_for_the_same_seed():
    assert (worse("noise10dB", speech())[0] == worse("noise10dB", speech())[0]).all()
    assert (worse("noise10dB", speech(), seed="1")[0] != worse("noise10dB", speech())[0]).any()


def test_a_telephone_takes_what_it_does_not_carry():
    changed, said = worse("phone8k", speech())
    assert (len(changed), said) == (len(speech()), "a b")
    before, after = (np.abs(np.fft.rfft(wave)) for wave in (speech(), changed))
    hertz = np.fft.rfftfreq(len(changed), 1 / RATE)
    for carried, frequency in ((False, 200), (True, 1000), (False, 6000)):
        near = np.abs(hertz - frequency) < 20
        assert (after[near].max() > 0.5 * before[near].max()) == carried, frequency


@pytest.mark.parametrize("name", ["noise-20dB", "phone8k"])
@pytest.mark.parametrize("wave", [np.zeros(24000), np.ones(24000), np.zeros(1)], ids=["silent", "full", "one"])
def test_odd_references_stay_within_full_scale(name: str, wave: np.ndarray):
    changed = worse(name, wave.astype(np.float32))[0]
    assert len(changed) == len(wave)
    assert np.isfinite(changed).all()
    assert np.abs(changed).max() <= 1


@pytest.mark.parametrize(
    ("name", "text", "seconds", "said"),
    [
        ("short1s", "one two three four", 1.0, "one"),
        ("short2s", "one two three four", 2.0, "one two"),
        ("short9s", "one two three four", 4.0, "one two three four"),
        ("short0.5s", "word", 0.5, "word"),
        ("short2s", None, 2.0, None),
    ],
)
def test_a_short_reference_keeps_its_share_of_the_text(name: str, text: str | None, seconds: float, said: str | None):
    wave, kept = worse(name, speech(), text)
    assert (len(wave) / RATE, kept) == (seconds, said)


# --- MOS predictors -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(arabic_mini: Path) -> np.ndarray:
    import soxr

    wave, rate = soundfile.read(sorted(arabic_mini.parent.glob("spk_02_*.flac"))[0], dtype="float32")
    return soxr.resample(wave, rate, 16000)


@pytest.mark.parametrize("name", KNOWN)
def test_a_predictor_tells_noise_from_speech(name: str, clip: np.ndarray):
    """Both ship their weights in wheels of the extra, so they are never skipped here."""
    predictor = load_predictor(name)
    noisy, _ = perturbed(parse_perturbation("noise0dB"), clip, 16000, None, "0")
    clean, bad = predictor.values(clip), predictor.values(noisy)
    worst = "dnsmos background" if name == "dnsmos" else name  # the overall guess of DNSMOS is lost on synthetic speech
    assert bad[worst] < clean[worst] - 0.2
    assert clean == predictor.values(clip)
    assert (predictor.identity.name, len(predictor.identity.sha256)) == (name, 64)
    for odd in (np.zeros(1), np.full(800, 2.0)):
        values = predictor.values(odd.astype(np.float32))
        assert values.keys() == clean.keys()
        assert np.isfinite(list(values.values())).all()


def test_dnsmos_says_what_its_package_says(clip: np.ndarray):
    import onnxruntime
    from speechmos.dnsmos import DNSMOS

    mine = load_predictor("dnsmos")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    folder = Path(DNSMOS.__call__.__code__.co_filename).parent / "dnsmos_models"
    theirs = object.__new__(DNSMOS)
    theirs.onnx_sess, theirs.p808_onnx_sess = (
        onnxruntime.InferenceSession(str(folder / name), options) for name in ("sig_bak_ovr.onnx", "model_v8.onnx")
    )
    for wave in (clip, np.tile(clip, 3)):
        said = theirs(wave, 16000, False)
        found = mine.values(wave)
        assert found["dnsmos"] == pytest.approx(said["ovrl_mos"], abs=1e-4)
        assert found["dnsmos background"] == pytest.approx(said["bak_mos"], abs=1e-4)


def test_an_unknown_predictor_is_refused_in_words():
    with pytest.raises(ConfigError, match="known: dnsmos, distillmos, none"):
        load_predictor("utmos")


def test_a_missing_predictor_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("train.evaluation.metric_models.importlib.util.find_spec", lambda name: None)
    for name in KNOWN:
        with pytest.raises(NotInstalled, match=f"{name}: not installed; pip install"):
            load_predictor(name)

"""`--perturb noise10dB,phone8k,short3s`: the reference as a person may really have it, to see what each model loses by that.

In: a reference [S] float32 and its text. Out: the same, worse, and equal for equal seeds. `noiseNdB` adds white noise N dB
below the speech, `phoneNk` is a telephone line of N kHz (300 Hz to 3400 Hz of an 8 kHz line, mu-law of 8 bits), `shortNs`
keeps the first N seconds, `notext` does not tell the model what is said in it. A short reference keeps the same share of its
text, cut between words: where nobody has marked the words that is as near as one comes, and the price is a word too many or
too few now and then.
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import msgspec
import numpy as np

from shards.errors import ConfigError

FORMS = {
    "noise": re.compile(r"noise(-?\d+(?:\.\d+)?)dB"),
    "phone": re.compile(r"phone(\d+(?:\.\d+)?)k"),
    "short": re.compile(r"short(\d+(?:\.\d+)?)s"),
}
RANGES = {"noise": (-20.0, 80.0), "phone": (4.0, 16.0), "short": (0.5, 30.0)}
UNITS = {"noise": "dB", "phone": "k", "short": "s"}
NO_TEXT = "notext"
LOWEST_HZ = 300.0
HIGHEST_SHARE = 3400 / 8000  # of the line's rate
MU = 255.0
SPEECH_BELOW_PEAK = 0.01  # what is quieter is a pause, and noise is measured against speech


class Perturbation(msgspec.Struct, frozen=True):
    """One kind with its amount; `name` is how it was asked for."""

    kind: Literal["noise", "phone", "short", "notext"]
    amount: float  # 0 of "notext"

    @property
    def name(self) -> str:
        return NO_TEXT if self.kind == NO_TEXT else f"{self.kind}{self.amount:g}{UNITS[self.kind]}"


def parse_perturbations(texts: tuple[str, ...]) -> list[Perturbation]:
    """Lists with commas, each once and in order. Raises ConfigError for what is none."""
    names = [name.strip() for text in texts for name in text.split(",")]
    return list(dict.fromkeys(parse_perturbation(name) for name in names))


def parse_perturbation(name: str) -> Perturbation:
    if name == NO_TEXT:
        return Perturbation(NO_TEXT, 0.0)
    for kind, form in FORMS.items():
        found = form.fullmatch(name)
        if not found:
            continue
        amount, (low, high) = float(found[1]), RANGES[kind]
        if not low <= amount <= high:
            raise ConfigError(f"--perturb {name}: {amount:g} is out of range, {low:g} to {high:g} {UNITS[kind]}")
        return Perturbation(kind, amount)  # pyright: ignore[reportArgumentType]
    raise ConfigError(
        f"--perturb {name!r}: expected noiseNdB, phoneNk, shortNs or notext, as in noise10dB,phone8k,short3s"
    )


def perturbed(
    perturbation: Perturbation, wave: np.ndarray, sample_rate: int, text: str | None, seed: str
) -> tuple[np.ndarray, str | None]:
    """wave [S] float32 -> (wave [S'] float32 within -1 to 1, its text). `seed`: any text; the same gives the same wave."""
    amount = perturbation.amount
    if perturbation.kind == NO_TEXT:
        return wave, None
    if perturbation.kind == "noise":
        return within_full_scale(with_noise(wave, amount, seed)), text
    if perturbation.kind == "phone":
        return within_full_scale(by_telephone(wave, sample_rate, amount * 1000)), text
    return first_seconds(wave, sample_rate, amount, text)


def with_noise(wave: np.ndarray, snr_db: float, seed: str) -> np.ndarray:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
    speech = wave[np.abs(wave) > SPEECH_BELOW_PEAK * np.abs(wave).max()] if wave.any() else wave
    power = float(np.mean(speech.astype(np.float64) ** 2)) if len(speech) else 0.0
    noise = np.random.default_rng(number).normal(0, 1, len(wave)) * np.sqrt(power / 10 ** (snr_db / 10))
    return (wave + noise).astype(np.float32)


def by_telephone(wave: np.ndarray, sample_rate: int, line_rate: float) -> np.ndarray:
    import soxr

    padded = np.pad(wave, (0, max(0, 64 - len(wave))))  # shorter ones have no sample left at the line's rate
    narrow = soxr.resample(padded, sample_rate, line_rate, quality="HQ")
    spectrum = np.fft.rfft(narrow)
    hertz = np.fft.rfftfreq(len(narrow), 1 / line_rate)
    spectrum[(hertz < LOWEST_HZ) | (hertz > HIGHEST_SHARE * line_rate)] = 0
    narrow = np.clip(np.fft.irfft(spectrum, len(narrow)), -1, 1)
    pressed = np.sign(narrow) * np.log1p(MU * np.abs(narrow)) / np.log1p(MU)
    pressed = np.round(pressed * 127) / 127
    opened = (np.sign(pressed) * np.expm1(np.abs(pressed) * np.log1p(MU)) / MU).astype(np.float32)
    wide = soxr.resample(opened, line_rate, sample_rate, quality="HQ").astype(np.float32)
    return np.pad(wide, (0, max(0, len(wave) - len(wide))))[: len(wave)]


def first_seconds(
    wave: np.ndarray, sample_rate: int, seconds: float, text: str | None
) -> tuple[np.ndarray, str | None]:
    kept = round(seconds * sample_rate)
    if kept >= len(wave):
        return wave, text
    if text is None:
        return wave[:kept], None
    words = text.split()
    ends = np.cumsum([len(word) + 1 for word in words])  # letters up to the end of each word
    share = kept / len(wave)
    count = 1 + int(np.argmin(np.abs(ends / max(1, ends[-1]) - share))) if words else 0
    return wave[:kept], " ".join(words[:count])


def within_full_scale(wave: np.ndarray) -> np.ndarray:
    """Turned down as a whole where it would clip."""
    peak = float(np.abs(wave).max(initial=0.0))
    return wave if peak <= 1 else (wave / peak).astype(np.float32)

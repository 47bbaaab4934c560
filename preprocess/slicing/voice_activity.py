"""Where somebody speaks: silero-vad's network over a stream, and its probabilities as stretches of speech.

In: mono blocks at 16 kHz. Out: one probability and one level per frame of 32 ms, then stretches (start_s, end_s). The weights
come from the wheel silero-vad (MIT), out of its TorchScript file: its safetensors hold an older model. The network itself stands
here, 30 lines of torch, which stage one has anyway: the script takes one frame at a time and ten times as long, and the ONNX form
would need onnxruntime, 20 MB more. The price: another release may have another network, so the release is pinned, and a test
holds this one against the script.

The network detects first words late and breathy ends not at all, so a stretch is extended over what is audibly louder than the
pauses, two seconds at most: breaths and coughs right beside speech stay with it.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import conv1d, pad

from shards.errors import ConfigError

FRAME = 512  # samples: 32 ms
CONTEXT = 64  # samples of the frame before, which the network sees again
FRAME_S = FRAME / 16000
FRAMES_PER_BLOCK = 512
BEGINS, ENDS = 0.5, 0.35  # probability from which speech begins, and below which it has ended: silero-vad's own
MIN_SPEECH_FRAMES = 2  # a single frame is a click; silero-vad asks for 250 ms, which loses "no"
ABOVE_NOISE_DB = 10.0
BELOW_SPEECH_DB = 35.0
MAX_EXTENSION_FRAMES = 62  # 2 s
MAX_HOLE_FRAMES = 7  # 0.22 s, less than any pause that is cut at: quiet inside what a stretch is extended over
SILENCE_DB = -120.0
LOUD_DB = 15.0  # below the speech's median level: what lies above is more than noise
LOUD_ALONE_DB = -45.0  # of full scale, where there is no speech
MIN_LOUD_FRAMES = 31  # 1 s
State = tuple[torch.Tensor, torch.Tensor]


class VoiceActivity:
    """The network of silero-vad for 16 kHz. Raises ConfigError where the wheel is missing or of another form."""

    def __init__(self) -> None:
        self.version = f"silero-vad {_version()}"
        file = _wheel_folder() / "data" / "silero_vad.jit"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript; nothing of it is run
                everything = torch.jit.load(str(file), map_location="cpu").state_dict()
            weights = {name.removeprefix("_model."): value for name, value in everything.items()}
            self._spectrum = weights["stft.forward_basis_buffer"]
            self._convolutions = [
                (*(weights[f"encoder.{number}.reparam_conv.{part}"] for part in ("weight", "bias")), stride)
                for number, stride in enumerate((1, 2, 2, 1))
            ]
            self._cell = torch.nn.LSTM(128, 128)
            cell = {f"{name}_l0": weights[f"decoder.rnn.{name}"] for name in _CELL}
            self._cell.load_state_dict(cell)
            self._last = (weights["decoder.decoder.2.weight"][:, :, 0], weights["decoder.decoder.2.bias"])
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise ConfigError(f"{file}: {error}; this program knows silero-vad 6.2: {INSTALL}") from None

    def listen(self, blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """blocks [n] float32 at 16 kHz -> (probability of speech [F] float32, level [F] in dB of full scale).

        The last frame is filled with zeros.
        """
        probabilities: list[np.ndarray] = []
        levels: list[np.ndarray] = []
        state: State | None = None
        before = torch.zeros(1, CONTEXT)
        with torch.inference_mode():
            for frames in _frames(blocks):
                power = np.square(frames, dtype=np.float64).mean(axis=1)
                levels.append(10 * np.log10(np.maximum(power, 10 ** (SILENCE_DB / 10))))
                new = torch.from_numpy(frames)
                context = torch.cat([before, new[:-1, -CONTEXT:]])
                before = new[-1:, -CONTEXT:]
                found, state = self._forward(torch.cat([context, new], dim=1), state)
                probabilities.append(found.numpy())
        if not levels:
            return np.zeros(0, np.float32), np.zeros(0)
        return np.concatenate(probabilities), np.concatenate(levels)

    def _forward(self, frames: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
        """frames [F, CONTEXT + FRAME] -> ([F], state of the cell)"""
        both = conv1d(pad(frames[:, None], (0, 64), "reflect"), self._spectrum, stride=128)
        hidden = (both[:, :129].square() + both[:, 129:].square()).sqrt()
        for weight, bias, stride in self._convolutions:
            hidden = conv1d(hidden, weight, bias, stride=stride, padding=1).relu()
        hidden, after = self._cell(hidden.squeeze(-1), state)
        weight, bias = self._last
        return torch.sigmoid(hidden.relu() @ weight.T + bias)[:, 0], after


_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
INSTALL = "pip install -e '.[slice]'"


def _version() -> str:
    try:
        return importlib.metadata.version("silero-vad")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"slice needs the weights of silero-vad: {INSTALL}") from None


def _wheel_folder() -> Path:
    spec = find_spec("silero_vad")  # found, not imported: importing it sets torch's thread count
    if not spec or not spec.origin:
        raise ConfigError(f"slice needs the weights of silero-vad: {INSTALL}")
    return Path(spec.origin).parent


def _frames(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Waves of any lengths -> [F, FRAME] float32 with F of at most FRAMES_PER_BLOCK."""
    waiting: list[np.ndarray] = []
    num_waiting = 0
    size = FRAME * FRAMES_PER_BLOCK
    for block in blocks:
        waiting.append(block)
        num_waiting += len(block)
        if num_waiting < size:
            continue
        wave = np.concatenate(waiting)
        end = len(wave) - len(wave) % size
        for start in range(0, end, size):
            yield wave[start : start + size].reshape(-1, FRAME)
        waiting, num_waiting = [wave[end:]], len(wave) - end
    if num_waiting:
        wave = np.concatenate(waiting)
        yield np.pad(wave, (0, -len(wave) % FRAME)).reshape(-1, FRAME)


def speech_stretches(probabilities: np.ndarray, levels: np.ndarray) -> list[tuple[float, float]]:
    """[F], [F] -> stretches of speech (start_s, end_s) in order, apart by one frame at least."""
    is_speech = np.zeros(len(probabilities), bool)
    inside = False
    for number, probability in enumerate(probabilities):
        inside = probability >= (ENDS if inside else BEGINS)
        is_speech[number] = inside
    for start, end in _runs(is_speech):
        if end - start < MIN_SPEECH_FRAMES:
            is_speech[start:end] = False
    if not is_speech.any():
        return []
    noise_db = float(np.percentile(levels[~is_speech], 10)) if (~is_speech).any() else SILENCE_DB
    audible = levels > max(noise_db + ABOVE_NOISE_DB, float(np.median(levels[is_speech])) - BELOW_SPEECH_DB)
    extended = is_speech.copy()
    for start, end in _runs(is_speech):
        # One frame more on each side in any case: a frame's probability is that of its end.
        before = _reach(audible[max(0, start - MAX_EXTENSION_FRAMES) : start][::-1])
        behind = _reach(audible[end : end + MAX_EXTENSION_FRAMES])
        extended[max(0, start - max(1, before)) : end + max(1, behind)] = True
    return [(start * FRAME_S, end * FRAME_S) for start, end in _runs(extended)]


def loud_elsewhere(
    levels: np.ndarray, speech: Iterable[tuple[float, float]], taken: Iterable[tuple[float, float]]
) -> list[tuple[float, float]]:
    """[F] -> (start_s, end_s) of a second or more, nearly as loud as the `speech`, that is neither speech nor `taken`."""
    is_speech, is_known = _mask(speech, len(levels)), _mask(taken, len(levels))
    is_known |= is_speech
    floor_db = float(np.median(levels[is_speech])) - LOUD_DB if is_speech.any() else LOUD_ALONE_DB
    found: list[tuple[int, int]] = []
    for start, end in _runs((levels > floor_db) & ~is_known):
        if found and start - found[-1][1] <= MAX_HOLE_FRAMES and not is_known[found[-1][1] : start].any():
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return [(start * FRAME_S, end * FRAME_S) for start, end in found if end - start >= MIN_LOUD_FRAMES]


def _mask(spans: Iterable[tuple[float, float]], size: int) -> np.ndarray:
    """[size] bool: the frames that the spans (start_s, end_s) touch."""
    mask = np.zeros(size, bool)
    for start_s, end_s in spans:
        mask[int(start_s / FRAME_S) : int(np.ceil(end_s / FRAME_S))] = True
    return mask


def _reach(audible: np.ndarray) -> int:
    """How many frames from a stretch outwards belong to it: up to the last audible one before a hole that is too long."""
    reach = 0
    for place in np.flatnonzero(audible):
        if place - reach > MAX_HOLE_FRAMES:
            break
        reach = int(place) + 1
    return reach


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]

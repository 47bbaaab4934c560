"""`inspect-shards show KEY --sequence`: what the model reads at every position, and what it must say there.

In: one sample and the configuration of training. Out: one line a position, or the same as data. The label stands in the line
of the position that must say it, so it equals what the next line holds: a shift that is wrong can be seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tokenizers import Tokenizer

from shards.artifacts import load_tokenizer, resolve
from shards.config import read_config
from shards.delay_pattern import STREAM_BOS, STREAM_EOS
from shards.label_shift import IGNORE
from shards.sample import Sample
from shards.sequence import AUDIO_OUT, WHISPER, Sequence, SequenceBuilder
from train.config import TrainConfig
from train.model.conditioning import Conditioning, decide_conditioning

HEADER = (
    "position  path   holds                                     must say next                             weight",
    "(B = begin, E = end of a codebook's stream, - = not learned; weights are the loss's, before dividing by counts)",
)


class SequenceView(NamedTuple):
    """The sample as training with this configuration builds it."""

    key: str
    layout: str
    conditioning: Conditioning
    sequence: Sequence
    rows: list[dict[str, Any]]

    def lines(self) -> Iterator[str]:
        yield f"layout {self.layout}, {self.conditioning}"
        yield from sequence_lines(self.rows, self.sequence)

    def facts(self) -> dict[str, Any]:
        about = {"key": self.key, "layout": self.layout, "conditioning": self.conditioning.name}
        return {**about, "learned": learned(self.sequence), "sequence": self.rows}


def describe_sequence(sample: Sample, config_path: Path | None, overrides: tuple[str, ...]) -> SequenceView:
    """Raises ConfigError and ShardError."""
    config = read_config(TrainConfig, config_path, overrides)
    base_dir = resolve(config.model.base, config.model.revision, "model.base")
    conditioning = decide_conditioning(config.sequence, config.features, base_dir)
    section = msgspec.structs.replace(config.sequence, conditioning=conditioning.name)
    tokenizer = load_tokenizer(base_dir)
    sequence = SequenceBuilder(tokenizer, section).training(sample)
    rows = sequence_rows(sequence, tokenizer, config.loss.text_loss_weight, config.loss.audio_loss_weight)
    return SequenceView(sample.key, section.layout, conditioning, sequence, list(rows))


def sequence_rows(
    sequence: Sequence, tokenizer: Tokenizer, text_weight: float, audio_weight: float
) -> Iterator[dict[str, Any]]:
    """One per position: what it holds and what it must say, as ids, codes (-100: not learned) and text.

    An audio column's weight counts its learned codebooks.
    """
    column = 0
    for position, (token, label) in enumerate(zip(sequence.token_ids, sequence.next_token, strict=True)):
        token, label = int(token), int(label)
        row: dict[str, Any] = {"position": position, "path": "text", "token": token, "part": ""}
        row["weight"] = text_weight if label != IGNORE else 0.0
        row["next_token"] = None if label == IGNORE else label
        row["next_text"] = None if label == IGNORE else piece(tokenizer, label)
        if token == AUDIO_OUT:
            says = sequence.next_codes[:, column]
            row["path"], row["part"] = "audio", audio_name(sequence, column)
            row["weight"] += audio_weight * float((says != IGNORE).mean())
            row["codes"], row["next_codes"] = sequence.codes[:, column].tolist(), says.tolist()
            column += 1
        elif token == WHISPER:
            row["part"] = "Whisper row"
        else:
            row["text"] = piece(tokenizer, token)
        yield row


def sequence_lines(rows: Iterable[dict[str, Any]], sequence: Sequence) -> Iterator[str]:
    """The header, a line per position, and what is learned in all."""
    yield from HEADER
    for row in rows:
        part = row["part"]
        says = "-" if row["next_token"] is None else f"{row['next_token']} {row['next_text']!r}"
        if row["path"] == "audio":
            holds, must = column_text(row["codes"]), column_text(row["next_codes"])
            if (
                row["next_token"] is not None
            ):  # the last column also says, through the text head, that the audio is over
                part += f", and token {says}"
        else:
            holds = "(state of the Whisper tower)" if "text" not in row else f"{row['token']} {row['text']!r}"
            must = says
        yield f"{row['position']:8d}  {row['path']:5s}  {holds:40s}  {must:40s}  {row['weight']:5.3g}  {part}".rstrip()
    found = learned(sequence)
    yield (
        f"{found['positions']} positions: {found['tokens']} tokens and {sum(found['codes'])} codes of "
        f"{len(sequence.codes)} codebooks learned, {found['ends_of_speech']} ends of speech"
    )


def learned(sequence: Sequence) -> dict[str, Any]:
    """What the sequence teaches, in all; `codes` by codebook."""
    return {
        "positions": len(sequence),
        "tokens": int((sequence.next_token != IGNORE).sum()),
        "codes": (sequence.next_codes != IGNORE).sum(axis=1).tolist(),
        "ends_of_speech": int((sequence.next_codes == STREAM_EOS).sum()),
    }


def column_text(column: list[int]) -> str:
    """K codes, markers or IGNORE, four characters each."""
    names = {STREAM_BOS: "B", STREAM_EOS: "E", IGNORE: "-"}
    return " ".join(f"{names.get(code, str(code)):>4s}" for code in column)


def piece(tokenizer: Tokenizer, token: int) -> str:
    """A token that is a piece of a letter shows as the sign for what cannot be decoded."""
    return tokenizer.decode([token], skip_special_tokens=False)


def audio_name(sequence: Sequence, column: int) -> str:
    start, end = sequence.target_columns
    return "target" if start <= column < end else "reference"

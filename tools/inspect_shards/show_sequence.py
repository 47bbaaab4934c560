"""`inspect-shards show KEY --sequence`: what the model reads at every position, and what it must say there.

In: one `Sequence` and the loss weights. Out: one line a position. The label stands in the line of the position that must
say it, so it equals what the next line holds: a shift that is wrong can be seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from shards.delay_pattern import STREAM_BOS, STREAM_EOS
from shards.label_shift import IGNORE
from shards.sequence import AUDIO_OUT, WHISPER, Sequence

HEADER = (
    "position  path   holds                                     must say next                             weight\n"
    "(B = begin, E = end of a codebook's stream, - = not learned; weights are the loss's, before dividing by counts)"
)


def sequence_lines(sequence: Sequence, tokenizer: Tokenizer, text_weight: float, audio_weight: float) -> Iterator[str]:
    """The header, then a line per position; an audio column's weight counts its learned codebooks."""
    yield HEADER
    column = 0
    num_codebooks = len(sequence.codes)
    for position, (token, label) in enumerate(zip(sequence.token_ids, sequence.next_token, strict=True)):
        if token == AUDIO_OUT:
            says = sequence.next_codes[:, column]
            weight = audio_weight * float((says != IGNORE).mean()) + (text_weight if label != IGNORE else 0.0)
            holds, must = column_text(sequence.codes[:, column]), column_text(says)
            part = audio_name(sequence, column)
            if label != IGNORE:  # the last column also says, through the text head, that the audio is over
                part += f", and token {token_text(tokenizer, int(label))}"
            column += 1
            path = "audio"
        else:
            path, part = "text", "Whisper row" if token == WHISPER else ""
            holds = token_text(tokenizer, int(token)) if token != WHISPER else "(state of the Whisper tower)"
            must = token_text(tokenizer, int(label)) if label != IGNORE else "-"
            weight = text_weight if label != IGNORE else 0.0
        yield f"{position:8d}  {path:5s}  {holds:40s}  {must:40s}  {weight:5.3g}  {part}".rstrip()
    learned = (sequence.next_codes != IGNORE).sum(axis=1)
    yield (
        f"{len(sequence)} positions: {int((sequence.next_token != IGNORE).sum())} tokens and {int(learned.sum())} codes of "
        f"{num_codebooks} codebooks learned, {int((sequence.next_codes == STREAM_EOS).sum())} ends of speech"
    )


def column_text(column: np.ndarray) -> str:
    """[K] codes, markers or IGNORE, four characters each."""
    names = {STREAM_BOS: "B", STREAM_EOS: "E", IGNORE: "-"}
    return " ".join(f"{names.get(int(code), str(code)):>4s}" for code in column)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Id and text; a token that is a piece of a letter shows as bytes."""
    return f"{token} {tokenizer.decode([token], skip_special_tokens=False)!r}"


def audio_name(sequence: Sequence, column: int) -> str:
    start, end = sequence.target_columns
    return "target" if start <= column < end else "reference"

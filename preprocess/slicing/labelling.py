"""What is known of each stretch of speech: whose it is, what is said in it, or why it cannot be used.

In: units from the pauses, the recording's transcript and turns. Out: units that carry a speaker, or the reason why they are in
no piece (`Unit.unfit`), and the texts. A sentence keeps its units together; of one that two speakers share, or that is lost in
part, nothing is used, because its text says more than the clip.
"""

from __future__ import annotations

import dataclasses

from preprocess.slicing.cutting import Unit
from preprocess.slicing.recordings_folder import Source
from preprocess.slicing.transcripts import read_transcript, texts_of_speech
from preprocess.slicing.turns import read_turns, speakers_of_speech

# Of forced aligners (MFA writes <unk> and spn): something is said that the text does not have.
UNKNOWN_WORDS = frozenset({"<unk>", "spn"})


def labelled(units: list[Unit], source: Source, is_name_global: bool = False) -> tuple[list[Unit], dict[Unit, str]]:
    """(units with their speakers, texts of the units). Raises DataError.

    is_name_global: a name of the turns means one person in all recordings, not in this one alone.
    """
    units = [dataclasses.replace(unit, label=source.folder) for unit in units]
    if source.turns:
        before = "" if is_name_global else f"{source.own_name}/"
        spoken_by = speakers_of_speech(read_turns(source.turns), [(unit.start_s, unit.end_s) for unit in units])
        units = [
            dataclasses.replace(unit, label=before + name if name else "", unfit=reason)
            for unit, (name, reason) in zip(units, spoken_by, strict=True)
        ]
    if not source.transcript:
        return units, {}
    spoken = texts_of_speech(read_transcript(source.transcript), [(unit.start_s, unit.end_s) for unit in units])
    sentences: list[list[int]] = []
    goes_on = False
    for number, said in enumerate(spoken):
        if goes_on:
            sentences[-1].append(number)
        else:
            sentences.append([number])
        goes_on = said.goes_on
    done: list[Unit] = []
    texts: dict[Unit, str] = {}
    for sentence in sentences:
        inside = [units[number] for number in sentence]
        reasons = [unit.unfit for unit in inside if unit.unfit]
        if len({unit.label for unit in inside}) > 1:
            reasons.append("two_speakers")
        is_unknown = any(not UNKNOWN_WORDS.isdisjoint(spoken[number].text.split()) for number in sentence)
        if is_unknown or not spoken[sentence[0]].text or not all(spoken[number].is_covered for number in sentence):
            reasons.append("no_text")
        for number in sentence:
            unit = dataclasses.replace(
                units[number], unfit=reasons[0] if reasons else "", goes_on=spoken[number].goes_on
            )
            done.append(unit)
            texts[unit] = spoken[number].text
    return done, texts

"""Which text belongs to which audio of a row: what was spoken is trained, and what may be anything else is a reject."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from preprocess.audio import AudioMeasures
from preprocess.reasons import RowFault
from preprocess.row_checks import CheckedRow, check_pair
from preprocess.sources import INSTRUCTION_PREFIX, Pair, SourceRow, find_pair
from preprocess.spoken_text import not_spoken
from preprocess.text import TextSection
from shards.config import RELEASED_SYSTEM_PROMPT
from shards.sample import ChatRow

REFERENCE = "الجسر الجديد يربط ضفتي النهر."
TARGET = "هل تعرف الطريق إلى المحطة؟"
A, B = {"type": "audio", "audio_url": "a.wav"}, {"type": "audio", "audio_url": "b.wav"}


def content(*items: Any) -> list[dict]:
    return [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]


def pair_of(*turns: tuple[str, Any]) -> Pair:
    """The pair of a row with these (role, content) turns."""
    messages = [{"role": role, "content": said if isinstance(said, str) else content(*said)} for role, said in turns]
    return find_pair(msgspec.convert({"messages": messages}, ChatRow))


def texts_of(*turns: tuple[str, Any]) -> tuple[str, str]:
    pair = pair_of(*turns)
    return pair.reference_text, pair.target_text


USER = ("user", (REFERENCE, A, f"{INSTRUCTION_PREFIX} {TARGET}"))
SAID = ("assistant", (TARGET, B))
RELEASED = [("system", RELEASED_SYSTEM_PROMPT), ("user", REFERENCE), ("assistant", (A,)), ("user", TARGET)]


@pytest.mark.parametrize(
    ("turns", "warnings"),
    [
        ([("system", "You are a helpful assistant."), USER, SAID], []),
        ([USER, ("assistant", (B,))], ["target_text_from_instruction"]),
        ([*RELEASED, ("assistant", (B,))], ["target_text_from_instruction"]),
        ([*RELEASED, SAID], []),
        # one side's pieces, joined
        ([("user", ("الجسر الجديد", "يربط ضفتي النهر.", A, INSTRUCTION_PREFIX, TARGET)), SAID], []),
        ([USER, ("assistant", ("هل تعرف الطريق", " إلى المحطة؟", B))], []),
        # the text in a turn of its own before the audio
        ([("user", REFERENCE), ("user", (A, f"{INSTRUCTION_PREFIX} {TARGET}")), SAID], []),
        ([("user", (REFERENCE, A)), ("user", f"{INSTRUCTION_PREFIX} {TARGET}"), SAID], []),
        ([("assistant", (REFERENCE, A)), ("user", f"{INSTRUCTION_PREFIX} {TARGET}"), SAID], []),
        # an instruction in other words, and the text said in the assistant's turn
        ([("user", (REFERENCE, A, f"Say in this voice: {TARGET}")), SAID], []),
        ([("user", (REFERENCE, A)), SAID], []),
    ],
)
def test_forms_in_use_give_the_texts_that_were_spoken(turns, warnings):
    pair = pair_of(*turns)
    assert (pair.reference_text, pair.target_text) == (REFERENCE, TARGET)
    assert (pair.reference_path, pair.target_path, pair.warnings) == ("a.wav", "b.wav", warnings)


@pytest.mark.parametrize(
    "behind",
    [
        [("assistant", "على الرحب والسعة")],
        [("user", "شكرا لك"), ("assistant", "عفوا")],
        [("user", "You are welcome"), ("system", "end")],
    ],
)
def test_text_behind_the_target_never_becomes_its_text(behind):
    pair = pair_of(USER, SAID, *behind)
    assert pair.target_text == TARGET
    assert pair.warnings == ["text_behind_target"]
    assert behind[0][1] in pair.details["text_behind_target"]
    assert TARGET in pair.details["text_behind_target"]
    unsaid = pair_of(USER, ("assistant", (B, "عفوا")), *behind)
    assert unsaid.target_text == TARGET, "of the instruction"


def test_a_target_with_its_text_only_behind_it_is_rejected():
    with pytest.raises(RowFault, match="stands only behind it") as fault:
        pair_of(("user", (REFERENCE, A)), ("assistant", (B, TARGET)))
    assert fault.value.reason == "text_missing"


def test_texts_that_differ_are_both_shown():
    pair = pair_of(USER, ("assistant", ("نص غير المطلوب", B)))
    assert pair.target_text == "نص غير المطلوب"
    assert pair.warnings == ["instruction_text_differs"]
    assert TARGET in pair.details["instruction_text_differs"]
    assert "نص غير المطلوب" in pair.details["instruction_text_differs"]


def test_the_same_text_in_both_audios_is_a_warning():
    assert pair_of(("user", (TARGET, A)), SAID).warnings == ["texts_are_the_same"]


LABELS = [
    "Reference audio:",
    "Reference audio",
    "**Reference voice:**",
    "Here is the reference recording:",
    "Listen to this speaker and remember how they sound:",
    "[audio]",
    "(voice sample 1)",
    "الصوت المرجعي:",
    "إليك تسجيل المتحدث:",
    "الصوت المرجعي",
    "Transcript: " + REFERENCE,
    "Reference text: " + REFERENCE,
    "النص المرجعي: " + REFERENCE,
    INSTRUCTION_PREFIX + " " + TARGET,
    "Say this in the voice of the audio: " + REFERENCE,
    "انطق الجملة التالية: " + REFERENCE,
    "None",
    "nan",
    "N/A",
    "...",
    "Say after me please, with this voice, " + TARGET,
]


@pytest.mark.parametrize("label", LABELS)
def test_a_label_before_the_reference_is_not_its_text(label: str):
    forms = [[("user", (label, A, f"{INSTRUCTION_PREFIX} {TARGET}")), SAID]]
    if not label.startswith(INSTRUCTION_PREFIX):  # in the turn before, the known instruction is taken away
        forms.append([("user", label), ("assistant", (A,)), ("user", TARGET), SAID])
    for turns in forms:
        with pytest.raises(RowFault) as fault:
            pair_of(*turns)
        assert fault.value.reason in ("text_unclear", "text_missing")


@pytest.mark.parametrize("label", [label for label in LABELS if TARGET not in label])
def test_a_label_in_the_assistants_turn_is_not_the_targets_text(label: str):
    with pytest.raises(RowFault) as fault:
        pair_of(("user", (REFERENCE, A)), ("assistant", (label, B)))
    assert fault.value.reason == "text_unclear"


@pytest.mark.parametrize(
    "request_text",
    [
        f"Say in this voice: {TARGET}",
        f"Please generate the speech in the voice of the reference audio: {TARGET}",
        f"Please say {TARGET}",
        f"اقرأ النص التالي بصوت المتحدث: {TARGET}",
        f"من فضلك اقرأ {TARGET}",
        f"Read aloud the sentence\n{TARGET}",
        f"قل: {TARGET}",
        f"Text: {TARGET}",
        f"Speak the words «{TARGET}» in this voice",
    ],
)
def test_an_instruction_in_other_words_is_never_the_target(request_text: str):
    for turns in (
        [("user", (REFERENCE, A, request_text)), ("assistant", (B,))],
        [("user", REFERENCE), ("assistant", (A,)), ("user", request_text), ("assistant", (B,))],
    ):
        with pytest.raises(RowFault) as fault:
            pair_of(*turns)
        assert fault.value.reason == "text_unclear"
        assert "assistant's turn" in fault.value.detail


@pytest.mark.parametrize(
    "turns",
    [
        [("user", (REFERENCE, A, TARGET)), ("assistant", (B,))],  # a text or an instruction?
        [("user", "مرحبا بك في البرنامج"), ("user", REFERENCE), ("user", (A,)), SAID],
        [("user", (REFERENCE, A)), ("user", "كلام آخر هنا"), ("user", TARGET), ("assistant", (B,))],
        [("user", REFERENCE), ("assistant", (A,)), ("user", TARGET), ("assistant", "حسنا، إليك"), ("assistant", (B,))],
    ],
)
def test_one_of_several_texts_is_never_chosen(turns):
    with pytest.raises(RowFault) as fault:
        pair_of(*turns)
    assert fault.value.reason == "text_unclear"


@pytest.mark.parametrize(
    "text",
    [
        REFERENCE,
        "قال المعلم: اجلسوا يا أولاد",
        "قال له بصوت خافت: تعال",
        "وجاء في البيان التالي: نرحب بكم",
        "يقول النص: من جد وجد",
        "المرجع الديني: السيد علي",
        "She said in a low voice: come here",
        "قل هو الله أحد",
        "اقرأ باسم ربك الذي خلق",
        "The audio was recorded yesterday.",
        "١٢٣",
        "صوته جميل",
        "نص المرجع",
        "«مرحبا» قالت له",
    ],
)
def test_what_people_say_passes(text: str):
    assert not_spoken(text) is None
    assert texts_of(("user", (text, A)), ("assistant", (TARGET, B))) == (text, TARGET)


@pytest.mark.parametrize(
    ("role", "text", "found"),
    [
        ("system", RELEASED_SYSTEM_PROMPT, None),
        ("system", "<|scene_desc_start|>\nغرفة هادئة\n<|scene_desc_end|>", None),
        ("system", "x <|scene_desc_start|> y", "<|scene_desc_start|>"),
        ("system", "<|scene_desc_end|> y <|scene_desc_start|>", "<|scene_desc_end|>"),
        ("system", "<|scene_desc_start|><|eot_id|><|scene_desc_end|>", "<|scene_desc_start|>"),
        ("system", RELEASED_SYSTEM_PROMPT + "<|AUDIO_OUT|>", "<|AUDIO_OUT|>"),
        ("user", RELEASED_SYSTEM_PROMPT, "<|scene_desc_start|>"),
        ("assistant", "<|scene_desc_start|>x<|scene_desc_end|>", "<|scene_desc_start|>"),
        ("user", "مرحبا <|eot_id|>", "<|eot_id|>"),
        ("user", "مرحبا ＜|eot_id|＞", "＜|eot_id|＞"),
        ("user", "مرحبا <｜end_header_id｜>", "<｜end_header_id｜>"),
        ("assistant", "<|eot\n_id|> مرحبا", r"<|eot\n_id|>"),
        ("user", "< | AUDIO_OUT | >", "< | AUDIO_OUT | >"),
        ("system", "<|scene_desc_start|>x<|scene_desc_end|> <|eot\t_id|>", r"<|eot\t_id|>"),
    ],
)
def test_only_a_system_text_may_hold_a_scene(role: str, text: str, found: str | None):
    turns = [(role, text), ("user", (REFERENCE, A)), SAID]
    if found is None:
        assert pair_of(*turns).system_text == text
        return
    with pytest.raises(RowFault) as fault:
        pair_of(*turns)
    assert fault.value.reason == "text_control_token"
    assert found in fault.value.detail


@pytest.mark.parametrize("text", ["س < ص | ع > ف", "a <|> b", "‹مرحبا› | ‹أهلا›", "<<|", "|x| < |y|"])
def test_signs_that_are_no_token_are_text(text: str):
    assert pair_of(("user", (f"{REFERENCE} {text}", A)), SAID).reference_text == f"{REFERENCE} {text}"


@pytest.mark.parametrize(
    ("chars", "limit", "outcome"),
    [
        (100, 2.0, []),
        (41, 2.0, []),
        (39, 2.0, ["target_text_slow"]),
        (21, 2.0, ["target_text_slow"]),
        (19, 2.0, "text_too_slow"),
        (10, 2.0, "text_too_slow"),
        (10, 0.0, []),
        (10, 1.0, ["target_text_slow"]),
    ],
)
def test_too_few_characters_for_the_audio(chars: int, limit: float, outcome):
    measures = AudioMeasures(10.0, 24000, 1, 0.0, 0.0, 0.0, [])
    text = ("كلمة " * 100)[: chars - 1] + "ا"
    pair = Pair("a.wav", "b.wav", None, "مرحبا بكم " * 6, text, [])
    row = SourceRow(0, "row-0", ChatRow([]), {})
    section = TextSection(min_chars_per_s=limit)
    if isinstance(outcome, list):
        assert check_pair(CheckedRow(row, pair, []), section, measures, measures, same_audio=False) == outcome
        return
    with pytest.raises(RowFault, match="characters per second, at least") as fault:
        check_pair(CheckedRow(row, pair, []), section, measures, measures, same_audio=False)
    assert fault.value.reason == outcome

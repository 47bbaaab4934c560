"""Whether a text can be what is said in an audio, or is a label, an instruction or a placeholder around it.

In: the text that stands where a transcript belongs. Out: why it cannot be one, or None. It looks for what lists really hold
("Reference audio:", "Say this in the voice above: ...", "None"), not for meaning: a label in words of its own passes here, and
`text.min_chars_per_s` is what is left against it. The price: a sentence like "Read this text: come" is rejected, too.
"""

from __future__ import annotations

import re
import unicodedata

from shards.cloning import INSTRUCTION

MAX_HEAD_WORDS = 16  # in front of a colon; a longer head is a sentence
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
COLONS = (":", "：", "﹕", "︓")
HEAD_END = re.compile(r"[:：﹕︓\n«“\"]")
CLOSING = " \"'»”*_)]>"  # what may stand behind a label's colon


def _plain(text: str) -> str:
    """Without case, diacritics and tatweel, with straight apostrophes and single blanks: for comparing only."""
    decomposed = unicodedata.normalize("NFKD", text.replace("’", "'").replace("ـ", ""))
    kept = "".join(c for c in decomposed if not unicodedata.combining(c))
    return " ".join(kept.casefold().split())


def _words(text: str) -> list[str]:
    return [_plain(word) for word in WORD.findall(text)]


def _set(text: str) -> frozenset[str]:
    return frozenset(_plain(text).split())


# Labels and placeholders consist of these: a text of nouns and fillers alone is no transcript.
NOUNS = _set(
    "audio audios voice voices reference ref references speaker sample clip recording prompt transcript transcription text "
    "speech wav placeholder null none nan undefined untitled todo tbd sentence "
    "الصوت صوت بصوت مرجعي المرجعي المرجعية مرجعية عينة العينة المقطع التسجيل المتحدث المتكلم النص الجملة العبارة"
)
FILLERS = _set(
    "a an the this that these here is are of in for to with from at and or s my your his her its following below above given "
    "input output target source first second original use using listen file please n "
    "هذا هذه هو هي إليك التالي التالية من في إلى هنا استمع استخدم أدناه أعلاه الهدف الأصلي"
)
VERBS = _set(
    "say read speak repeat pronounce generate synthesize synthesise clone imitate narrate utter convert produce create "
    "اقرأ انطق قل ردد كرر تحدث تكلم أنشئ حول قلد استنسخ"
)
POLITE = _set("please kindly رجاء الرجاء فضلك")


def not_spoken(text: str, is_request: bool = False) -> str | None:
    """Why `text` (stripped) is no transcript, in words that follow "it"; None when it may be one.

    `is_request`: it stands where instructions stand as well, and nothing else says what was spoken; less is believed then.
    """
    words = _words(text)
    if not words:
        return "holds no letter or digit"
    if _plain(text).startswith(_plain(INSTRUCTION)):
        return "is the instruction"
    if text.rstrip(CLOSING).endswith(COLONS):
        return "ends with a colon, as a label does"
    if _is_label(words):
        return "is a label or a placeholder"
    end = HEAD_END.search(text)
    head = text[: end.start()].strip() if end else ""
    if _is_instruction(_words(head), is_request):
        return f"begins with an instruction or a label ({head[:60]!r})"
    if is_request and (POLITE & set(words[:2]) or (words[0] in VERBS and NOUNS & set(words))):
        return "reads like an instruction"
    return None


def _is_label(words: list[str]) -> bool:
    words = [word for word in words if not word.isdecimal()]
    is_made_of = all(word in NOUNS or word in FILLERS for word in words)
    return bool(words) and is_made_of and (not NOUNS.isdisjoint(words) or words == ["n", "a"])


def _is_instruction(head: list[str], is_request: bool) -> bool:
    """Of the words before a colon, a line break or an opening quote."""
    if not head or len(head) > MAX_HEAD_WORDS:
        return False
    has_noun, has_verb = not NOUNS.isdisjoint(head), not VERBS.isdisjoint(head)
    return _is_label(head) or (has_noun and has_verb) or (is_request and (has_noun or has_verb))

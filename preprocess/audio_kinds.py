"""Says what a file really is, by its first bytes: which decoder may read it, or what a file that is no audio is.

In: bytes. Out: a `Kind`, or None for bytes nobody knows. File names do not count: a wav named .mp3 is a wav. The one
guess is text, which is called so only when no decoder took it.
"""

from __future__ import annotations

from dataclasses import dataclass

from preprocess.reasons import AudioFault
from shards.printable import excerpt

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 4000, 384000  # telephones have 8000; beyond lie damaged headers
MAX_CHANNELS = 16
CONVERT = "convert it, e.g. ffmpeg -i FILE FILE.flac"


@dataclass(frozen=True)
class Kind:
    """What a file is; `decoder` is "pyav" for what libsndfile lacks, "none" for what holds no audio.

    `container` is FFmpeg's name of the form. FFmpeg must not guess it: some forms it knows are lists of other files or
    of network addresses (concat, SDP, HLS), and 64 bytes with the right mark in them would make it open those.
    """

    name: str
    decoder: str
    advice: str = CONVERT
    container: str = ""


PACKED = "unpack it first"
NOT_AUDIO = "name the audio file itself"
# (offset, bytes there, what it is). Longer marks stand before shorter ones.
MARKS: list[tuple[int, bytes, Kind]] = [
    (0, b"version https://git-lfs", Kind("a git-lfs pointer", "none", "run `git lfs pull` where it came from")),
    (0, b"\x00\x05\x16\x07", Kind("a macOS side file (._NAME, AppleDouble)", "none", "take it out of the list")),
    (4, b"ftyp", Kind("m4a or mp4", "pyav", container="mov")),
    (0, b"\x1a\x45\xdf\xa3", Kind("webm or matroska", "pyav", container="matroska")),
    (0, bytes.fromhex("3026b2758e66cf11"), Kind("WMA (ASF)", "pyav", container="asf")),
    (0, b"#!AMR", Kind("AMR", "pyav", container="amr")),
    (0, b"wvpk", Kind("WavPack", "pyav", container="wv")),
    (0, b"MAC ", Kind("Monkey's Audio", "pyav", container="ape")),
    (0, b"TTA1", Kind("True Audio", "pyav", container="tta")),
    (0, b"FLV\x01", Kind("Flash video", "pyav", container="flv")),
    (8, b"AVI ", Kind("AVI video", "pyav", container="avi")),
    (28, b"\x7fFLAC", Kind("Ogg FLAC", "pyav", container="ogg")),  # libsndfile reads its own, not FFmpeg's
    (28, b"Speex   ", Kind("Ogg Speex", "pyav", container="ogg")),
    (0, b"MThd", Kind("MIDI, notes without sound", "none", NOT_AUDIO)),
    (0, b"\x1f\x8b", Kind("a gzip file", "none", PACKED)),
    (0, b"PK\x03\x04", Kind("a zip archive", "none", PACKED)),
    (0, b"\x28\xb5\x2f\xfd", Kind("a zstd file", "none", PACKED)),
    (0, b"\xfd7zXZ", Kind("an xz file", "none", PACKED)),
    (0, b"BZh", Kind("a bzip2 file", "none", PACKED)),
    (0, b"7z\xbc\xaf", Kind("a 7z archive", "none", PACKED)),
    (0, b"Rar!", Kind("a rar archive", "none", PACKED)),
    (257, b"ustar", Kind("a tar archive", "none", PACKED)),
    (0, b"PAR1", Kind("a parquet table", "none", "write its audio to files first")),
    (0, b"\x93NUMPY", Kind("a numpy array", "none", "write it as wav first")),
    (0, b"\x89PNG", Kind("a picture", "none", NOT_AUDIO)),
    (0, b"\xff\xd8\xff", Kind("a picture", "none", NOT_AUDIO)),
    (0, b"%PDF", Kind("a PDF", "none", NOT_AUDIO)),
]
HTML_BEGINS = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--", b"<body", b"<error")
HTML = Kind("a web page (HTML or XML): a failed download", "none", "fetch the file again")
EMPTY = Kind("an empty file", "none", "copy or fetch it again")
ZEROS = Kind("zero bytes only: never written, or lost by a copy", "none", "copy or fetch it again")
ADTS = Kind("AAC (ADTS)", "pyav", container="aac")


def kind_of(data: bytes) -> Kind | None:
    """What the bytes are, where libsndfile is not the one to read them; None: let it try."""
    if not data:
        return EMPTY
    for offset, mark, kind in MARKS:
        if data[offset : offset + len(mark)] == mark:
            return kind
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(HTML_BEGINS):
        return HTML
    if is_adts(data):
        return ADTS
    if not any(data[:4096]) and not any(data[-4096:]):
        return ZEROS
    return None


def is_adts(data: bytes, position: int = 0) -> bool:
    """Whether an AAC frame stands there: MPEG's sync word with layer 0, and a second frame where the first ends."""
    head = data[position : position + 7]
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return False
    following = position + ((head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5)
    behind = data[following : following + 2]
    return following > position + 7 and (not behind or (behind[0] == 0xFF and behind[-1] & 0xF6 in (0xF0, 0xF6)))


def unknown(data: bytes) -> str:
    """What is left to say of bytes that no decoder knows."""
    if data[:4] == b"RIFF":
        return f"a wav that cannot be read; {CONVERT}"
    try:
        text = data[:256].decode("utf-8", "strict" if len(data) <= 256 else "ignore")
    except UnicodeDecodeError:
        text = ""
    if text and all(letter.isprintable() or letter in "\r\n\t" for letter in text):
        return f"text, which begins with {excerpt(text)!r}; {NOT_AUDIO}"
    return f"begins with {data[:8].hex(' ')}, which no decoder knows; {CONVERT}"


def check_form(num_channels: int, sample_rate: int, most: int = MAX_CHANNELS) -> None:
    """Raises AudioFault for channels and rates that no recording of speech has, before memory is spent on them."""
    if not 0 < num_channels <= most:
        raise AudioFault("audio_unreadable", f"{num_channels} channels, at most {most}; a damaged header, or {CONVERT}")
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        detail = f"{sample_rate} Hz; accepted are {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz"
        raise AudioFault("audio_sample_rate", detail)

"""Rows that cannot be read: in both forms of a list each is one reject with its row and line, and the others are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preprocess.list_file import BadRow, RawRow, read_raw_rows
from preprocess.list_row import MAX_ROW_CHARS
from preprocess.sources import SourceRow, read_rows
from shards.errors import DataError
from shards.writer import Reject

ROW = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "نص"}, {"type": "audio", "audio_url": "a.wav"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "آخر"}, {"type": "audio", "audio_url": "b.wav"}]},
    ],
    "speaker": "s",
}
GOOD = json.dumps(ROW, ensure_ascii=False).encode()


def with_field(json_text: bytes) -> bytes:
    return GOOD[:-1] + b', "misc": {"x": ' + json_text + b"}}"


# kind -> (a row's bytes, what its reject says)
FAULTS = {
    "60 kB of brackets": (with_field(b"[" * 30000 + b"]" * 30000), "brackets more than 64 deep"),
    "65 brackets": (with_field(b"[" * 65 + b"]" * 65), "brackets more than 64 deep"),
    "brackets without an end": (with_field(b"[" * 30000), "brackets more than 64 deep"),
    "NaN": (with_field(b"NaN"), "NaN is no JSON number"),
    "Infinity": (with_field(b"-Infinity"), "-Infinity is no JSON number"),
    "an integer of 30 digits": (with_field(b"1" * 30), "is beyond 64 bits"),
    "an integer of 2**64": (with_field(b"18446744073709551616"), "is beyond 64 bits"),
    "an integer of 5000 digits": (with_field(b"7" * 5000), "(5000 digits) is beyond 64 bits"),
    "1e400": (with_field(b"1e400"), "is beyond 64 bits"),
    "half a surrogate pair": (with_field(b'"\\ud800"'), "half of a surrogate pair"),
    "a key twice": (GOOD.replace(b'"role"', b'"text": "x", "text"', 1), "the key 'text' stands twice"),
    "a key twice, escaped": (with_field(b'{"a\\u003a": 1, "a:": 2}'), "the key 'a:' stands twice"),
    "a byte that is not UTF-8": (GOOD.replace("نص".encode(), b"caf\xe9"), "not UTF-8: byte 0xe9 at byte"),
    "cp1256": (json.dumps(ROW, ensure_ascii=False).encode("cp1256"), "it may be WINDOWS-1256"),
    "a zero byte in a text": (GOOD.replace(b"a.wav", b"a\0.wav"), "a raw '\\x00' inside a string"),
    "a comma too many": (GOOD[:-1] + b",}", "not valid JSON: "),
    "no comma": (GOOD.replace(b'}], "speaker"', b'}] "speaker"'), "not valid JSON: Expecting ',' delimiter"),
    "single quotes": (GOOD.replace(b'"s"', b"'s'"), "not valid JSON: Expecting value"),
    "an opening bracket too many": (GOOD.replace(b"[", b"[[", 1), "not valid JSON: "),
    "a closing bracket too many": (GOOD.replace(b"}], ", b"}]], "), "not valid JSON: "),
    "a row's bracket too early": (GOOD.replace(b"}], ", b"}]}, "), "not valid JSON: "),
    "a row's bracket twice": (GOOD + b"}", "not valid JSON: "),
    "no closing bracket": (GOOD[:-1], "not valid JSON: "),
    "a quote missing": (GOOD.replace(b'a.wav"', b"a.wav"), "not valid JSON: "),
    "a word": (b"word", "not valid JSON: "),
}


def written(folder: Path, form: str, rows: list[bytes]) -> Path:
    path = folder / ("list.json" if form == "array" else "list.jsonl")
    path.write_bytes(b"[" + b",\n".join(rows) + b"]" if form == "array" else b"\n".join(rows) + b"\n")
    return path


@pytest.mark.parametrize("form", ["array", "lines"])
@pytest.mark.parametrize("kind", FAULTS)
def test_one_bad_row_is_one_reject_in_both_forms(tmp_path: Path, kind: str, form: str):
    data, words = FAULTS[kind]
    for bad in (0, 1, 2):
        rows = [GOOD] * 3
        rows[bad] = data
        path = written(tmp_path, form, rows)
        if kind == "a word" and bad == 0 and form == "lines":
            continue  # no list begins like that
        found = list(read_rows(path))
        kinds = [type(row) for row in found]
        assert kinds == [Reject if number == bad else SourceRow for number in range(3)], found
        reject = found[bad]
        assert isinstance(reject, Reject)
        assert reject.reason == "row_invalid"
        assert reject.detail.startswith(f"row {bad} (line {bad + 1}): ")
        assert words in reject.detail
        assert len(reject.detail) < 400


def test_a_broken_row_does_not_take_the_next_along(tmp_path: Path):
    """Every second row without its last bracket, beyond the size of what is read at once."""
    path = written(tmp_path, "array", [GOOD[:-1] if number % 2 else GOOD for number in range(3000)])
    kinds = [type(row) for row in read_raw_rows(path)]
    assert kinds == [RawRow, BadRow] * 1500


@pytest.mark.parametrize("form", ["array", "lines"])
def test_a_row_too_large_is_one_reject(tmp_path: Path, form: str):
    path = written(tmp_path, form, [GOOD, with_field(b'"' + b"x" * (MAX_ROW_CHARS + 9) + b'"'), GOOD, GOOD])
    found = list(read_raw_rows(path))
    assert [type(row) for row in found] == [RawRow, BadRow, RawRow, RawRow]
    assert "more than 4 MB" in found[1].detail  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("form", ["array", "lines"])
def test_rows_across_the_blocks_of_reading(tmp_path: Path, form: str):
    rows = [with_field(json.dumps("ص" * (number * 7919 % 70000)).encode()) for number in range(60)]
    found = list(read_rows(written(tmp_path, form, rows)))
    assert [row.chat.misc for row in found] == [json.loads(row)["misc"] for row in rows]  # pyright: ignore
    assert [row.row for row in found] == list(range(60))


def test_null_and_empty_ids_are_no_ids(tmp_path: Path):
    rows = [GOOD[:-1] + b', "id": %s}' % own for own in (b"null", b'""', b"null", b"7", b'"seven"')]
    names = [row.id for row in read_rows(written(tmp_path, "lines", rows))]
    assert names == ["row-0", "row-1", "row-2", "7", "seven"]


def test_commas_and_blank_lines_that_do_no_harm(tmp_path: Path):
    path = tmp_path / "list.json"
    path.write_bytes(b"\n\n [\r\n" + GOOD + b" ,\r\n\r\n" + GOOD + b",\n]\n \n")
    assert [type(row) for row in read_raw_rows(path)] == [RawRow, RawRow]
    path.write_bytes(GOOD + b"\r\n\r\n  \n\xef\xbb\xbf" + GOOD + b"\r\n")
    assert [row.line for row in read_raw_rows(path)] == [1, 4]
    path.write_bytes(b"[" + GOOD + b",," + GOOD + b', "text", 12, null, [{}]]')
    assert [type(row) for row in read_rows(path)] == [SourceRow, Reject, SourceRow, Reject, Reject, Reject, Reject]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_another_encoding_is_named_with_its_conversion(tmp_path: Path, encoding: str):
    path = tmp_path / "a list.json"
    path.write_bytes(json.dumps([ROW], ensure_ascii=False).encode(encoding))
    with pytest.raises(DataError, match=r"expected UTF-8; convert it: iconv -f UTF-(16|32)") as error:
        list(read_raw_rows(path))
    assert "'a list.json'" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_several_bad_lines_first_do_not_end_the_list(tmp_path: Path):
    path = tmp_path / "list.jsonl"
    path.write_bytes(b"{bad\n{worse\n" + b"\n".join([GOOD] * 9))
    assert [type(row) for row in read_raw_rows(path)] == [BadRow] * 2 + [RawRow] * 9
    path.write_bytes(b'{\n"data": [\n' + b",\n".join([GOOD] * 9) + b"]}")
    with pytest.raises(DataError, match="the top level is an object"):
        list(read_raw_rows(path))


def test_many_blanks_before_a_list_are_no_empty_list(tmp_path: Path):
    path = tmp_path / "list.json"
    path.write_bytes(b" \n" * 500_000 + b"[" + GOOD + b"]")
    assert [type(row) for row in read_raw_rows(path)] == [RawRow]


def test_a_fault_is_named_also_where_its_row_has_no_end(tmp_path: Path):
    path = written(tmp_path, "array", [with_field(b"NaN, oops"), *[GOOD] * 30_000])
    first = next(read_raw_rows(path))
    assert isinstance(first, BadRow)
    assert "NaN is no JSON number" in first.detail


def test_the_detail_of_a_reject_is_one_line(tmp_path: Path):
    path = written(tmp_path, "lines", [GOOD.replace(b'"user"', b'"us\\ner\\u202e\\u001b[31m"')])
    reject = next(read_rows(path))
    assert isinstance(reject, Reject)
    assert reject.detail.isprintable()


@pytest.mark.parametrize("end", [b"\r", b"\r\r", b" \r\t", b"\r\n\r"])
def test_lines_that_end_as_on_an_old_mac_are_rows(tmp_path: Path, end: bytes):
    path = tmp_path / "list.jsonl"
    rows = [GOOD, b'{"messages": [', GOOD[:-1] + b', "misc": {\r "x":\r {"y": 1}}}', GOOD, b"word", GOOD]
    path.write_bytes(end.join([rows[0], rows[1], rows[3], rows[4], rows[5]]))
    assert [type(row) for row in read_raw_rows(path)] == [RawRow, BadRow, RawRow, BadRow, RawRow]
    path.write_bytes(b"\n".join(rows))  # a CR inside a row of other lists stays what it is: a blank
    assert [type(row) for row in read_raw_rows(path)] == [RawRow, BadRow, RawRow, RawRow, BadRow, RawRow]


def test_old_mac_lines_longer_than_a_block_are_whole(tmp_path: Path):
    path = tmp_path / "list.jsonl"
    long = with_field(b'"' + b"x" * 300_000 + b'"')
    too_large = with_field(b'"' + b"y" * (5 * MAX_ROW_CHARS) + b'"')
    path.write_bytes(b"\r".join([GOOD, long, too_large, GOOD, long]))
    found = list(read_raw_rows(path))
    assert [type(row) for row in found] == [RawRow, RawRow, BadRow, RawRow, RawRow]
    assert [row.line for row in found] == [1, 2, 3, 4, 5]
    path.write_bytes(b"\r".join([GOOD, GOOD[:-9]]))
    with pytest.raises(DataError, match="line 2: the list ends inside a row"):
        list(read_raw_rows(path))


@pytest.mark.parametrize("key", ["id", "speaker", "start_index", "misc", "messages"])
def test_rows_of_another_form_behind_a_broken_one_are_found(tmp_path: Path, key: str):
    path = tmp_path / "list.json"
    values = {"id": '"a"', "speaker": '"b"', "start_index": "1", "misc": "{}", "messages": "[]"}
    other = f'{{\n "{key}" : {values[key]}, "text": [{{"type": "text"}}]}}'.encode()
    path.write_bytes(b"[" + b" ,\n".join([GOOD, GOOD.replace(b'"s"', b"'s'"), other, b'{"own": 1}', GOOD]) + b"]")
    assert [type(row) for row in read_raw_rows(path)] == [RawRow, BadRow, RawRow, RawRow, RawRow]

"""Reading what somebody else wrote: every outcome is a value or one short line."""

import os
import time
from pathlib import Path

import pytest

from mistral_chat.errors import PromptError, one_line, shown
from mistral_chat.files import parse_json, read_json, read_small_file, read_text, read_toml


def _refused(path: Path, read=read_json, **options) -> str:  # type: ignore[no-untyped-def]
    begun = time.process_time()
    with pytest.raises(PromptError) as error:
        read(path, PromptError, **options)
    assert time.process_time() - begun < 5
    line = one_line(error.value)
    assert len(line) <= 300
    assert line.isprintable()
    return line


def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "no regular file" in _refused(tmp_path / "fifo")


def test_a_device_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "params.json").symlink_to("/dev/zero")
    assert "no regular file" in _refused(tmp_path / "params.json")


def test_a_sparse_terabyte_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    assert "1,099,511,627,776 bytes: expected at most" in _refused(tmp_path / "sparse")


def test_a_folder_a_missing_file_and_an_impossible_name_are_refused(tmp_path: Path) -> None:
    assert "is a folder" in _refused(tmp_path)
    assert "does not exist" in _refused(tmp_path / "nothing")
    assert "cannot be read" in _refused(tmp_path / "a\0b")
    assert "cannot be read" in _refused(tmp_path / ("x" * 5000))


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "Git LFS pointer" in _refused(tmp_path / "x", read_small_file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("1" * 4000, "4000 digits"),
        ("1" * 10_000, "10000 digits"),
        ("1e999", "1e999"),
        ("[NaN]", "NaN"),
        ("-Infinity", "-Infinity"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"' + "n" * 9000 + '": 1, "' + "n" * 9000 + '": 2}', "twice"),
        ('{"a": 1', "line 1, column 8"),
        ("", "line 1, column 1"),
    ],
)
def test_json_that_is_none_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert said in _refused(tmp_path / "x.json")


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 50_000, "a = " + "1" * 5000, "a =", "a = 1\na = 2"]
)
def test_toml_that_is_none_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    assert "TOML" in _refused(tmp_path / "x.toml", read_toml)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_text(tmp_path / "x", PromptError) == '{"a": 1}'
    assert read_json(tmp_path / "x", PromptError) == {"a": 1}
    (tmp_path / "y").write_bytes(b"\xef\xbb\xbfa = 1")
    assert read_toml(tmp_path / "y", PromptError) == {"a": 1}


@pytest.mark.parametrize("data", [b"caf\xe9", b"\xef\xbb\xbfcaf\xe9"])
def test_the_offset_of_what_is_no_utf8_counts_the_files_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    assert f"byte 0xe9 at offset {len(data) - 1}" in _refused(tmp_path / "x")


def test_numbers_keep_their_value() -> None:
    assert parse_json("[18446744073709551616, -1, 0.5, 1e300]", "x", PromptError) == [
        1 << 64, -1, 0.5, 1e300,
    ]  # fmt: skip


def test_a_message_is_one_clean_line_that_keeps_its_end() -> None:
    assert one_line("a\n\tb  c") == "a b c"
    assert "\x1b" not in one_line("name \x1b]52;c;AAAA\x07 is odd\x9b31m")
    line = one_line("begin " + "x" * 5000 + " do this")
    assert len(line) == 300
    assert line.startswith("begin x")
    assert line.endswith("x do this")


def test_a_value_is_shown_short_whatever_it_is() -> None:
    assert shown("ab") == "'ab'"
    assert len(shown("x" * 5000)) == 60
    assert len(shown(10**5000)) <= 60
    assert len(shown([10**200] * 9)) <= 60

"""Tokens kept for the next run: the same stream or a new one, never a wrong one, and never a reason to stop."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera_shared import token_cache
from tessera_shared.corpus import Document
from tessera_shared.packing import TokenStream
from tessera_shared.token_cache import cached_stream, token_folder
from tessera_shared.tokens import Tokenizer

CODEC, OTHER = Tokenizer.train_bpe(["some text"], 260), Tokenizer.train_bpe(["other text"], 260)
DOCUMENTS = [Document("a", "some text\n" * 30), Document("b", ""), Document("c", "é")]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time that documents are encoded."""
    calls, plain = [], Tokenizer.encode_documents
    monkeypatch.setattr(Tokenizer, "encode_documents", lambda self, texts: calls.append(1) or plain(self, texts))
    return calls


def assert_same(one: TokenStream, other: TokenStream) -> None:
    for left, right in ((one.token_ids_X, other.token_ids_X), (one.starts, other.starts)):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_a_stream_is_encoded_once_and_is_then_the_same(tmp_path: Path, encoded: list[int]) -> None:
    said: list[str] = []
    streams = [cached_stream(tmp_path / "new" / "cache", DOCUMENTS, CODEC, end_id=0, say=said.append) for _ in "12"]
    assert_same(*streams)
    assert len(encoded) == 1
    assert said == ["encoding 3 documents"]
    assert not [path for path in (tmp_path / "new" / "cache").iterdir() if path.name.startswith(".")]


def test_a_stream_that_nobody_used_for_a_month_goes_when_another_is_kept(tmp_path: Path, encoded: list[int]) -> None:
    month = time.time() - 40 * 86400
    for end_id in (0, None):
        cached_stream(tmp_path, DOCUMENTS, CODEC, end_id=end_id)
    for path in tmp_path.iterdir():
        os.utime(path, (month, month))
    cached_stream(tmp_path, DOCUMENTS, CODEC, end_id=0)
    cached_stream(tmp_path, DOCUMENTS[:1], CODEC, end_id=0)
    assert len(encoded) == 3
    cached_stream(tmp_path, DOCUMENTS, CODEC, end_id=0)
    assert len(encoded) == 3, "it was used, so it was kept"
    cached_stream(tmp_path, DOCUMENTS, CODEC, end_id=None)
    assert len(encoded) == 4


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=4),
    moved=st.integers(0, 8),
)
def test_other_texts_borders_tokenizers_and_ends_have_files_of_their_own(texts: list[str], moved: int) -> None:
    documents = [Document(str(index), text) for index, text in enumerate(texts)]
    key = token_cache._key(documents, CODEC, 0)
    assert key == token_cache._key([Document("renamed", text) for text in texts], CODEC, 0)
    whole = "".join(texts)
    for other in ([whole[:moved], whole[moved:]], [*texts, ""], [*texts[1:], texts[0] + "x"]):
        if other != texts:
            assert token_cache._key([Document("", text) for text in other], CODEC, 0) != key
    assert len({key, token_cache._key(documents, OTHER, 0), token_cache._key(documents, CODEC, None)}) == 3


def test_a_file_flipped_cut_or_under_anothers_name_is_made_anew_with_one_line(
    tmp_path: Path, encoded: list[int]
) -> None:
    truth = cached_stream(tmp_path, DOCUMENTS, CODEC, end_id=0)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    cached_stream(tmp_path, DOCUMENTS, CODEC, end_id=None)
    other = next(file for file in tmp_path.iterdir() if file != path).read_bytes()
    spoiled = [whole[:length] for length in (0, 7, 40, len(whole) - 1)] + [whole + b"\0", other]
    spoiled += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    for count, data in enumerate(spoiled, 3):
        said: list[str] = []
        path.write_bytes(data)
        assert_same(cached_stream(tmp_path, DOCUMENTS, CODEC, end_id=0, say=said.append), truth)
        if len(encoded) < count:  # a flip in the header's padding, say, which changes no number
            encoded.append(1)
            assert said == []
        else:
            (line,) = said
            assert line.startswith(f"encoding 3 documents again: {path} is ")
            assert path.read_bytes() == whole


@pytest.mark.parametrize("change", [("_FORMAT_VERSION", 1), ("version", lambda name: "9.9")])
def test_a_file_of_another_version_is_replaced_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int], change: tuple[str, object]
) -> None:
    with monkeypatch.context() as then:
        then.setattr(token_cache, *change)
        cached_stream(tmp_path, DOCUMENTS, CODEC, end_id=0)
    said: list[str] = []
    for _ in range(2):
        cached_stream(tmp_path, DOCUMENTS, CODEC, end_id=0, say=said.append)
    assert len(encoded) == 2
    assert len(list(tmp_path.iterdir())) == len(said) == 1
    assert "is of tessera" in said[0]


def a_file_in_the_way(folder: Path) -> None:
    folder.write_text("mine")


def a_folder_where_the_file_goes(folder: Path) -> None:
    (folder / f"{token_cache._key(DOCUMENTS, CODEC, 0)}.safetensors").mkdir(parents=True)


@pytest.mark.parametrize("obstacle", [a_file_in_the_way, a_folder_where_the_file_goes])
def test_where_nothing_can_be_kept_the_stream_is_made_and_said_so(
    tmp_path: Path, obstacle: Callable[[Path], None]
) -> None:
    said: list[str] = []
    obstacle(tmp_path / "cache")
    stream = cached_stream(tmp_path / "cache", DOCUMENTS, CODEC, end_id=0, say=said.append)
    assert_same(stream, cached_stream(None, DOCUMENTS, CODEC, end_id=0))
    assert len(said) == 2
    assert "tokens are not kept" in said[1]


def test_a_disk_that_fills_up_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, arrays: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(token_cache, "write_tensors", full)
    said: list[str] = []
    assert cached_stream(tmp_path, DOCUMENTS, CODEC, end_id=0, say=said.append).token_ids_X.size
    assert "No space left" in said[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("/x", "/x/tessera/tokens"), ("", "/home/me/.cache/tessera/tokens"), ("rel", "/home/me/.cache/tessera/tokens")],
)
def test_the_folder_is_the_users_as_xdg_says(monkeypatch: pytest.MonkeyPatch, variable: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert token_folder() == Path(expected)


def test_a_user_without_a_home_has_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert token_folder() is None

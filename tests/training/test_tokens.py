"""Tokenizers: exact round trips, the same tokenizer every time, and files that are not one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera_shared.errors import DataError, FormatError
from tessera_shared.tokens import END_OF_TEXT, Tokenizer
from tessera_shared.validate_text import check_text, check_vocabulary, decode_utf8

TEXTS = [
    "def f(x):\n    return x + 1\n" * 5,
    "the cat sat on the mat, and then the cat sat again\n" * 4,
    "Ärger 漢字 🙂",
]


@pytest.fixture(scope="module")
def codec() -> Tokenizer:
    return Tokenizer.train_bpe(TEXTS, 300)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_decoding_what_was_encoded_gives_the_text_back(codec: Tokenizer, text: str) -> None:
    assert codec.decode(codec.encode(text)) == text
    assert next(codec.encode_documents([text])) == codec.encode(text)


def test_training_twice_gives_the_same_tokenizer_and_merges_shorten_text(codec: Tokenizer) -> None:
    again = Tokenizer.train_bpe(iter(TEXTS), 300)
    assert again.checksum == codec.checksum
    assert codec.vocab_size == 300
    assert codec.end_id == 0
    assert len(codec.encode(TEXTS[0])) < len(TEXTS[0].encode())


def test_every_byte_has_an_id_so_a_short_text_gives_a_smaller_vocabulary() -> None:
    codec = Tokenizer.train_bpe(["ab"], 5000)
    assert codec.vocab_size == 258  # the end of text, 256 bytes, one merge
    assert codec.decode(codec.encode("漢\0\x7f")) == "漢\0\x7f"


def test_a_saved_tokenizer_is_the_same_one_when_it_is_loaded(codec: Tokenizer, tmp_path: Path) -> None:
    codec.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.text == codec.text
    assert loaded.encode(TEXTS[1]) == codec.encode(TEXTS[1])
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_the_name_of_a_special_token_is_text_in_a_document_and_special_in_a_prompt(codec: Tokenizer) -> None:
    ids = codec.encode(f"a{END_OF_TEXT}b")
    assert 0 not in ids
    assert codec.decode(ids) == f"a{END_OF_TEXT}b"
    assert codec.encode_prompt(f"a{END_OF_TEXT}b").count(0) == 1
    assert codec.decode([*codec.encode("a"), 0], keep_special=False) == "a"


def test_a_file_that_asks_for_truncation_or_padding_does_not_get_it_for_documents(codec: Tokenizer) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(codec.text)
    inner.enable_truncation(max_length=3)
    inner.enable_padding(length=64)
    assert Tokenizer(inner.to_str()).encode(TEXTS[0]) == codec.encode(TEXTS[0])


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"\xff\xfe", b'{"model": 3}', b"not json"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere.json")


def test_no_text_and_too_small_a_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        Tokenizer.train_bpe([], 300)
    with pytest.raises(DataError, match="every byte"):
        Tokenizer.train_bpe(TEXTS, 256)


def test_half_a_character_is_refused_wherever_it_comes_in(codec: Tokenizer) -> None:
    for use in (codec.encode, codec.encode_prompt, lambda text: Tokenizer.train_bpe([text], 300)):
        with pytest.raises(DataError, match=r"U\+D800"):
            use("ab\ud800")
    assert check_text("fine", "x") == "fine"


@given(
    head=st.binary(max_size=9).map(lambda data: data.hex().encode()),
    bad=st.sampled_from([b"\xff", b"\xc3(", b"\xed\xa0\x80"]),
)
def test_the_byte_where_utf8_ends_is_named(head: bytes, bad: bytes) -> None:
    with pytest.raises(DataError, match=rf"^f\.txt: byte {len(head)} = 0x"):
        decode_utf8(head + bad, "f.txt")


def test_a_tokenizer_may_be_smaller_than_the_vocabulary_and_not_larger() -> None:
    check_vocabulary(300, 300, "t")
    check_vocabulary(299, 300, "t")
    with pytest.raises(DataError, match="t: 301 ids"):
        check_vocabulary(301, 300, "t")

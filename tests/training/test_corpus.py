"""Corpus and packing: what is read, how it is divided, and that batches are a pure function of seed and step."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera_parity.budget import chance_limit
from tessera_shared.batch import Batch
from tessera_shared.corpus import load_corpus, read_corpus, standard_library
from tessera_shared.errors import DataError
from tessera_shared.objectives import IGNORE_INDEX
from tessera_shared.packing import (
    TokenStream,
    batch_at,
    batches_in_order,
    join_documents,
    round_keys,
    shuffled,
    split_rows,
)
from tessera_shared.randomness import stream_key

DOCUMENTS = st.lists(st.lists(st.integers(1, 99), max_size=12), min_size=1, max_size=8).filter(any)


def _all_windows(stream: TokenStream, length: int) -> list[Batch]:
    return list(batches_in_order(stream, rows=1, length=length))


# ---- packing


@given(documents=DOCUMENTS, length=st.integers(1, 9), end_id=st.sampled_from([None, 0]))
def test_each_token_but_a_documents_first_is_a_label_exactly_once_an_epoch(
    documents: list[list[int]], length: int, end_id: int | None
) -> None:
    stream = join_documents(documents, end_id=end_id)
    closed = [ids + ([] if end_id is None else [end_id]) for ids in documents if ids]
    labels = [batch.labels_BT[batch.labels_BT != IGNORE_INDEX] for batch in _all_windows(stream, length)]
    assert np.concatenate(labels).tolist() == [token for ids in closed for token in ids[1:]]


@given(documents=DOCUMENTS, length=st.integers(1, 9))
def test_windows_hold_the_stream_and_say_which_document_a_token_is_of(documents: list[list[int]], length: int) -> None:
    stream = join_documents(documents)
    owners = [index for index, ids in enumerate(ids for ids in documents if ids) for _ in ids]
    place = 0
    for batch in _all_windows(stream, length):
        real_T = batch.segments_BT[0] >= 0
        size = int(real_T.sum())
        assert real_T[:size].all()  # padding only at the end
        here = np.array(owners[place : place + size])
        np.testing.assert_array_equal(batch.token_ids_BT[0, :size], stream.token_ids_X[place : place + size])
        np.testing.assert_array_equal(batch.segments_BT[0, :size], here - here[0])
        starts = [int(np.argmax(here == owner)) for owner in here]
        np.testing.assert_array_equal(batch.positions_BT[0, :size], np.arange(size) - starts)
        assert (batch.positions_BT[0, size:] == -1).all()
        assert (batch.labels_BT[0, size:] == IGNORE_INDEX).all()
        place += size
        assert all(field.dtype == np.int32 for field in batch)
    assert place == len(owners)


@given(documents=DOCUMENTS, length=st.integers(1, 5), rows=st.integers(1, 7), seed=st.integers(0, 2**64 - 1))
def test_an_epoch_takes_each_window_once_however_it_is_cut_into_batches(
    documents: list[list[int]], length: int, rows: int, seed: int
) -> None:
    stream = join_documents(documents)
    windows = stream.num_windows(length)
    steps = -(-2 * windows // rows)
    taken = [batch_at(stream, step, rows=rows, length=length, seed=seed) for step in range(steps)]
    rows_taken = [row.tobytes() for batch in taken for row in batch.token_ids_BT]
    whole = Counter(batch.token_ids_BT[0].tobytes() for batch in _all_windows(stream, length))
    assert Counter(rows_taken[:windows]) == whole
    assert Counter(rows_taken[windows : 2 * windows]) == whole
    one_by_one = [batch_at(stream, n, rows=1, length=length, seed=seed).token_ids_BT[0] for n in range(2 * windows)]
    assert rows_taken[: 2 * windows] == [row.tobytes() for row in one_by_one]


def test_the_order_depends_on_the_seed_and_on_the_epoch_and_never_changes() -> None:
    stream = join_documents([list(range(64))])
    orders = [
        tuple(batch_at(stream, epoch, rows=64, length=1, seed=seed).token_ids_BT[:, 0].tolist())
        for seed in (0, 1)
        for epoch in (0, 1, 10**9)
    ]
    assert len(set(orders)) == 6
    assert tuple(range(64)) not in orders
    assert orders[0][:8] == (46, 48, 60, 57, 54, 55, 0, 45)


@given(size=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_shuffling_is_a_permutation_of_any_size(size: int, seed: int) -> None:
    keys = round_keys(stream_key(seed, "permutation"))
    assert sorted(shuffled(index, size, keys) for index in range(size)) == list(range(size))


def test_shuffling_sends_every_index_everywhere() -> None:
    found = np.zeros((5, 5), dtype=int)
    for seed in range(2000):
        keys = round_keys(stream_key(seed, "even"))
        for index in range(5):
            found[index, shuffled(index, 5, keys)] += 1
    # each cell is binomial(2000, 1/5): mean 400, variance 2000 * 1/5 * 4/5
    assert abs(found - 400).max() < chance_limit(found.size) * (2000 * 0.2 * 0.8) ** 0.5


def test_large_streams_shuffle_without_making_the_permutation() -> None:
    keys = round_keys(stream_key(0, "large"))
    size = 2**40 + 12345
    places = [shuffled(index, size, keys) for index in range(200)]
    assert len(set(places)) == 200
    assert all(0 <= place < size for place in places)


@given(rows=st.integers(1, 12), parts=st.integers(1, 12))
def test_micro_batches_are_the_batch_cut_evenly_or_refused(rows: int, parts: int) -> None:
    batch = batch_at(join_documents([list(range(50))]), 0, rows=rows, length=3, seed=0)
    if rows % parts:
        with pytest.raises(DataError, match="accumulation"):
            split_rows(batch, parts)
        return
    pieces = split_rows(batch, parts)
    assert len(pieces) == parts
    for name, field in batch._asdict().items():
        np.testing.assert_array_equal(np.concatenate([getattr(piece, name) for piece in pieces]), field)


def test_a_limited_evaluation_is_spread_over_the_stream_in_equal_shapes() -> None:
    stream = join_documents([list(range(1, 101))])
    batches = list(batches_in_order(stream, rows=2, length=3, limit=3))
    assert [batch.token_ids_BT[:, 0].tolist() for batch in batches] == [[1, 16], [34, 52], [67, 85]]
    every = list(batches_in_order(stream, rows=3, length=7))
    assert {batch.token_ids_BT.shape for batch in every} == {(3, 7)}
    assert sum(int((batch.segments_BT >= 0).sum()) for batch in every) == 100


def test_no_tokens_and_steps_before_the_first_are_refused() -> None:
    with pytest.raises(DataError, match="no tokens"):
        join_documents([[], []], end_id=0)
    with pytest.raises(DataError, match="step = -1"):
        batch_at(join_documents([[1]]), -1, rows=1, length=1, seed=0)
    with pytest.raises(DataError, match="length = 0"):
        batch_at(join_documents([[1]]), 0, rows=1, length=0, seed=0)


# ---- corpus


def test_the_standard_library_is_divided_by_module_and_pinned() -> None:
    corpus = load_corpus()
    sides = [{document.name.partition("/")[0] for document in side} for side in (corpus.train, corpus.held_out)]
    assert not sides[0] & sides[1]
    assert "asyncio" in sides[0] | sides[1]
    assert not any("site-packages" in document.name for document in corpus.train)
    assert corpus.manifest["bytes"] > 1_000_000
    assert 0.01 < corpus.manifest["held_out_bytes"] / corpus.manifest["bytes"] < 0.3
    assert corpus.checksum == standard_library().checksum


def test_a_library_file_that_is_not_utf8_is_left_out_and_named(tmp_path: Path) -> None:
    for name, data in {"a.py": b"x = 1\n", "b/c.py": b"y = 2\n", "b/bad.py": b"# \xe9\n", "tests/t.py": b"z\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    corpus = standard_library(tmp_path)
    assert corpus.manifest["skipped"] == ["b/bad.py"]
    assert {document.name for document in corpus.train + corpus.held_out} == {"a.py", "b/c.py"}


def test_files_folders_json_lines_and_parquet_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "more" / ".hidden").mkdir(parents=True)
    (tmp_path / "more" / "b.txt").write_text("two\n")
    (tmp_path / "more" / "a.md").write_text("one\n")
    (tmp_path / "more" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "more" / ".hidden" / "c.txt").write_text("never\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "id": 3}\n')
    parquet.write_table(pyarrow.table({"text": ["five", "six"], "id": [1, 2]}), tmp_path / "rows.parquet")
    (tmp_path / "named.weird").write_text("seven\n")
    names = ["more", "rows.jsonl", "rows.parquet", "named.weird"]
    corpus = read_corpus([tmp_path / name for name in names])
    texts = {document.text.strip() for document in corpus.train + corpus.held_out}
    assert texts == {"one", "two", "three", "four", "five", "six", "seven"}
    assert corpus.manifest["skipped"] == ["more/picture.png"]
    assert corpus.held_out
    json.dumps(corpus.manifest)


def test_the_checksum_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place / "text").mkdir(parents=True)
        for name in ("a.txt", "b.txt"):
            (tmp_path / place / "text" / name).write_text(f"{name}\n")
    first, second = (read_corpus([tmp_path / place / "text"]).checksum for place in ("here", "there"))
    assert first == second
    (tmp_path / "there" / "text" / "b.txt").write_text("b.txt!\n")
    assert read_corpus([tmp_path / "there" / "text"]).checksum != first


def test_copies_of_a_text_are_on_one_side_and_no_text_is_on_both(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"document {index % 40}"}) for index in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    corpus = read_corpus([tmp_path / "rows.jsonl"])
    train, held_out = ({document.text for document in side} for side in (corpus.train, corpus.held_out))
    assert len(corpus.train) + len(corpus.held_out) == 120
    assert train
    assert held_out
    assert not train & held_out


def test_a_lone_document_is_cut_at_a_line_and_a_lone_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("line\n" * 64)
    corpus = read_corpus([path])
    assert [document.text for document in corpus.train + corpus.held_out] == ["line\n" * 60, "line\n" * 4]
    path.write_text("a single line")
    corpus = read_corpus([path])
    assert len(corpus.train) == 1
    assert corpus.held_out == ()


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("a.txt", b"abc\xff", r"a\.txt: byte 3 = 0xff"),
        ("a.txt", b" \n\t", "no text"),
        ("a.jsonl", b'{"text": "ok"}\n{"text"', r"a\.jsonl: line 2: not JSON"),
        ("a.jsonl", b'{"txt": "ok"}\n', r"a\.jsonl: line 1: .*string 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl: line 1"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl: line 1"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl: line 1: character 0 = U\+D800"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl: byte 10"),
        ("a.parquet", b"PAR1 this is not", r"a\.parquet: not readable"),
    ],
)
def test_text_that_cannot_be_used_is_refused_by_place(tmp_path: Path, name: str, data: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=found) as caught:
        read_corpus([tmp_path])
    assert "\n" not in str(caught.value)


def test_parquet_without_a_text_column_or_with_a_hole_in_it_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for table, found in (({"words": ["a"]}, "columns words"), ({"text": ["a", None]}, "row 2")):
        parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
        with pytest.raises(DataError, match=found):
            read_corpus([tmp_path / "rows.parquet"])


def test_a_path_that_is_not_there_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: not found"):
        read_corpus([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="no text"):
        read_corpus([tmp_path])

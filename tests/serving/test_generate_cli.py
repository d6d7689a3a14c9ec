"""`tessera generate` prints text as it comes: whole characters, each at once, and a line that ends however it ends."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tessera_shared.cli import generate
from tessera_shared.cli.edge import run_commands
from tessera_shared.cli.main import app
from tessera_shared.init import initial_weights
from tessera_shared.presets import preset
from tessera_shared.text_stream import stream_text
from tessera_shared.tokens import Tokenizer
from tessera_shared.weights import save_model

CODEC = Tokenizer.train_bpe(["the cat sat on the mat, 漢字 and 🙂 and the cat sat again\n" * 4], 300)
MAIN = "from tessera_shared.cli.entry import main; main()"
EURO = CODEC.encode("€")  # three bytes, three ids
BYTE_FALLBACK = {  # as Llama's and Mistral's: a space is a mark, and a byte that no token has is a token of its own
    "version": "1.0", "added_tokens": [], "truncation": None, "padding": None, "normalizer": None,
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
    "post_processor": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    "model": {
        "type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "▁", "merges": [],
        "vocab": {"▁": 0, "a": 1, "b": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)},
    },
}  # fmt: skip
FALLBACK = Tokenizer(json.dumps(BYTE_FALLBACK))


@pytest.mark.parametrize("keep_special", [True, False])
@given(ids=st.lists(st.integers(0, 299), max_size=40), num_context=st.integers(0, 40))
@example(ids=[*EURO, 0, EURO[0], 0, *EURO], num_context=0)
@example(ids=[EURO[0], EURO[1]], num_context=0)
def test_pieces_are_the_text_and_each_stays_what_it_was(ids: list[int], num_context: int, keep_special: bool) -> None:
    text = CODEC.decode(ids, keep_special=keep_special)
    context = ids[:num_context]
    said = CODEC.decode(context, keep_special=keep_special)
    if said.endswith("\ufffd"):
        return  # a prompt is text, and ends with a character
    pieces = list(stream_text(CODEC, ids[num_context:], context=context, keep_special=keep_special))
    assert said + "".join(pieces) == text
    assert all(pieces)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@example("🙂€é")
def test_a_character_of_several_tokens_comes_whole_and_with_its_last(text: str) -> None:
    for codec in (CODEC, FALLBACK):
        ids = codec.encode(text)
        said = ""
        for piece in stream_text(codec, ids):
            said += piece
            assert codec.decode(ids).startswith(said)
        assert said == codec.decode(ids)
    alone = [list(stream_text(CODEC, CODEC.encode(letter))) for letter in text]
    assert alone == [[letter] for letter in text]


def test_the_space_at_the_seam_of_prompt_and_answer_is_kept() -> None:
    prompt, answer = FALLBACK.encode("a"), FALLBACK.encode("b")
    assert FALLBACK.decode(answer) == "b"
    assert "".join(stream_text(FALLBACK, answer, context=prompt)) == " b"


def test_the_command_keeps_that_space_too(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    FALLBACK.save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(generate, "streamed_ids", lambda *given, **options: iter(FALLBACK.encode("b")))
    flags = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--prompt", "a", "--ignore-end"]
    assert run_commands(app, ["generate", str(model_dir), *flags], program="tessera") == 0
    assert capsys.readouterr().out == "a b\n"


def test_a_token_is_decoded_with_the_piece_before_it_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, decode = [], CODEC.decode
    monkeypatch.setattr(CODEC, "decode", lambda ids, **how: lengths.append(len(ids)) or decode(ids, **how))
    pieces = list(stream_text(CODEC, CODEC.encode("zqx" * 100)))
    assert len(pieces) == 300
    assert max(lengths) == 2


def test_a_piece_is_on_the_screen_before_the_next_is_made(capsys: Any) -> None:
    def pieces() -> Iterator[str]:
        assert capsys.readouterr().out == "prompt"
        yield "one"
        assert capsys.readouterr().out == "one"
        yield "two"

    generate._print_as_it_comes("prompt", pieces())
    assert capsys.readouterr().out == "two\n"


def test_whatever_stops_a_stream_its_line_is_ended(capsys: Any) -> None:
    def pieces() -> Iterator[str]:
        yield "half a "
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate._print_as_it_comes("", pieces())
    assert capsys.readouterr().out == "half a \n"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generate")
    CODEC.save(directory / "tokenizer.json")
    spec = replace(preset("nano"), eos_token_id=0)
    save_model(directory / "m", spec, initial_weights(spec, seed=0), tokenizer_file=directory / "tokenizer.json")
    return directory / "m"


def test_what_is_printed_is_the_text_of_the_ids(model_dir: Path, backend: str, capsys: Any) -> None:
    flags = ["--backend", backend, "--prompt", "the €", "--tokens", "20", "--temperature", "1", "--top-k", "40"]
    printed = []
    for more in ([], ["--ids"]):
        assert run_commands(app, ["generate", str(model_dir), *flags, *more], program="tessera") == 0
        printed.append(capsys.readouterr().out)
    ids = json.loads(printed[1])
    assert printed[0] == CODEC.decode(ids["prompt_ids"] + ids["new_ids"], keep_special=False) + "\n"


def test_ctrl_c_leaves_with_130_a_whole_line_and_one_word_about_it(model_dir: Path) -> None:
    flags = ["--prompt", "the €", "--tokens", "1000", "--temperature", "1", "--ignore-end"]
    command = [sys.executable, "-c", MAIN, "generate", str(model_dir), *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        begun = b""
        while len(begun) < 20:
            begun += process.stdout.read1()
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    text = (begun + out).decode()  # whole characters
    assert process.returncode == 130
    assert text.startswith("the €")
    assert text.endswith("\n")
    assert err.decode().splitlines() == ["interrupted; nothing was left half-written"]

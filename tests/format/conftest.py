"""What several files of this folder start from."""

from pathlib import Path

import pytest

from tessera_shared.weights import save_model

from .model_directories import SPEC, made


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound") / "m"
    (directory.parent / "tokenizer.json").write_text('{"model": {}}')
    save_model(directory, SPEC, made(), tokenizer_file=directory.parent / "tokenizer.json", max_shard_bytes=300)
    return directory

"""Promises of the cache: what was computed is read, what is damaged is computed again."""

from pathlib import Path

import numpy as np
import pytest

from stream_hbaf.corpora import cache as cache_module
from stream_hbaf.corpora.cache import (
    cached,
    cached_dialogue_encoder,
    load_array,
    store_array,
)
from stream_hbaf.features.text import TextEncoder, Turn

TEXTS = ["Well, hello.", "Oh no."]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder("all-MiniLM-L6-v2")


def files(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_dialogues_are_encoded_once(encoder: TextEncoder, tmp_path: Path) -> None:
    """All rows in one array, none for no dialogues. The second time the same array is read; other
    texts, or others' order, are encoded anew."""
    dialogues = [(Turn("Anna", TEXTS[0]), Turn("Ben", TEXTS[1])), (Turn("", TEXTS[1]),)]
    expected = np.concatenate(encoder.encode_dialogues(dialogues))
    np.testing.assert_array_equal(cached_dialogue_encoder(encoder, tmp_path)(dialogues), expected)
    first = files(tmp_path)
    encode = cached_dialogue_encoder(encoder, tmp_path)
    np.testing.assert_array_equal(encode(dialogues), expected)
    assert files(tmp_path) == first
    np.testing.assert_array_equal(encode(dialogues[::-1]), expected[[2, 0, 1]])
    assert encode([]).shape == (0, encoder.width)
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("changed", ["digest_of", "digest_code", "library_versions"])
def test_other_weights_code_or_libraries_are_another_key(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Whatever decides the features, and isn't the texts themselves."""
    dialogues = [[Turn("", text) for text in TEXTS]]
    cached_dialogue_encoder(encoder, tmp_path)(dialogues)
    other = ("other",) if changed == "library_versions" else "other"
    monkeypatch.setattr(cache_module, changed, lambda *_: other)
    cached_dialogue_encoder(encoder, tmp_path)(dialogues)
    assert len(files(tmp_path)) == 2


def test_damaged_arrays_are_made_anew(tmp_path: Path) -> None:
    """Cut short by a loss of power, or no array at all, as a pickle isn't."""
    file = tmp_path / "folder" / "array.npy"
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert load_array(file) is None
    store_array(file, array)
    whole = file.read_bytes()
    for content in (whole[:-4], b"", b"\x80\x04."):
        file.write_bytes(content)
        assert load_array(file) is None
        np.testing.assert_array_equal(cached(file, lambda: array), array)
        assert file.read_bytes() == whole

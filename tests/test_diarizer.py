"""Promises of the attribution of utterances to speakers."""

from collections.abc import Sequence

import numpy as np
import pytest
from conftest import RECORDINGS
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SpeakersConfig
from stream_hbaf.evaluation.diarization import count_right
from stream_hbaf.features import speaker
from stream_hbaf.features.speaker import open_speaker_encoder
from stream_hbaf.speech.diarizer import REMEMBERED_TURNS, Attributed, Diarizer, unit

needs_weights = pytest.mark.skipif(speaker.find_campplus() is None, reason=speaker.INSTALL)
WIDTH = 192
Embedding = NDArray[np.floating]


def voice(seed: int, *, width: int = WIDTH) -> Embedding:
    """A made-up voice: a random direction."""
    made_up: Embedding = np.random.default_rng(seed).normal(size=width)
    return unit(made_up)


def utterance(of: int, seed: int, *, likeness: float = 0.7, width: int = WIDTH) -> Embedding:
    """An utterance of a made-up voice, at this cosine to it."""
    apart = voice(1000 + seed, width=width)
    apart = unit(apart - (apart @ voice(of, width=width)) * voice(of, width=width))
    return unit(likeness * voice(of, width=width) + np.sqrt(1 - likeness**2) * apart)


def between(*embeddings: Embedding) -> Embedding:
    """What lies in the middle, as of several people at once."""
    return unit(np.sum([unit(one) for one in embeddings], axis=0))


def attribute(diarizer: Diarizer, speakers: Sequence[int], *, first: int = 0) -> list[str]:
    """Add an utterance of each of these made-up voices; the speakers as answered at once."""
    return [
        diarizer.add(turn, utterance(one, turn), duration_s=3.0)[-1].speaker
        for turn, one in enumerate(speakers, start=first)
    ]


def named(attributions: Sequence[Attributed]) -> list[tuple[int, str]]:
    return [(one.turn, one.speaker) for one in attributions]


@pytest.mark.parametrize("width", [192, 256])
def test_speakers_are_numbered_in_the_order_of_their_first_turns(width: int) -> None:
    """For embeddings of any width."""
    diarizer = Diarizer(SpeakersConfig())
    found = [
        diarizer.add(turn, utterance(one, turn, width=width), duration_s=3.0)
        for turn, one in enumerate([7, 7, 9, 7, 9, 8])
    ]
    numbers = [1, 1, 2, 1, 2, 3]
    assert [one.speaker for (one,) in found] == [f"speaker {n}" for n in numbers]
    assert {one.source for (one,) in found} == {"voice"}
    assert min(one.score for (one,) in found) > 0.7


@pytest.mark.parametrize(("duration_s", "has_embedding"), [(1.4, True), (3.0, False)])
def test_a_short_utterance_is_not_sure(duration_s: float, has_embedding: bool) -> None:
    """Nor does a voice learn from it: the next one is the first speaker."""
    diarizer = Diarizer(SpeakersConfig())
    embedding = utterance(1, 1) if has_embedding else None
    assert diarizer.add(0, embedding, duration_s=duration_s) == (Attributed(0, "", 0.0, ""),)
    assert attribute(diarizer, [2], first=1) == ["speaker 1"]


def test_what_is_between_two_voices_is_not_sure() -> None:
    """Two people at once, say. Neither one is named, nor a third."""
    diarizer = Diarizer(SpeakersConfig(min_score=0.6))
    attribute(diarizer, [1, 2, 1, 2])
    one, other = utterance(1, 0) + utterance(1, 2), utterance(2, 1) + utterance(2, 3)
    (both,) = diarizer.add(4, between(one, other), duration_s=3.0)
    assert (both.speaker, both.source) == ("", "")
    assert both.score < 0.6


def test_a_later_turn_may_revise_an_earlier_one() -> None:
    """An utterance between two voices is the speaker's who proves to sound like it."""
    diarizer = Diarizer(SpeakersConfig(min_score=0.6))
    attribute(diarizer, [1, 2])
    middle = between(utterance(1, 0), utterance(2, 1))
    assert diarizer.add(2, middle, duration_s=3.0)[-1].speaker == ""
    like_it = between(middle, utterance(1, 0))
    changed = [one for n in (3, 4, 5) for one in diarizer.add(n, like_it, duration_s=3.0)]
    assert [(one.turn, one.speaker) for one in changed if one.turn < 3] == [(2, "speaker 1")]


def test_an_enrolled_voice_has_its_name() -> None:
    diarizer = Diarizer(SpeakersConfig(), voices={"Ada": voice(3), "Ben": voice(5)})
    (stranger,) = diarizer.add(0, utterance(4, 0), duration_s=3.0)
    (ada,) = diarizer.add(1, utterance(3, 1), duration_s=3.0)
    assert (stranger.speaker, stranger.source) == ("speaker 1", "voice")
    assert (ada.speaker, ada.source) == ("Ada", "enrolled")
    assert ada.score > 0.9


@given(likeness=st.floats(0.0, 0.4), seed=st.integers(0, 1000))
def test_a_stranger_who_sounds_a_little_like_somebody_has_no_name(
    likeness: float, seed: int
) -> None:
    diarizer = Diarizer(SpeakersConfig(), voices={"Ada": voice(3)})
    for turn in range(4):
        stranger = utterance(3, seed, likeness=likeness) + 0.2 * voice(2000 + turn)
        changed = diarizer.add(turn, stranger, duration_s=3.0)
        assert "Ada" not in {one.speaker for one in changed}


def test_a_turn_by_itself_must_not_contradict_an_enrolled_name() -> None:
    """A turn unlike Ada in her voice, or one like her in a stranger's, is not sure."""
    diarizer = Diarizer(SpeakersConfig(), voices={"Ada": voice(3)})
    likenesses = [(50, 0.6, "Ada")] * 3 + [(60, 0.3, "speaker 1")] * 3
    for turn, (seed, likeness, expected) in enumerate([*likenesses, (50, 0.3, ""), (60, 0.5, "")]):
        embedding = utterance(3, seed, likeness=likeness)
        assert diarizer.add(turn, embedding, duration_s=3.0)[-1].speaker == expected


def test_a_correction_is_kept_and_learned_from() -> None:
    """The turn is the person's whom it was given to, and so is what sounds like it later."""
    diarizer = Diarizer(SpeakersConfig())
    attribute(diarizer, [1])
    assert diarizer.correct(0, "Ada") == (Attributed(0, "Ada", 1.0, "corrected"),)
    assert diarizer.correct(0, "Ada") == ()
    (later,) = diarizer.add(1, utterance(1, 1), duration_s=3.0)
    assert (later.speaker, later.source) == ("Ada", "voice")
    assert diarizer.correct(0, "Ben") == (Attributed(0, "Ben", 1.0, "corrected"),)


def test_a_correction_to_another_speaker_leaves_the_others_as_they_are() -> None:
    """Even if the turn sounds like the wrong speaker: the person can tell the two."""
    diarizer = Diarizer(SpeakersConfig())
    attribute(diarizer, [1, 1, 2, 2])
    assert named(diarizer.correct(1, "speaker 2")) == [(1, "speaker 2")]
    assert attribute(diarizer, [2], first=4) == ["speaker 2"]


def test_a_correction_to_a_new_name_is_of_all_that_sounds_like_it() -> None:
    diarizer = Diarizer(SpeakersConfig())
    attribute(diarizer, [1, 2, 1])
    assert named(diarizer.correct(2, "Ada")) == [(0, "Ada"), (2, "Ada")]


def test_a_turn_of_nobody() -> None:
    """A person may say that a turn is nobody's, such as the television's."""
    diarizer = Diarizer(SpeakersConfig())
    attribute(diarizer, [1])
    assert diarizer.correct(0, "") == (Attributed(0, "", 1.0, "corrected"),)
    assert attribute(diarizer, [2], first=1) == ["speaker 2"]


def test_a_turn_that_is_forgotten_or_short_is_corrected_by_itself() -> None:
    diarizer = Diarizer(SpeakersConfig())
    diarizer.add(0, utterance(1, 0), duration_s=0.7)
    assert named(diarizer.correct(0, "Ada")) == [(0, "Ada")]
    assert named(diarizer.correct(-5, "Ada")) == [(-5, "Ada")]


def test_renamed_and_merged_speakers_change_their_turns() -> None:
    """Both voices of the merged speaker are that speaker's from then on."""
    diarizer = Diarizer(SpeakersConfig())
    attribute(diarizer, [1, 2, 1])
    assert named(diarizer.rename("speaker 1", "Ada")) == [(0, "Ada"), (2, "Ada")]
    assert named(diarizer.merge("speaker 2", "Ada")) == [(1, "Ada")]
    assert attribute(diarizer, [2, 1, 3], first=3) == ["Ada", "Ada", "speaker 3"]
    assert diarizer.rename("nobody", "Ben") == ()
    assert diarizer.merge("Ada", "Ada") == ()


def test_a_dialogue_has_at_most_so_many_speakers() -> None:
    """A voice beyond them is not sure, rather than somebody else's; 30 voices are no trouble."""
    diarizer = Diarizer(SpeakersConfig(max_speakers=8))
    found = attribute(diarizer, range(30))
    assert found[:8] == [f"speaker {n}" for n in range(1, 9)]
    assert set(found[8:]) == {""}
    assert attribute(diarizer, [5], first=30) == ["speaker 6"]


def test_memory_is_bounded() -> None:
    """Voices outlast the turns that they were learned from."""
    diarizer = Diarizer(SpeakersConfig())
    found = attribute(diarizer, [1, 2] + [1] * (REMEMBERED_TURNS + 10) + [2])
    assert found[-1] == "speaker 2"
    assert len(diarizer.rename("speaker 1", "Ada")) == REMEMBERED_TURNS - 1


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_an_embedding_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="zero or not finite"):
        Diarizer(SpeakersConfig()).add(0, np.full(WIDTH, value), duration_s=3.0)


@needs_weights
def test_real_voices() -> None:
    """Two readers in turn, each known as one; both at once are never a third, enrolled person."""
    encoder = open_speaker_encoder()
    jfk = read_audio(RECORDINGS / "jfk.flac")
    austen = [
        read_audio(RECORDINGS / f"sense_and_sensibility_01_austen_64kb-{n}.flac")
        for n in ("0870", "0890", "0920")
    ]
    pieces = [
        jfk[:48_000],
        austen[0],
        jfk[48_000:96_000],
        austen[1],
        austen[2],
        jfk[96_000:160_000],
    ]
    true = ["jfk", "austen", "jfk", "austen", "austen", "jfk"]
    espeak = encoder.embed(read_audio(RECORDINGS / "espeak_no_no_no.flac"))
    assert espeak is not None
    diarizer = Diarizer(SpeakersConfig(), voices={"espeak": espeak})
    found = [
        diarizer.add(turn, encoder.embed(piece), duration_s=len(piece) / 16_000)[-1].speaker
        for turn, piece in enumerate(pieces)
    ]
    assert count_right(true, found).all()
    length = min(len(jfk), len(austen[0]))
    both = (jfk[:length] // 2 + austen[0][:length] // 2).astype(np.int16)
    assert diarizer.add(6, encoder.embed(both), duration_s=3.0)[-1].speaker != "espeak"


@needs_weights
def test_a_whisper_is_never_somebody_else() -> None:
    """It may be the person who whispers, or nobody who is known."""
    encoder = open_speaker_encoder()
    readers = {
        name: read_audio(RECORDINGS / f"{name}.flac")
        for name in ("jfk", "espeak_no_no_no", "sense_and_sensibility_01_austen_64kb-0870")
    }
    voices = {name: encoder.embed(audio[:96_000]) for name, audio in readers.items()}
    enrolled = {name: one for name, one in voices.items() if one is not None}
    assert len(enrolled) == 3
    for name, audio in readers.items():
        embedding = encoder.embed(whispered(audio[:64_000]))
        diarizer = Diarizer(SpeakersConfig(), voices=enrolled)
        found = diarizer.add(0, embedding, duration_s=3.0)[-1].speaker
        assert found not in enrolled.keys() - {name}


def whispered(audio: NDArray[np.int16]) -> NDArray[np.int16]:
    """Noise in the place of the voice's tone: the spectrum's envelope, with random phases."""
    length, hop = 512, 128
    window, random = np.hanning(length), np.random.default_rng(0)
    out = np.zeros(len(audio))
    for start in range(0, len(audio) - length, hop):
        cepstrum = np.fft.irfft(np.log(np.abs(np.fft.rfft(window * audio[start:][:length])) + 1e-3))
        cepstrum[30:-30] = 0.0
        envelope = np.exp(np.fft.rfft(cepstrum).real)
        phases = np.exp(2j * np.pi * random.random(len(envelope)))
        out[start : start + length] += window * np.fft.irfft(envelope * phases)
    level = audio.std() / max(1.0, out.std()) / 4
    quiet: NDArray[np.int16] = (out * level).clip(-32768, 32767).astype(np.int16)
    return quiet

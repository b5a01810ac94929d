"""Replay of a recorded session gives what was recognised live, to the bit where possible."""

import asyncio
import shutil
import time
import wave
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray
from session_samples import header

from stream_hbaf.audio.file import FileSource, read_audio
from stream_hbaf.audio.source import AudioSource, Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ, SourceConfig
from stream_hbaf.errors import BundleError, CorpusError
from stream_hbaf.events import DialogueSummary, Feedback, Utterance
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.live.replay import Replayed, recorded_config, replay_session
from stream_hbaf.live.runtime import Recognition
from stream_hbaf.networks.adaptive_sets import AdaptiveSets
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.sessions.format import EVENTS_FILE, HEADER_FILE, Stretch, encode_line
from stream_hbaf.sessions.recorder import SessionRecorder
from stream_hbaf.sessions.session import Session, open_session, open_sessions

Sound = NDArray[np.int16]
Play = Mapping[SourceConfig, AudioSource]
Cue = Callable[["Prompted"], Awaitable[None]]
AS_IT_WAS = {"id", "rev", "type", "source", "dialogue_id", "turn", "speaker", "start_time"} | {
    "end_time",
    "audio_start_ms",
    "audio_end_ms",
    "trigger",
    "text",
    "language",
    "modalities",
    "conflict",
    "inferences",
    "model",
}


class SessionSource:
    """The recorded audio of a session's source, as fast as it is taken; its gaps take no time."""

    def __init__(self, session: Session, source: str, *, chunk_samples: int) -> None:
        self.name = source
        self._session = session
        self._chunk_samples = chunk_samples

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        pass

    async def chunks(self) -> AsyncIterator[Chunk]:
        start, after_gap = 0, False
        for piece in self._session.audio(self.name):
            if isinstance(piece, Stretch):
                start, after_gap = piece.start, True
                continue
            for first in range(0, len(piece), self._chunk_samples):
                samples = piece[first : first + self._chunk_samples]
                yield Chunk(start, samples, time.monotonic(), after_gap=after_gap)
                start, after_gap = start + len(samples), False
                await asyncio.sleep(0)


def write_wav(path: Path, *pieces: Sound) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
        file.writeframes(np.concatenate(pieces).tobytes())
    return path


def file_source(path: Path, *, chunk_ms: int) -> FileSource:
    return FileSource(path, speed=None, chunk_ms=chunk_ms, on_status=lambda *_: None)


def record(
    recognizer: Recognizer,
    sources: Play,
    folder: Path,
    *,
    on_stage: Callable[[LivePipeline, SessionRecorder], None] = lambda pipeline, recorder: None,
) -> tuple[Session, list[Recognition]]:
    """Run sources to their end and record them; the session, and what was recognised live."""
    live: list[Recognition] = []

    async def run() -> None:
        recorder = SessionRecorder(folder, config=recognizer.config, recognizer=recognizer)
        pipeline = LivePipeline(
            recognizer, [recorder], on_recognition=live.append, on_audio=recorder.on_audio
        )
        for source in sources.values():
            await source.__aenter__()
        on_stage(pipeline, recorder)
        await pipeline.run(sources, stop=asyncio.Event())
        for source in sources.values():
            await source.__aexit__()

    asyncio.run(run())
    (session,) = open_sessions(folder)
    return session, live


@pytest.fixture(scope="module")
def conversation(
    recognizer: Recognizer, sentences: list[Sound], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Session, list[Recognition]]:
    """Two files in odd chunks, whose speakers talk with each other."""
    folder = tmp_path_factory.mktemp("conversation")
    ann = write_wav(folder / "ann.wav", sentences[1], sentences[4])
    ben = write_wav(folder / "ben.wav", sentences[3], sentences[2])
    sources = {
        SourceConfig(name="a", speaker="Ann", dialogue="talk"): file_source(ann, chunk_ms=37),
        SourceConfig(name="b", speaker="Ben", dialogue="talk"): file_source(ben, chunk_ms=101),
    }
    return record(recognizer, sources, folder / "recorded")


def replay(
    session: Session, recognizer: Recognizer, **options: Any
) -> tuple[Replayed, list[Utterance | DialogueSummary], list[Recognition]]:
    events: list[Utterance | DialogueSummary] = []
    again: list[Recognition] = []
    counted = replay_session(
        session,
        on_event=events.append,
        on_recognition=again.append,
        load=lambda config: nullcontext(recognizer),
        **options,
    )
    return counted, events, again


Replay = tuple[Replayed, list[Utterance | DialogueSummary], list[Recognition]]


@pytest.fixture(scope="module")
def replayed(recognizer: Recognizer, conversation: tuple[Session, list[Recognition]]) -> Replay:
    """That conversation once more."""
    return replay(conversation[0], recognizer)


def test_replay_gives_the_same_features_text_and_probabilities(
    conversation: tuple[Session, list[Recognition]], replayed: Replay
) -> None:
    """Two speakers in one dialogue: features to the bit, words to the letter, 1e-5."""
    _, live = conversation
    counted, _, again = replayed
    assert counted == Replayed(matched=len(live), missing=0, extra=0)
    assert len({recognition.id.rpartition("-")[0] for recognition in live}) == 1
    assert len(live) >= 4
    for one, other in zip(live, again, strict=True):
        assert (one.id, one.finish) == (other.id, other.finish)
        assert one.acoustic is not None
        assert other.acoustic is not None
        assert np.array_equal(one.acoustic.functionals, other.acoustic.functionals)
        assert one.text is not None
        assert other.text is not None
        assert one.text.transcript == other.text.transcript
        assert one.prediction.probabilities == pytest.approx(
            other.prediction.probabilities, abs=1e-5
        )


def test_replay_gives_the_same_events(
    conversation: tuple[Session, list[Recognition]], replayed: Replay
) -> None:
    """Each finished utterance and its dialogue's summary, with the ids and times it had."""
    session, _ = conversation
    _, events, _ = replayed
    live = [e for e in session.events if isinstance(e, DialogueSummary) or e in session.ends]
    assert [type(event) for event in events] == [type(event) for event in live]
    for one, other in zip(live, events, strict=True):
        if isinstance(one, Utterance) and isinstance(other, Utterance):
            assert one.emotion is not None
            assert other.emotion is not None
            assert one.contributions is not None
            assert other.contributions is not None
            assert other.model_dump(include=AS_IT_WAS) == one.model_dump(include=AS_IT_WAS)
            assert other.emotion.set == one.emotion.set
            assert other.contributions.model_dump() == pytest.approx(
                one.contributions.model_dump(), abs=1e-5
            )
        if isinstance(one, DialogueSummary) and isinstance(other, DialogueSummary):
            assert (other.emotions, other.speakers) == (one.emotions, one.speakers)
            assert other.probabilities == pytest.approx(one.probabilities, abs=1e-5)


def test_recorded_sound_is_what_was_recognised(
    conversation: tuple[Session, list[Recognition]],
) -> None:
    """The FLAC holds every sample of the file that was listened to, and no other."""
    session, _ = conversation
    for name, file in (("a", "ann.wav"), ("b", "ben.wav")):
        original = read_audio(session.folder.parent.parent / file)
        assert np.array_equal(read_audio(session.audio_file(name)), original)


def test_session_as_a_source_of_a_live_pipeline_gives_the_same(
    recognizer: Recognizer, conversation: tuple[Session, list[Recognition]], tmp_path: Path
) -> None:
    """Played into the live pipeline in other chunks, a source's sound says the same."""
    session, live = conversation
    source = SessionSource(session, "a", chunk_samples=5328)
    _, again = record(recognizer, {SourceConfig(name="a"): source}, tmp_path)
    ann = [one for one in live if one.finish in {other.finish for other in again}]
    assert [one.finish for one in ann] == [one.finish for one in again]
    for one, other in zip(ann, again, strict=True):
        assert one.acoustic is not None
        assert other.acoustic is not None
        assert np.array_equal(one.acoustic.functionals, other.acoustic.functionals)


def test_replay_after_a_gap_gives_the_same(
    recognizer: Recognizer, sentences: list[Sound], tmp_path: Path
) -> None:
    """Sound that was lost live is missing in the replay at the same sample."""

    class Broken(FileSource):
        """Loses the sound between 2 s and 2.5 s."""

        async def chunks(self) -> AsyncIterator[Chunk]:
            given_until = 0
            async for chunk in super().chunks():
                if not 2.0 < chunk.start / SAMPLE_RATE_HZ < 2.5:
                    yield replace(chunk, after_gap=chunk.start != given_until)
                    given_until = chunk.start + len(chunk.samples)

    wav = write_wav(tmp_path / "one.wav", sentences[1], sentences[4])
    source = Broken(wav, speed=None, chunk_ms=53, on_status=lambda *_: None)
    session, live = record(recognizer, {SourceConfig(name="a"): source}, tmp_path / "recorded")
    assert [stretch.why for stretch in session.stretches["a"]] == ["begin", "gap"]
    counted, _, again = replay(session, recognizer)
    assert counted.missing == counted.extra == 0
    assert [one.finish for one in live] == [one.finish for one in again]
    assert live[0].finish.trigger == "end_of_input"


class Prompted(FileSource):
    """A file that runs each of its cues once so many seconds of it were played."""

    def __init__(self, path: Path, cues: dict[float, Cue], *, chunk_ms: int) -> None:
        super().__init__(path, speed=None, chunk_ms=chunk_ms, on_status=lambda *_: None)
        self._cues = sorted(cues.items())
        self.pipeline: LivePipeline
        self.recorder: SessionRecorder

    def stage(self, pipeline: LivePipeline, recorder: SessionRecorder) -> None:
        self.pipeline, self.recorder = pipeline, recorder

    async def chunks(self) -> AsyncIterator[Chunk]:
        async for chunk in super().chunks():
            while self._cues and chunk.start >= self._cues[0][0] * SAMPLE_RATE_HZ:
                await self._cues.pop(0)[1](self)
            yield chunk


async def flush(source: Prompted) -> None:
    await source.pipeline.cut("request")


async def stop_listening(source: Prompted) -> None:
    await source.pipeline.set_switch("a", "listening", on=False)


async def listen_again(source: Prompted) -> None:
    await source.pipeline.set_switch("a", "listening", on=True)


async def stop_transcribing(source: Prompted) -> None:
    await source.pipeline.set_switch("a", "transcribe", on=False)


async def stop_recording(source: Prompted) -> None:
    source.recorder.record("a", on=False)
    await source.pipeline.cut("request")


async def record_again(source: Prompted) -> None:
    source.recorder.record("a", on=True)
    await source.pipeline.cut("request")


@pytest.mark.parametrize(
    ("cues", "whys", "unrecorded"),
    [
        ({1.3: flush, 1.71: flush}, ["begin", "cut", "cut"], 0),
        ({1.3: stop_listening, 2.1: listen_again}, ["begin", "cut", "pause"], 0),
        ({1.3: stop_recording, 2.1: record_again}, ["begin", "pause"], 2),
    ],
)
def test_replay_after_requests_gives_the_same(
    recognizer: Recognizer,
    sentences: list[Sound],
    tmp_path: Path,
    cues: dict[float, Cue],
    whys: list[str],
    unrecorded: int,
) -> None:
    """What was cut off or not listened to live is cut off at the same sample, for the same
    reason; utterances that weren't recorded aren't replayed."""
    wav = write_wav(tmp_path / "one.wav", sentences[1], sentences[4])
    source = Prompted(wav, cues, chunk_ms=53)
    session, live = record(
        recognizer, {SourceConfig(name="a"): source}, tmp_path / "recorded", on_stage=source.stage
    )
    assert [stretch.why for stretch in session.stretches["a"]] == whys
    counted, events, again = replay(session, recognizer)
    kept = {end.id for end in session.ends}
    assert len(live) - len(kept) == unrecorded
    assert (counted.matched, counted.missing) == (len(kept), 0)
    for one, other in zip([one for one in live if one.id in kept], again, strict=True):
        assert one.finish == other.finish
        assert one.acoustic is not None
        assert other.acoustic is not None
        assert np.array_equal(one.acoustic.functionals, other.acoustic.functionals)
    ends = [event for event in events if isinstance(event, Utterance)]
    assert [end.trigger for end in ends] == [end.trigger for end in session.ends]


def test_replay_goes_on_with_voices_where_that_was_done_live(
    recognizer: Recognizer,
    sentences: list[Sound],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second dialogue's first answer is as live, which isn't what it is without the first."""
    keeping = recognizer.config.dialogue.model_copy(update={"gap_s": 2, "keep_voices": True})
    config = recognizer.config.model_copy(update={"dialogue": keeping})
    monkeypatch.setattr(recognizer, "config", config)
    wav = write_wav(tmp_path / "a.wav", sentences[1], np.zeros(48_000, np.int16), sentences[4])
    source = {SourceConfig(name="a", speaker="Ann"): file_source(wav, chunk_ms=53)}
    session, live = record(recognizer, source, tmp_path / "recorded")
    first, second = dict.fromkeys(end.dialogue_id for end in session.ends)
    summaries = [one for one in session.events if isinstance(one, DialogueSummary)]
    assert {one.follows for one in summaries if one.dialogue_id == second} == {first}
    _, _, again = replay(session, recognizer)
    for one, other in zip(live, again, strict=True):
        assert one.prediction.probabilities == pytest.approx(
            other.prediction.probabilities, abs=1e-5
        )


def test_replay_adapts_label_sets_where_that_was_done_live(
    recognizer: Recognizer,
    conversation: tuple[Session, list[Recognition]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A correction counts from where it stands in the session."""
    copy = shutil.copytree(conversation[0].folder, tmp_path / "copy")
    lines = (copy / EVENTS_FILE).read_bytes().splitlines(keepends=True)
    first = conversation[0].ends[0]
    at = next(n for n, line in enumerate(lines) if b'"end"' in line) + 1
    assert first.emotion is not None
    least = min(first.emotion.probabilities, key=first.emotion.probabilities.__getitem__)
    lines.insert(at, encode_line(Feedback(id=first.id, label=least)))
    (copy / EVENTS_FILE).write_bytes(b"".join(lines))
    calibration = recognizer.bundle.calibration
    sets = AdaptiveSets(calibration, bundle="b")
    monkeypatch.setattr(recognizer, "sets", sets)
    _, events, _ = replay(open_session(copy), recognizer)
    assert sets.shift > 0.0
    ends = [event for event in events if isinstance(event, Utterance)]
    for n, end in enumerate(ends):
        assert end.emotion is not None
        found = np.array(list(end.emotion.probabilities.values()))
        shift = sets.shift if n else 0.0
        flags = calibration.label_sets(found, pattern="audio+text", shift=shift)
        assert len(end.emotion.set) == flags.sum()


def test_settings_that_a_session_does_not_know_are_those_of_its_time(tmp_path: Path) -> None:
    """What is on by default now was off then; what the session names is as it says."""
    (tmp_path / HEADER_FILE).write_text(
        header().model_copy(update={"settings": {"vad": {"threshold": 0.4}}}).model_dump_json()
    )
    config = recorded_config(open_session(tmp_path), device="cpu")
    assert (config.vad.forget, config.vad.threshold) == (False, 0.4)
    assert (config.endpoint.engine, config.speakers.engine) == ("silence", "none")


@pytest.mark.parametrize("section", ["endpoint", "speakers", "vad"])
@pytest.mark.parametrize("hostile", [None, 7, "silence", ["engine"]])
def test_a_damaged_section_of_settings_is_one_line(
    tmp_path: Path, section: str, hostile: object
) -> None:
    """A section that is no mapping is named, like any setting that isn't known."""
    damaged = header().model_copy(update={"settings": {section: hostile}})
    (tmp_path / HEADER_FILE).write_text(damaged.model_dump_json())
    with pytest.raises(CorpusError, match=f"setting '{section}' isn't known to this version"):
        recorded_config(open_session(tmp_path), device="cpu")


def test_replay_transcribes_only_what_was_transcribed_live(
    recognizer: Recognizer, sentences: list[Sound], tmp_path: Path
) -> None:
    """With ``transcribe`` off an utterance has no text, live and in the replay."""
    wav = write_wav(tmp_path / "one.wav", sentences[4])
    source = Prompted(wav, {0.0: stop_transcribing}, chunk_ms=64)
    session, live = record(
        recognizer, {SourceConfig(name="a"): source}, tmp_path / "recorded", on_stage=source.stage
    )
    counted, events, again = replay(session, recognizer)
    assert counted == Replayed(matched=1, missing=0, extra=0)
    assert isinstance(events[0], Utterance)
    assert events[0].text == session.ends[0].text == ""
    assert events[0].modalities == session.ends[0].modalities == ["audio"]
    assert again[0].prediction.probabilities == pytest.approx(
        live[0].prediction.probabilities, abs=1e-5
    )


def shortened(session: Session, folder: Path, **changed: Any) -> Session:
    """A copy of a session with its first ``end`` alone, and another header."""
    shutil.copytree(session.folder, folder)
    end = session.ends[0]
    if "model" in changed:
        end = end.model_copy(update=changed)
    (folder / EVENTS_FILE).write_bytes(encode_line(end))
    header = session.header.model_copy(update=changed)
    (folder / HEADER_FILE).write_text(header.model_dump_json(), encoding="utf-8")
    return open_session(folder)


def test_replay_takes_the_edition_that_replaces_the_recorded_one(
    recognizer: Recognizer,
    conversation: tuple[Session, list[Recognition]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recorded with an edition that the bundle says it replaces: the same weights."""
    session, _ = conversation
    former = "0143b4135a8f9ffe50034cd8ad1a91f7837bc1360e2482b74fcce6a50ffb5a46"
    config = recognizer.bundle.config.model_copy(update={"replaces": (former,)})
    monkeypatch.setattr(recognizer, "bundle", replace(recognizer.bundle, config=config))
    live = session.header.model.model_copy(update={"sha256": former})
    counted, events, _ = replay(shortened(session, tmp_path / "former", model=live), recognizer)
    assert counted.missing == 0
    assert isinstance(events[0], Utterance)
    assert events[0].model == recognizer.model


def test_replay_with_another_bundle_is_refused_in_a_line(
    recognizer: Recognizer, conversation: tuple[Session, list[Recognition]], tmp_path: Path
) -> None:
    """A bundle of the same name that was trained anew doesn't pass for the one used live."""
    session, _ = conversation
    live = session.header.model.model_copy(update={"sha256": "0" * 64})
    other = shortened(session, tmp_path / "other", model=live)
    with pytest.raises(
        BundleError, match=r"was recorded with bundle live-en 000000000000, but live-en"
    ):
        replay(other, recognizer)
    counted, events, _ = replay(other, recognizer, model="live-en")
    assert counted == Replayed(matched=1, missing=0, extra=len(session.ends) - 1)
    assert isinstance(events[0], Utterance)
    assert events[0].text == session.ends[0].text


def test_replay_reports_other_versions(
    recognizer: Recognizer, conversation: tuple[Session, list[Recognition]], tmp_path: Path
) -> None:
    """One line says that another openSMILE may give other figures."""
    session, _ = conversation
    versions = {**session.header.versions, "opensmile": "2.5.0"}
    other = shortened(session, tmp_path / "other", versions=versions)
    lines: list[str] = []
    replay(other, recognizer, progress=lines.append)
    assert lines == [f"{other.folder}: recorded with opensmile 2.5.0; others may differ a little"]


def test_replay_goes_on_where_sound_is_missing(
    recognizer: Recognizer, conversation: tuple[Session, list[Recognition]], tmp_path: Path
) -> None:
    """An utterance whose sound is gone is events of in a line; the rest is replayed."""
    session, live = conversation
    folder = tmp_path / "other"
    shutil.copytree(session.folder, folder)
    (folder / "b.flac").unlink()
    lines: list[str] = []
    counted, events, _ = replay(open_session(folder), recognizer, progress=lines.append)
    lost = [end for end in session.ends if end.source == "b"]
    assert counted == Replayed(matched=len(live) - len(lost), missing=len(lost), extra=0)
    assert {event.source for event in events} == {"a"}
    assert lines == [f"{folder}: {len(lost)} utterances weren't found again"]

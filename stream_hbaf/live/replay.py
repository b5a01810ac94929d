"""Replays a recorded session: the same sound through the same models, in the recorded order.

The recording decides what timing decided live: which dialogue an utterance belonged to, and in
which order the utterances of several sources were classified. It also knows where turns were found
to be over, so that the turn model isn't needed, and which utterances were cut where the speaker
changes. Everything else is computed anew.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ValidationError

from stream_hbaf.config import Config, SourceConfig
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.errors import BundleError, ConfigError, CorpusError
from stream_hbaf.events import DialogueSummary, Feedback, Model, Switch, Utterance
from stream_hbaf.features.speaker import Part, SpeakerEncoder
from stream_hbaf.live.runtime import Recognition
from stream_hbaf.live.speakers import DialogueSpeakers, Revision
from stream_hbaf.live.tracker import DialogueTracker
from stream_hbaf.live.utterance import LiveUtterance
from stream_hbaf.prediction import initial_state
from stream_hbaf.recognizer import Int16, Recognizer
from stream_hbaf.sessions.format import SpeakerChange, Stretch, package_versions, sample_at
from stream_hbaf.sessions.session import Session
from stream_hbaf.speech.detector import Feed, UtteranceAction, UtteranceDetector
from stream_hbaf.speech.segmenter import Begin, Consult, Finish

Load = Callable[[Config], AbstractContextManager[Recognizer]]
Progress = Callable[[str], None]
# Of sessions that were recorded before there was a choice, whatever the defaults are now.
BEFORE: Mapping[str, Mapping[str, Any]] = {
    "endpoint": {"engine": "silence"},
    "speakers": {"engine": "none"},
    "vad": {"forget": False},
}
RECORDED = {"id", "rev", "start_time", "end_time"}  # fields that are taken from the recording


@dataclass(slots=True)
class Replayed:
    """The numbers of utterances in a replay."""

    matched: int = 0  # recorded, detected again and classified
    missing: int = 0  # recorded, but not detected again
    extra: int = 0  # detected, but not recorded


@dataclass(frozen=True, slots=True)
class _Detected:
    """One utterance that was detected in the recorded sound."""

    samples: Int16
    finish: Finish
    part: Part | None = None  # of an utterance of several speakers


def replay_session(
    session: Session,
    *,
    on_event: Callable[[Utterance | DialogueSummary], None],
    on_recognition: Callable[[Recognition], None] = lambda recognition: None,
    progress: Progress = lambda line: None,
    model: str | None = None,
    device: str = "auto",
    load: Load = Recognizer,
) -> Replayed:
    """Recognise each finished utterance of a session again, as fast as it goes.

    Ids, turns and times of day are the recorded ones; features are the same to the bit, text to
    the letter, probabilities to 1e-5. Provisional events (``update``, ``partial``) and latencies
    aren't repeated. ``progress`` gets a line for each known difference from the recording's
    conditions. ``model`` replaces the bundles that were used live.

    Raises BundleError if a bundle that was used live isn't there in the same version, CorpusError
    if the session can't be read.
    """
    _report_other_versions(session, progress=progress)
    config = recorded_config(session, device=device)
    replay = _Replay(session, config, on_event=on_event, on_recognition=on_recognition)
    loaded: Model | str | None = None
    with ExitStack() as opened:
        for event, transcribed in _steps(session):
            if isinstance(event, SpeakerChange):
                replay.apply(event)
                continue
            if isinstance(event, Feedback):
                if loaded is not None and (sets := replay.recognizer.sets) is not None:
                    sets.correct(event.id, event.label)
                continue
            end = event
            wanted = model or end.model or session.header.model
            if wanted != loaded:
                opened.close()
                name = wanted if isinstance(wanted, str) else _name(session, wanted)
                recognizer = load(config.model_copy(update={"model": name}))
                replay.recognizer = opened.enter_context(recognizer)
                if isinstance(wanted, Model):
                    _require_same(session, recognizer=replay.recognizer, live=wanted)
                loaded = wanted
            replay.recognise(end, transcribed=transcribed)
    replay.report_other_speakers(progress)
    counted = replay.count()
    if counted.missing:
        progress(f"{session.folder}: {counted.missing} utterances weren't found again")
    return counted


@dataclass(slots=True)
class _Replay:
    """One pass over a session's finished utterances, in their recorded order."""

    session: Session
    config: Config
    on_event: Callable[[Utterance | DialogueSummary], None]
    on_recognition: Callable[[Recognition], None]
    recognizer: Recognizer = field(init=False)  # the one in use
    _trackers: dict[str, DialogueTracker] = field(default_factory=dict)  # by dialogue id
    _detections: dict[str, Iterator[_Detected]] = field(default_factory=dict)  # by source
    _next: dict[str, _Detected] = field(default_factory=dict)  # detected, not matched yet
    _counted: Replayed = field(default_factory=Replayed)
    _speakers: dict[str, str] = field(default_factory=dict)  # by utterance, as replayed
    _followed: dict[str, str] = field(init=False)  # by dialogue, the one that it goes on from

    def __post_init__(self) -> None:
        summaries = (one for one in self.session.events if isinstance(one, DialogueSummary))
        self._followed = {one.dialogue_id: one.follows for one in summaries if one.follows}

    def recognise(self, end: Utterance, *, transcribed: bool) -> None:
        """Find a recorded utterance in the sound, classify it and pass its events on.

        ``transcribed``: whether its source was being transcribed when it was recorded.
        """
        detected = self._find(end)
        if detected is None:
            self._counted.missing += 1
            return
        tracker = self._tracker(end.dialogue_id)
        assert tracker.dialogue is not None
        utterance = LiveUtterance(
            recognizer=self.recognizer,
            source=SourceConfig(name=end.source, speaker=_fixed_speaker(end)),
            dialogue=tracker.dialogue,
            speakers=tracker.speakers,
            turn=end.turn,
            start=detected.finish.start,
            started_at=0.0,  # replaced by the recorded times
            finish=detected.finish,
        )
        revisions = self._attribute(utterance, detected)
        recognition = self._classify(utterance, detected, transcribed=transcribed)
        event = utterance.event(
            "end", text=recognition.text, prediction=recognition.prediction
        ).model_copy(update={**end.model_dump(include=RECORDED), "latency_ms": None})
        self._counted.matched += 1
        self._speakers[event.id] = event.speaker
        self.on_recognition(recognition)
        self.on_event(event)
        assert tracker.speakers is not None
        self.on_event(tracker.speakers.add(event))
        self._pass_on(tracker.speakers, revisions)

    def apply(self, change: SpeakerChange) -> None:
        """Do as a person said about the speakers; what can't be done here is passed over."""
        tracker = self._trackers.get(change.dialogue_id)
        if tracker is not None and tracker.speakers is not None:
            with contextlib.suppress(ConfigError):  # of somebody who isn't found in this replay
                self._pass_on(tracker.speakers, tracker.speakers.apply(change))

    def report_other_speakers(self, progress: Progress) -> None:
        """One line if voices have other names than they had live."""
        recorded = {end.id: end.speaker for end in self.session.ends}
        other = [one for one, speaker in self._speakers.items() if recorded[one] != speaker]
        if other:
            progress(
                f"{self.session.folder}: {len(other)} utterances have other speakers than live; "
                "voices have been enrolled or forgotten since"
            )

    def _attribute(self, utterance: LiveUtterance, detected: _Detected) -> list[Revision]:
        """Say by the voice who spoke, where that was done live."""
        encoder = self.recognizer.speaker_encoder
        if encoder is None or utterance.speaker:
            return []
        part = detected.part
        return utterance.attribute(
            encoder.embed(detected.samples) if part is None else part.embedding
        )

    def _pass_on(self, speakers: DialogueSpeakers, revisions: list[Revision]) -> None:
        summary = None
        for revision in revisions:
            self._speakers[revision.after.id] = revision.after.speaker
            self.on_event(revision.after)
            summary = speakers.summarise(revision) or summary
        if summary is not None:
            self.on_event(summary)

    def count(self) -> Replayed:
        """The numbers of utterances; ends the replay."""
        self._counted.extra += len(self._next)
        for source in self.session.stretches:
            self._counted.extra += sum(1 for _ in self._detect(source))
        return self._counted

    def _find(self, end: Utterance) -> _Detected | None:
        """The source's next utterance with the start of this one; earlier ones are passed over."""
        start = sample_at(end.audio_start_ms)
        while True:
            found = self._next.pop(end.source, None) or next(self._detect(end.source), None)
            if found is None or found.finish.start == start:
                return found
            if found.finish.start > start:
                self._next[end.source] = found
                return None
            self._counted.extra += 1

    def _detect(self, source: str) -> Iterator[_Detected]:
        """The rest of the utterances in a source's sound."""
        return self._detections.setdefault(source, self._each_part(source))

    def _each_part(self, source: str) -> Iterator[_Detected]:
        """All utterances in a source's sound, cut where the speaker changes if they were live."""
        cut = {
            sample_at(end.audio_start_ms)
            for end in self.session.ends
            if end.source == source and end.trigger == "speaker"
        }
        for one in _utterances(self.session, source=source, config=self.config):
            encoder = self.recognizer.speaker_encoder if one.finish.start in cut else None
            yield from [one] if encoder is None else _cut(one, encoder)

    def _tracker(self, dialogue_id: str) -> DialogueTracker:
        known = self._trackers.get(dialogue_id)
        if known is None:
            dialogue = LiveDialogue(initial_state(self.recognizer.bundle), id=dialogue_id)
            known = DialogueTracker()
            known.begin(self.recognizer, dialogue)
            before = self._trackers.get(self._followed.get(dialogue_id, ""))
            if before is not None and before.dialogue is not None:
                dialogue.go_on_from(before.dialogue)
            self._trackers[dialogue_id] = known
        return known

    def _classify(
        self, utterance: LiveUtterance, detected: _Detected, *, transcribed: bool
    ) -> Recognition:
        """The live pipeline's steps for a finished utterance, one after another."""
        recognizer, finish = self.recognizer, detected.finish
        acoustic = None
        if recognizer.acoustic is not None:
            acoustic = recognizer.acoustic.extract(detected.samples)
        transcript = recognizer.transcriber.final(
            detected.samples, speech_score=finish.mean_score, decode=transcribed
        )
        text = utterance.encode_text(transcript)
        prediction = utterance.classify_final(acoustic, text)
        return Recognition(utterance.id, finish, acoustic, text, prediction)


def _cut(whole: _Detected, encoder: SpeakerEncoder) -> Iterator[_Detected]:
    """An utterance cut where the speaker changes."""
    stream = encoder.open()
    stream.feed(whole.samples)
    parts, start = stream.parts(), whole.finish.start
    ends = whole.finish.split([start + part.start for part in parts[1:]])
    for part, end in zip(parts, ends, strict=True):
        yield _Detected(whole.samples[part.start : part.end], end, part)


def _steps(session: Session) -> Iterator[tuple[Utterance | SpeakerChange | Feedback, bool]]:
    """Finished utterances in the order of publication, and whether they were transcribed; between
    them what people said about the speakers and the labels."""
    off: set[str] = set()  # sources that weren't transcribed
    for event in session.events:
        if isinstance(event, Switch) and event.switch == "transcribe":
            (off.discard if event.on else off.add)(event.source)
        elif isinstance(event, SpeakerChange | Feedback):
            yield event, True
        elif isinstance(event, Utterance) and event.type == "end" and event.revision is None:
            yield event, event.source not in off


def _fixed_speaker(end: Utterance) -> str:
    """The speaker whom the source's settings named; sessions of before name no other."""
    return end.speaker if end.speaker_source in ("", "source") else ""


def _utterances(session: Session, *, source: str, config: Config) -> Iterator[_Detected]:
    """All utterances in a source's sound, detected as they were live."""
    detector = UtteranceDetector(config, asks=config.endpoint.engine != "silence")
    recorded = {
        (sample_at(end.audio_end_ms), end.trigger)
        for end, _ in _steps(session)
        if isinstance(end, Utterance) and end.source == source and end.audio_end_ms is not None
    }

    def was_over(asked: Consult) -> bool:
        return (asked.end, asked.trigger) in recorded

    pieces: list[Int16] = []
    actions: Iterable[UtteranceAction]
    for piece in (*session.audio(source), None):
        if piece is None:
            actions = detector.flush(resume_at=0)
        elif isinstance(piece, Stretch):
            actions = detector.flush(resume_at=piece.start, trigger=piece.trigger)
        else:
            actions = detector.feed_whole(piece, is_over=was_over)
        for action in actions:
            match action:
                case Begin():
                    pieces = []
                case Feed(samples=samples):
                    pieces.append(samples)
                case Finish():
                    yield _Detected(np.concatenate(pieces), action)


def recorded_config(session: Session, *, device: str) -> Config:
    """The settings that a session was recognised with, those of its time included."""
    try:
        settings = {**session.header.settings, "device": device}
        for section, values in BEFORE.items():
            own = settings.get(section, {})
            if isinstance(own, Mapping):  # anything else is refused below
                settings[section] = {**values, **own}
        return Config.model_validate(settings)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise CorpusError(
            f"{session.folder}: setting '{key}' isn't known to this version; replay it with "
            f"stream-hbaf {session.header.versions.get('stream-hbaf', 'of its time')}"
        ) from None


def _name(session: Session, wanted: Model) -> str:
    """A bundle's name; of the session's first one the name or folder that it was started with."""
    header = session.header
    return str(header.settings.get("model", wanted.id)) if wanted == header.model else wanted.id


def _require_same(session: Session, *, recognizer: Recognizer, live: Model) -> None:
    model = recognizer.model
    if live.sha256 not in (model.sha256, *recognizer.bundle.config.replaces):
        raise BundleError(
            f"{session.folder}: was recorded with bundle {live.id} {live.sha256[:12]}, but "
            f"{model.id} here is {model.sha256[:12]}; install that version, or choose one with "
            "--model"
        )


def _report_other_versions(session: Session, *, progress: Progress) -> None:
    """Report packages that affect results and have changed since the recording, in one line."""
    now, then = package_versions(), session.header.versions
    changed = [f"{name} {then[name]}" for name in then if now.get(name) != then[name]]
    if changed:
        versions = ", ".join(changed)
        progress(f"{session.folder}: recorded with {versions}; others may differ a little")

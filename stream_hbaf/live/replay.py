"""A session is recognised again: the same sound through the same models, in the recorded order.

The recording decides what only chance decided live: which dialogue an utterance belonged to, and
in which order sources that talk with each other were answered. Everything else is found anew.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ValidationError

from stream_hbaf.config import Config, SourceConfig
from stream_hbaf.errors import BundleError, CorpusError
from stream_hbaf.events import DialogueSummary, Model, Switch, Utterance
from stream_hbaf.live.runtime import Conversation, Recognition
from stream_hbaf.live.utterance import SpokenUtterance
from stream_hbaf.recognizer import Dialogue, Int16, Recognizer
from stream_hbaf.sessions.header import decisive_versions
from stream_hbaf.sessions.session import Session, Stretch, sample_at
from stream_hbaf.speech.listener import Listener, Sound
from stream_hbaf.speech.segmenter import Begin, Finish

Load = Callable[[Config], AbstractContextManager[Recognizer]]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Replayed:
    """How a replay went, in numbers of utterances."""

    told: int  # found again, and told
    missing: int  # the recording tells of them, but they weren't found
    others: int  # found, but the recording doesn't tell of them


@dataclass(frozen=True, slots=True)
class _Found:
    """One utterance in the recorded sound."""

    start: int  # sample, since the source was opened
    samples: Int16
    finish: Finish


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
    """Tell again, as fast as it goes, each finished utterance that a session tells of.

    Ids, turns and times of day are the recorded ones; features are the same to the bit, words to
    the letter, probabilities to 1e-5. What is provisional live (``update``, ``partial``) and
    latencies aren't told again. ``progress`` hears in a line each what makes this replay another.
    With ``model``, that bundle reads what others read live.

    Raises BundleError if the bundle that was used live isn't there in the same version, CorpusError
    if the session can't be read.
    """
    for line in _other_versions(session):
        progress(line)
    config = _config(session, device=device)
    replay = _Replay(session, config, on_event=on_event, on_recognition=on_recognition)
    reading: Model | str | None = None
    with ExitStack() as opened:
        for end, write in _ends(session):
            wanted = model or end.model or session.header.model
            if wanted != reading:
                opened.close()
                name = wanted if isinstance(wanted, str) else _name(session, wanted)
                recognizer = load(config.model_copy(update={"model": name}))
                replay.recognizer = opened.enter_context(recognizer)
                if isinstance(wanted, Model):
                    _require_same(session, replay.recognizer, wanted)
                reading = wanted
            replay.tell(end, write=write)
    counted = replay.count()
    if counted.missing:
        progress(f"{session.folder}: {counted.missing} utterances weren't found again")
    return counted


@dataclass(slots=True)
class _Replay:
    """One run over a session's finished utterances, in their recorded order."""

    session: Session
    config: Config
    on_event: Callable[[Utterance | DialogueSummary], None]
    on_recognition: Callable[[Recognition], None]
    recognizer: Recognizer = field(init=False)  # that reads now
    _conversations: dict[str, Conversation] = field(default_factory=dict)  # by dialogue's id
    _found: dict[str, Iterator[_Found]] = field(default_factory=dict)  # by source
    _next: dict[str, _Found] = field(default_factory=dict)  # found, but not told yet
    _told: int = 0
    _missing: int = 0
    _others: int = 0

    def tell(self, end: Utterance, *, write: bool) -> None:
        """Find the utterance again, and tell of it; ``write`` down its words if that was on."""
        found = self._find(end)
        if found is None:
            self._missing += 1
            return
        conversation = self._conversation(end.dialogue_id)
        assert conversation.dialogue is not None
        spoken = SpokenUtterance(
            recognizer=self.recognizer,
            dialogue=conversation.dialogue,
            turn=end.turn,
            start=found.start,
            started_at=0.0,  # the recorded times are told
            finish=found.finish,
        )
        again = self._recognise(spoken, found, speaker=end.speaker, write=write)
        said = spoken.event(
            "end",
            SourceConfig(name=end.source, speaker=end.speaker),
            words=again.words,
            prediction=again.prediction,
        ).model_copy(update=_recorded(end))
        self._told += 1
        self.on_recognition(again)
        self.on_event(said)
        summary = conversation.summarise(said)
        if summary is not None:
            self.on_event(summary)

    def count(self) -> Replayed:
        """What came of it; nothing can be told after that."""
        self._others += len(self._next)
        for source in self.session.stretches:
            self._others += sum(1 for _ in self._listen(source))
        return Replayed(self._told, self._missing, self._others)

    def _find(self, end: Utterance) -> _Found | None:
        """The source's next utterance that begins where this one did; earlier ones are passed."""
        start = sample_at(end.audio_start_ms)
        while True:
            found = self._next.pop(end.source, None) or next(self._listen(end.source), None)
            if found is None or found.start == start:
                return found
            if found.start > start:
                self._next[end.source] = found
                return None
            self._others += 1

    def _listen(self, source: str) -> Iterator[_Found]:
        if source not in self._found:
            self._found[source] = _utterances(self.session, source, Listener(self.config))
        return self._found[source]

    def _conversation(self, dialogue_id: str) -> Conversation:
        known = self._conversations.get(dialogue_id)
        if known is None:
            dialogue = Dialogue(self.recognizer.bundle.network.initial_state(), id=dialogue_id)
            known = Conversation(dialogue=dialogue, recognizer=self.recognizer)
            self._conversations[dialogue_id] = known
        return known

    def _recognise(
        self, spoken: SpokenUtterance, found: _Found, *, speaker: str, write: bool
    ) -> Recognition:
        """What the pipeline does with a finished utterance, one step after another."""
        recognizer, dialogue = self.recognizer, spoken.dialogue
        acoustic = None
        if recognizer.acoustic is not None:
            acoustic = recognizer.acoustic.extract(found.samples)
        transcript = recognizer.transcriber.final(
            found.samples, speech_score=found.finish.mean_score, write=write
        )
        words = recognizer.understand(transcript, speaker=speaker, window=dialogue.window)
        prediction = recognizer.conclude(
            acoustic=acoustic, words=words, dialogue=dialogue, speaker=speaker, explain=True
        )
        return Recognition(spoken.id, found.finish, acoustic, words, prediction)


def _ends(session: Session) -> Iterator[tuple[Utterance, bool]]:
    """Finished utterances in the order in which they were told, and whether words were wanted."""
    unwritten: set[str] = set()
    for told in session.events:
        if isinstance(told, Switch) and told.switch == "transcribe":
            (unwritten.discard if told.on else unwritten.add)(told.source)
        elif isinstance(told, Utterance) and told.type == "end":
            yield told, told.source not in unwritten


def _utterances(session: Session, source: str, listener: Listener) -> Iterator[_Found]:
    """All utterances in a source's sound, found as they were live."""
    sound: list[Int16] = []
    for piece in (*session.heard(source), None):
        if piece is None:
            heard = listener.flush(resume_at=0)
        elif isinstance(piece, Stretch):
            heard = listener.flush(resume_at=piece.start, trigger=piece.trigger)
        else:
            heard = listener.feed(piece)
        for action in heard:
            match action:
                case Begin():
                    sound = []
                case Sound(samples=samples):
                    sound.append(samples)
                case Finish():
                    yield _Found(action.start, np.concatenate(sound), action)


def _recorded(end: Utterance) -> dict[str, Any]:
    """What the recording knows better."""
    return {
        "id": end.id,
        "rev": end.rev,
        "start_time": end.start_time,
        "end_time": end.end_time,
        "latency_ms": None,
    }


def _config(session: Session, *, device: str) -> Config:
    try:
        return Config.model_validate({**session.header.settings, "device": device})
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise CorpusError(
            f"{session.folder}: setting '{key}' isn't known to this version; replay it with "
            f"stream-hbaf {session.header.versions.get('stream-hbaf', 'of its time')}"
        ) from None


def _name(session: Session, wanted: Model) -> str:
    """Where a bundle is to be found: the first one's folder may have been given instead of it."""
    header = session.header
    return str(header.settings.get("model", wanted.id)) if wanted == header.model else wanted.id


def _require_same(session: Session, recognizer: Recognizer, live: Model) -> None:
    model = recognizer.model
    if live.sha256 not in (model.sha256, *recognizer.bundle.config.replaces):
        raise BundleError(
            f"{session.folder}: was recorded with bundle {live.id} {live.sha256[:12]}, but "
            f"{model.id} here is {model.sha256[:12]}; install that version, or choose one with "
            "--model"
        )


def _other_versions(session: Session) -> list[str]:
    """One line if packages that decide have changed since."""
    now, then = decisive_versions(), session.header.versions
    changed = [f"{name} {then[name]}" for name in then if now.get(name) != then[name]]
    if not changed:
        return []
    return [f"{session.folder}: recorded with {', '.join(changed)}; others may differ a little"]

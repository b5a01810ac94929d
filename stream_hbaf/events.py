"""The typed events of a run, and the payloads in which they are published.

Inside the recogniser time is counted in samples. Events hold seconds and wall-clock times, because
they leave it: times of day are ISO 8601 in UTC, durations are in milliseconds.

The docstring below a field is its description in ``docs/mqtt.md`` and in the JSON Schemas.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from stream_hbaf.untrusted import as_unicode

Stage = Literal["capture", "vad", "transcript", "acoustic", "speaker", "classifier"]
State = Literal["online", "offline", "degraded"]
Trigger = Literal["silence", "turn", "timeout", "length", "speaker", "end_of_input", "request"]
SwitchName = Literal["listening", "transcribe", "record"]
Privacy = Literal["full", "no_text", "label_only"]
SpeakerSource = Literal["", "source", "voice", "enrolled", "corrected"]


class Part(BaseModel):
    """An immutable part of an event."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        """A file's name that isn't UTF-8 may stand in a detail; JSON and MQTT can't hold it."""
        return as_unicode(value) if isinstance(value, str) and not value.isascii() else value


class Event(Part):
    """A message, whole in itself."""


class Affect(Part):
    """Valence and arousal."""

    valence: float
    """From -1, unpleasant, to 1, pleasant."""
    arousal: float
    """From -1, calm, to 1, excited."""
    source: Literal["derived", "trained"] = "derived"
    """Where they are from: ``derived`` from the probabilities of the labels, of which each has a
    fixed place; ``trained``: the arousal is the mean of that and of what a head of the model says
    of the voice."""


class Emotion(Part):
    """A prediction. With privacy ``label_only`` the label is all that is published of it."""

    label: str
    """The most probable of the model's labels; ``info`` lists them."""
    score: float | None = None
    """The label's probability, 0 to 1."""
    abstained: bool = False
    """The prediction is too uncertain to rely on; the label is the best guess all the same."""
    set: list[str] = []
    """The conformal prediction set, most probable label first; the bundle's calibration says how
    often such sets contain the true label."""
    probabilities: dict[str, float] = {}
    """The probability of every label; they sum to 1."""
    familiarity: float | None = None
    """How familiar the voice sounds, 0 to 1: the share of utterances of held-out speakers of the
    training corpora, each corpus weighing the same, whose sound lies at least as far from the
    training set's as this one's. Close to 0 it is a stranger through a strange microphone, and the
    answer relies on it less. Absent without sound, and with models that don't measure it."""
    affect: Affect | None = None
    """The expected valence and arousal; absent for labels whose place isn't known."""


class Contributions(Part):
    """What each input added to the label's probability (Shapley values); negative where it spoke
    against the label.

    They sum to the score less the score without sound, words and context.
    """

    audio: float
    """Of the speaker's voice, as a difference of probabilities."""
    text: float
    """Of the words."""
    context: float
    """Of the dialogue so far."""


class Inferred(Part):
    """Commonsense inferences from the words, as phrases: at most 3 each, most probable first.

    The names are the HBAF paper's.
    """

    external: list[str]
    """What others feel."""
    internal: list[str]
    """What the speaker feels."""
    purpose: list[str]
    """What the speaker wants."""


class Asr(Part):
    """The speech recogniser's confidence in the words."""

    avg_logprob: float
    """Mean log probability of the tokens; closer to 0 is more certain. 0 where nothing was decoded:
    it is hardly speech, or certainly in another ``language``."""
    no_speech_prob: float
    """Probability that there is no speech at all, 0 to 1; 1 where nothing was decoded."""


class Latency(Part):
    """Milliseconds from the last speech sample to publication, by stage."""

    vad: float
    """Until the silence confirmed the end of the utterance."""
    transcript: float
    """From there until the words were there."""
    acoustic: float
    """For the acoustic functionals."""
    text: float
    """For the text features."""
    classify: float
    """For the network."""
    publish: float
    """From the prediction until the event was handed to the publishers."""
    total: float
    """From the last speech sample until then."""


class Model(Part):
    """A trained bundle."""

    id: str
    """The bundle's name."""
    sha256: str
    """Digest of the bundle's settings and weights, in hexadecimal."""


class Utterance(Event):
    """One utterance: ``new`` when speech begins, ``update`` at each pause, then ``end``; another
    ``end`` where it turns out later that somebody else has spoken."""

    schema_: Literal["stream_hbaf/utterance/1"] = Field("stream_hbaf/utterance/1", alias="schema")
    id: str
    """The same in all messages about one utterance, and different between utterances."""
    rev: int
    """The revision: rises with every message about the same id."""
    type: Literal["new", "update", "end"]
    """The stage of the utterance."""
    revision: int | None = None
    """Only in an ``end`` that replaces an earlier one: how many it has replaced."""
    source: str
    """The name of the audio source, as in the topic."""
    dialogue_id: str
    """The dialogue that the utterance belongs to; a new random id after a long silence or a
    ``reset``."""
    turn: int
    """The position in the dialogue, beginning at 1."""
    speaker: str
    """The speaker's name; empty if unknown, or before the ``end`` where the voice decides."""
    speaker_score: float | None = None
    """The probability that it is this speaker, or where that is too low to name one, of the most
    probable speaker. Absent where the voice doesn't decide."""
    speaker_source: SpeakerSource = ""
    """What the speaker is known by: the settings of the ``source``, a ``voice`` of this dialogue
    (``speaker 1``, ``speaker 2`` and so on), an ``enrolled`` voice, or a person who ``corrected``
    it. Empty if the speaker is unknown."""
    start_time: str
    """When speech began, ISO 8601, UTC. Of a recording at ``--speed max``: when it was played."""
    end_time: str | None = None
    """When speech ended. Only in an ``end``."""
    audio_start_ms: float
    """When speech began, since the source was opened."""
    audio_end_ms: float | None = None
    """When speech ended, since the source was opened. Only in an ``end``."""
    trigger: Trigger | None = None
    """What ended the utterance. Only in an ``end``. ``turn`` is a short pause where the turn seems
    over, ``silence`` a longer one, ``timeout`` the longest, where it doesn't. ``speaker``: somebody
    else speaks on."""
    text: str = ""
    """The transcript; empty if there are no words, or if privacy keeps them back."""
    language: str = ""
    """The transcript's language, ISO 639-1, such as ``en``; empty without words."""
    asr: Asr | None = None
    """Confidence in the transcript; absent without words."""
    modalities: list[Literal["audio", "text"]] = []
    """The inputs that the prediction is based on."""
    emotion: Emotion | None = None
    """The prediction; absent until there is one."""
    contributions: Contributions | None = None
    """What each input added to the prediction. Only in an ``end`` with an emotion."""
    conflict: bool | None = None
    """Whether voice alone and words alone give contradicting emotions; absent without both."""
    inferences: Inferred | None = None
    """Only in an ``end`` with words, and only with ``--inferences``."""
    degraded: str = ""
    """The stage that failed and the reason; empty if none did."""
    latency_ms: Latency | None = None
    """Only in an ``end``."""
    model: Model | None = None
    """The bundle that made the prediction. Only in an ``end``."""


class Partial(Event):
    """The running transcript with a provisional emotion. Partials may be dropped, and are never
    sent again."""

    schema_: Literal["stream_hbaf/partial/1"] = Field("stream_hbaf/partial/1", alias="schema")
    id: str
    """The utterance's id."""
    source: str
    """The name of the audio source, as in the topic."""
    dialogue_id: str
    """The dialogue that the utterance belongs to."""
    speaker: str
    """The speaker's name as configured for the source; empty if unknown."""
    text: str
    """The transcript so far."""
    modalities: list[Literal["audio", "text"]]
    """The inputs that the prediction is based on."""
    emotion: Emotion
    """The provisional prediction from the utterance so far."""


class Info(Event):
    """The recogniser behind this node. Sent at each connection and when sources come and go,
    retained."""

    schema_: Literal["stream_hbaf/info/1"] = Field("stream_hbaf/info/1", alias="schema")
    version: str
    """The version of stream-hbaf."""
    model: Model
    """The bundle that makes the predictions."""
    labels: list[str]
    """All labels of the model."""
    licence: str
    """The licence terms of weights and parts, in one line."""
    sources: list[str]
    """The names of the audio sources, as in topics."""
    privacy: Privacy = "full"
    """The privacy mode in force."""
    speakers: list[str] = []
    """The names of enrolled voices that are recognised."""


class Quantiles(Part):
    """Of the last hundred utterances, in milliseconds."""

    p50: float
    """The median."""
    p95: float
    """The 95th percentile."""


class SetCoverage(Part):
    """How often label sets hold the right label, as far as corrections tell."""

    stated: float
    """The share that the model's calibration states."""
    corrections: int
    """How many of the latest utterances were corrected."""
    held: float | None = None
    """The share of these whose published set held the right label; absent without corrections."""


class Health(Event):
    """Load and losses of the recogniser. Every minute, retained."""

    schema_: Literal["stream_hbaf/health/1"] = Field("stream_hbaf/health/1", alias="schema")
    uptime_s: float
    """Seconds since the start."""
    memory_mb: float
    """Resident memory."""
    utterances: int
    """Finished utterances since the start."""
    queues: dict[str, int]
    """The present length of each queue: ``chunks``, ``finished``, ``transcripts``, ``outbox``."""
    dropped: dict[str, int]
    """What was dropped since the start, by kind: messages (``partials``, ``utterances``), and under
    load ``partial_transcripts`` and, at pauses, ``speculative_transcripts``."""
    latency_ms: dict[str, Quantiles]
    """By stage, as in an ``end``."""
    hints: list[str] = []
    """What a person should check, a line for each source: nothing but silence, sound without any
    speech, channels that cancel each other out. Published at once; usually empty."""
    sets: SetCoverage | None = None
    """Of the label sets; only with ``adaptive_sets``."""


class DialogueSummary(Event):
    """A dialogue so far, after each of its utterances. Retained."""

    schema_: Literal["stream_hbaf/dialogue/1"] = Field("stream_hbaf/dialogue/1", alias="schema")
    source: str
    """The source of the latest utterance."""
    dialogue_id: str
    """As in its utterances."""
    follows: str | None = None
    """The dialogue before it at the same source, by which known voices are measured on; only with
    ``dialogue.keep_voices``."""
    start_time: str
    """When the first utterance began, ISO 8601, UTC."""
    end_time: str
    """When the latest utterance ended."""
    turns: int
    """The number of utterances so far."""
    speakers: dict[str, str]
    """The latest label of each speaker; the key ``""`` is a speaker without a name."""
    emotions: dict[str, int]
    """The number of utterances by label."""
    probabilities: dict[str, float]
    """The mean probability of each label over the utterances."""
    mood: dict[str, Affect] = {}
    """Each speaker's mood: the decayed mean of the utterances' valence and arousal, in which one
    counts half after two more."""
    shift: bool = False
    """Whether the latest utterance is far from its speaker's mood before it: by 0.4 or more."""


class Switch(Event):
    """The state of a source's switch. Retained."""

    source: str
    """The name of the audio source, as in the topic."""
    switch: SwitchName
    """The switch's name."""
    on: bool
    """Its state."""


class Feedback(Event):
    """A correction: the emotion that an utterance really had, who really spoke it, or both."""

    schema_: Literal["stream_hbaf/feedback/1"] = Field("stream_hbaf/feedback/1", alias="schema")
    id: str
    """The utterance's id."""
    label: str = ""
    """The correct label; empty if the emotion isn't corrected."""
    speaker: str = ""
    """The name of who spoke; empty if the speaker isn't corrected."""
    by: str = ""
    """The annotator's name; may be left out."""

    @property
    def corrects(self) -> str:
        """What of the utterance: its label, its speaker, or both."""
        return " ".join(name for name in ("label", "speaker") if getattr(self, name))


class Request(Event):
    """A command received on ``request/<command>``; answered on ``response/<command>``."""

    command: str
    """The command's name: the topic's last level."""
    arguments: dict[str, Any] = {}
    """The command's arguments."""
    transaction: str = ""
    """Returned in the response unchanged."""


class Response(Event):
    """The result of a request."""

    schema_: Literal["stream_hbaf/response/1"] = Field("stream_hbaf/response/1", alias="schema")
    command: str
    """The request's command."""
    status: Literal["ok", "error"]
    """Whether the command succeeded."""
    content: dict[str, Any] = Field({}, alias="data")
    """The command's result; empty for most commands."""
    error: str = ""
    """What is wrong and what to do, in one line; empty if nothing is."""
    transaction: str = ""
    """The request's, unchanged."""


class Status(Event):
    """The state of a stage of a source's pipeline."""

    source: str
    """The name of the audio source, as in the topic."""
    stage: Stage
    """The stage."""
    state: State
    """Its state."""
    detail: str = ""
    """The reason, in one line for people; not published over MQTT."""


class Speech(Event):
    """Speech begins or ends."""

    source: str
    """The name of the audio source, as in the topic."""
    on: bool
    """True when speech begins."""


class Connected(Event):
    """The first message of ``stream-hbaf serve`` on each connection; not published over MQTT."""

    schema_: Literal["stream_hbaf/connected/1"] = Field("stream_hbaf/connected/1", alias="schema")
    id: str
    """The stream's id: who connects again with it goes on with the stream. A secret."""
    source: str
    """The name of the audio source, as in the topic."""
    resumed: bool
    """Whether the stream goes on, with its dialogue; else it is a new one."""
    resume_s: int
    """Seconds for which the stream waits for its client after a lost connection."""


class Level(Event):
    """The present sound level, for terminal and dashboard; not published over MQTT."""

    source: str
    """The name of the audio source, as in the topic."""
    dbfs: float
    """Level of the newest chunk in dB relative to full scale; 0 is the loudest possible."""
    speech: bool
    """Whether an utterance is in progress."""


AnyEvent = Utterance | Partial | Info | Health | DialogueSummary | Switch | Status | Speech | Level

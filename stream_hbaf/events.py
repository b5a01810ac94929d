"""Everything that travels: what the pipeline says, and what is published of it.

Samples are counted inside the recogniser; seconds and wall-clock times appear here only, where
an event leaves it. Times of day are ISO 8601 in UTC, durations are milliseconds.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Stage = Literal["capture", "vad", "transcript", "acoustic", "classifier"]
State = Literal["online", "offline", "degraded"]
Trigger = Literal["silence", "length", "end_of_input", "request"]
SwitchName = Literal["listening", "transcribe", "record"]
Privacy = Literal["full", "no_text", "label_only"]


class Event(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class Emotion(Event):
    """What is felt; of all this, privacy ``label_only`` leaves the label."""

    label: str
    """The likeliest of the model's labels, which ``info`` lists."""
    score: float | None = None
    """The label's probability, 0 to 1."""
    abstained: bool = False
    """Too unsure to be an answer: the label is the best guess, no more."""
    set: list[str] = []
    """Labels, likeliest first; calibration says how often it holds the right."""
    probabilities: dict[str, float] = {}
    """Every label's, summing to 1."""


class Contributions(Event):
    """What each part added to the label's score; below 0 where it spoke against the label.

    They sum to the score less what it would be with neither sound, words nor past.
    """

    audio: float
    """The sound of the voice, as a difference of probabilities."""
    text: float
    """The words, likewise."""
    context: float
    """The dialogue's past, as the network remembers it, likewise."""


class Inferred(Event):
    """What isn't said but follows from the words, in annotators' phrases: up to 3, likeliest first.

    The names are the paper's.
    """

    external: list[str]
    """What others feel."""
    internal: list[str]
    """What the speaker feels."""
    purpose: list[str]
    """What the speaker wants."""


class Asr(Event):
    """How sure Whisper is of the words."""

    avg_logprob: float
    """Mean log probability of the words' tokens; nearer 0 is surer."""
    no_speech_prob: float
    """Probability that nobody spoke at all, 0 to 1."""


class Latency(Event):
    """Milliseconds from the last speech sample to publication, and what they were spent on."""

    vad: float
    """Waiting for the silence that confirms the end."""
    transcript: float
    """Waiting for the words after that."""
    acoustic: float
    """For the functionals."""
    text: float
    """For the text features."""
    classify: float
    """For the network."""
    publish: float
    """Until handed to the publishers."""
    total: float
    """From the last speech sample until now."""


class Model(Event):
    """A trained bundle."""

    id: str
    """The bundle's name."""
    sha256: str
    """Of the bundle's settings and weights, in hexadecimal."""


class Utterance(Event):
    """One utterance's life: ``new`` when speech begins, ``update`` at each pause, ``end`` once."""

    schema_: Literal["stream_hbaf/utterance/1"] = Field("stream_hbaf/utterance/1", alias="schema")
    id: str
    """The same in all messages about one utterance, and in no other's."""
    rev: int
    """Rises with every message about the same id."""
    type: Literal["new", "update", "end"]
    """What has happened."""
    source: str
    """Which microphone, file or stream, as in the topic."""
    dialogue_id: str
    """What the utterance belongs to: a new random name after a long silence or a ``reset``."""
    turn: int
    """1 for a dialogue's first utterance."""
    speaker: str
    """As configured for the source; empty if unknown."""
    start_time: str
    """When speech began, ISO 8601, UTC; of a recording at ``--speed max``, as it was played."""
    end_time: str | None = None
    """When speech ended; of an ``end``."""
    audio_start_ms: float
    """When speech began, since the source was opened."""
    audio_end_ms: float | None = None
    """When speech ended, likewise; of an ``end``."""
    trigger: Trigger | None = None
    """What ended it; of an ``end``."""
    text: str = ""
    """The words; empty if there are none, or if they may not leave."""
    language: str = ""
    """Of the words, as ISO 639-1: ``en``; empty without words."""
    asr: Asr | None = None
    """How sure the words are; absent without them."""
    modalities: list[Literal["audio", "text"]] = []
    """What the emotion was read from."""
    emotion: Emotion | None = None
    """Absent until there was something to read it from."""
    contributions: Contributions | None = None
    """Of an ``end`` with an emotion."""
    conflict: bool | None = None
    """Voice alone and words alone contradict; absent without both."""
    inferences: Inferred | None = None
    """Of an ``end`` with text, where they were asked for."""
    degraded: str = ""
    """What failed, if anything did: stage and reason."""
    latency_ms: Latency | None = None
    """Of an ``end``."""
    model: Model | None = None
    """What read the emotion; of an ``end``."""


class Partial(Event):
    """The running transcript and a provisional emotion; may be dropped, never repeated."""

    schema_: Literal["stream_hbaf/partial/1"] = Field("stream_hbaf/partial/1", alias="schema")
    id: str
    """The utterance's."""
    source: str
    """Which microphone, file or stream, as in the topic."""
    dialogue_id: str
    """What the utterance belongs to: a new random name after a long silence or a ``reset``."""
    speaker: str
    """As configured for the source; empty if unknown."""
    text: str
    """The words so far."""
    modalities: list[Literal["audio", "text"]]
    """What the emotion was read from."""
    emotion: Emotion
    """Provisional: of the utterance so far."""


class Info(Event):
    """Who publishes here: sent once per connection, retained."""

    schema_: Literal["stream_hbaf/info/1"] = Field("stream_hbaf/info/1", alias="schema")
    version: str
    """Of stream-hbaf."""
    model: Model
    """What reads the emotions."""
    labels: list[str]
    """All that the model tells apart."""
    licence: str
    """Terms that the weights and parts come with, in one line."""
    sources: list[str]
    """The names that topics have."""
    privacy: Privacy = "full"
    """What is published of all that is known."""


class Quantiles(Event):
    """Of the last hundred utterances, in milliseconds."""

    p50: float
    """The median."""
    p95: float
    """What 95 % of them stay under."""


class Health(Event):
    """How the recogniser bears up: every minute, retained."""

    schema_: Literal["stream_hbaf/health/1"] = Field("stream_hbaf/health/1", alias="schema")
    uptime_s: float
    """Since the start."""
    memory_mb: float
    """Resident memory."""
    utterances: int
    """Finished since the start."""
    queues: dict[str, int]
    """What waits now, by queue: chunks, finished, outbox."""
    dropped: dict[str, int]
    """What was let go since the start, by kind: partials, utterances."""
    latency_ms: dict[str, Quantiles]
    """By stage, as in an ``end``."""


class DialogueSummary(Event):
    """A dialogue so far, after each of its utterances; retained."""

    schema_: Literal["stream_hbaf/dialogue/1"] = Field("stream_hbaf/dialogue/1", alias="schema")
    source: str
    """Which source's utterance was the latest."""
    dialogue_id: str
    """As in its utterances."""
    start_time: str
    """When its first utterance began, ISO 8601, UTC."""
    end_time: str
    """When its latest utterance ended."""
    turns: int
    """Utterances so far."""
    speakers: dict[str, str]
    """Each one's last label; "" is a speaker without a name."""
    emotions: dict[str, int]
    """Utterances by label."""
    probabilities: dict[str, float]
    """The mean over its utterances."""


class Switch(Event):
    """A switch of a source stands so; retained."""

    source: str
    """Which microphone, file or stream, as in the topic."""
    switch: SwitchName
    """Which one."""
    on: bool
    """How it stands."""


class Feedback(Event):
    """Somebody says what an utterance's emotion really was."""

    schema_: Literal["stream_hbaf/feedback/1"] = Field("stream_hbaf/feedback/1", alias="schema")
    id: str
    """The utterance's."""
    label: str
    """What it should have said."""
    by: str = ""
    """Who says so, if they want to."""


class Request(Event):
    """Somebody wants something: ``request/<command>``, answered on ``response/<command>``."""

    command: str
    """What is wanted: the topic's last level."""
    arguments: dict[str, Any] = {}
    """What the command needs to know."""
    transaction: str = ""
    """Comes back in the answer as it was."""


class Response(Event):
    """What came of a request."""

    schema_: Literal["stream_hbaf/response/1"] = Field("stream_hbaf/response/1", alias="schema")
    command: str
    """What was asked for."""
    status: Literal["ok", "error"]
    """Whether it was done."""
    content: dict[str, Any] = Field({}, alias="data")
    """What the command has to tell; empty for most."""
    error: str = ""
    """One line: what is wrong, and what to do."""
    transaction: str = ""
    """The request's, as it was."""


class Status(Event):
    """A stage's health; ``detail`` is one line for people and is not published."""

    source: str
    """Which microphone, file or stream, as in the topic."""
    stage: Stage
    """Which part of the pipeline."""
    state: State
    """How it works."""
    detail: str = ""
    """One line for people; not published."""


class Speech(Event):
    """Somebody starts or stops speaking."""

    source: str
    """Which microphone, file or stream, as in the topic."""
    on: bool
    """True when speech begins."""


class Level(Event):
    """How loud it is now, for the screen only."""

    source: str
    """Which microphone, file or stream, as in the topic."""
    dbfs: float
    """Of the newest sound, 0 is the loudest there is."""
    speech: bool
    """Whether somebody speaks."""


AnyEvent = Utterance | Partial | Info | Health | DialogueSummary | Switch | Status | Speech | Level

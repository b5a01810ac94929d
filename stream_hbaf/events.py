"""Everything that travels: what the pipeline says, and what is published of it.

Samples are counted inside the recogniser; seconds and wall-clock times appear here only, where
an event leaves it. Times of day are ISO 8601 in UTC, durations are milliseconds.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Stage = Literal["capture", "vad", "transcript", "acoustic", "classifier"]
State = Literal["online", "offline", "degraded"]
Trigger = Literal["silence", "length", "end_of_input"]


class Event(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class Emotion(Event):
    label: str
    score: float  # the label's probability
    abstained: bool  # too unsure to be an answer: the label is the best guess, no more
    set: list[str]  # labels, likeliest first; a calibrated bundle says how often it holds the right
    probabilities: dict[str, float]  # every label's, summing to 1


class Contributions(Event):
    """What each part added to the label's score; below 0 where it spoke against the label.

    They sum to the score less what it would be with neither sound, words nor past.
    """

    audio: float
    text: float
    context: float  # the dialogue's past, as the network remembers it


class Inferred(Event):
    """What isn't said but follows from the words, in annotators' phrases: up to 3, likeliest first.

    The names are the paper's.
    """

    external: list[str]  # what others feel
    internal: list[str]  # what the speaker feels
    purpose: list[str]  # what the speaker wants


class Asr(Event):
    avg_logprob: float  # of the words' tokens; nearer 0 is surer
    no_speech_prob: float


class Latency(Event):
    """Milliseconds from the last speech sample to publication, and what they were spent on."""

    vad: float  # waiting for the silence that confirms the end
    transcript: float  # waiting for the words after that
    acoustic: float  # for the functionals
    text: float  # for the text features
    classify: float  # for the network
    publish: float  # until handed to the publishers
    total: float


class Model(Event):
    id: str
    sha256: str


class Utterance(Event):
    """One utterance's life: ``new`` when speech begins, ``update`` at each pause, ``end`` once."""

    schema_: Literal["stream_hbaf/utterance/1"] = Field("stream_hbaf/utterance/1", alias="schema")
    id: str
    rev: int  # rises with every message about the same id
    type: Literal["new", "update", "end"]
    source: str
    dialogue_id: str
    turn: int  # 1 for a dialogue's first utterance
    speaker: str
    start_time: str
    end_time: str | None = None
    audio_start_ms: float  # since the source was opened
    audio_end_ms: float | None = None
    trigger: Trigger | None = None  # what ended it
    text: str = ""
    language: str = ""
    asr: Asr | None = None
    modalities: list[Literal["audio", "text"]] = []  # what the emotion was read from
    emotion: Emotion | None = None
    contributions: Contributions | None = None  # of an ``end`` with an emotion
    conflict: bool | None = None  # voice alone and words alone contradict; None without both
    inferences: Inferred | None = None  # of an ``end`` with text, where they were asked for
    degraded: str = ""  # what failed, if anything did
    latency_ms: Latency | None = None
    model: Model | None = None


class Partial(Event):
    """The running transcript and a provisional emotion; may be dropped, never repeated."""

    schema_: Literal["stream_hbaf/partial/1"] = Field("stream_hbaf/partial/1", alias="schema")
    id: str  # the utterance's
    source: str
    dialogue_id: str
    speaker: str
    text: str
    modalities: list[Literal["audio", "text"]]
    emotion: Emotion


class Info(Event):
    """Who publishes here: sent once per connection, retained."""

    schema_: Literal["stream_hbaf/info/1"] = Field("stream_hbaf/info/1", alias="schema")
    version: str
    model: Model
    labels: list[str]
    licence: str
    sources: list[str]


class Status(Event):
    """A stage's health; ``detail`` is one line for people and is not published."""

    source: str
    stage: Stage
    state: State
    detail: str = ""


class Speech(Event):
    """Somebody starts or stops speaking."""

    source: str
    on: bool


class Level(Event):
    """How loud it is now, for the screen only."""

    source: str
    dbfs: float
    speech: bool


AnyEvent = Utterance | Partial | Info | Status | Speech | Level

"""Events, settings and helpers that the tests of MQTT share."""

import asyncio
import json

from stream_hbaf.config import MqttConfig
from stream_hbaf.events import (
    AnyEvent,
    Asr,
    Contributions,
    Emotion,
    Info,
    Latency,
    Model,
    Partial,
    Utterance,
)
from stream_hbaf.publish.mqtt import MqttPublisher

INFO = Info(
    version="0", model=Model(id="b", sha256="c"), labels=["joy"], licence="MIT", sources=["m"]
)
JOY = Emotion(
    label="joy",
    score=0.81999,
    abstained=False,
    set=["joy"],
    probabilities={"joy": 0.81999, "neutral": 0.18001},
)
# An end event with a value in each field, and numbers that are rounded when it is published.
END = Utterance(
    id="u1",
    rev=3,
    type="end",
    source="microphone",
    dialogue_id="d1",
    turn=2,
    speaker="Zoë",
    speaker_score=0.91234,
    speaker_source="enrolled",
    start_time="2026-01-02T03:04:05.600Z",
    end_time="2026-01-02T03:04:07.100Z",
    audio_start_ms=1000.04,
    audio_end_ms=2500.06,
    trigger="silence",
    text="I got the “job” 🎉",
    language="en",
    asr=Asr(avg_logprob=-0.123456, no_speech_prob=0.01),
    modalities=["audio", "text"],
    emotion=JOY,
    contributions=Contributions(audio=0.500049, text=-0.1, context=0.0),
    conflict=True,
    latency_ms=Latency(
        vad=600.0, transcript=1.26, acoustic=2.04, text=5.0, classify=3.0, publish=0.1, total=611.4
    ),
    model=Model(id="live-en", sha256="ab" * 32),
)


def emotion(label: str) -> Emotion:
    return Emotion(label=label, score=0.9, abstained=False, set=[label], probabilities={label: 0.9})


def utterance(turn: int, *, label: str | None = "joy") -> Utterance:
    return Utterance(
        id=f"u{turn}",
        rev=2,
        type="end",
        source="m",
        dialogue_id="d",
        turn=turn,
        speaker="Zoë",
        start_time="t",
        audio_start_ms=0.0,
        text=f"“{turn}”",
        emotion=emotion(label) if label else None,
    )


def partial(number: int) -> Partial:
    return Partial(
        id="u",
        source="m",
        dialogue_id="d",
        speaker="",
        text=str(number),
        modalities=["text"],
        emotion=emotion("joy"),
    )


def config(url: str, **settings: object) -> MqttConfig:
    return MqttConfig.model_validate({"url": url, "prefix": "p", "node": "n", **settings})


def payload(line: str) -> dict[str, object]:
    """The JSON object in a line of ``mosquitto.Subscriber``."""
    fields: dict[str, object] = json.loads(line.split(" ", 3)[3])
    return fields


def utterance_ids(lines: list[str]) -> list[object]:
    """The ids of the utterance messages among a subscriber's lines."""
    return [payload(line)["id"] for line in lines if "/utterance " in line]


class StatusLog:
    """An ``on_status`` callback that keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[bool, str]] = []
        self._called = asyncio.Event()

    def __call__(self, connected: bool, line: str) -> None:
        self.calls.append((connected, line))
        self._called.set()

    @property
    def lines(self) -> list[str]:
        return [line for _, line in self.calls]

    async def until(self, *, connected: bool) -> None:
        """Wait until the latest call has this state."""
        async with asyncio.timeout(10):
            while not self.calls or self.calls[-1][0] != connected:
                self._called.clear()
                await self._called.wait()


async def send_all(publisher: MqttPublisher, *events: AnyEvent) -> None:
    for event in events:
        await publisher.send(event)

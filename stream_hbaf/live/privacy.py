"""Removes from an event what may not leave the process, before any publisher gets it.

full        everything is published
no_text     everything but the text, and the inferences that are made from it
label_only  the label of each finished utterance and its times; nothing of utterances before that
"""

from stream_hbaf.events import (
    AnyEvent,
    DialogueSummary,
    Emotion,
    Partial,
    Privacy,
    Utterance,
)

# Fields of a finished utterance that are published under label_only, besides the label.
UNREDACTED = {"id", "rev", "type", "source", "dialogue_id", "turn"} | {
    "start_time",
    "end_time",
    "audio_start_ms",
    "audio_end_ms",
}


def redact(event: AnyEvent, privacy: Privacy) -> AnyEvent | None:
    """The event as it may be published; None if it may not be."""
    if privacy == "full":
        return event
    if privacy == "no_text":
        return _without_text(event)
    match event:
        case Utterance(type="end"):
            return _label_alone(event)
        case Utterance() | Partial():
            return None
        case DialogueSummary():
            return event.model_copy(update={"speakers": {}, "probabilities": {}})
        case _:
            return event


def _without_text(event: AnyEvent) -> AnyEvent:
    match event:
        case Utterance():
            return event.model_copy(update={"text": "", "inferences": None})
        case Partial():
            return event.model_copy(update={"text": ""})
        case _:
            return event


def _label_alone(event: Utterance) -> Utterance:
    label = Emotion(label=event.emotion.label) if event.emotion else None
    return Utterance(**event.model_dump(include=UNREDACTED), speaker="", emotion=label)

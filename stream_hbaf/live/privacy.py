"""What of an event may leave the process: applied once, before any publisher is told.

full        everything
no_text     everything but words, and what was inferred from them in phrases
label_only  the label of each finished utterance and when it was; nothing on the way there
"""

from stream_hbaf.events import (
    AnyEvent,
    DialogueSummary,
    Emotion,
    Partial,
    Privacy,
    Utterance,
)


def veil(event: AnyEvent, privacy: Privacy) -> AnyEvent | None:
    """The event as it may leave; None if it may not."""
    if privacy == "full":
        return event
    if privacy == "no_text":
        return _without_words(event)
    match event:
        case Utterance(type="end"):
            return _label_alone(event)
        case Utterance() | Partial():
            return None
        case DialogueSummary():
            return event.model_copy(update={"speakers": {}, "probabilities": {}})
        case _:
            return event


def _without_words(event: AnyEvent) -> AnyEvent:
    match event:
        case Utterance():
            return event.model_copy(update={"text": "", "inferences": None})
        case Partial():
            return event.model_copy(update={"text": ""})
        case _:
            return event


def _label_alone(event: Utterance) -> Utterance:
    label = Emotion(label=event.emotion.label) if event.emotion else None
    return Utterance(
        id=event.id,
        rev=event.rev,
        type=event.type,
        source=event.source,
        dialogue_id=event.dialogue_id,
        turn=event.turn,
        speaker="",
        start_time=event.start_time,
        end_time=event.end_time,
        audio_start_ms=event.audio_start_ms,
        audio_end_ms=event.audio_end_ms,
        emotion=label,
    )

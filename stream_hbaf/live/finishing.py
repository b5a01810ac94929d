"""Publishes finished utterances: who spoke, what they felt, and what that says of earlier ones.

Several sources may share a dialogue. Its utterances are attributed, classified and published one
after the other, so that each knows all that were published before it.
"""

import asyncio
import time

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.features.acoustic import Acoustic
from stream_hbaf.live.runtime import Recognition, Runtime
from stream_hbaf.live.slots import Urgency
from stream_hbaf.live.speakers import Revision
from stream_hbaf.live.stages import SourceStages
from stream_hbaf.live.utterance import LiveUtterance


async def publish_finished(
    utterance: LiveUtterance, *, runtime: Runtime, stages: SourceStages
) -> None:
    """Wait for what a finished utterance is classified from, classify it and publish its end."""
    assert utterance.text is not None
    assert utterance.speakers is not None
    assert utterance.finish is not None
    acoustic, text, embedding = await asyncio.gather(
        _functionals(utterance, runtime, stages), utterance.text, _embedding(utterance, stages)
    )
    async with utterance.speakers.lock:
        utterance.timing.classify_began = time.monotonic()
        revisions: list[Revision] = []
        if utterance.voice is not None:
            revisions = await runtime.run_model("classifier", utterance.attribute, embedding)
        prediction = await stages.attempt(
            utterance, "classifier", utterance.classify_final, acoustic, text
        )
        utterance.timing.classified = now = time.monotonic()
        end = utterance.event("end", text=text, prediction=prediction, now=now)
        await runtime.publish(end)
        await runtime.publish(utterance.speakers.add(end))
        await runtime.publish_revisions(utterance.speakers, revisions)
    await runtime.close_utterance(end)
    if prediction is not None:
        runtime.on_recognition(
            Recognition(utterance.id, utterance.finish, acoustic, text, prediction)
        )


async def _functionals(
    utterance: LiveUtterance, runtime: Runtime, stages: SourceStages
) -> Acoustic | None:
    front_end = utterance.recognizer.acoustic
    if utterance.session is not None:
        if utterance.embedded is not None:
            await utterance.embedded
        acoustic = await stages.attempt(utterance, "acoustic", utterance.session.finish)
    elif utterance.part is not None and front_end is not None:
        async with runtime.slots.hold(utterance.source.name, lambda: Urgency.FINAL):
            acoustic = await stages.attempt(
                utterance, "acoustic", front_end.extract, utterance.samples, thread="embedding"
            )
    else:
        return None
    utterance.timing.acoustic = time.monotonic()
    return acoustic


async def _embedding(utterance: LiveUtterance, stages: SourceStages) -> NDArray[np.float32] | None:
    if utterance.voice is None:
        return None
    return await stages.attempt(
        utterance, "speaker", utterance.voice.embedding, utterance.part or 0
    )

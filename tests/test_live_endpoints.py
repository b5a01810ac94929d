"""Endpoints by pauses and the turn model, live and replayed: the same, and without the model."""

import json
from pathlib import Path

import numpy as np
import pytest
from live_kit import EventLog, RandomChunks, Sound, recognise
from test_live_replay import file_source, record, replay, write_wav

from stream_hbaf.config import Config, EndpointConfig, SourceConfig
from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.events import Status
from stream_hbaf.features import turn_model
from stream_hbaf.features.turn_model import (
    TurnModel,
    choose_engine,
    find_turn_model,
    open_turn_model,
)
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.sessions.format import HEADER_FILE
from stream_hbaf.sessions.session import open_session

needs_weights = pytest.mark.skipif(find_turn_model() is None, reason="pipecat-ai isn't installed")
# Whatever the source's habit: the sentences are too few to learn it.
AT_ONCE = EndpointConfig(engine="turn", max_resumed=1.0)
BY_PAUSES = EndpointConfig(engine="pause", max_resumed=1.0)


@pytest.fixture
def by_turns(recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch) -> Recognizer:
    """The recogniser with the turn model."""
    config = recognizer.config.model_copy(update={"endpoint": AT_ONCE})
    monkeypatch.setattr(recognizer, "config", config)
    return recognizer


@needs_weights
def test_turns_whatever_the_chunks(by_turns: Recognizer, sentences: list[Sound]) -> None:
    """Other chunks, other waits for the model: the same ends for the same reasons."""
    sound = np.concatenate(sentences)
    first, second = (recognise(by_turns, RandomChunks(sound, seed=seed)) for seed in (1, 2))
    assert [one.finish for one in first] == [one.finish for one in second]
    finishes = [one.finish for one in first]
    assert "turn" in {finish.trigger for finish in finishes}
    for finish in finishes:
        if finish.trigger == "turn":
            assert finish.confirmed_at - finish.speech_end == 11 * 512  # 352 ms


def test_pauses_need_no_model(
    recognizer: Recognizer,
    sentences: list[Sound],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Still pauses end utterances early, whatever the chunks, live and replayed."""
    monkeypatch.setattr(turn_model, "package_folder", None)  # nothing is looked for
    config = recognizer.config.model_copy(update={"endpoint": BY_PAUSES})
    monkeypatch.setattr(recognizer, "config", config)
    assert choose_engine(config) == config
    sound = np.concatenate(sentences)
    first, second = (recognise(recognizer, RandomChunks(sound, seed=seed)) for seed in (1, 2))
    finishes = [one.finish for one in first]
    assert finishes == [one.finish for one in second]
    assert "turn" in {finish.trigger for finish in finishes}
    wav = write_wav(tmp_path / "one.wav", *sentences)
    source = {SourceConfig(name="a"): file_source(wav, chunk_ms=53)}
    session, live = record(recognizer, source, tmp_path / "recorded")
    counted, _, again = replay(session, recognizer)
    assert (counted.missing, counted.extra) == (0, 0)
    assert [one.finish for one in again] == [one.finish for one in live]
    assert "turn" in {end.trigger for end in session.ends}


@needs_weights
def test_replay_gives_the_recorded_ends_without_the_model(
    by_turns: Recognizer, sentences: list[Sound], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recording knows where turns were over."""
    wav = write_wav(tmp_path / "one.wav", *sentences)
    source = {SourceConfig(name="a"): file_source(wav, chunk_ms=53)}
    session, live = record(by_turns, source, tmp_path / "recorded")
    monkeypatch.setattr(turn_model, "package_folder", lambda name: None)
    counted, _, again = replay(session, by_turns)
    assert (counted.missing, counted.extra) == (0, 0)
    assert [one.finish for one in again] == [one.finish for one in live]
    assert "turn" in {end.trigger for end in session.ends}


def test_session_from_before_is_replayed_by_silence(
    recognizer: Recognizer, sentences: list[Sound], tmp_path: Path
) -> None:
    """Settings without endpoints are those of a version that knew silence only."""
    wav = write_wav(tmp_path / "one.wav", *sentences[:2])
    source = {SourceConfig(name="a"): file_source(wav, chunk_ms=53)}
    session, live = record(recognizer, source, tmp_path / "recorded")
    header = json.loads((session.folder / HEADER_FILE).read_text(encoding="utf-8"))
    del header["settings"]["endpoint"]
    (session.folder / HEADER_FILE).write_text(json.dumps(header), encoding="utf-8")
    counted, _, again = replay(open_session(session.folder), recognizer)
    assert (counted.missing, counted.extra) == (0, 0)
    assert [one.finish for one in again] == [one.finish for one in live]


@needs_weights
def test_failing_turn_model_leaves_it_to_the_pause(
    by_turns: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is reported as degraded, and utterances end as without a model."""

    def fail(model: TurnModel, samples: Sound) -> float:
        raise ModelError("out of memory")

    monkeypatch.setattr(TurnModel, "probability", fail)
    log = EventLog()
    [one] = recognise(by_turns, RandomChunks(sentences[1], seed=3), [log])
    config = by_turns.config.model_copy(update={"endpoint": BY_PAUSES})
    monkeypatch.setattr(by_turns, "config", config)
    [other] = recognise(by_turns, RandomChunks(sentences[1], seed=3))
    assert one.finish == other.finish
    reports = [event for event in log.events if isinstance(event, Status)]
    assert ("vad", "degraded", "end of turn: out of memory") in {
        (report.stage, report.state, report.detail) for report in reports
    }


@needs_weights
def test_auto_uses_the_model_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its weights the pause alone decides."""
    config = Config(endpoint=EndpointConfig(engine="auto"))
    assert choose_engine(config).endpoint.engine == "turn"
    monkeypatch.setattr(turn_model, "package_folder", lambda name: None)
    assert choose_engine(config).endpoint.engine == "pause"
    assert open_turn_model(config.endpoint) is None


def test_silence_opens_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked for."""
    monkeypatch.setattr(turn_model, "package_folder", None)
    config = Config(endpoint=EndpointConfig(engine="silence", silence_ms=700))
    assert choose_engine(config) == config
    assert open_turn_model(config.endpoint) is None


def test_what_is_wrong_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contradictory settings, and a model that was asked for and isn't there."""
    config = Config(endpoint=EndpointConfig(engine="turn", silence_ms=700))
    with pytest.raises(
        ConfigError, match=r"endpoint\.silence_ms is 700, more than segmenter\.min_"
    ):
        choose_engine(config)
    monkeypatch.setattr(turn_model, "package_folder", lambda name: None)
    with pytest.raises(ModelError, match="--no-deps pipecat-ai"):
        choose_engine(Config(endpoint=AT_ONCE))


def test_unknown_engine() -> None:
    """Settings name what there is."""
    with pytest.raises(ValueError, match="'silence', 'pause', 'turn' or 'auto'"):
        EndpointConfig.model_validate({"engine": "words"})

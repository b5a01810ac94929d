"""The live pipeline on a virtual clock, and the plan that is made from it."""

import argparse
import base64
import json
from pathlib import Path

import numpy as np
import pytest
import simulate_fleet
from service_times import Cost, ServiceTimes, fitted
from simulate_fleet import capacity, mean_load, plan
from talks import RATE_HZ
from timed_models import LOUDEST, simulate, sound_of

from stream_hbaf.speech.vad import SILERO_FRAME

SENTENCE, PAUSE = 60, 40  # frames of 32 ms


def service_times() -> ServiceTimes:
    """Two cores, and people who speak for 2 s and are silent for 1.3 s, each at another time."""

    def cost(base_s: float, per_s: float = 0.0) -> Cost:
        return Cost(base_s, per_s, (0.9, 1.0, 1.1))

    names = ("encode", "embed", "decode", "ge2e", "campplus", "functionals")
    costs = {name: cost(0.02, 0.01) for name in names}
    costs |= {name: cost(0.01) for name in ("text", "provisional", "classify")}
    costs["opensmile"] = cost(0.01, 0.01)
    talk = np.tile(np.repeat([255, 0], [SENTENCE, PAUSE]).astype(np.uint8), 4)
    return ServiceTimes(
        asr="tiny.en",
        machine="made up",
        measured_at="2026-01-01",
        pace=10.0,
        rates=(1.0, 1.6),
        vad_s=0.0001,
        hop_s=0.0005,
        costs=costs,
        talk=tuple(
            base64.b64encode(np.roll(talk, 7 * person).tobytes()).decode() for person in range(13)
        ),
    )


def test_one_stream_has_its_event_after_the_silence_that_ends_an_utterance() -> None:
    """600 ms of silence in whole frames and chunks, openSMILE's end and the classification."""
    found = simulate(service_times(), 1, seconds=12)
    assert found["ends"] == found["new"] == 4
    assert 608 < found["median"] < 608 + 64 + 100
    assert found["stages"]["transcript"] == 0  # it was done before the end was certain
    assert found["lost"] == 0


def test_same_seed_gives_the_same_and_takes_little_real_time() -> None:
    first, second = (simulate(service_times(), 5, seconds=12, seed=3) for _ in range(2))
    assert first == second


def test_crowded_process_gives_up_partials_and_no_end() -> None:
    """As the pipeline does: its own priorities are what is simulated."""
    alone, crowded = (simulate(service_times(), n, seconds=8) for n in (2, 20))
    assert crowded["ends"] == crowded["new"]
    assert crowded["p95"] > alone["p95"]
    assert crowded["partials"] / 20 < alone["partials"] / 2
    assert crowded["health"]["dropped"]["partial_transcripts"] > 0


def test_people_who_listen_most_of_the_time_leave_room_for_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulate_fleet, "PLAN_SEEDS", 1)
    monkeypatch.setattr(simulate_fleet, "PLAN_S", 20.0)
    times = service_times()
    dense, _ = capacity(times, speech=1.0, limit_ms=710)
    sparse, point = capacity(times, speech=0.4, limit_ms=710)
    assert 2 <= dense < sparse
    assert point.p95 <= 710


def test_sound_holds_the_scores_of_its_frames_in_turns() -> None:
    sound = sound_of(np.array([0.25, 0.5]), seconds=20, speech=0.5, lag=0.0)
    frames = sound[::SILERO_FRAME] / LOUDEST
    assert len(sound) == 20 * RATE_HZ // SILERO_FRAME * SILERO_FRAME
    assert frames[:4].tolist() == [0.25, 0.5, 0.25, 0.5]
    assert np.flatnonzero(frames).max() * SILERO_FRAME / RATE_HZ == pytest.approx(10, abs=0.1)


def test_fitted_cost_is_the_mean_of_what_was_measured() -> None:
    length_s = [1.0, 2.0, 3.0, 4.0]
    cost = fitted(length_s, [0.030, 0.035, 0.050, 0.055])
    assert cost.base_s + cost.per_s * 2.5 == pytest.approx(0.0425, abs=1e-4)
    assert len(cost.spread) == 4
    assert np.mean(cost.spread) == pytest.approx(1.0, abs=1e-2)


def test_fitted_cost_has_no_negative_part() -> None:
    assert fitted([1.0, 2.0], [0.01, 0.03]).base_s == 0.0
    assert fitted([1.0, 2.0], [0.03, 0.01]).per_s == 0.0


def test_service_times_come_back_from_their_file(tmp_path: Path) -> None:
    times = service_times()
    times.save(tmp_path / "times.json")
    assert ServiceTimes.load(tmp_path / "times.json").scores(0).tolist() == times.scores(0).tolist()
    again = json.loads((tmp_path / "times.json").read_text(encoding="utf-8"))
    assert again["rates"] == [1.0, 1.6]


def test_streams_placed_at_random_need_room_for_chance() -> None:
    """Poisson: with a mean of 8 more than 15 come in 0.8 % of all times, with 9 in 2.2 %."""
    assert mean_load(15) == 8
    assert mean_load(1) == 1


def test_plan_grows_with_the_streams(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each row: processes, cores, machines, memory, sound and messages."""
    monkeypatch.setattr(simulate_fleet, "capacity", lambda *_, **__: (10, POINT))
    service_times().save(tmp_path / "times.json")
    options = argparse.Namespace(
        times=tmp_path / "times.json", streams=[100, 100_000], speech=1.0, limit_ms=1500,
        machine_cores=32, process_mb=1000.0, stream_mb=10.0, broker=50_000.0,
    )  # fmt: skip
    plan(options)
    *_, few, many = capsys.readouterr().out.splitlines()
    assert few == "| 100 | 10 (25) | 20 | 1 | 11 | 27 (3) | 200 | 0.01 |"
    assert many == (
        "| 100,000 | 10,000 (25,000) | 20,000 | 625 | 11,000 | 26,880 (2,520) | 200,000 | 8.00 |"
    )


POINT = simulate_fleet.Point(
    median=700, p95=1400, lowest_p95=1300, highest_p95=1500, lost=0,
    found={"messages": 2.0, "payload_bytes": 700.0},
)  # fmt: skip

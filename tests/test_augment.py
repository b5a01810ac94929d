"""Promises of the changed clips: each change is what it says, by measurement."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from training_kit import write_wav

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.corpora.augment import (
    BANDS,
    CLEAN,
    CONDITIONS,
    SPEEDS,
    AugmentationConfig,
    Condition,
    NoisesAndRooms,
    Samples,
    Waveform,
    add_noise,
    augment,
    compand,
    draw_condition,
    evaluation_condition,
    read_noises_and_rooms,
    training_conditions,
)

SPOKEN = Path(__file__).parent / "recordings" / "sense_and_sensibility_01_austen_64kb-0870.flac"
QUIET = NoisesAndRooms(noises=(), rooms=())
SECONDS = 3


def tone(hz: float, *, peak: float = 10_000) -> Samples:
    """Three seconds of a sine."""
    time_s = np.arange(SECONDS * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    return np.rint(peak * np.sin(2 * np.pi * hz * time_s)).astype(np.int16)


def rms_db(samples: Samples | Waveform) -> float:
    return 10 * float(np.log10(np.mean(np.square(samples.astype(np.float64)))))


def test_noise_has_the_asked_ratio() -> None:
    """Clip and noise differ by the SNR, measured on what was added."""
    draw = np.random.default_rng(1)
    clip, noise = draw.standard_normal(16_000), 5 * draw.standard_normal(16_000)
    added = add_noise(clip, noise, snr_db=12.0) - clip
    ratio = 10 * np.log10(np.mean(clip**2) / np.mean(added**2))
    assert ratio == pytest.approx(12.0, abs=1e-6)


def test_gain_clips_instead_of_wrapping() -> None:
    """20 dB more of a loud clip stops at the ends of int16."""
    samples = np.array([100, -100, 20_000, -20_000], np.int16)
    louder = augment(samples, Condition(gain_db=20.0), QUIET)
    assert louder.tolist() == [1000, -1000, 32767, -32768]


def test_level_is_reached_whatever_the_recording() -> None:
    """A quiet and a loud recording come out equally loud: level must not predict anything."""
    tone = np.sin(np.arange(16_000) / 20)
    for peak in (300, 20_000):
        samples = (peak * tone).astype(np.int16)
        changed = augment(samples, Condition(level_dbfs=-30.0), QUIET).astype(np.float64)
        assert 20 * np.log10(np.sqrt(np.mean(changed**2)) / 32768) == pytest.approx(-30, abs=0.05)


def test_same_condition_gives_the_same_sound() -> None:
    """A condition and its seed fix every sample; another seed gives others."""
    samples = read_audio(SPOKEN)[:32_000]
    around = NoisesAndRooms(noises=(samples[::-1].copy(),), rooms=(samples[:800],))
    condition = Condition(snr_db=5.0, room=True, seed=3)
    first = augment(samples, condition, around)
    assert np.array_equal(first, augment(samples, condition, around))
    assert not np.array_equal(first, augment(samples, replace(condition, seed=4), around))
    assert len(first) == len(samples)


def test_nothing_to_change_is_the_recording_itself() -> None:
    """The clean condition gives back the very samples."""
    samples = tone(441)
    assert augment(samples, CLEAN, QUIET) is samples


@pytest.mark.parametrize("speed", [Fraction(6, 5), *SPEEDS], ids=str)
def test_faster_is_higher_and_shorter(speed: Fraction) -> None:
    """As a tape: 1000 Hz at 6/5 of the speed is 1200 Hz for 5/6 of the time, as loud as before."""
    samples = tone(1000)
    changed = augment(samples, Condition(speed=speed), QUIET)
    assert len(changed) == -(-len(samples) * speed.denominator // speed.numerator)
    spectrum = np.abs(np.fft.rfft(changed * np.hanning(len(changed))))
    peak_hz = float(spectrum.argmax() * SAMPLE_RATE_HZ / len(changed))
    assert peak_hz == pytest.approx(1000 * speed, abs=0.5)
    assert rms_db(changed) == pytest.approx(rms_db(samples), abs=0.1)


def test_a_channel_lets_its_band_pass() -> None:
    """A telephone loses 100 Hz and 6 kHz and keeps 1 kHz; its edges are 3 dB down."""
    telephone = Condition(band_hz=(300.0, 3400.0))
    passed = {}
    for hz in (100, 300, 1000, 3400, 6000):
        samples = tone(hz)
        changed = augment(samples, telephone, QUIET)[SAMPLE_RATE_HZ:]  # once the filter has settled
        passed[hz] = rms_db(changed) - rms_db(samples)
    assert passed[100] < -35  # 40.6 dB down
    assert passed[300] == pytest.approx(-3, abs=0.1)
    assert passed[1000] == pytest.approx(0, abs=0.01)
    assert passed[3400] == pytest.approx(-3, abs=0.1)
    assert passed[6000] < -35


@pytest.mark.parametrize("band_hz", BANDS, ids=str)
def test_every_channel_keeps_a_voice(band_hz: tuple[float, float]) -> None:
    """Whatever the channel, 1 kHz comes through within 1 dB, and length stays."""
    samples = tone(1000)
    changed = augment(samples, Condition(band_hz=band_hz), QUIET)
    assert len(changed) == len(samples)
    assert abs(rms_db(changed[SAMPLE_RATE_HZ:]) - rms_db(samples)) < 1


@pytest.mark.parametrize("peak", [30_000, 10_000, 3_000, 300])
def test_companding_keeps_within_its_steps(peak: int) -> None:
    """No sample moves by more than half a step, and steps are small where the samples are."""
    wave = tone(441, peak=peak).astype(np.float64)
    error = np.abs(compand(wave) - wave)
    half_step = np.log1p(255) / 127 / 2 * (np.abs(wave) + 32768 / 255)
    assert (error <= 1.02 * half_step).all()  # the step's own slope: 1.01 at most
    assert error.max() > 0.9 * half_step.min()


def test_companding_is_as_noisy_as_a_telephone() -> None:
    """About 38 dB below a loud sine, and still 33 dB below one that is 40 dB quieter."""
    for peak, snr_db in ((30_000, 38.4), (10_000, 38.4), (3_000, 38.2), (300, 33.3)):
        samples = tone(441, peak=peak)
        changed = augment(samples, Condition(companded=True), QUIET).astype(np.float64)
        assert rms_db(samples) - rms_db(changed - samples) == pytest.approx(snr_db, abs=0.5)


def test_a_telephone_keeps_its_band_and_nothing_above() -> None:
    """1 kHz comes through as noisy as G.711 is; 100 Hz and 6 kHz don't, nor any overtone."""
    for hz, least, most in ((100, -999, -35), (1000, -0.1, 0.1), (6000, -999, -35)):
        samples = tone(hz)
        changed = augment(samples, Condition(telephone=True), QUIET)[SAMPLE_RATE_HZ:]
        assert least < rms_db(changed) - rms_db(samples) < most
    spoken = read_audio(SPOKEN)
    changed = augment(spoken, Condition(telephone=True), QUIET)
    assert len(changed) == len(spoken)
    power = np.square(np.abs(np.fft.rfft(changed.astype(np.float64))))
    above = np.fft.rfftfreq(len(changed), 1 / SAMPLE_RATE_HZ) > 4200
    assert power[above].sum() < 1e-3 * power.sum()


def test_telephones_are_drawn_beside_what_was_drawn_without() -> None:
    """As many as asked for; everything else of the conditions stays as it is."""
    without, half = AugmentationConfig(copies=1000), AugmentationConfig(copies=1000, telephone=0.5)
    plain, drawn = training_conditions(7, without), training_conditions(7, half)
    assert not any(one.telephone for one in plain)
    assert np.mean([one.telephone for one in drawn]) == pytest.approx(0.5, abs=0.05)
    assert [replace(one, telephone=False) for one in drawn] == plain


def test_training_meets_every_kind_of_augment() -> None:
    """Of a thousand conditions each kind has its share; levels stay between the two given."""
    draw = np.random.default_rng(0)
    drawn = [draw_condition(draw, AugmentationConfig()) for _ in range(1000)]
    shares = {
        "noise": np.mean([one.snr_db is not None for one in drawn]),
        "room": np.mean([one.room for one in drawn]),
        "speed": np.mean([one.speed != 1 for one in drawn]),
        "channel": np.mean([one.band_hz is not None for one in drawn]),
        "codec": np.mean([one.companded for one in drawn]),
    }
    expected = {"noise": 0.6, "room": 0.3, "speed": 0.5, "channel": 0.3, "codec": 0.15}
    assert shares == pytest.approx(expected, abs=0.05)
    assert {one.speed for one in drawn} == {Fraction(1), *SPEEDS}
    assert {one.band_hz for one in drawn} == {None, *BANDS}
    levels = [one.level_dbfs for one in drawn]
    assert all(level is not None and -62 <= level <= -12 for level in levels)


def test_conditions_of_evaluation_are_the_same_every_time() -> None:
    """Fixed, with another noise and room for each clip; clean is clean."""
    assert evaluation_condition("noise_10db", 1) == Condition(snr_db=10.0, seed=1)
    assert evaluation_condition("noise_10db_room", 2) == Condition(snr_db=10.0, room=True, seed=2)
    assert evaluation_condition("clean", 3) == CONDITIONS["clean"] == CLEAN


def test_conditions_of_training_begin_with_the_recording() -> None:
    """Then as many as are asked for, other ones for each clip, the same every time."""
    config = AugmentationConfig(copies=2)
    first, second = (training_conditions(index, config) for index in range(2))
    assert first[0] == second[0] == CLEAN
    assert len({*first, *second}) == 5
    assert training_conditions(1, config) == second
    assert first[1].seed == 2084654370


@pytest.mark.parametrize(
    ("count", "trained", "tested"), [(5, [1, 2, 3], [4, 5]), (2, [1, 2], [1, 2])]
)
def test_noises_of_tests_are_not_trained_on(
    tmp_path: Path, count: int, trained: list[int], tested: list[int]
) -> None:
    """The last two of each kind are for tests alone, where there are more."""
    for kind in ("noise", "rir"):
        (tmp_path / kind).mkdir()
        for n in range(1, count + 1):
            write_wav(tmp_path / kind / f"{kind}{n}.wav", np.full(800, n, np.int16))
    for expected, part in ((trained, False), (tested, True)):
        sounds = read_noises_and_rooms(tmp_path, tested=part)
        for found in (sounds.noises, sounds.rooms):
            assert [int(one[0]) for one in found] == expected

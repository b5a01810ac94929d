#!/usr/bin/env python3
"""Measures CPU time and memory of the whole program: start, silence, speech; days: ``soak.py``.

    tools/bench_resources.py start  [--runs 5]
    tools/bench_resources.py silence --mic pulse [--seconds 60]   (or --file of silence)
    tools/bench_resources.py speech  --corpora DIR [--minutes 10]
    tools/bench_resources.py asr     --corpora DIR [--asr base tiny.en]   (transcripts alone)

The command runs in a child process; CPU time and memory are those of all its processes.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import soundfile

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, TranscriptConfig
from stream_hbaf.features.whisper import Transcriber

TICKS = os.sysconf("SC_CLK_TCK")
COMMAND = [sys.executable, "-m", "stream_hbaf.cli", "--json", "--mqtt"]


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += family(int(child))
    return found


def cost(pid: int) -> tuple[float, float]:
    """CPU seconds and resident megabytes of a process with its descendants."""
    seconds = megabytes = 0.0
    for member in family(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
            status = Path(f"/proc/{member}/status").read_text()
        except OSError:
            continue
        seconds += (int(fields[11]) + int(fields[12])) / TICKS
        resident = [line for line in status.splitlines() if line.startswith("VmRSS")]
        megabytes += int(resident[0].split()[1]) / 1024 if resident else 0.0
    return seconds, megabytes


class Run:
    """The command with its JSON lines; counts ``end`` events and notes when it is listening."""

    def __init__(self, *arguments: str, mqtt: str = "none") -> None:
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*COMMAND, mqtt, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.listening = threading.Event()
        self.listening_after = 0.0
        self.ends = 0
        self.errors: list[str] = []
        threading.Thread(target=self._read_out, daemon=True).start()
        threading.Thread(target=self._read_err, daemon=True).start()

    def _read_out(self) -> None:
        for line in self.process.stdout or ():
            event = json.loads(line)
            if event["event"] == "status" and event["stage"] == "capture":
                self.listening_after = time.monotonic() - self.began
                self.listening.set()
            if event["event"] == "utterance" and event["type"] == "end":
                self.ends += 1

    def _read_err(self) -> None:
        self.errors += list(self.process.stderr or ())


def speech(corpora: Path, *, seconds: float, pause_s: float, seed: int) -> np.ndarray:
    """Meetings, read and acted speech in random order, with pauses of this mean length."""
    draw = random.Random(seed)
    clips = [*corpora.glob("ravdess/Actor_*/*.flac"), *corpora.glob("speech/librivox/*.flac")]
    clips = sorted(clips) + sorted(corpora.glob("speech/meeting/*.flac")) * 40
    parts, length = [], 0
    while length < seconds * SAMPLE_RATE_HZ:
        pause = np.zeros(int(draw.expovariate(1 / pause_s) * SAMPLE_RATE_HZ), np.int16)
        parts += [read_audio(draw.choice(clips)), pause]
        length += len(parts[-2]) + len(pause)
    return np.concatenate(parts)


def measure_start(runs: int) -> None:
    silence = np.zeros(SAMPLE_RATE_HZ, np.int16)
    times = []
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        soundfile.write(file.name, silence, SAMPLE_RATE_HZ)
        for _ in range(runs):
            run = Run("--file", file.name, mqtt="embedded")
            run.process.wait()
            times.append(run.listening_after)
    print(f"start to listening: median {statistics.median(times):.2f} s, worst {max(times):.2f} s")


def measure_silence(arguments: list[str], *, seconds: float) -> None:
    run = Run(*arguments, mqtt="embedded")
    run.listening.wait(60)
    time.sleep(5)
    before, _ = cost(run.process.pid)
    time.sleep(seconds)
    after, megabytes = cost(run.process.pid)
    run.process.terminate()
    run.process.wait()
    share = (after - before) / seconds
    print(
        f"listening to silence: {share:.1%} of one core, {megabytes:.0f} MB, {run.ends} utterances"
    )


def measure_speech(sound: np.ndarray, *arguments: str, every_s: float) -> None:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        soundfile.write(file.name, sound, SAMPLE_RATE_HZ)
        run = Run("--file", file.name, *arguments)
        run.listening.wait(60)
        began = time.monotonic()
        samples: list[tuple[float, float, int]] = []
        while run.process.poll() is None:
            _, megabytes = cost(run.process.pid)
            samples.append((time.monotonic() - began, megabytes, run.ends))
            print(f"  {samples[-1][0]:7.0f} s  {megabytes:6.0f} MB  {run.ends} utterances")
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(every_s)
        spent = time.monotonic() - began
    hours = len(sound) / SAMPLE_RATE_HZ / 3600
    later = [m for at, m, _ in samples if at > spent / 4] or [samples[-1][1]]
    print(
        f"{hours:.2f} h of sound in {spent / 60:.1f} min, {run.ends} utterances, exit "
        f"{run.process.returncode}; memory at most {max(m for _, m, _ in samples):.0f} MB; "
        f"after the first quarter {later[0]:.0f} → {later[-1]:.0f} MB"
    )


def measure_transcripts(corpora: Path, model: str) -> None:
    """CPU time of the transcript thread: partials every 0.7 s of speech, one final a clip.

    As with live-en, the acoustic input is the encoder of Whisper base.
    """
    config = TranscriptConfig(model=model)
    clips = sorted(corpora.glob("ravdess/Actor_2[1-4]/*.flac"))
    sounds = [read_audio(path) for path in random.Random(0).sample(clips, 30)]
    _, before = cost(os.getpid())
    transcriber = Transcriber(config, acoustic_encoder="base")
    transcriber.final(sounds[0], speech_score=1.0)
    _, after = cost(os.getpid())
    every = config.partial_every_ms * SAMPLE_RATE_HZ // 1000
    spent = {"partials": 0.0, "finals": 0.0}
    for sound in sounds:
        began = time.process_time()
        for end in range(every, len(sound), every):
            transcriber.partial(sound[:end], abandon=lambda: False)
        between = time.process_time()
        transcriber.final(sound, speech_score=1.0)
        spent["partials"] += between - began
        spent["finals"] += time.process_time() - between
    seconds = sum(map(len, sounds)) / SAMPLE_RATE_HZ
    print(
        f"{model}: CPU seconds per second of speech: partials {spent['partials'] / seconds:.3f}, "
        f"finals {spent['finals'] / seconds:.3f}, sum {sum(spent.values()) / seconds:.3f}; "
        f"{after - before:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("start", "silence", "speech", "asr"))
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("--asr", nargs="+", default=["base", "tiny.en"], metavar="MODEL")
    parser.add_argument("--mic")
    parser.add_argument("--file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    if options.what in ("speech", "asr") and options.corpora is None:
        parser.error(f"{options.what} needs --corpora")
    match options.what:
        case "start":
            measure_start(options.runs)
        case "silence":
            arguments = ["--mic", options.mic] if options.mic else ["--file", options.file]
            measure_silence(arguments, seconds=options.seconds)
        case "speech":
            sound = speech(options.corpora, seconds=options.minutes * 60, pause_s=1, seed=0)
            measure_speech(sound, every_s=30)
        case "asr":
            for model in options.asr:
                measure_transcripts(options.corpora, model)


if __name__ == "__main__":
    main()

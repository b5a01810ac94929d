"""The commands. What they need is imported when they run, so that ``--help`` answers at once."""

import argparse
import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stream_hbaf.errors import ConfigError, StreamHbafError

if TYPE_CHECKING:
    from stream_hbaf.config import Config

EXAMPLE = Path(__file__).parent / "audio" / "example.flac"
# What only the commands that read corpora need, by the name it is imported under.
TRAINING_PACKAGES = {
    "jellyfish",
    "jinja2",
    "lightning",
    "matplotlib",
    "peft",
    "scipy",
    "sklearn",
    "tensorboard",
}
# Those of corpora/reading.py, which would have to be imported to be asked.
CORPORA = "emorynlp, goemotions, iemocap, meld, nemo, ravdess, tess, or a manifest .csv"
FAILURE = 2  # the exit status of every error that the user can mend

EPILOG = """\
examples:
  stream-hbaf                            the microphone if there is one, else a recording
  stream-hbaf --mic "USB Audio"          this microphone
  stream-hbaf --file talk.mp3 --speed max --json
  stream-hbaf --mic --mqtt mqtt://broker.local --speaker Ann
  stream-hbaf watch                      show what is published
Each command has a --help of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 2 after one line that says what is wrong."""
    try:
        options = _parser().parse_args(arguments)
        status: int = options.run(options)
    except StreamHbafError as error:
        status = _complain(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in TRAINING_PACKAGES:
            raise
        status = _complain(f"{package} is not installed; pip install 'stream-hbaf[train]'")
    except BaseExceptionGroup as group:
        known, others = group.split(StreamHbafError)
        if others is not None or known is None:
            raise
        status = _complain(str(_first(known)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:
        status = 130
    return status


class _Parser(argparse.ArgumentParser):
    """One that complains in a line, as all else does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stream-hbaf",
        description="Recognise the emotion of each utterance, live, and publish it over MQTT.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--mic", nargs="?", const="", metavar="NAME|INDEX", help="listen to a microphone"
    )
    where.add_argument("--file", metavar="PATH|URL", help="listen to a recording or a stream")
    where.add_argument(
        "--source",
        action="append",
        dest="sources",
        metavar="NAME=WHERE",
        help="listen to several: mic:NAME, a file, a URL, ws://HOST:PORT, wyoming://HOST:PORT, "
        "satellite://HOST:PORT or browser; with ,channel=N ,speaker=NAME ,dialogue=NAME",
    )
    parser.add_argument(
        "--speed", default="1", metavar="1|max", help="of a recording; 1 is real time (default)"
    )
    _add_settings(parser)
    parser.set_defaults(run=_listen)
    commands = parser.add_subparsers(title="other commands", metavar="COMMAND")

    devices = commands.add_parser("devices", help="list the microphones there are")
    devices.set_defaults(run=_devices)

    schema = commands.add_parser("schema", help="print what is published as AsyncAPI")
    schema.add_argument("--out", type=Path, help="write it here, with a JSON Schema a message")
    schema.set_defaults(run=_schema)

    watch = commands.add_parser("watch", help="subscribe and show what is published")
    _add_settings(watch, listening=False)
    watch.set_defaults(run=_watch)

    _add_research(commands)
    return parser


def _add_research(commands: Any) -> None:
    """What needs corpora: extract, train, evaluate, experiment."""
    extract = commands.add_parser("extract", help="measure a corpus's clips, into the cache")
    extract.add_argument("corpus", help=CORPORA)
    extract.add_argument(
        "--features",
        default="compare",
        metavar="NAME[,NAME]",
        help="compare (default), egemaps, mfcc, prosody, whisper:NAME, or a speech encoder's name",
    )
    _add_corpora(extract)
    extract.set_defaults(run=_extract)

    train = commands.add_parser("train", help="train bundles from corpora, one a seed")
    train.add_argument("recipe", type=Path, help="such as configs/iemocap.yaml")
    train.add_argument("--out", type=Path, required=True, help="folder of the new bundle")
    train.add_argument("--devices", metavar="N|auto", help="GPUs to train on, of each node")
    train.add_argument("--nodes", type=int, metavar="N", help="machines to train on")
    _add_corpora(train, models=False)
    train.set_defaults(run=_train)

    _add_evaluate(commands)

    experiment = commands.add_parser("experiment", help="a grid of trainings, over seeds")
    experiment.add_argument("file", type=Path, help="such as configs/experiments/iemocap.yaml")
    experiment.add_argument(
        "--results", type=Path, default=Path("models/results"), help="folder of the figures"
    )
    _add_corpora(experiment)
    experiment.set_defaults(run=_experiment)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="judge bundles on a corpus, with a report")
    evaluate.add_argument("bundle", nargs="+", help="a system: its bundles, one a seed")
    judged = evaluate.add_mutually_exclusive_group(required=True)
    judged.add_argument("--corpus", help=f"with its own words, from files: {CORPORA}")
    judged.add_argument(
        "--live", metavar="CORPUS", help="one bundle as it is live: the clips played into it"
    )
    evaluate.add_argument(
        "--split",
        choices=("train", "dev", "test", "all"),
        default="test",
        help="of the corpus (default: test); all, with --live, for one that it was not trained on",
    )
    evaluate.add_argument(
        "--against", nargs="+", default=(), metavar="BUNDLE", help="another system's bundles"
    )
    evaluate.add_argument(
        "--rows",
        metavar="NAME[,NAME]",
        help="of --live: some of its ways of hearing (default: all)",
    )
    evaluate.add_argument(
        "--speed", metavar="N|max", help="of --live: times real time (default: max)"
    )
    evaluate.add_argument("--out", type=Path, default=Path("report"), help="folder of the report")
    _add_corpora(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _add_corpora(parser: argparse.ArgumentParser, *, models: bool = True) -> None:
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument(
        "--cache", type=Path, default=Path("cache"), help="what can be made again (default: cache)"
    )
    if models:
        parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
        parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _add_settings(parser: argparse.ArgumentParser, *, listening: bool = True) -> None:
    parser.add_argument(
        "--mqtt", metavar="URL|embedded|none", help="the broker (default: embedded)"
    )
    if listening:
        parser.add_argument("--model", metavar="BUNDLE", help="a bundle's name or folder")
        parser.add_argument("--asr", metavar="MODEL", help="a Whisper model (default: base)")
        parser.add_argument("--language", metavar="CODE", help="what is spoken (default: en)")
        parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="for the models")
        parser.add_argument("--speaker", metavar="NAME", help="who is speaking")
        parser.add_argument(
            "--privacy",
            choices=("full", "no_text", "label_only"),
            help="what leaves the process (default: full)",
        )
        parser.add_argument(
            "--dashboard",
            nargs="?",
            const="",
            metavar="HOST:PORT",
            help="show it on a page (default: 127.0.0.1:8770)",
        )
        parser.add_argument(
            "--record", type=Path, metavar="DIR", help="write a session: sound and events"
        )
        parser.add_argument(
            "--inferences",
            action="store_true",
            default=None,  # not given: the file or the environment decides
            help="say what others and the speaker may feel, and what the speaker wants",
        )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, no more")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="any setting, such as vad.engine=webrtc",
    )


def _config(options: argparse.Namespace) -> "Config":
    from stream_hbaf.config import load_config

    overrides: dict[str, Any] = {}
    for setting in options.settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write it as KEY=VALUE")
        overrides[key.strip()] = value.strip()
    if getattr(options, "dashboard", None) is not None:
        overrides["dashboard"] = {}  # there, with its defaults
        overrides |= {f"dashboard.{k}": v for k, v in _address(options.dashboard).items()}
    if getattr(options, "sources", None):
        overrides["sources"] = [_source(text) for text in options.sources]
    if getattr(options, "mic", None) is not None:
        overrides["source.where"] = f"mic:{options.mic}" if options.mic else "mic"
    named = {
        "file": "source.where",
        "privacy": "privacy",
        "record": "record",
        "mqtt": "mqtt.url",
        "model": "model",
        "asr": "transcript.model",
        "language": "transcript.language",
        "device": "device",
        "speaker": "source.speaker",
        "inferences": "inferences",
    }
    for option, key in named.items():
        value = getattr(options, option, None)
        if value is not None:
            overrides[key] = str(value) if isinstance(value, Path) else value
    return load_config(file=options.config, environ=os.environ, overrides=overrides)


def _address(text: str) -> dict[str, str]:
    """``HOST:PORT``, ``HOST`` or ``:PORT`` as the settings of the page."""
    host, _, port = text.rpartition(":") if re.search(r":\d+$", text) else (text, "", "")
    found = {"host": host.strip("[]"), "port": port}
    return {key: value for key, value in found.items() if value}


def _source(text: str) -> dict[str, str]:
    """``NAME=WHERE,channel=0,speaker=Ann,dialogue=table`` as the settings of a source."""
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise ConfigError(f"--source {text}: write it as NAME=WHERE, such as ann=mic:1")
    settings = {"name": name, "speaker": name}
    found = re.compile(r",(channel|speaker|dialogue)=([^,]*)$")
    while option := found.search(rest):
        settings[option[1]] = option[2]
        rest = rest[: option.start()]
    return settings | {"where": rest}


def _listen(options: argparse.Namespace) -> int:
    if options.version:
        from stream_hbaf import __version__

        sys.stdout.write(f"stream-hbaf {__version__}\n")
        return 0
    speed = _speed(options.speed)
    config = _config(options)
    _share_the_cores()
    from stream_hbaf.listening import Replaying, listen

    replaying = Replaying(speed=speed, example=EXAMPLE)
    return asyncio.run(_interruptibly(listen, config, replaying=replaying, json=options.json))


def _share_the_cores() -> None:
    """Keep the libraries' threads out of each other's way; they read this when first imported."""
    # numpy's products here are small, and waking threads for them costs more than they do.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # OpenMP's threads, Whisper's and torch's, wait for each other by spinning. Where other
    # programs want the cores too, that keeps from running what is waited for: beside a busy loop
    # on each core, words came 25 s after the end of an utterance; without spinning, at once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


async def _interruptibly(command: Any, *arguments: Any, **named: Any) -> int:
    """Run a command that stops in good order when asked to by Ctrl-C or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await command(*arguments, **named, stop=stop)
    return 0


def _devices(options: argparse.Namespace) -> int:
    from stream_hbaf.audio.capture import list_devices

    devices = list_devices()
    if not devices:
        sys.stdout.write("no microphone found; plug one in, or give a recording with --file\n")
    for device in devices:
        mark = "*" if device.is_default else " "
        sys.stdout.write(
            f"{mark} {device.index:>3}  {device.name}  "
            f"({device.channels} channels, {device.rate_hz} Hz)\n"
        )
    return 0


def _schema(options: argparse.Namespace) -> int:
    from stream_hbaf.schema import schema, write_schema

    if options.out is None:
        _say(json.dumps(schema(), indent=2, ensure_ascii=False))
        return 0
    write_schema(options.out)
    _say(f"{options.out}: an AsyncAPI document and JSON Schemas of all that is published")
    return 0


def _watch(options: argparse.Namespace) -> int:
    config = _config(options)
    from stream_hbaf.publish.watch import watch

    try:
        asyncio.run(watch(config.mqtt, out=sys.stdout, json=options.json))
    except KeyboardInterrupt:
        return 0
    return 0


def _extract(options: argparse.Namespace) -> int:
    from stream_hbaf.corpora.extraction import extract
    from stream_hbaf.corpora.reading import open_corpus
    from stream_hbaf.terminal import show_progress

    corpus = open_corpus(options.corpus, options.corpora, whole=False)
    for representation in options.features.split(","):
        with show_progress(f"{corpus.name}, {representation}") as progress:
            extracted = extract(
                corpus,
                representation=representation,
                cache=options.cache / "sound",
                workers=options.workers,
                device=_device(options),
                progress=progress,
            )
        if extracted.leftovers:
            _say(extracted.leftovers)
        for skipped in extracted.skipped:
            _say(f"skipped: {skipped}")
        measured = sum(len(rows) for rows in extracted.features.values()) - len(extracted.skipped)
        _say(f"{representation}: {measured} utterances measured, {len(extracted.skipped)} skipped")
    return 0


def _train(options: argparse.Namespace) -> int:
    from stream_hbaf.training.train import train

    devices = options.devices
    if devices not in (None, "auto"):
        if not devices.isdigit() or not int(devices):
            raise ConfigError(f"--devices {devices}: must be 'auto' or a number of GPUs, such as 1")
        devices = int(devices)
    train(
        options.recipe,
        options.corpora,
        options.out,
        cache=options.cache,
        devices=devices,
        nodes=options.nodes,
        progress=_say,
    )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    _share_the_cores()
    if options.live is not None:
        return _evaluate_live(options)
    for option in ("rows", "speed"):
        if getattr(options, option) is not None:
            raise ConfigError(f"--{option}: goes with --live CORPUS only; leave it out")
    if options.split == "all":
        raise ConfigError("--split all: goes with --live CORPUS only; choose train, dev or test")
    from stream_hbaf.training.report import evaluate

    evaluate(
        options.bundle,
        corpus=options.corpus,
        corpora=options.corpora,
        split=options.split,
        against=options.against,
        out=options.out,
        cache=options.cache,
        device=_device(options),
        workers=options.workers,
        progress=_say,
    )
    return 0


def _evaluate_live(options: argparse.Namespace) -> int:
    if options.against:
        raise ConfigError("--against: can't be had with --live; evaluate each bundle by itself")
    if len(options.bundle) > 1:
        raise ConfigError(
            f"--live: judges one bundle, not {len(options.bundle)}; evaluate each by itself"
        )
    speed = _speed("max" if options.speed is None else options.speed)
    rows = () if options.rows is None else options.rows.split(",")
    from stream_hbaf.config import load_config
    from stream_hbaf.training.live_evaluation import evaluate_live

    evaluate_live(
        options.bundle[0],
        corpus=options.live,
        corpora=options.corpora,
        split=options.split,
        rows=rows,
        speed=speed,
        out=options.out,
        config=load_config(environ=os.environ, overrides={"device": options.device}),
        progress=_say,
    )
    return 0


def _experiment(options: argparse.Namespace) -> int:
    from stream_hbaf.training.experiment import run_experiment

    run_experiment(
        options.file,
        options.corpora,
        results=options.results,
        cache=options.cache,
        workers=options.workers,
        device=_device(options),
        progress=_say,
    )
    return 0


def _device(options: argparse.Namespace) -> str:
    from stream_hbaf.recognizer import resolve_device

    return resolve_device(options.device)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()  # a log of hours should not wait for a full buffer


def _speed(text: str) -> float | None:
    """A factor of real time; None is as fast as it goes."""
    if text == "max":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not speed > 0:
        raise ConfigError(f"--speed {text}: must be 'max' or a number above 0, such as 1")
    return speed


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _complain(message: str) -> int:
    sys.stderr.write(f"stream-hbaf: {' '.join(message.split())}\n")
    return FAILURE


if __name__ == "__main__":
    sys.exit(main())

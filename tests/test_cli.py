"""The command line: what it says when something is wrong, and how it ends."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stream_hbaf.bundle import announced, resolve_bundle
from stream_hbaf.cli import (
    _commands_of,
    build_parser,
    list_settings,
    main,
    parse,
    settings_table,
    shown_log,
)
from stream_hbaf.commands.live import read_config
from stream_hbaf.errors import ConfigError

RECORDINGS = Path(__file__).parent / "recordings"
SPEECH = RECORDINGS / "sense_and_sensibility_01_austen_64kb-0880.flac"

LIVE = ["evaluate", "live-en", "--live", "own.csv"]
OFFLINE = ["evaluate", "live-en", "--corpus", "own.csv"]


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must fail with status 2."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    last = printed.err.splitlines()[-1]
    assert last.startswith("stream-hbaf: ")
    assert "Traceback" not in printed.err
    return last


def test_help_imports_no_heavy_library() -> None:
    """``--help`` answers at once because nothing that is slow to import is imported for it."""
    heavy = "torch transformers numpy faster_whisper opensmile pydantic rich"
    code = (
        "import sys\n"
        "from stream_hbaf.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        f"found = [name for name in '{heavy}'.split() if name in sys.modules]\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--mic" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--file", "absent.wav", "--mqtt", "none"], "absent.wav"),
        (["--speed", "fast"], "--speed fast: must be 'max' or a number above 0"),
        (["--set", "vad.engin=silero"], "did you mean 'vad.engine'?"),
        (["--set", "speaker"], "write it as KEY=VALUE"),
        (["--source", "ann"], "--source ann: write it as NAME=WHERE"),
        (["--source", "a/b=mic"], "'sources.0.name'"),
        (["--source", "request=mic"], "'request' is the beginning of other topics"),
        (["--source", "a=mic", "--source", "a=mic:2"], "two sources are called 'a'"),
        (["--source", "ann=x.wav,channel=left"], "'sources.0.channel' must be"),
        (["--source", "ann=absent.wav", "--mqtt", "none"], "absent.wav: can't be read"),
        (["--source", "me=browser", "--mqtt", "none"], "--dashboard"),
        (["--dashboard", ":x"], "--dashboard :x: write it as HOST:PORT, such as"),
        (
            ["--source", "a=ws://0.0.0.0:8765", "--mqtt", "none"],
            "anybody on the network could send sound here; set a token",
        ),
        (["--set", "dashboard.token=secret"], "a password on the command line"),
        (["--metrics", ":x"], "--metrics :x: write it as HOST:PORT, such as 127.0.0.1:8771"),
        (["--metrics", "70000"], "'metrics.port' must be less than or equal to 65535"),
        (["--set", "metrics.token=secret"], "a password on the command line"),
        (["--config", "absent.yaml"], "absent.yaml: can't be read"),
        (["--file", str(SPEECH), "--mqtt", "none", "--model", "absent"], "absent"),
        (["--file", str(SPEECH), "--mqtt", "mqtt://127.0.0.1:1"], "127.0.0.1:1"),
        (["--file", str(SPEECH), "--mqtt", "http://x"], "http://x"),
        (
            ["--file", str(SPEECH), "--mqtt", "none", "--asr", "tiny.en", "--language", "de"],
            "--asr base",
        ),
        (
            ["extract", "mosei", "--corpora", "."],
            "unknown corpus 'mosei'; choose ased, emorynlp",
        ),
        (["extract", "own.csv", "--corpora", "absent"], "absent/own.csv is missing"),
        (
            ["train", "absent", "--corpora", ".", "--out", "x"],
            "absent: no such file or recipe; there is",
        ),
        (["train", "x.yaml", "--corpora", ".", "--out", "x", "--devices", "all"], "--devices all"),
        (OFFLINE, "own.csv is missing"),
        (["evaluate", "absent", *OFFLINE[2:]], "bundle 'absent': no such folder and no such name"),
        (["evaluate", "absent", *LIVE[2:]], "bundle 'absent': no such folder and no such name"),
        (["evaluate", "x"], "--corpus --live is required"),
        ([*LIVE, "--corpus", "meld"], "--corpus: not allowed with argument --live"),
        ([*LIVE, "--against", "y"], "--against: goes with --corpus only; leave it out"),
        ([*LIVE, "--cache", "y"], "--cache: goes with --corpus only; leave it out"),
        (["evaluate", "x", "y", *LIVE[2:]], "--live: takes one bundle, not 2"),
        ([*LIVE, "--speed", "fast"], "--speed fast: must be 'max' or a number above 0"),
        ([*LIVE, "--held-out", "ravdess"], "--held-out ravdess: write it as CORPUS=BUNDLE"),
        ([*LIVE, "--held-out", "tess=x", "tess=y"], "--held-out: tess has two bundles"),
        ([*LIVE, "--single-modality", "=x"], "--single-modality =x: write it as CORPUS=BUNDLE"),
        (LIVE, "own.csv is missing"),
        ([*OFFLINE, "--conditions", "clean"], "--conditions: goes with --live only; leave it out"),
        ([*OFFLINE, "--speed", "1"], "--speed: goes with --live only; leave it out"),
        ([*OFFLINE, "--update-card"], "--update-card: goes with --live only; leave it out"),
        ([*OFFLINE, "--split", "all"], "--split all: goes with --live only; choose train, dev or"),
        (["sessions", "list", "absent"], "absent: no such folder; give the one that --record"),
        (["sessions", "export", "absent", "x"], "absent: no such folder"),
        (["sessions", "import", "absent", "x.csv"], "absent: no such folder"),
        (["sessions"], "list|export|import"),
        (["speakers"], "enrol|list|forget"),
        (["speakers", "enrol", "Ann"], "one of the arguments --mic --file is required"),
        (["speakers", "enrol", " ", "--mic"], "a speaker's name is printable text, not ' '"),
        (["speakers", "forget", "Ann"], "no voice 'Ann' is enrolled; there is nobody"),
        (["replay", "absent"], "absent/session.json: can't be read"),
        (["--file", str(SPEECH), "--mqtt", "none", "--record", "/proc/x"], "--record /proc/x"),
        (
            [*("--file", str(SPEECH), "--mqtt", "none"), "--record", "x", "--privacy", "no_text"],
            "a recording holds text, which privacy 'no_text' forbids",
        ),
        (["listen"], "invalid choice: 'listen'"),
        (["--lang", "de"], "--lang: there is no such option; did you mean --language?"),
        (["train", "x.yaml", "--corp", ".", "--out", "x"], "required: --corpora"),
        (["--mic", "watch"], "--mic watch: 'watch' is a command, which comes first"),
        (
            ["--dashboard", "devices"],
            "if it is the value of --dashboard, write --dashboard=devices",
        ),
        (["--speed", "2", "--mic"], "--speed: is that of a recording"),
        (
            ["--mqtt", "none", "--set", "mqtt.url=none"],
            "--mqtt: --set mqtt.url is the same setting",
        ),
        (["--source", "a=mic", "--speaker", "Ann"], "--speaker: is for one source"),
        (["--source", "a=mic", "--set", "source.channel=1"], "--set source.channel: is for one"),
        (["watch", "--set", "model=x"], "--set model=x: 'watch' has the settings mqtt.KEY only"),
        (["experiment", "absent", "--corpora", "."], "absent: no such file or recipe"),
    ],
)
def test_wrong_argument_ends_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each wrong argument is answered by one clear line and status 2."""
    assert said in complaint(capsys, *arguments)


# Each command with what it requires, and a value for each option of listening that takes one.
COMMANDS = (
    ["devices"],
    ["watch"],
    ["replay", "session"],
    ["sessions", "list", "folder"],
    ["sessions", "export", "folder", "out"],
    ["sessions", "import", "folder", "table.csv"],
    ["speakers", "enrol", "Ann", "--file", "ann.wav"],
    ["speakers", "list"],
    ["speakers", "forget", "Ann"],
    ["adapt", "live-en", "sessions", "--out", "new"],
    ["extract", "meld", "--corpora", "."],
    ["train", "x.yaml", "--corpora", ".", "--out", "x"],
    ["evaluate", "x", "--corpora", ".", "--corpus", "meld"],
    ["experiment", "x.yaml", "--corpora", "."],
    ["schema"],
    ["settings"],
    ["completion", "bash"],
)
VALUES = {"--speed": "max", "--device": "cpu", "--privacy": "no_text", "--set": "mqtt.port=1"}


def listening_options() -> list[list[str]]:
    """Every option of ``stream-hbaf`` without a command, with a value if it takes one."""
    options = []
    for action in build_parser()._actions:
        if action.option_strings and action.dest != "help":
            option = action.option_strings[-1]
            options.append([option] if action.nargs == 0 else [option, VALUES.get(option, "x")])
    return options


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("option", listening_options(), ids=" ".join)
def test_option_before_a_command_is_honoured_or_refused(
    command: list[str], option: list[str]
) -> None:
    """It is never dropped: it does the same as behind the command, or it is named in one line."""
    known = _commands_of(build_parser())[command[0]]._option_string_actions
    if option[0] not in known:
        with pytest.raises(ConfigError, match=f"^{option[0]}: '{command[0]}' has no such option"):
            parse([*option, *command])
        with pytest.raises(ConfigError):
            parse([command[0], *option, *command[1:]])
    else:
        before = parse([*option, *command])
        assert before == parse([command[0], *option, *command[1:]])
        assert before != parse(command)


def test_options_before_and_behind_a_command_add_up() -> None:
    """A repeated option keeps both values, in their order."""
    options = parse(["--set", "mqtt.node=a", "-v", "watch", "--set", "mqtt.port=1", "--json"])
    assert options.settings == ["mqtt.node=a", "mqtt.port=1"]
    assert (options.verbose, options.json) == (1, True)


def test_watch_asks_the_broker_that_is_named_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    """And not the default one."""
    said = complaint(capsys, "--mqtt", "mqtt://127.0.0.1:1", "watch")
    assert "mqtt://127.0.0.1:1: nothing listens there" in said


def test_named_source_replaces_those_of_the_file(tmp_path: Path) -> None:
    """The command line wins over a file that lists several sources."""
    file = tmp_path / "settings.yaml"
    file.write_text("sources: [{name: a, where: mic}, {name: b, where: 'mic:2'}]\n")
    config = read_config(parse(["--config", str(file), "--file", "talk.wav", "--speaker", "Ann"]))
    assert config.sources == ()
    assert (config.source.where, config.source.speaker) == ("talk.wav", "Ann")
    assert len(read_config(parse(["--config", str(file)])).sources) == 2


def test_log_is_shown_only_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings always, in the style of all messages; -v what happens, -vv the details."""
    log = logging.getLogger("stream_hbaf.live.pipeline")
    shown = {}
    for verbose in range(3):
        with shown_log(verbose):
            log.debug("a detail")
            log.info("an event")
            log.warning("a warning")
            logging.getLogger("stream_hbaf.progress").info("loading")
        shown[verbose] = capsys.readouterr().err.splitlines()
    assert shown[0] == ["stream-hbaf: a warning", "stream-hbaf: loading"]
    assert [line.partition(" stream_hbaf.")[2] for line in shown[1]] == [
        "live.pipeline: an event",
        "live.pipeline: a warning",
        "progress: loading",
    ]
    assert "DEBUG stream_hbaf.live.pipeline: a detail" in shown[2][0]
    assert len(shown[2]) == 4


def test_long_step_is_announced_and_a_short_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    """After a second somebody wonders what it is waiting for."""
    caplog.set_level(logging.INFO)
    with announced("loading a small model", after_s=60):
        pass
    with announced("loading a large model", after_s=0.01):
        time.sleep(0.2)
    assert caplog.messages == ["loading a large model"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_option(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script is the shell's, and names what may be typed."""
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("train", "sessions", "--privacy", "label_only", "--own-labels"):
        assert word.removeprefix("--") in script


def test_bash_completes_commands_options_and_choices() -> None:
    """As bash would ask for them."""
    script = subprocess.run(
        [sys.executable, "-m", "stream_hbaf.cli", "completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    typed = (["tr"], ["train", "--corp"], ["--privacy", "l"])
    asks = "\n".join(
        f"COMP_WORDS=(stream-hbaf {' '.join(words)}); COMP_CWORD={len(words)}; COMPREPLY=(); "
        "_shtab_stream_hbaf; echo ${COMPREPLY[@]}"
        for words in typed
    )
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{asks}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["train", "--corpora", "label_only"]


def test_every_setting_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, the unit that its name promises, and its default as YAML has it."""
    units = {"ms": "ms", "s": "s", "h": "h", "prob": "probability", "port": "TCP port"}
    settings = {setting.key: setting for setting in list_settings()}
    for key, setting in settings.items():
        assert re.fullmatch(r"[A-Z`].*[^.]\.", setting.description), key
        unit = units.get(re.split(r"[._]", key)[-1])
        assert unit is None or setting.unit == unit, key
    assert settings["vad.threshold"].default == "0.5"
    assert settings["mqtt.url"].default == "embedded"
    assert settings["vad.engine"].values == "silero, webrtc"
    assert settings["source.channel"].unit == "index from 0"
    assert main(["settings"]) == 0
    listed = capsys.readouterr().out
    assert all(setting.description.replace("``", "") in listed for setting in settings.values())
    table = settings_table().splitlines()
    assert len(table) == 2 + len(settings)
    assert {row.count("|") - row.count("\\|") for row in table} == {6}


def test_switch_for_inferences_overrides_and_its_absence_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not given, it leaves what the environment says."""
    for said, wanted in (("false", False), ("true", True)):
        monkeypatch.setenv("STREAM_HBAF_INFERENCES", said)
        assert read_config(parse([])).inferences is wanted
        assert read_config(parse(["--inferences"])).inferences is True


def test_several_sources_have_settings_of_their_own() -> None:
    """A URL keeps its commas; what isn't said is the name, and nobody's dialogue."""
    said = ["--source", "ann=mic:USB,channel=1,dialogue=table", "--source", "tv=http://h/a,b?c=d"]
    ann, tv = read_config(parse(said)).sources
    assert (ann.name, ann.where, ann.speaker, ann.channel, ann.dialogue) == (
        *("ann", "mic:USB", "ann", 1, "table"),
    )
    assert (tv.where, tv.speaker, tv.channel, tv.dialogue) == ("http://h/a,b?c=d", "tv", None, "")


@pytest.mark.parametrize(
    ("said", "host", "port"),
    [
        ("", "127.0.0.1", 8770),
        ("0.0.0.0", "0.0.0.0", 8770),
        (":9000", "127.0.0.1", 9000),
        ("9000", "127.0.0.1", 9000),
        ("[::1]:9000", "::1", 9000),
    ],
)
def test_the_page_is_where_it_is_wanted(said: str, host: str, port: int) -> None:
    """Host, port, both or neither; without the option there is no page."""
    page = read_config(parse(["--dashboard", *([said] if said else [])])).dashboard
    assert page is not None
    assert (page.host, page.port) == (host, port)
    assert read_config(parse([])).dashboard is None


def test_help_lists_every_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    """What can be read stands in the help, which doesn't ask the readers: they load numpy."""
    from stream_hbaf.corpora.open_corpus import CORPORA

    for command in ("extract", "evaluate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        listed = " ".join(capsys.readouterr().out.split())
        assert f"{', '.join(CORPORA)}, or a manifest .csv" in listed


def test_a_trained_voice_is_weighed_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the training, by the same recipe, corpora, folder and cache; else not."""
    calls: list[tuple[str, Path, Path, Path]] = []

    def called(step: str) -> Any:
        def record(recipe: Path, corpora: Path, out: Path, *, cache: Path, **_: Any) -> None:
            calls.append((step, recipe, corpora, out / cache))

        return record

    monkeypatch.setattr("stream_hbaf.training.train.train", called("train"))
    monkeypatch.setattr("stream_hbaf.training.weighing.weigh_trained", called("weigh"))
    arguments = ["train", "live-en", "--corpora", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert [step for step, *_ in calls] == ["train"]
    assert main([*arguments, "--weigh-voice"]) == 0
    assert [step for step, *_ in calls] == ["train", "train", "weigh"]
    assert calls[-1][1:] == calls[-2][1:]


def test_threads_wait_without_spinning() -> None:
    """The libraries' OpenMP, all that are loaded, is told to wait without using up a core."""
    environ = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-m", "stream_hbaf.cli", "--file", "absent.wav", "--mqtt", "none"],
        env=environ | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=False,
    )
    counts = [line.strip() for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert counts
    assert set(counts) == {"GOMP_SPINCOUNT = '0'"}


def test_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """--device cuda never falls back in silence."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments = ["--file", str(SPEECH), "--mqtt", "none", "--device", "cuda"]
    assert "torch finds no GPU here; use --device auto or cpu" in complaint(capsys, *arguments)


def test_extract_measures_a_manifest_and_names_what_it_skips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken clips are named, all others are measured, and a second time nothing is to do."""
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    rows = [
        f"{split},{split}-{n},Ann,Well.,{label},{split},{clip}"
        for split in ("train", "dev", "test")
        for n, (label, clip) in enumerate([("joy", SPEECH), ("anger", "broken.wav")])
    ]
    header = "dialogue,id,speaker,text,label,split,audio"
    (tmp_path / "own.csv").write_text("\n".join([header, *rows, ""]))
    arguments = ["extract", "own.csv", "--corpora", str(tmp_path), "--features", "egemaps"]
    assert main([*arguments, "--cache", str(tmp_path / "cache"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["skipped"] * 3 + ["egemaps"]
    assert printed[0].startswith("skipped: train-1: ")
    assert "broken.wav" in printed[0]
    assert printed[-1] == "egemaps: 3 utterances measured, 3 skipped"


def test_extract_takes_a_corpus_that_only_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TESS has neither dev nor test; its clips are measured all the same."""
    clip = tmp_path / "tess" / "oaf_angry" / "OAF_back_angry.flac"
    clip.parent.mkdir(parents=True)
    shutil.copy(SPEECH, clip)
    arguments = ["extract", "tess", "--corpora", str(tmp_path), "--features", "egemaps"]
    assert main([*arguments, "--cache", str(tmp_path / "cache"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["egemaps: 1 utterances measured, 0 skipped"]


def test_evaluate_live_plays_the_clips_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bundle, one's own clip, the conditions that are asked for, and a report of them."""
    table, out = tmp_path / "own.csv", tmp_path / "report"
    table.write_text(f"audio,label\n{SPEECH},neutral\n")
    arguments = ["evaluate", "live-en", "--live", str(table), "--out", str(out)]
    assert main([*arguments, "--conditions", "clean,text_only"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(out / "report.html")
    report = json.loads((out / "metrics.json").read_text())
    assert list(report["conditions"]) == ["clean", "text_only"]
    assert report["speed"] == "max"
    assert report["bundle"]["id"] == "live-en"
    assert report["conditions"]["clean"]["missed"] == []
    assert "live-en" in (out / "report.html").read_text()


def test_evaluate_live_updates_the_card_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures stand in the bundle's metrics.json and card; its weights stay as they are."""
    bundle, table = tmp_path / "mine", tmp_path / "own.csv"
    shutil.copytree(resolve_bundle("live-en"), bundle)
    table.write_text(f"audio,label\n{SPEECH},neutral\n")
    before = json.loads((bundle / "metrics.json").read_text())
    arguments = ["evaluate", str(bundle), "--live", str(table), "--conditions", "clean"]
    assert main([*arguments, "--out", str(tmp_path / "report"), "--update-card"]) == 0
    assert "metrics.json and README.md updated" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "metrics.json").read_text())
    after = json.loads((bundle / "metrics.json").read_text())
    assert after["live"]["conditions"]["own/clean"]["uar"] == report["conditions"]["clean"]["uar"]
    assert {**after, "live": before["live"]} == before
    assert "| own test, audio and recognised words, UAR |" in (bundle / "README.md").read_text()
    (bundle / "metrics.json").write_text("{}")
    said = complaint(capsys, *arguments, "--update-card")
    assert "metrics.json isn't what a model card is written from" in said


def test_command_without_its_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training's packages are an extra; the message names it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("evaluation.plots", "training.results_page", "training.experiment"):
        monkeypatch.delitem(sys.modules, f"stream_hbaf.{name}", raising=False)
    said = complaint(capsys, "experiment", "x.yaml", "--corpora", ".")
    assert said == "stream-hbaf: matplotlib is not installed; pip install 'stream-hbaf[train]'"

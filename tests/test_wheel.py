"""The wheel, installed outside the clone: what is in it, and that it runs without the clone."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel, and a folder outside the clone to run it in."""

    environment: Path
    elsewhere: Path

    @property
    def package(self) -> Path:
        return next(self.environment.glob("lib/python*/site-packages/stream_hbaf"))

    def run(self, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.environment / "bin" / command[0]), *command[1:]],
            cwd=self.elsewhere,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built with the packages that are installed here."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    subprocess.run([*pip, *options, str(ROOT)], check=True)
    (built,) = out.iterdir()
    return built


def install(wheel: Path, place: Path, *, without: frozenset[str] = frozenset()) -> Installed:
    """Install the wheel into a fresh environment that shares the dependencies installed here.

    Each dependency is linked by itself: neither the clone nor the packages ``without`` can be
    imported there.
    """
    environment, shared = place / "environment", place / "shared"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    target = ["--python", str(environment / "bin/python"), "install", "--no-compile"]
    subprocess.run([*pip, *target, "--no-deps", "--no-index", str(wheel)], check=True)
    shared.mkdir()
    hidden = {"stream_hbaf", "_stream_hbaf", "_editable_impl_stream_hbaf", *without}
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if re.split(r"[-.]", entry.name)[0] not in hidden:
            (shared / entry.name).symlink_to(entry)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(f"{shared}\n")
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    return Installed(environment, elsewhere)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """With all extras."""
    return install(wheel, tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def plain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Without the packages of the extras for users, but audformat, which openSMILE needs anyway."""
    left = {name: packages for name, packages in EXTRAS.items() if name not in ("dev", "audformat")}
    users = [one for packages in left.values() for one in packages]
    names = {re.split(r"[=<>]", one)[0] for one in users}
    without = frozenset(name.replace("-", "_") for name in names) | {"opentelemetry"}
    return install(wheel, tmp_path_factory.mktemp("plain"), without=without)


def test_wheel_holds_what_is_run_and_nothing_else(wheel: Path) -> None:
    """Every bundle and recipe; no results, reports, tests or tools."""
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    bundles = {path.parent for path in ROOT.glob("models/*/config.yaml")}
    assert len(bundles) == 2
    expected = {
        f"stream_hbaf/models/{bundle.name}/{path.name}"
        for bundle in bundles
        for path in bundle.iterdir()
        if path.is_file()
    }
    assert {name for name in names if name.startswith("stream_hbaf/models/")} == expected
    recipes = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.yaml")}
    assert {f"stream_hbaf/{recipe}" for recipe in recipes} <= names
    assert {"stream_hbaf/audio/example.flac", "stream_hbaf/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {
        "stream_hbaf",
        f"stream_hbaf-{PROJECT['version']}.dist-info",
    }
    assert wheel.stat().st_size < 50_000_000


def test_installed_command_recognises_the_bundled_recording(installed: Installed) -> None:
    """From another folder, without the clone: weights, bundle and recording are found."""
    recording = installed.package / "audio" / "example.flac"
    options = ["--json", "--mqtt", "none", "--speed", "max"]
    done = installed.run("stream-hbaf", "--file", str(recording), *options)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    ends = [event for event in events if event.get("type") == "end"]
    assert len(ends) >= 3
    assert all(end["text"] and end["emotion"]["label"] for end in ends)
    assert {end["model"]["id"] for end in ends} == {"live-en"}
    assert installed.run("stream-hbaf", "--version").stdout == f"stream-hbaf {PROJECT['version']}\n"


def test_installed_package_is_not_the_clone(installed: Installed) -> None:
    """What is imported lies in the environment, and no folder of the clone is searched."""
    code = "import stream_hbaf, sys; print(stream_hbaf.__file__, *sys.path, sep='\\n')"
    found, *searched = installed.run("python", "-c", code).stdout.splitlines()
    assert Path(found).parent == installed.package
    assert not {str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")} & set(searched)


def test_installed_command_knows_the_recipes_by_name(installed: Installed) -> None:
    """A recipe is found in the package; what is missing then is the corpus."""
    done = installed.run("stream-hbaf", "train", "meld", "--corpora", "absent", "--out", "x")
    assert done.returncode == 2
    assert re.fullmatch(r"stream-hbaf: .*absent.*", done.stderr.splitlines()[-1])
    assert "meld.yaml" not in done.stderr


def test_missing_weights_and_extras_are_named_in_one_line(plain: Installed) -> None:
    """Without the extra and without a network: which it is, and how to get it."""
    recording = plain.package / "audio" / "example.flac"
    offline = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(plain.elsewhere)}
    for command, extra in {
        ("--file", str(recording), "--mqtt", "none"): "offline",
        ("--dashboard", "--file", str(recording), "--mqtt", "none"): "dashboard",
        ("--metrics", "--file", str(recording), "--mqtt", "none"): "metrics",
        ("--traces", "--file", str(recording), "--mqtt", "none"): "metrics",
    }.items():
        done = plain.run(
            "stream-hbaf", *command, XDG_CACHE_HOME=str(plain.elsewhere / "cache"), **offline
        )
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert f"pip install 'stream-hbaf[{extra}]'" in done.stderr.splitlines()[-1]

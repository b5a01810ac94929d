"""The kinds of inputs that ``tools/fuzz.py`` tries: how each is damaged, and what reads it.

The imports of a kind stand in it: it is prepared in a process of its own, whose memory is measured.
"""

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from damages import (
    CODECS,
    JSON,
    VALUES,
    YAML,
    as_text,
    change,
    complaint,
    damage,
    damage_sound,
    one_second,
)

ROOT = Path(__file__).parent.parent
SPEECH = ROOT / "tests/recordings/sense_and_sensibility_01_austen_64kb-0880.flac"
LISTEN = ("--speed", "max", "--json", "--mqtt", "none")


class Kind(Protocol):
    """A kind of input. Its folder is its own."""

    def __init__(self, folder: Path) -> None:
        """Write what is to be damaged."""

    @property
    def command(self) -> Sequence[str]:
        """What reads the same input by the real command line; empty if there is none."""

    def write(self, seed: int) -> None:
        """Make the input of this number."""

    def read(self) -> str:
        """Read it; returns the complaint, empty if there is none. Any error is a fault."""


def damaged_text(tree: Any, seed: int, *, fixed: Sequence[str]) -> bytes:
    """One of the fixed hostile texts, a tree with wrong values, or a text with damaged bytes."""
    if seed < len(fixed):
        return fixed[seed].encode(errors="surrogatepass")[: 1 << 18]
    return damage(as_text(tree), seed) if seed % 3 == 0 else as_text(change(tree, seed))


class Audio:
    """A second of speech in ten containers."""

    def __init__(self, folder: Path) -> None:
        from stream_hbaf.audio.file import read_audio

        self._folder, self._read = folder, read_audio
        self._whole = [one_second(SPEECH, folder / f"whole.{kind}") for kind in CODECS]
        self._path = folder

    @property
    def command(self) -> Sequence[str]:
        return ("--file", str(self._path), "--asr", "tiny.en", *LISTEN)

    def write(self, seed: int) -> None:
        whole = self._whole[seed % len(self._whole)]
        self._path = self._folder / f"damaged{whole.suffix}"
        self._path.write_bytes(damage_sound(whole.read_bytes(), seed))

    def read(self) -> str:
        said: list[str] = []
        said.append(
            complaint(lambda: self._read(self._path, on_status=lambda _, line: said.append(line)))
        )
        return " ".join(said)


class Settings:
    """A file of settings."""

    def __init__(self, folder: Path) -> None:
        from stream_hbaf.config import Config, load_config

        self._path, self._load = folder / "settings.yaml", load_config
        self._whole = Config().model_dump(mode="json", exclude={"record"})
        self._whole |= {"sources": [{"name": "a", "where": "mic"}], "dashboard": {"port": 1}}
        self.command = ("--config", str(self._path), "--file", str(SPEECH), *LISTEN)

    def write(self, seed: int) -> None:
        self._path.write_bytes(damaged_text(self._whole, seed, fixed=YAML))

    def read(self) -> str:
        return complaint(lambda: self._load(file=self._path))


class Recipes:
    """A recipe, and an experiment of it."""

    def __init__(self, folder: Path) -> None:
        from experiment_kit import EXPERIMENT, RECIPE, write_experiment

        from stream_hbaf.training.experiment_file import read_experiment
        from stream_hbaf.training.recipe import Recipe, read_recipe

        write_experiment(folder)
        self._path = folder / "damaged.yaml"
        self._trees: list[tuple[Any, Callable[[Path], object]]] = [
            (Recipe.model_validate(RECIPE).model_dump(mode="json"), read_recipe),
            (RECIPE | {"extends": "meld", "without": ["meld"]}, read_recipe),
            (EXPERIMENT, read_experiment),
        ]
        self._read: Callable[[Path], object] = read_recipe
        self.command = ("train", str(self._path), "--corpora", str(folder / "none"))

    def write(self, seed: int) -> None:
        tree, self._read = self._trees[seed // 3 % 3]
        self._path.write_bytes(damaged_text(tree, seed, fixed=YAML))

    def read(self) -> str:
        return complaint(lambda: self._read(self._path))


class Manifests:
    """A table of people's own recordings."""

    CELLS = (*(value for value in VALUES if isinstance(value, str)), "-1", "nan", "1e999", '"', ",")

    def __init__(self, folder: Path) -> None:
        from stream_hbaf.corpora.manifest import COLUMNS, read_manifest

        shutil.copy(SPEECH, folder / "a.flac")
        self._read, self._path = read_manifest, folder / "manifest.csv"
        self._rows = [[*COLUMNS]]
        for number, split in enumerate(("train", "train", "dev", "test")):
            row = [f"d{number}", f"u{number}", "Ann", "Well, hello.", "joy", split]
            self._rows.append([*row, "a.flac", "0.1", "1.5"])
        options = ("--features", "egemaps", "--workers", "1", "--corpora", str(folder))
        self.command = ("extract", str(self._path), *options, "--cache", str(folder / "cache"))

    def write(self, seed: int) -> None:
        draw = random.Random(seed)
        rows = [[*row] for row in self._rows]
        if seed % 2:
            for _ in range(draw.choice((1, 1, 3))):
                row = draw.choice(rows)
                row[draw.randrange(len(row))] = draw.choice(self.CELLS)
        text = "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows)
        content = text.encode(errors="surrogatepass")
        self._path.write_bytes(content if seed % 2 else damage(content, seed))

    def read(self) -> str:
        with_labels = complaint(lambda: self._read(self._path, labels=("joy", "anger")))
        return complaint(lambda: self._read(self._path)) + with_labels


class Bundles:
    """The settings, the weights and the sums of a tiny bundle."""

    def __init__(self, folder: Path) -> None:
        from bundle_kit import make_tiny, rewritten, settings_of

        from stream_hbaf.bundle import Bundle

        self._small, self._path = folder / "small", folder / "damaged"
        make_tiny(folder / "encoder", audio_width=5).save(self._small, metrics={}, card="")
        self._load, self._rewritten = Bundle.load, rewritten
        self._settings = settings_of(self._small)
        self.command = ("--model", str(self._path), "--file", str(SPEECH), *LISTEN)

    def write(self, seed: int) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        if seed < len(YAML) or seed % 3 == 0:
            config = damaged_text(self._settings, seed, fixed=YAML)
            self._rewritten(self._small, self._path, config=config)
        elif seed % 3 == 1:
            weights = damage((self._small / "model.safetensors").read_bytes(), seed)
            self._rewritten(self._small, self._path, weights=weights)
        else:
            shutil.copytree(self._small, self._path)
            file = self._path / ("SHA256SUMS", "config.yaml", "model.safetensors")[seed // 3 % 3]
            file.write_bytes(damage(file.read_bytes(), seed))

    def read(self) -> str:
        return complaint(lambda: self._load(str(self._path)))


class Sessions:
    """A recorded session beside another, which must not suffer from it."""

    def __init__(self, folder: Path) -> None:
        import session_damages

        self._kit = session_damages
        self._two = session_damages.record_two(folder / "two")
        self._path = folder / "damaged"
        self.command = ("sessions", "list", str(self._path))

    def write(self, seed: int) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        name = (*self._kit.TABLES, "a.flac")[seed // 2 % 4]
        content = (self._two / "bad" / name).read_bytes()
        if name == "a.flac":
            content = damage_sound(content, seed)
        elif seed < 2 * len(JSON):
            content = JSON[seed // 2].encode(errors="surrogatepass") + b"\n"
        else:
            content = self._kit.damage_table(content, name, seed)
        self._kit.damaged(self._two, self._path, name, content)

    def read(self) -> str:
        self._kit.assert_rest_goes_on(self._path)
        return ""


class Voices:
    """The file of enrolled voices. What is damaged is set aside, and then nobody is enrolled."""

    command = ("speakers", "list")

    def __init__(self, folder: Path) -> None:
        os.environ["XDG_STATE_HOME"] = str(folder)
        from stream_hbaf.features import voice_prints
        from stream_hbaf.features.campplus import EMBEDDING_WIDTH

        self._read, self._path = voice_prints.read_voices, voice_prints.voices_file()
        voice = {
            "name": "Ann",
            "encoder": voice_prints.encoder_id(),
            "enrolled": "2026-01-01T12:00:00+00:00",
            "speech_s": 10.0,
            "embedding": [1.0, *[0.0] * (EMBEDDING_WIDTH - 1)],
        }
        self._whole = {"format": 1, "voices": [voice, {**voice, "name": "Bob"}]}

    def write(self, seed: int) -> None:
        shutil.rmtree(self._path.parent, ignore_errors=True)
        self._path.parent.mkdir(parents=True)
        self._path.write_bytes(damaged_text(self._whole, seed, fixed=JSON))

    def read(self) -> str:
        said = complaint(self._read)
        assert not complaint(self._read)  # what is damaged has been set aside
        return said

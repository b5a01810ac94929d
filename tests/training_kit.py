"""Tiny corpora in the layouts of the published ones, and recipes that train on them in seconds."""

import csv
import wave
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from tiny_encoder import save_tiny_bert

from stream_hbaf.audio.file import read_audio
from stream_hbaf.corpora.dataset import Dataset
from stream_hbaf.corpora.dialogue import LABELS
from stream_hbaf.features.prosody import PROSODY
from stream_hbaf.training.recipe import Recipe, read_recipe

RECORDINGS = Path(__file__).parent / "recordings"
ONE: dict[str, Any] = {  # a recipe of one corpus
    "id": "one",
    "corpora": "meld",
    "commonsense": {"source": "none"},
    "network": {"hidden": 16, "heads": 2, "layers": 1, "filters": 4, "window": 3},
    "fit": {"epochs": 3, "seeds": [0, 1], "batch": 2},
    "workers": 1,
}
SEVERAL: dict[str, Any] = ONE | {  # dialogues, further texts, clips in two languages
    "id": "several",
    "corpora": ["meld", "goemotions", "ravdess", "nemo"],
    "commonsense": {"hidden": 8, "epochs": 2},
    "audio": {"representation": "compare", "components": 8, "cut": "segmenter", "copies": 1},
    "asr_errors": {"versions": 1},
    "fit": {"epochs": 2, "seeds": [0, 1], "batch": 2, "ship": "ensemble"},
}

SPOKEN: dict[str, Any] = SEVERAL | {  # dialogues with embeddings of their sound beside clips
    "corpora": {
        "meld": {},
        "iemocap": {
            "classes": {"anger": ["anger"], "joy": ["happiness"], "sadness": ["sadness"]},
        },
        "ravdess": {},
        "nemo": {},
    },
    "audio": {
        "representation": "mfcc+ge2e",
        "selection": None,
        "copies": 1,
        "baseline": {"parts": ["mfcc"], "prior": 2.0},
    },
}
# Words that the tiny encoder knows: of each emotion, and of each session.
WORDS = ("angry", "great", "bad", "happy", "is", "sad")
SESSION_WORDS = ("i", "you", "it", "the", "rachel")
TABLE_HEADER = ",".join(("video_id", "segment_id", "emotion", "gender", "mode", "text", *PROSODY))


def silent(line: str) -> None:
    """Progress that nobody reads."""


def write_recipe(folder: Path, settings: dict[str, Any], **changes: Any) -> Path:
    """A recipe's file, named by its id."""
    recipe = settings | changes
    file = folder / f"{recipe['id']}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return file


def make_recipe(folder: Path, settings: dict[str, Any], **changes: Any) -> Recipe:
    return read_recipe(write_recipe(folder, settings, **changes))


def write_table(file: Path, header: list[str], rows: list[list[Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([header, *rows])


def make_meld(root: Path) -> Path:
    """Three dialogues a split; one utterance isn't in the prosody tables, one pitch is missing."""
    draw = np.random.default_rng(0)
    for split in ("train", "dev", "test"):
        rows = [
            [f"I feel {label} now", "Ann" if n % 2 else "Bob", label, n % 3, n // 3]
            for n, label in enumerate(LABELS)
        ]
        header = ["Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"]
        write_table(root / "meld" / f"{split}_sent_emo.csv", header, rows)
        prosody = [
            [f"dia{row[3]}_utt{row[4]}.wav", *(draw.random(len(PROSODY)) + 1).round(3).tolist()]
            for row in rows[1:]
        ]
        prosody[0][1 + PROSODY.index("avg_pitch")] = ""
        write_table(root / "meld" / f"prosody_{split}.csv", ["filename", *PROSODY], prosody)
    return root


def make_corpora(root: Path) -> Path:
    """MELD, GoEmotions, Event2Mind, RAVDESS, nEMO, noises and rooms: pieces of real speech."""
    make_meld(root)
    speech = read_audio(RECORDINGS / "jfk.flac")
    (root / "goemotions").mkdir()
    (root / "goemotions" / "labels.txt").write_text("\n".join(LABELS), encoding="utf-8")
    for split in ("train", "dev", "test"):
        lines = [f"What {label} this is\t{n}\t{split}{n}\n" for n, label in enumerate(LABELS)]
        (root / "goemotions" / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
        write_table(
            root / "event2mind" / f"{split}.csv",
            ["Source", "Event", "Xintent", "Xemotion", "Otheremotion", "Xsent", "Osent"],
            [
                ["x", "PersonX wins", '["to win"]', '["happy"]', '["envious"]', "", ""],
                ["x", "PersonX loses", '["to try"]', '["sad"]', '["sorry"]', "", ""],
            ],
        )
    for actor in range(1, 25):
        folder = root / "ravdess" / f"Actor_{actor:02d}"
        folder.mkdir(parents=True)
        for emotion in (3, 5) if actor < 21 else (5,):
            start = 4000 * actor + 1000 * emotion
            piece = speech[start : start + 12_000] // (1 if emotion == 5 else 4)
            write_wav(folder / f"03-01-{emotion:02d}-01-01-01-{actor:02d}.wav", piece)
    rows = ["file_id\temotion\tspeaker_id\tgender\ttext"]
    for n, speaker in enumerate(("IC0", "KD0", "KS0", "SM0", "MP0", "TP0")):
        name = f"{speaker}_fear_1.wav"
        rows.append(f"{name}\tfear\t{speaker}\tmale\tTak.")
        (root / "nemo").mkdir(exist_ok=True)
        write_wav(root / "nemo" / name, speech[7000 * n : 7000 * n + 12_000])
    (root / "nemo" / "data.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for kind in ("noise", "rir"):
        (root / "speech" / kind).mkdir(parents=True)
        write_wav(root / "speech" / kind / "a.wav", speech[::-1][:1600])
    return root


def make_iemocap(root: Path) -> None:
    """A dialogue of six turns for each session; the first session's is dev, the last's test."""
    rows, times = [TABLE_HEADER], ["name,start_s,end_s"]
    for session in range(1, 6):
        for number, emotion in enumerate(("ang", "exc", "fru", "hap", "neu", "sad")):
            name = f"Ses0{session}F_impro01"
            text = f"{WORDS[number]} {SESSION_WORDS[session - 1]}"
            mode = {1: "valid", 5: "test"}.get(session, "train")
            rows.append(f"{name},{number},{emotion},F,{mode},{text}{',1' * 8}")
            times.append(f"{name}_F{number:03d},{number},{number + 1}")
    (root / "iemocap").mkdir()
    (root / "iemocap" / "utterances.csv").write_text("\n".join(rows))
    (root / "iemocap" / "order.csv").write_text("\n".join(times))


def make_spoken_corpora(root: Path) -> Path:
    """All corpora of ``SPOKEN``, and in ``bert`` the tiny encoder; IEMOCAP as embeddings."""
    make_corpora(root)
    (root / "bert").mkdir()
    save_tiny_bert(root / "bert")
    make_iemocap(root)
    names = [f"Ses0{session}F_impro01_F{n:03d}" for session in range(1, 6) for n in range(6)]
    voices = np.random.default_rng(0).normal(size=(len(names), 256)).astype(np.float32)
    np.savez(root / "iemocap" / "ge2e.npz", name=names, embedding=voices)
    return root


def write_wav(file: Path, samples: NDArray[np.int16]) -> None:
    with wave.open(str(file), "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes(samples.tobytes())


def make_dataset(classes: int = 4, **changes: Any) -> Dataset:
    """Two dialogues of four; text and audio features are random, so that each tells its label."""
    draw = np.random.default_rng(0)
    text, audio = draw.standard_normal((2, 8, 6)).astype(np.float32)
    whole: dict[str, Any] = {
        "labels": np.arange(8) % classes,
        "text": text,
        "commonsense": np.zeros((8, 3, 6), np.float32),
        "audio": {"": audio},
        "dialogues": (np.arange(4), np.arange(4, 8)),
    }
    return Dataset(**whole | changes)

"""Tiny text encoders of the real classes, in folders as transformers saves them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    MPNetConfig,
    MPNetModel,
    MPNetTokenizer,
)

WORDS = (
    "i you can can't believe it no well the garden ross rachel joey happy sad angry great bad is "
    "are so what never always came home today left work friend ' t ! , . : ? a b"
)
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def save_tiny_bert(folder: Path) -> Path:
    """A model of MiniLM's class."""
    vocabulary = f"[PAD] [UNK] [CLS] [SEP] [MASK] {WORDS}".split()
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), **SIZES)).save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def save_tiny_mpnet(folder: Path) -> Path:
    """A model of all-mpnet-base-v2's class: its positions are relative too."""
    vocabulary = f"<s> <pad> </s> <unk> <mask> [UNK] {WORDS}".split()
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(0)
    sizes = MPNetConfig(vocab_size=len(vocabulary), max_position_embeddings=514, **SIZES)
    MPNetModel(sizes).save_pretrained(folder)
    MPNetTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder

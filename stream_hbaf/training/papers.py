"""Training: what papers report, weighted F1 x 100 on test, to stand beside our own figures."""

from collections.abc import Mapping

# Luo et al., "Heterogeneous bimodal attention fusion for speech emotion recognition": table 2
# (sound alone, with and without its audio context network) and the differences of sections 5.1
# to 5.3, made absolute. All offline. By the name of the row.
PAPER: Mapping[str, Mapping[str, float]] = {
    "meld": {
        "both": 67.1,
        "text": 64.8,
        "audio": 41.2,
        "audio_without_context": 39.8,
        "audio_mfcc": 34.6,
        "audio_mfcc_without_context": 33.5,
        "audio_wav2vec": 47.3,
        "audio_wav2vec_without_context": 47.6,
        "audio_data2vec": 37.9,
        "audio_data2vec_without_context": 37.8,
        "without_fusion": 63.5,
        "without_contrastive": 64.2,
    },
    "iemocap": {
        "both": 69.6,
        "text": 64.5,
        "audio": 58.3,
        "audio_without_context": 56.7,
        "audio_mfcc": 52.8,
        "audio_mfcc_without_context": 51.5,
        "audio_wav2vec": 61.9,
        "audio_wav2vec_without_context": 62.1,
        "audio_data2vec": 53.0,
        "audio_data2vec_without_context": 52.7,
        "without_fusion": 63.0,
        "without_contrastive": 64.2,
    },
}

# The same paper's figures for networks, by kind. For its baselines its figure 6 is a picture
# without numbers; its text says that HBAF gains 2.2 over TelME on MELD and 6.9 over Mamba on
# IEMOCAP.
PAPER_NETWORKS: Mapping[str, Mapping[str, float]] = {
    "meld": {"hbaf": PAPER["meld"]["both"], "telme": 64.9},
    "iemocap": {"hbaf": PAPER["iemocap"]["both"], "mamba": 62.7},
}

# What those who proposed a network report for it, by kind, and what it was given: all of them had
# other features than ours, most of them vision.
ORIGINAL: Mapping[str, Mapping[str, tuple[float, str]]] = {
    "meld": {
        "m2fnet": (66.7, "Chudasama et al. 2022, audio, text, vision"),
        "telme": (67.4, "Yun et al. 2024, audio, text, vision"),
    },
    "iemocap": {
        "dialogue-rnn": (62.8, "Majumder et al. 2019, BiDialogueRNN+Att, text alone"),
        "m2fnet": (69.9, "Chudasama et al. 2022, audio, text, vision"),
        "telme": (70.5, "Yun et al. 2024, audio, text, vision"),
    },
}

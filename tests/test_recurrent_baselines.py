"""bc-LSTM, CMN and DialogueRNN against their papers' equations in float64 plain loops."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks_kit import (
    BC_LSTM,
    BI_DIALOGUE_RNN,
    CMN,
    DIALOGUE_RNN,
    SC_LSTM,
    dialogues,
    map_floats,
    ready,
    tensor,
)
from oracle import (
    Sequence,
    add,
    apply,
    assert_same,
    bilstm,
    dot,
    gru_step,
    linear,
    lstm,
    plain,
    relu,
    softmax,
    tanh,
    weighted,
)
from torch import Tensor

from stream_hbaf.networks.network import PARTIES, NetworkConfig

VARIANTS = {
    "sc-lstm": SC_LSTM,
    "sc-lstm-plain": replace(SC_LSTM, use_hierarchy=False, use_dense=False),
    "sc-lstm-text": replace(SC_LSTM, use_audio=False),
    "bc-lstm": BC_LSTM,
    "bc-lstm-plain": replace(BC_LSTM, use_hierarchy=False, use_dense=False),
    "bc-lstm-audio": replace(BC_LSTM, use_text=False),
    "cmn": CMN,
    "cmn-own": replace(CMN, use_others=False),
    "cmn-others-mean": replace(CMN, use_own=False, use_attention=False, hops=1),
    "dialogue-rnn": DIALOGUE_RNN,
    "dialogue-rnn-listener": replace(DIALOGUE_RNN, use_listener=True),
    "dialogue-rnn-bare": replace(DIALOGUE_RNN, use_parties=False, use_emotion=False, memory=1),
    "bi-dialogue-rnn": BI_DIALOGUE_RNN,
    "bi-dialogue-rnn-listener": replace(BI_DIALOGUE_RNN, use_listener=True, use_attention=False),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def attended(scores: list[float], vectors: Sequence, width: int) -> list[float]:
    """The vectors' sum under the softmax of the scores; zero of none."""
    return weighted(softmax(scores), vectors) if vectors else [0.0] * width


def contextual(part: Any, inputs: Sequence) -> Sequence:
    """bc-LSTM: an LSTM in one or both directions, and a dense layer."""
    both_ways = part.lstm.bidirectional
    outputs = bilstm(part.lstm, inputs) if both_ways else lstm(part.lstm, inputs, suffix="_l0")
    return outputs if part.dense is None else [relu(linear(part.dense, x)) for x in outputs]


def bc_lstm(network: Any, audio: Sequence, text: Sequence, speakers: list[int]) -> Sequence:
    streams = {"a": audio, "l": text}
    chosen = [streams[m] for m in network.config.modalities]
    if network.contexts:
        parts = zip(network.contexts.values(), chosen, strict=True)
        chosen = [contextual(part, stream) for part, stream in parts]
    fused = [[v for x in vectors for v in x] for vectors in zip(*chosen, strict=True)]
    if network.fusing is not None:
        fused = contextual(network.fusing, fused)
    return [linear(network.classifier, x) for x in fused]


def cmn(network: Any, audio: Sequence, text: Sequence, speakers: list[int]) -> Sequence:
    config, logits = network.config, []
    utterances = [x + y for x, y in zip(audio, text, strict=True)]
    for t in range(len(utterances)):
        memories = []
        for name, history in network.histories.items():
            hidden, memory = [0.0] * config.hidden, []
            for i in range(max(0, t - config.memory), t):
                if (speakers[i] == speakers[t]) == (name == "own"):
                    hidden = gru_step(history.cell, utterances[i], hidden)
                    memory.append(hidden)
            memories.append(memory)
        query = tanh(linear(network.query, utterances[t]))
        for _ in range(config.hops):
            reads = []
            for memory in memories:
                scores = [math.tanh(dot(query, m)) * config.use_attention for m in memory]
                reads.append(attended(scores, memory, config.hidden))
            query = tanh(add(query, *reads))
        logits.append(linear(network.classifier, query))
    return logits


def one_way(part: Any, config: Any, utterances: Sequence, speakers: list[int]) -> Sequence:
    """DialogueRNN in one direction: e of every turn."""
    zero = [0.0] * config.hidden
    parties = [zero] * PARTIES
    past: Sequence = []
    emotions: Sequence = []
    numbers = speakers if config.use_parties else [0] * len(speakers)
    for u, s in zip(utterances, numbers, strict=True):
        seen = past[-config.memory :] if config.mode == "live" else past
        key = linear(part.key, u)
        context = attended([dot(key, g) for g in seen], seen, config.hidden)
        before = parties[s]
        past.append(gru_step(part.whole, u + before, past[-1] if past else zero))
        after = gru_step(part.party, u + context, before)
        if config.use_listener:
            parties = [gru_step(part.listener, u + after, q) for q in parties]
        parties = [*parties[:s], after, *parties[s + 1 :]]
        emotion = after
        if config.use_emotion:
            emotion = gru_step(
                part.emotion, after, emotions[-1] if emotions else zero, suffix="_l0"
            )
        emotions.append(emotion)
    return emotions


def dialogue_rnn(network: Any, audio: Sequence, text: Sequence, speakers: list[int]) -> Sequence:
    config = network.config
    utterances = [x + y for x, y in zip(audio, text, strict=True)]
    emotions = one_way(network.forwards, config, utterances, speakers)
    if config.mode == "offline":
        back = one_way(network.backwards, config, utterances[::-1], speakers[::-1])[::-1]
        emotions = [x + y for x, y in zip(emotions, back, strict=True)]
    if config.mode == "offline" and config.use_attention:
        keys = [apply(plain(network.match.weight), e) for e in emotions]
        emotions = [attended([dot(k, e) for e in emotions], emotions, len(k)) for k in keys]
    return [linear(network.classifier, relu(linear(network.dense, e))) for e in emotions]


ORACLES: dict[str, Callable[[Any, Sequence, Sequence, list[int]], Sequence]] = {
    "bc-lstm": bc_lstm,
    "cmn": cmn,
    "dialogue-rnn": dialogue_rnn,
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_network_is_its_papers_equations(config: NetworkConfig) -> None:
    """Dialogue by dialogue the loops give the same logits, to 1e-9."""
    network: Any = ready(config).double()
    features = map_floats(dialogues(7, 4, present=0.7), Tensor.double)
    with torch.no_grad():
        logits, inputs = network(features).logits, network.inputs(features)
    for b, length in enumerate((7, 4)):
        audio, text = (plain(part[b, :length]) for part in (inputs.audio, inputs.text))
        speakers = inputs.speaker[b, :length].tolist()
        assert_same(logits[b, :length], ORACLES[config.kind](network, audio, text, speakers))


def test_cmn_depends_on_the_last_utterances_only() -> None:
    """An utterance of K turns ago has an influence, one of K + 1 turns ago has none."""
    network, features = ready(CMN), dialogues(9, parties=1)
    text = tensor(features.text).clone()
    text[:, 1] += 1
    with torch.no_grad():
        moved = network(features).logits != network(replace(features, text=text)).logits
    assert moved[0].any(dim=-1).tolist() == [False] + [True] * (CMN.memory + 1) + [False] * 3


@pytest.mark.parametrize(
    "config",
    [CMN, DIALOGUE_RNN, BI_DIALOGUE_RNN],
    ids=lambda config: f"{config.kind}-{config.mode}",
)
def test_speakers_count_by_identity_not_by_number(config: NetworkConfig) -> None:
    """Other numbers for the same speakers change nothing; one speaker in place of two does."""
    network, features = ready(config), dialogues(8, parties=2)
    with torch.no_grad():
        logits = network(features).logits
        renamed = network(replace(features, speaker=5 - tensor(features.speaker))).logits
        alone = network(replace(features, speaker=None)).logits
    torch.testing.assert_close(logits, renamed, atol=1e-6, rtol=0)
    assert not torch.allclose(logits, alone, atol=1e-4)

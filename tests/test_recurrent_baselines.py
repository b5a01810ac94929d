"""bc-LSTM, CMN and DialogueRNN: their equations in plain loops, and what every network promises."""

import io
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError, ModelError
from stream_hbaf.networks.baselines.bc_lstm import BcLstm, BcLstmConfig
from stream_hbaf.networks.baselines.cmn import Cmn, CmnConfig
from stream_hbaf.networks.baselines.dialogue_rnn import DialogueRnn, DialogueRnnConfig
from stream_hbaf.networks.network import Network
from stream_hbaf.networks.state import PARTIES, Features

Vector = list[float]

SIZES = {"audio_width": 6, "text_width": 5, "hidden": 6, "classes": 3, "dropout": 0.0}
BC = BcLstmConfig(**SIZES)
SC = replace(BC, mode="live")
CMN = CmnConfig(**SIZES, memory=4)
RNN = DialogueRnnConfig(**SIZES, mode="live", memory=3)
BI = replace(RNN, mode="offline")
NETWORKS = {BcLstmConfig: BcLstm, CmnConfig: Cmn, DialogueRnnConfig: DialogueRnn}

LIVE = {
    "sc-lstm": SC,
    "sc-lstm-plain": replace(SC, use_hierarchy=False, use_dense=False),
    "sc-lstm-text": replace(SC, use_audio=False),
    "cmn": CMN,
    "cmn-own": replace(CMN, use_others=False),
    "cmn-others-mean": replace(CMN, use_own=False, use_attention=False, hops=1),
    "dialogue-rnn": RNN,
    "dialogue-rnn-listener": replace(RNN, use_listener=True),
    "dialogue-rnn-bare": replace(RNN, use_parties=False, use_emotion=False, memory=1),
}
OFFLINE = {
    "bc-lstm": BC,
    "bc-lstm-plain": replace(BC, use_hierarchy=False, use_dense=False),
    "bc-lstm-audio": replace(BC, use_text=False),
    "bi-dialogue-rnn": BI,
    "bi-dialogue-rnn-listener": replace(BI, use_listener=True, use_attention=False),
}
ALL = {**LIVE, **OFFLINE}
MAIN = [SC, BC, CMN, RNN, BI]


def each(configs: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", configs.values(), ids=configs)


EACH_MAIN = pytest.mark.parametrize(
    "config", MAIN, ids=lambda config: f"{config.kind}-{config.mode}"
)


pytestmark = pytest.mark.usefixtures("one_thread")


def ready(config) -> Network:
    """Ready to predict; every weight drawn, absent vectors too (they start at zero)."""
    torch.manual_seed(3)
    network = NETWORKS[type(config)](config).eval()
    for name, weight in network.named_parameters():
        if "absent" in name:
            nn.init.normal_(weight)
    return network


def dialogues(*lengths: int, present: float = 1.0, parties: int = 3) -> Features:
    """Random dialogues, padded to the longest with NaN; each modality present so often."""
    draw = torch.Generator().manual_seed(7)
    shape = len(lengths), max(lengths)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]

    def noise(width: int) -> Tensor:
        values = torch.randn(*shape, width, generator=draw)
        values[~mask] = torch.nan
        return values

    return Features(
        audio=noise(SIZES["audio_width"]),
        text=noise(SIZES["text_width"]),
        audio_mask=torch.rand(shape, generator=draw) < present,
        text_mask=torch.rand(shape, generator=draw) < present,
        utterance_mask=mask,
        speaker=torch.randint(parties, shape, generator=draw),
    )


def turn(features: Features, b: int, t: int) -> Features:
    """One utterance, as the recogniser hands it to step: absent modalities are None."""
    return Features(
        audio=features.audio[b, t] if features.audio_mask[b, t] else None,
        text=features.text[b, t] if features.text_mask[b, t] else None,
        speaker=features.speaker[b, t],
    )


def stepped(network: Network, features: Features, b: int) -> Tensor:
    """Logits [U, C] of dialogue b, one utterance at a time."""
    state, logits = network.initial_state(), []
    for t in range(int(features.utterance_mask[b].sum())):
        one, state = network.step(turn(features, b, t), state)
        logits.append(one)
    return torch.stack(logits)


def changed(features: Features, t: int) -> Features:
    """The same dialogues with utterance t of each replaced by another, of another speaker."""

    def put(values: Tensor) -> Tensor:
        values = values.clone()
        values[:, t] = 3 - values[:, t]
        return values

    parts = {name: put(getattr(features, name)) for name in ("audio", "text", "speaker")}
    return replace(features, **parts)


# --- arithmetic ---------------------------------------------------------------------------------


def add(*vectors: Vector) -> Vector:
    return [sum(column) for column in zip(*vectors, strict=True)]


def times(x: Vector, y: Vector) -> Vector:
    return [p * q for p, q in zip(x, y, strict=True)]


def dot(x: Vector, y: Vector) -> float:
    return sum(times(x, y))


def product(weight: Tensor, x: Vector, bias: Tensor | None = None) -> Vector:
    rows = [dot(row, x) for row in weight.tolist()]
    return rows if bias is None else add(rows, bias.tolist())


def linear(layer: nn.Linear, x: Vector) -> Vector:
    return product(layer.weight, x, layer.bias)


def sigmoid(x: Vector) -> Vector:
    return [1 / (1 + math.exp(-v)) for v in x]


def tanh(x: Vector) -> Vector:
    return [math.tanh(v) for v in x]


def relu(x: Vector) -> Vector:
    return [max(v, 0.0) for v in x]


def weighed(scores: Vector, vectors: list[Vector], width: int) -> Vector:
    """The softmax of the scores, and the vectors' sum under it; zero of none."""
    total = sum(math.exp(v) for v in scores)
    parts = [
        [math.exp(v) / total * x for x in vector] for v, vector in zip(scores, vectors, strict=True)
    ]
    return add([0.0] * width, *parts)


def gru(cell: nn.Module, x: Vector, hidden: Vector, suffix: str = "") -> Vector:
    given = product(getattr(cell, f"weight_ih{suffix}"), x, getattr(cell, f"bias_ih{suffix}"))
    own = product(getattr(cell, f"weight_hh{suffix}"), hidden, getattr(cell, f"bias_hh{suffix}"))
    n = len(hidden)
    reset = sigmoid(add(given[:n], own[:n]))
    update = sigmoid(add(given[n : 2 * n], own[n : 2 * n]))
    new = tanh(add(given[2 * n :], times(reset, own[2 * n :])))
    return [(1 - z) * v + z * h for z, v, h in zip(update, new, hidden, strict=True)]


def lstm(layer: nn.LSTM, inputs: list[Vector], suffix: str) -> list[Vector]:
    size = layer.hidden_size
    hidden, cell, outputs = [0.0] * size, [0.0] * size, []
    for x in inputs:
        given = product(
            getattr(layer, f"weight_ih_{suffix}"), x, getattr(layer, f"bias_ih_{suffix}")
        )
        own = product(
            getattr(layer, f"weight_hh_{suffix}"), hidden, getattr(layer, f"bias_hh_{suffix}")
        )
        gates = add(given, own)
        i, f, g, o = (gates[k * size : (k + 1) * size] for k in range(4))
        cell = add(times(sigmoid(f), cell), times(sigmoid(i), tanh(g)))
        hidden = times(sigmoid(o), tanh(cell))
        outputs.append(hidden)
    return outputs


# --- the papers' equations ----------------------------------------------------------------------


def contextual(part: nn.Module, inputs: list[Vector]) -> list[Vector]:
    """bc-LSTM: an LSTM, one or both ways, and a dense layer."""
    said = lstm(part.lstm, inputs, "l0")
    if part.lstm.bidirectional:
        back = lstm(part.lstm, inputs[::-1], "l0_reverse")[::-1]
        said = [x + y for x, y in zip(said, back, strict=True)]
    return said if part.dense is None else [relu(linear(part.dense, x)) for x in said]


def bc_lstm(network: Network, audio: list[Vector], text: list[Vector], who: list[int]) -> list:
    streams = {"a": audio, "l": text}
    chosen = [streams[m] for m in network.config.modalities]
    if network.contexts:
        parts = zip(network.contexts.values(), chosen, strict=True)
        chosen = [contextual(part, stream) for part, stream in parts]
    fused = [[v for x in vectors for v in x] for vectors in zip(*chosen, strict=True)]
    if network.fusing is not None:
        fused = contextual(network.fusing, fused)
    return [linear(network.classifier, x) for x in fused]


def cmn(network: Network, audio: list[Vector], text: list[Vector], who: list[int]) -> list:
    config, logits = network.config, []
    spoken = [x + y for x, y in zip(audio, text, strict=True)]
    for t in range(len(spoken)):
        memories = []
        for name, history in network.histories.items():
            hidden, memory = [0.0] * config.hidden, []
            for i in range(max(0, t - config.memory), t):
                if (who[i] == who[t]) == (name == "own"):
                    hidden = gru(history.cell, spoken[i], hidden)
                    memory.append(hidden)
            memories.append(memory)
        query = tanh(linear(network.query, spoken[t]))
        for _ in range(config.hops):
            told = []
            for memory in memories:
                scores = [math.tanh(dot(query, m)) * config.use_attention for m in memory]
                told.append(weighed(scores, memory, config.hidden))
            query = tanh(add(query, *told))
        logits.append(linear(network.classifier, query))
    return logits


def one_way(part: nn.Module, config, spoken: list[Vector], who: list[int]) -> list[Vector]:
    """DialogueRNN in one direction: e of every turn."""
    zero = [0.0] * config.hidden
    parties = [zero] * PARTIES
    past, emotions, emotion = [], [], zero
    for utterance, s in zip(spoken, who if config.use_parties else [0] * len(who), strict=True):
        seen = past[-config.memory :] if config.mode == "live" else past
        scores = [dot(product(part.key.weight, utterance), g) for g in seen]
        context = weighed(scores, seen, config.hidden)
        before = parties[s]
        past.append(gru(part.whole, utterance + before, past[-1] if past else zero))
        speaking = gru(part.party, utterance + context, before)
        if config.use_listener:
            parties = [gru(part.listener, utterance + speaking, q) for q in parties]
        parties = [*parties[:s], speaking, *parties[s + 1 :]]
        emotion = gru(part.emotion, speaking, emotion, "_l0") if config.use_emotion else speaking
        emotions.append(emotion)
    return emotions


def dialogue_rnn(network: Network, audio: list[Vector], text: list[Vector], who: list[int]) -> list:
    config = network.config
    spoken = [x + y for x, y in zip(audio, text, strict=True)]
    emotions = one_way(network.forwards, config, spoken, who)
    if config.mode == "offline":
        back = one_way(network.backwards, config, spoken[::-1], who[::-1])[::-1]
        emotions = [x + y for x, y in zip(emotions, back, strict=True)]
    if config.mode == "offline" and config.use_attention:
        keys = [product(network.match.weight, e) for e in emotions]
        emotions = [weighed([dot(k, e) for e in emotions], emotions, len(k)) for k in keys]
    return [linear(network.classifier, relu(linear(network.dense, e))) for e in emotions]


@each(ALL)
def test_network_is_its_papers_equations(config) -> None:
    """Loops in float64, dialogue by dialogue, give the same logits to 1e-9."""
    network = ready(config).double()
    features = dialogues(7, 4, present=0.7)
    features = replace(features, audio=features.audio.double(), text=features.text.double())
    oracle = {BcLstm: bc_lstm, Cmn: cmn, DialogueRnn: dialogue_rnn}[type(network)]
    with torch.no_grad():
        logits, heard = network(features).logits, network.inputs(features)
        for b, length in enumerate((7, 4)):
            given = (part[b, :length].tolist() for part in (heard.audio, heard.text, heard.speaker))
            expected = torch.tensor(oracle(network, *given), dtype=torch.float64)
            torch.testing.assert_close(logits[b, :length], expected, atol=1e-9, rtol=0)


# --- time ---------------------------------------------------------------------------------------


@each(LIVE)
def test_step_of_each_utterance_equals_batch(config) -> None:
    """Stepping through a dialogue gives what forward gives for it in a batch, to 1e-5."""
    network, features = ready(config), dialogues(11, 6, present=0.6)
    with torch.no_grad():
        logits = network(features).logits
    for b, length in enumerate((11, 6)):
        ours = stepped(network, features, b)
        torch.testing.assert_close(ours, logits[b, :length], atol=1e-5, rtol=0)


@each(LIVE)
def test_streams_at_different_turns_go_on_as_each_alone(config) -> None:
    """Dialogues stepped together, each from its own turn, give what each gives by itself."""
    network, features = ready(config), dialogues(4, 4, 4, 4, present=0.5)
    states = [network.initial_state()]
    for b in range(1, 4):
        state = states[0]
        for t in range(b):
            _, state = network.step(turn(features, b, t), state)
        states.append(state)
    together = states[0].stack(states)
    now = replace(features, utterance_mask=None).map(lambda part: part[:, 3])
    logits, after = network.step(now, together)
    for b, state in enumerate(states):
        alone, next_state = network.step(turn(features, b, 3), state)
        torch.testing.assert_close(logits[b], alone, atol=1e-5, rtol=0)
        for name, part in next_state.tensors().items():
            torch.testing.assert_close(after.tensors()[name][b], part, atol=1e-5, rtol=0)


@each(LIVE)
@pytest.mark.parametrize("t", [1, 4, 8])
def test_live_output_never_depends_on_a_later_utterance(config, t: int) -> None:
    """Changing utterance t moves no output before t, not by a single bit, but t's own."""
    network, features = ready(config), dialogues(9, 9)
    with torch.no_grad():
        before, after = network(features).logits, network(changed(features, t)).logits
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


@each(OFFLINE)
def test_offline_output_sees_the_future(config) -> None:
    """The last utterance changes what is said of the first."""
    network, features = ready(config), dialogues(5)
    with torch.no_grad():
        before, after = network(features).logits, network(changed(features, 4)).logits
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("live", "offline"), [(SC, BC), (RNN, BI)], ids=["bc-lstm", "dialogue-rnn"]
)
def test_offline_network_refuses_to_listen(live, offline) -> None:
    """It has no state to begin with, and takes no other's."""
    network = ready(offline)
    for refused in (network.initial_state, lambda: network.blank(2)):
        with pytest.raises(ModelError, match="offline and sees the future"):
            refused()
    with pytest.raises(ModelError, match="offline and sees the future"):
        network.step(turn(dialogues(1), 0, 0), ready(live).initial_state())


@each(LIVE)
def test_state_keeps_its_size_and_is_left_alone(config) -> None:
    """The state of turn 200 has the bytes of turn 1's; a step doesn't change what it is given."""
    network, features = ready(config), dialogues(10)
    state, sizes = network.initial_state(), set()
    for t in range(200):
        kept = state.map(torch.clone)
        _, after = network.step(turn(features, 0, t % 10), state)
        assert state == kept
        state = after
        if t in (0, 199):
            buffer = io.BytesIO()
            torch.save(state.tensors(), buffer)
            held = sum(part.untyped_storage().nbytes() for part in state.tensors().values())
            sizes.add((len(buffer.getvalue()), held))
    assert len(sizes) == 1


def test_cmn_remembers_the_last_utterances_only() -> None:
    """An utterance K turns ago is heard, one of K + 1 turns ago is forgotten."""
    network, features = ready(CMN), dialogues(9, parties=1)
    text = features.text.clone()
    text[:, 1] += 1
    with torch.no_grad():
        moved = network(features).logits != network(replace(features, text=text)).logits
    assert moved[0].any(dim=-1).tolist() == [False] + [True] * (CMN.memory + 1) + [False] * 3


@pytest.mark.parametrize(
    "config", [CMN, RNN, BI], ids=lambda config: f"{config.kind}-{config.mode}"
)
def test_speakers_are_told_apart_by_who_speaks_not_by_number(config) -> None:
    """Other numbers for the same people change nothing; another person does."""
    network, features = ready(config), dialogues(8, parties=2)
    with torch.no_grad():
        logits = network(features).logits
        renamed = network(replace(features, speaker=5 - features.speaker)).logits
        alone = network(replace(features, speaker=None)).logits
    torch.testing.assert_close(logits, renamed, atol=1e-6, rtol=0)
    assert not torch.allclose(logits, alone, atol=1e-4)


# --- padding and absence ------------------------------------------------------------------------


@each(ALL)
def test_padding_never_changes_a_result(config) -> None:
    """A dialogue gives the same alone and padded in a batch, though the padding is NaN."""
    network, lengths = ready(config), (3, 9, 0, 6)
    features = dialogues(*lengths, present=0.7)
    with torch.no_grad():
        padded = network(features)
        for b, length in enumerate(lengths):
            assert torch.equal(padded.logits[b, length:], torch.zeros(9 - length, 3))
            if length:
                alone = network(features.map(lambda part, b=b, n=length: part[b : b + 1, :n]))
                for name in ("logits", "h_m"):
                    ours, theirs = getattr(padded, name), getattr(alone, name)
                    torch.testing.assert_close(ours[b, :length], theirs[0], atol=1e-5, rtol=0)


@each(ALL)
def test_absent_modality_is_never_read(config) -> None:
    """Whatever stands where a modality is absent, NaN included, changes nothing, gradients too."""
    network, clean = ready(config), dialogues(7, 4, present=0.5)
    dirty = replace(
        clean,
        audio=clean.audio.masked_fill(~clean.audio_mask[..., None], torch.nan),
        text=clean.text.masked_fill(~clean.text_mask[..., None], torch.nan),
    )
    results = []
    for features in (clean, dirty):
        network.zero_grad()
        logits = network(features).logits
        logits.square().sum().backward()
        grads = [w.grad.clone() for w in network.parameters() if w.grad is not None]
        results.append([logits.detach(), *grads])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()


@EACH_MAIN
@pytest.mark.parametrize("part", ["audio", "text"])
def test_modality_switched_off_changes_nothing(config, part: str) -> None:
    """Without its switch a modality can say what it likes; with it, it is heard."""
    features = dialogues(6)
    other = replace(features, **{part: getattr(features, part) + 1})
    with torch.no_grad():
        deaf, hearing = ready(replace(config, **{f"use_{part}": False})), ready(config)
        assert torch.equal(deaf(features).logits, deaf(other).logits)
        assert not torch.allclose(hearing(features).logits, hearing(other).logits, atol=1e-4)


# --- learning -----------------------------------------------------------------------------------


@EACH_MAIN
def test_gradients_reach_every_parameter(config) -> None:
    """Nothing is in the network that training could not change."""
    network = ready(config)
    network(dialogues(9, 6, present=0.6)).logits.square().sum().backward()
    idle = [n for n, w in network.named_parameters() if w.grad is None or not w.grad.any()]
    assert idle == []


@EACH_MAIN
def test_network_learns_what_only_context_tells(config) -> None:
    """Each utterance's label is what was said one turn before: guessing would cost 0.9."""
    torch.manual_seed(0)
    network = NETWORKS[type(config)](replace(config, hidden=16))
    said = torch.randint(3, (8, 6))
    labels = torch.cat([torch.zeros(8, 1, dtype=torch.long), said[:, :-1]], dim=1)
    text = nn.functional.pad(nn.functional.one_hot(said, 3).float(), (0, 2))
    features = Features(text=text, speaker=torch.arange(6).expand(8, 6) % 2)
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-2)
    for _ in range(80):
        loss = nn.functional.cross_entropy(network(features).logits.flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.4


@pytest.mark.parametrize(
    ("build", "wrong", "says"),
    [
        (CmnConfig, {"mode": "offline"}, "never looks ahead"),
        (CmnConfig, {"memory": 0}, "memory and hops"),
        (CmnConfig, {"hops": 0}, "memory and hops"),
        (CmnConfig, {"use_own": False, "use_others": False}, "use_own and use_others"),
        (DialogueRnnConfig, {"memory": 0}, "memory of dialogue-rnn"),
        (BcLstmConfig, {"use_audio": False, "use_text": False}, "both off"),
    ],
    ids=["cmn-offline", "cmn-memory", "cmn-hops", "cmn-histories", "rnn-memory", "bc-modalities"],
)
def test_configuration_that_cannot_be_is_refused(build, wrong: dict, says: str) -> None:
    """A mistake is told before anything is trained."""
    with pytest.raises(ConfigError, match=says):
        build(**wrong)

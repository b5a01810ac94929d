"""MGCMA: its forms a second time in float64 plain loops, and the network's promises."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks_kit import (
    both_present,
    dialogue,
    map_floats,
    output_of_pairs,
    randomised,
    tensor,
    utterances_at,
)
from oracle import (
    Sequence,
    Vector,
    add,
    attend_by_head,
    layer_norm,
    linear,
    mean,
    plain,
    relu,
    residual,
)
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.mgcma import MGCMA, MgcmaConfig
from stream_hbaf.networks.network import Features, Stateless
from stream_hbaf.networks.registry import Ensemble

SMALL = MgcmaConfig(audio_width=6, text_width=5, hidden=8, heads=2, layers=2, classes=3)

pytestmark = pytest.mark.usefixtures("one_thread")


def network(**switches: Any) -> MGCMA:
    return randomised(MGCMA(replace(SMALL, **switches)), seed=0, std=0.5)


def utterances(*lengths: int, speech: int = 7, text: int = 4, present: float = 1.0) -> Features:
    """Random dialogues of such lengths; each utterance has its own number of tokens, then NaN."""
    draw = torch.Generator().manual_seed(sum(lengths))
    shape = len(lengths), max(lengths)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]

    def tokens(most: int, width: int) -> Tensor:
        values = torch.randn(*shape, most, width, generator=draw, dtype=torch.float64)
        counts = torch.randint(1, most + 1, shape, generator=draw) * mask
        values[torch.arange(most) >= counts[..., None]] = torch.nan
        return values

    return Features(
        audio=tokens(speech, SMALL.audio_width),
        text=tokens(text, SMALL.text_width),
        audio_mask=torch.rand(shape, generator=draw) < present,
        text_mask=torch.rand(shape, generator=draw) < present,
        utterance_mask=mask,
    )


def utterance(features: Features, b: int, t: int) -> Features:
    """One utterance as the recogniser passes it to ``step``: its own tokens; absent: None."""

    def own(values: Tensor, mask: Tensor) -> Tensor | None:
        tokens = values[b, t]
        return tokens[~tokens[:, 0].isnan()] if bool(mask[b, t]) else None

    return Features(
        own(tensor(features.audio), tensor(features.audio_mask)),
        own(tensor(features.text), tensor(features.text_mask)),
    )


# --- the network in plain loops -----------------------------------------------------------------


def place(position: int, width: int) -> Vector:
    angles = [position / 10_000 ** (k / (width // 2)) for k in range(width // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def standardised(layer: Any, x: Vector) -> Vector:
    if isinstance(layer.standardise, nn.Identity):
        return x
    fitted = plain(layer.standardise.mean), plain(layer.standardise.deviation)
    return [(v - centre) / deviation for v, centre, deviation in zip(x, *fitted, strict=True)]


def project(layer: Any, rows: Sequence) -> Sequence:
    if not rows:
        return [plain(layer.absent)]
    placed = []
    for position, row in enumerate(rows):
        normed = layer_norm(layer.norm, linear(layer.linear, standardised(layer, row)))
        placed.append(add(normed, place(position, len(normed))))
    return placed


def attention(layer: Any, target: Sequence, source: Sequence) -> Sequence:
    """softmax(QKᵀ/√d) V of each head, one token at a time."""
    hidden = len(source[0])
    pairs = [linear(layer.key_value, token) for token in source]
    keys, values = [pair[:hidden] for pair in pairs], [pair[hidden:] for pair in pairs]
    return [
        attend_by_head(linear(layer.query, token), keys, values, heads=layer.heads)
        for token in target
    ]


def self_attention(layer: Any, rows: Sequence) -> Sequence:
    attended = attention(layer.attention, rows, rows)
    return [
        residual(layer.residual, row, linear(layer.out, mixed))
        for row, mixed in zip(rows, attended, strict=True)
    ]


def cross_attention(layer: Any, target: Sequence, source: Sequence) -> Vector:
    attended = attention(layer.attention, target, source)
    return residual(layer.residual, mean(target), linear(layer.out, mean(attended)))


def extract(extractor: Any, tokens: Tensor | None) -> Sequence:
    rows = project(extractor[0], [] if tokens is None else plain(tokens))
    for layer in extractor[1:]:
        rows = self_attention(layer, rows)
    return rows


def classify(classifier: Any, joined: Vector) -> Vector:
    return linear(classifier[4], relu(linear(classifier[1], joined)))


def oracle(net: Any, one: Features) -> dict[str, Vector]:
    """An utterance's logits and representations."""
    speech = extract(net.feature_extractor["a"], one.audio)
    text = extract(net.feature_extractor["l"], one.text)
    h_a, h_l = mean(speech), mean(text)
    joined = h_a + h_l
    if net.token_alignment is not None:
        joined = cross_attention(net.token_alignment.speech, speech, text)
        joined = joined + cross_attention(net.token_alignment.text, text, speech)
    return {"logits": classify(net.classifier, joined), "h_a": h_a, "h_l": h_l, "h_m": joined}


@pytest.mark.parametrize("switches", [{}, {"use_token_alignment": False}, {"layers": 0}], ids=str)
def test_forward_is_the_plain_loops(switches: dict[str, Any]) -> None:
    """Every part of the output, of utterances with few tokens, many and none, to 1e-9."""
    net, features = network(**switches), utterances(4, 3, present=0.6)
    net.standardise(3.0 + 2.0 * torch.randn(50, SMALL.text_width))
    with torch.no_grad():
        output = net(features)
    for b, length in enumerate((4, 3)):
        for t in range(length):
            for part, expected in oracle(net, utterance(features, b, t)).items():
                ours = getattr(output, part)[b, t]
                assert ours.tolist() == pytest.approx(expected, abs=1e-9)


# --- tokens, absences, padding ------------------------------------------------------------------


def test_forward_never_uses_rows_without_a_token() -> None:
    """More rows of NaN change nothing, nor does anything in padding."""
    net, features = network(), utterances(4, 2, present=0.7)

    def wider(values: Tensor) -> Tensor:
        more = values.new_full((*values.shape[:2], 5, values.shape[-1]), torch.nan)
        values = torch.cat([values, more], dim=2)
        values[~tensor(features.utterance_mask)] = 7.0  # padding may hold anything
        return values

    padded = replace(
        features, audio=wider(tensor(features.audio)), text=wider(tensor(features.text))
    )
    with torch.no_grad():
        torch.testing.assert_close(net(padded).logits, net(features).logits, atol=1e-12, rtol=0)


def test_forward_of_a_dialogue_is_the_same_in_any_batch() -> None:
    """Longer dialogues and longer utterances in the batch change nothing."""
    net, features = network(), utterances(3, 9)
    with torch.no_grad():
        batch, alone = net(features), net(dialogue(features, 0, 3))
    torch.testing.assert_close(batch.logits[:1, :3], alone.logits, atol=1e-12, rtol=0)
    for part in ("logits", "h_a", "h_l", "h_m"):
        assert not getattr(batch, part)[0, 3:].any()


@pytest.mark.parametrize("part", ["audio", "text", "audio_mask", "text_mask"])
def test_output_of_an_utterance_depends_on_itself_alone(part: str) -> None:
    """Changing one utterance moves its own logits and no other's.

    A mask changes how many tokens the batch holds, and some processors round a product of
    another size otherwise: there the others' logits agree to 1e-12, else to the last bit.
    """
    net, features = network(), utterances(6, 6, speech=3)
    values = getattr(features, part).clone()
    values[0, 2] = ~values[0, 2] if values.dtype == torch.bool else 3 - values[0, 2]
    with torch.no_grad():
        moved = (net(features).logits - net(replace(features, **{part: values})).logits).abs()
    assert moved[0, 2].max() > 1e-6
    moved[0, 2] = 0.0
    assert moved.max() <= (1e-12 if values.dtype == torch.bool else 0.0)


def test_forward_depends_on_the_order_of_tokens() -> None:
    """Speech tokens in reverse order give another result, and so do text tokens."""
    torch.manual_seed(0)
    net, features = MGCMA(SMALL).double().eval(), utterances(1)
    audio, text = (
        part[~part[..., 0].isnan()] for part in (tensor(features.audio), tensor(features.text))
    )
    assert min(len(audio), len(text)) > 1
    with torch.no_grad():
        logits = net(Features(audio[None, None], text[None, None])).logits
        for reverse in ((audio.flip(0), text), (audio, text.flip(0))):
            other = net(Features(*(part[None, None] for part in reverse))).logits
            assert (logits - other).abs().max() > 1e-3


def test_missing_value_of_a_token_is_zero() -> None:
    """NaN in one place of a token counts as zero there; the token stays."""
    net, features = network(), utterances(2)
    audio = tensor(features.audio).clone()
    audio[:, :, 0, 2] = torch.nan
    with torch.no_grad():
        missing = net(replace(features, audio=audio)).logits
        audio[:, :, 0, 2] = 0.0
        assert torch.equal(missing, net(replace(features, audio=audio)).logits)


ABSENCES: dict[str, Callable[[Features], Features]] = {
    "masked out": lambda f: replace(f, text_mask=torch.zeros_like(tensor(f.text_mask))),
    "not given": lambda f: replace(f, text=None),
    "without tokens": lambda f: replace(f, text=torch.full_like(tensor(f.text), torch.nan)),
    "no columns": lambda f: replace(f, text=tensor(f.text)[:, :, :0]),
}


@pytest.mark.parametrize("absence", ABSENCES.values(), ids=ABSENCES)
def test_absent_text_is_the_learned_token(absence: Callable[[Features], Features]) -> None:
    """However text is missing, its learned token stands there; speech stays as it is."""
    net, features = network(layers=0), utterances(3)
    with torch.no_grad():
        output, whole = net(absence(features)), net(features)
    absent = net.get_parameter("feature_extractor.l.0.absent").expand(1, 3, -1)
    torch.testing.assert_close(output.h_l, absent, atol=1e-12, rtol=0)
    torch.testing.assert_close(output.h_a, whole.h_a, atol=1e-12, rtol=0)


def test_forward_without_any_mask_takes_every_utterance() -> None:
    """The mask is that of the tokens' utterances: [B, U], not [B, U, F]."""
    net, features = network(), utterances(3, 3)
    masked = replace(features, utterance_mask=torch.ones(2, 3, dtype=torch.bool))
    with torch.no_grad():
        bare = net(Features(features.audio, features.text)).logits
        assert torch.equal(bare, net(masked).logits)
        assert torch.equal(
            net(Features(features.audio)).logits, net(replace(masked, text=None)).logits
        )


def test_forward_of_no_utterance_is_empty() -> None:
    """A batch of nothing but padding gives zeros."""
    features = utterances(2)
    padding = replace(features, utterance_mask=torch.zeros(1, 2, dtype=torch.bool))
    assert not network()(padding).logits.any()


def test_standardise_fits_the_rows_with_a_token() -> None:
    """Mean and deviation of the tokens; rows of NaN are left out."""
    net, features = MGCMA(SMALL), utterances(5, 5)
    text = tensor(features.text).float()
    net.standardise(text)
    tokens = text[~text[..., 0].isnan()]
    fitted = [
        net.get_buffer(f"feature_extractor.l.0.standardise.{n}") for n in ("mean", "deviation")
    ]
    torch.testing.assert_close(fitted[0], tokens.mean(dim=0))
    torch.testing.assert_close(fitted[1], tokens.std(dim=0, correction=0))


# --- stepping -----------------------------------------------------------------------------------


STEPPED: list[dict[str, Any]] = [
    {},
    {"use_audio": False},
    {"use_text": False},
    {"use_token_alignment": False},
]


@pytest.mark.parametrize("switches", STEPPED, ids=str)
def test_step_of_each_utterance_equals_batch(switches: dict[str, Any]) -> None:
    """Each utterance alone gives what it gives in a batch, in float32, absences included."""
    net, features = network(**switches).float(), utterances(9, 5, present=0.7)
    features = map_floats(features, Tensor.float)
    with torch.no_grad():
        logits = net(features).logits
    state = net.initial_state()
    for b, length in enumerate((9, 5)):
        for t in range(length):
            one, after = net.step(utterance(features, b, t), state)
            assert after == state
            torch.testing.assert_close(one, logits[b, t], atol=1e-5, rtol=0)


def test_step_of_many_streams_equals_each_alone() -> None:
    """S streams stepped together give what each gives by itself; the state is empty."""
    net, features = network(), utterances(1, 1, 1, present=0.6)
    together, after = net.step(utterances_at(features, 0), net.initial_state(3))
    assert after == Stateless(torch.zeros(3, 0, dtype=torch.float64))
    for b in range(3):
        alone, _ = net.step(utterance(features, b, 0), net.initial_state())
        torch.testing.assert_close(together[b], alone, atol=1e-12, rtol=0)


def test_step_of_an_ensemble_is_of_the_mean_probability() -> None:
    """Two MGCMAs as one network, one dialogue and several streams."""
    members = [randomised(MGCMA(SMALL), seed=seed) for seed in (1, 2)]
    both, features = Ensemble(members), utterances(1, 1)
    now = utterances_at(features, 0)
    logits, after = both.step(now, both.initial_state(2))
    shares = [member.step(now, member.initial_state(2))[0].softmax(-1) for member in members]
    torch.testing.assert_close(logits.softmax(-1), (shares[0] + shares[1]) / 2)
    assert after.shape == (2, 2)
    one, _ = both.step(utterance(features, 1, 0), both.initial_state())
    torch.testing.assert_close(one, logits[1])


# --- switches -----------------------------------------------------------------------------------


PARTS = {
    "use_audio": "feature_extractor.a token_alignment",
    "use_text": "feature_extractor.l token_alignment",
    "use_token_alignment": "token_alignment",
    "use_distribution_alignment": "criterion.distribution",
    "use_instance_alignment": "criterion.instance",
}


def weights(net: MGCMA) -> set[str]:
    """The names of the network's weights and of its criterion's."""
    criterion = net.criterion()
    beside = {} if criterion is None else criterion.state_dict()
    return set(net.state_dict()) | {f"criterion.{name}" for name in beside}


@pytest.mark.parametrize("switch", PARTS)
def test_switch_off_takes_exactly_its_part_away(switch: str) -> None:
    """Only the weights of the named part are missing, and the network runs."""
    whole, less = network(), network(**{switch: False})
    named = PARTS[switch].split()
    if switch in ("use_audio", "use_text"):
        named.append("criterion")  # of one modality there is nothing to align
    assert weights(whole) - weights(less) == {
        name for name in weights(whole) if name.startswith(tuple(named))
    }
    with torch.no_grad():
        output = less(utterances(5, 3, present=0.8))
    assert output.logits.isfinite().all()
    assert (output.h_a is None) == (switch == "use_audio")
    assert (output.h_l is None) == (switch == "use_text")


def test_switches_of_both_losses_off_leave_no_criterion() -> None:
    """Cross entropy is all there is then."""
    assert (
        network(use_distribution_alignment=False, use_instance_alignment=False).criterion() is None
    )


def test_criterion_is_of_the_configuration() -> None:
    """Weights, temperature and the supervised switch are the configuration's."""
    criterion: Any = network(
        distribution=0.2, instance=0.5, supervised=True, temperature=0.3
    ).criterion()
    assert criterion.weights == {"distribution": 0.2, "instance": 0.5}
    assert criterion.supervised is True
    assert criterion.instance.temperature == 0.3
    assert criterion.distribution.log_scale.exp().item() == pytest.approx(1 / 0.3)


@pytest.mark.parametrize("left", ["distribution", "instance"])
def test_criterion_of_one_loss_is_its_term_of_both(left: str) -> None:
    """The loss that stays keeps its weight."""
    output, mask, labels = output_of_pairs(hidden=8)
    whole: Any = network(distribution=0.2, instance=0.5).criterion()
    other = {"distribution": "instance", "instance": "distribution"}[left]
    switch = {f"use_{other}_alignment": False}
    part: Any = network(distribution=0.2, instance=0.5, **switch).criterion()
    part.double().load_state_dict(whole.double().state_dict(), strict=False)
    whole.weights[other] = 0.0
    losses = [criterion(output, mask, labels).item() for criterion in (part, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


@pytest.mark.parametrize(
    ("switches", "complaint"),
    [
        ({"mode": "offline"}, "its mode is live"),
        ({"use_audio": False, "use_text": False}, "both off"),
        ({"hidden": 10, "heads": 4}, "must divide"),
        ({"temperature": 0.0}, "above 0"),
        ({"instance": -0.1}, "weights distribution and instance"),
    ],
)
def test_config_that_cannot_be_built_is_refused(switches: dict[str, Any], complaint: str) -> None:
    """The error names the setting and what it may be."""
    with pytest.raises(ConfigError, match=complaint):
        replace(SMALL, **switches)


def test_config_takes_tokens() -> None:
    """Feature extraction sees in the configuration that this network takes tokens."""
    assert SMALL.takes_tokens is True


def test_network_is_small_enough_to_ship() -> None:
    """At its usual size, fewer than 1.5 million parameters, the criterion's not among them."""
    usual = MGCMA(MgcmaConfig(audio_width=65))
    assert sum(weight.numel() for weight in usual.parameters()) == 490_631


# --- learning -----------------------------------------------------------------------------------


def test_gradient_reaches_every_parameter_and_none_is_nan() -> None:
    """Of the network and of the criterion, from a batch with absences and tokens of NaN."""
    net, features = network(dropout=0.0).train(), utterances(6, 4, present=0.7)
    criterion: Any = net.criterion()
    output, mask = net(features), both_present(features)
    labels = torch.randint(0, 3, mask.shape)
    loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    (loss + criterion.double()(output, mask, labels)).backward()
    for module in (net, criterion):
        for name, weight in module.named_parameters():
            assert tensor(weight.grad).isfinite().all(), name
            assert tensor(weight.grad).any(), name


def signed(count: int, seed: int) -> tuple[Features, Tensor]:
    """One token of speech and one of text have a sign; the label is whether the signs agree.

    All other tokens are noise; the signed ones stand anywhere.
    """
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (2, count), generator=draw)
    parts = []
    for sign, most, width in zip(signs, (5, 3), (SMALL.audio_width, SMALL.text_width), strict=True):
        tokens = 0.3 * torch.randn(count, most, width, generator=draw)
        lengths = torch.randint(1, most + 1, (count,), generator=draw)
        place = (torch.rand(count, generator=draw) * lengths).long()
        tokens[torch.arange(count), place, 0] += 4.0 * sign - 2.0
        tokens[torch.arange(most) >= lengths[:, None]] = torch.nan
        parts.append(tokens[None])
    return Features(*parts), (signs[0] == signs[1]).long()


def accuracy(**switches: Any) -> float:
    """Accuracy on new utterances after training on ``signed`` ones."""
    torch.manual_seed(0)
    net = MGCMA(replace(SMALL, hidden=16, layers=1, classes=2, dropout=0.0, **switches))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    features, labels = signed(128, 1)
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(features).logits[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, labels = signed(400, 2)
    with torch.no_grad():
        return float((net(features).logits[0].argmax(-1) == labels).double().mean())


def test_network_learns_what_only_both_modalities_show() -> None:
    """Whether the signs of speech and text agree: chance for either modality alone."""
    assert accuracy() > 0.95
    assert accuracy(use_token_alignment=False) > 0.95
    assert accuracy(use_audio=False) < 0.62
    assert accuracy(use_text=False) < 0.62


def test_network_trains_with_its_criterion() -> None:
    """All three losses together: eight utterances are learned, and the alignment losses fall."""
    torch.manual_seed(0)
    net = MGCMA(replace(SMALL, hidden=16, dropout=0.0))
    criterion: Any = net.criterion()
    features, labels = signed(8, 3)
    labels, mask = labels[None], torch.ones(1, 8, dtype=torch.bool)
    optimizer = torch.optim.Adam([*net.parameters(), *criterion.parameters()], lr=1e-2)
    alignment = []
    for _ in range(60):
        output = net(features)
        alignment.append(criterion(output, mask, labels))
        entropy = nn.functional.cross_entropy(output.logits[0], labels[0])
        optimizer.zero_grad()
        (entropy + alignment[-1]).backward()
        optimizer.step()
    assert entropy.item() < 0.05
    assert alignment[-1].item() < alignment[0].item() / 5

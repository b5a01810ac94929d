"""MGCMA: its forms a second time in float64 plain loops, and the network's promises."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stream_hbaf.errors import ConfigError
from stream_hbaf.networks.ensemble import Ensemble
from stream_hbaf.networks.mgcma import MGCMA, MgcmaConfig
from stream_hbaf.networks.network import Output
from stream_hbaf.networks.state import Features, Stateless

SMALL = MgcmaConfig(audio_width=6, text_width=5, hidden=8, heads=2, layers=2, classes=3)

Vector = list[float]


pytestmark = pytest.mark.usefixtures("one_thread")


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Ready to predict, in float64; every weight drawn, those that start at zero or one too."""
    torch.manual_seed(seed)
    module.double().eval()
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.5)
    return module


def network(**switches) -> MGCMA:
    return randomised(MGCMA(replace(SMALL, **switches)))


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


def turn(features: Features, b: int, t: int) -> Features:
    """One utterance, as the recogniser hands it to step: its own tokens; absent ones are None."""

    def own(values: Tensor, mask: Tensor) -> Tensor | None:
        tokens = values[b, t]
        return tokens[~tokens[:, 0].isnan()] if bool(mask[b, t]) else None

    return Features(
        own(features.audio, features.audio_mask), own(features.text, features.text_mask)
    )


# --- the network in plain loops -----------------------------------------------------------------


def linear(layer: nn.Linear, x: Vector) -> Vector:
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + bias for row, bias in rows]


def layer_norm(layer: nn.LayerNorm, x: Vector) -> Vector:
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    weights = zip(x, layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [(v - mean) / deviation * w + b for v, w, b in weights]


def add(x: Vector, y: Vector) -> Vector:
    return [p + q for p, q in zip(x, y, strict=True)]


def mean(rows: list[Vector]) -> Vector:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def relu(x: Vector) -> Vector:
    return [max(v, 0.0) for v in x]


def place(position: int, width: int) -> Vector:
    angles = [position / 10_000 ** (k / (width // 2)) for k in range(width // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def standardised(layer: nn.Module, x: Vector) -> Vector:
    if isinstance(layer.standardise, nn.Identity):
        return x
    known = layer.standardise.mean.tolist(), layer.standardise.deviation.tolist()
    return [(v - mean) / deviation for v, mean, deviation in zip(x, *known, strict=True)]


def project(layer: nn.Module, rows: list[Vector]) -> list[Vector]:
    if not rows:
        return [layer.absent.tolist()]
    placed = []
    for position, row in enumerate(rows):
        normed = layer_norm(layer.norm, linear(layer.linear, standardised(layer, row)))
        placed.append(add(normed, place(position, len(normed))))
    return placed


def attend(layer: nn.Module, asking: list[Vector], told: list[Vector]) -> list[Vector]:
    """softmax(QKᵀ/√d) V of each head, one token at a time."""
    results = []
    for row in asking:
        query, mixed = linear(layer.query, row), []
        pairs = [linear(layer.key_value, other) for other in told]
        hidden, size = len(row), len(row) // layer.heads
        for head in range(layer.heads):
            own = range(head * size, (head + 1) * size)
            scores = [sum(query[k] * pair[k] for k in own) / math.sqrt(size) for pair in pairs]
            total = sum(math.exp(score) for score in scores)
            shares = [math.exp(score) / total for score in scores]
            for k in own:
                values = [pair[hidden + k] for pair in pairs]
                mixed.append(sum(s * v for s, v in zip(shares, values, strict=True)))
        results.append(mixed)
    return results


def residual(layer: nn.Module, before: Vector, attended: Vector) -> Vector:
    normed = layer_norm(layer.norm, add(before, attended))
    inner = relu(linear(layer.feed_forward[0], normed))
    return layer_norm(layer.add_norm, add(normed, linear(layer.feed_forward[3], inner)))


def self_attention(layer: nn.Module, rows: list[Vector]) -> list[Vector]:
    attended = attend(layer.attention, rows, rows)
    return [
        residual(layer.residual, row, linear(layer.out, told))
        for row, told in zip(rows, attended, strict=True)
    ]


def cross_attention(layer: nn.Module, asking: list[Vector], told: list[Vector]) -> Vector:
    attended = attend(layer.attention, asking, told)
    return residual(layer.residual, mean(asking), linear(layer.out, mean(attended)))


def extract(extractor: nn.Sequential, tokens: Tensor | None) -> list[Vector]:
    rows = project(extractor[0], [] if tokens is None else tokens.tolist())
    for layer in extractor[1:]:
        rows = self_attention(layer, rows)
    return rows


def classify(classifier: nn.Sequential, joined: Vector) -> Vector:
    return linear(classifier[4], relu(linear(classifier[1], joined)))


def oracle(net: MGCMA, one: Features) -> dict[str, Vector]:
    """An utterance's logits, h_a and h_l."""
    speech = extract(net.feature_extractor["a"], one.audio)
    text = extract(net.feature_extractor["l"], one.text)
    h_a, h_l = mean(speech), mean(text)
    joined = h_a + h_l
    if net.token_alignment is not None:
        joined = cross_attention(net.token_alignment.speech, speech, text)
        joined = joined + cross_attention(net.token_alignment.text, text, speech)
    return {"logits": classify(net.classifier, joined), "h_a": h_a, "h_l": h_l, "h_m": joined}


@pytest.mark.parametrize("switches", [{}, {"use_token_alignment": False}, {"layers": 0}], ids=str)
def test_forward_is_the_plain_loops(switches: dict) -> None:
    """Every part of the output, of utterances with few tokens, many and none, to 1e-9."""
    net, features = network(**switches), utterances(4, 3, present=0.6)
    net.standardise(3.0 + 2.0 * torch.randn(50, SMALL.text_width))
    with torch.no_grad():
        output = net(features)
    for b, length in enumerate((4, 3)):
        for t in range(length):
            for part, expected in oracle(net, turn(features, b, t)).items():
                ours = getattr(output, part)[b, t]
                assert ours.tolist() == pytest.approx(expected, abs=1e-9)


def pairs(count: int = 6, hidden: int = 4) -> tuple[Output, Tensor, Tensor]:
    """An output of one dialogue, the utterances to compare (not the first), and labels."""
    torch.manual_seed(7)
    h_a, h_l = torch.randn(2, 1, count, hidden, dtype=torch.float64)
    mask = torch.ones(1, count, dtype=torch.bool)
    mask[0, 0] = False
    labels = torch.tensor([[0, 1, 2, 1, -1, -1, 2, 0][:count]])
    return (
        Output(h_a.new_zeros(1, count, 3), h_a.requires_grad_(), h_l.requires_grad_()),
        mask,
        labels,
    )


# --- tokens, absences, padding ------------------------------------------------------------------


def test_forward_never_reads_what_is_no_token() -> None:
    """More rows of NaN change nothing, and a column that only padding or absences use is cut."""
    net, features = network(), utterances(4, 2, present=0.7)

    def wider(values: Tensor) -> Tensor:
        more = values.new_full((*values.shape[:2], 5, values.shape[-1]), torch.nan)
        values = torch.cat([values, more], dim=2)
        values[~features.utterance_mask] = 7.0  # padding may hold anything
        return values

    theirs = replace(features, audio=wider(features.audio), text=wider(features.text))
    with torch.no_grad():
        torch.testing.assert_close(net(theirs).logits, net(features).logits, atol=1e-12, rtol=0)


def test_forward_of_a_dialogue_is_the_same_in_any_batch() -> None:
    """Longer dialogues beside it, and longer utterances, move nothing."""
    net, features = network(), utterances(3, 9)
    alone = features.map(lambda part: part[:1, :3])
    alone = replace(alone, audio=alone.audio[:, :, :7], text=alone.text[:, :, :4])
    with torch.no_grad():
        ours, theirs = net(features), net(alone)
    torch.testing.assert_close(ours.logits[:1, :3], theirs.logits, atol=1e-12, rtol=0)
    for part in ("logits", "h_a", "h_l", "h_m"):
        assert not getattr(ours, part)[0, 3:].any()


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


def test_forward_hears_the_order_of_tokens() -> None:
    """The same speech tokens the other way round are another utterance; so are the text's."""
    torch.manual_seed(0)
    net, features = MGCMA(SMALL).double().eval(), utterances(1)
    audio, text = (part[~part[..., 0].isnan()] for part in (features.audio, features.text))
    assert min(len(audio), len(text)) > 1
    with torch.no_grad():
        logits = net(Features(audio[None, None], text[None, None])).logits
        for turned in ((audio.flip(0), text), (audio, text.flip(0))):
            theirs = net(Features(*(part[None, None] for part in turned))).logits
            assert (logits - theirs).abs().max() > 1e-3


def test_token_that_lacks_a_measurement_has_the_usual_one() -> None:
    """NaN in one place of a token is zero there; the token stays."""
    net, features = network(), utterances(2)
    audio = features.audio.clone()
    audio[:, :, 0, 2] = torch.nan
    with torch.no_grad():
        lacking = net(replace(features, audio=audio)).logits
        audio[:, :, 0, 2] = 0.0
        assert torch.equal(lacking, net(replace(features, audio=audio)).logits)


ABSENCES = [
    ("masked out", lambda f: replace(f, text_mask=torch.zeros_like(f.text_mask))),
    ("not given", lambda f: replace(f, text=None)),
    ("without tokens", lambda f: replace(f, text=torch.full_like(f.text, torch.nan))),
    ("no columns", lambda f: replace(f, text=f.text[:, :, :0])),
]


@pytest.mark.parametrize(
    "absence", [change for _, change in ABSENCES], ids=[n for n, _ in ABSENCES]
)
def test_absent_text_is_the_learned_token(absence) -> None:
    """However text is missing, its learned token stands there, and speech is heard still."""
    net, features = network(layers=0), utterances(3)
    with torch.no_grad():
        output = net(absence(features))
        h_a = net(features).h_a
    absent = net.feature_extractor["l"][0].absent.expand(1, 3, -1)
    torch.testing.assert_close(output.h_l, absent, atol=1e-12, rtol=0)
    torch.testing.assert_close(output.h_a, h_a, atol=1e-12, rtol=0)


def test_forward_without_any_mask_takes_every_utterance() -> None:
    """Tokens alone say what is there: [B, U], not [B, U, F]."""
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
    nobody = replace(features, utterance_mask=torch.zeros(1, 2, dtype=torch.bool))
    assert not network()(nobody).logits.any()


def test_standardise_takes_tokens_and_not_what_is_none() -> None:
    """Mean and deviation of the rows that are tokens, NaN rows left out."""
    net, features = MGCMA(SMALL), utterances(5, 5)
    net.standardise(features.text.float())
    known = features.text[~features.text[..., 0].isnan()].float()
    standard = net.feature_extractor["l"][0].standardise
    torch.testing.assert_close(standard.mean, known.mean(dim=0))
    torch.testing.assert_close(standard.deviation, known.std(dim=0, correction=0))


# --- stepping -----------------------------------------------------------------------------------


STEPPED = [{}, {"use_audio": False}, {"use_text": False}, {"use_token_alignment": False}]


@pytest.mark.parametrize("switches", STEPPED, ids=str)
def test_step_of_each_utterance_equals_batch(switches: dict) -> None:
    """What was trained in batches is what the live recogniser runs, in float32, absences too."""
    net, features = network(**switches).float(), utterances(9, 5, present=0.7)
    features = features.map(lambda part: part.float() if part.is_floating_point() else part)
    with torch.no_grad():
        logits = net(features).logits
    state = net.initial_state()
    for b, length in enumerate((9, 5)):
        for t in range(length):
            one, after = net.step(turn(features, b, t), state)
            assert after == state
            torch.testing.assert_close(one, logits[b, t], atol=1e-5, rtol=0)


def test_step_of_many_streams_equals_each_alone() -> None:
    """S streams stepped together give what each gives by itself; nothing is remembered of them."""
    net, features = network(), utterances(1, 1, 1, present=0.6)
    now = replace(features, utterance_mask=None).map(lambda part: part[:, 0])
    together, after = net.step(now, net.initial_state(3))
    assert after == Stateless(torch.zeros(3, 0, dtype=torch.float64))
    for b in range(3):
        alone, _ = net.step(turn(features, b, 0), net.initial_state())
        torch.testing.assert_close(together[b], alone, atol=1e-12, rtol=0)


def test_step_of_an_ensemble_is_of_the_mean_probability() -> None:
    """Two of it are one network, alone and over streams."""
    members = [randomised(MGCMA(SMALL), seed) for seed in (1, 2)]
    both, features = Ensemble(members), utterances(1, 1)
    now = replace(features, utterance_mask=None).map(lambda part: part[:, 0])
    logits, after = both.step(now, both.initial_state(2))
    shares = [member.step(now, member.initial_state(2))[0].softmax(-1) for member in members]
    torch.testing.assert_close(logits.softmax(-1), (shares[0] + shares[1]) / 2)
    assert after.shape == (2, 2)
    one, _ = both.step(turn(features, 1, 0), both.initial_state())
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
    """The weights that go are those of the part that is named, and the network still runs."""
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
    """Weights, temperature and the supervised switch are those that the recipe names."""
    criterion = network(
        distribution=0.2, instance=0.5, supervised=True, temperature=0.3
    ).criterion()
    assert criterion.weights == {"distribution": 0.2, "instance": 0.5}
    assert criterion.supervised is True
    assert criterion.instance.temperature == 0.3
    assert criterion.distribution.log_scale.exp().item() == pytest.approx(1 / 0.3)


@pytest.mark.parametrize("left", ["distribution", "instance"])
def test_criterion_of_one_loss_is_its_share_of_both(left: str) -> None:
    """What is left weighs what it weighed."""
    output, mask, labels = pairs(hidden=8)
    whole = network(distribution=0.2, instance=0.5).criterion().double()
    other = {"distribution": "instance", "instance": "distribution"}[left]
    part = network(distribution=0.2, instance=0.5, **{f"use_{other}_alignment": False}).criterion()
    part.double().load_state_dict(whole.state_dict(), strict=False)
    whole.weights[other] = 0.0
    ours, theirs = (criterion(output, mask, labels).item() for criterion in (part, whole))
    assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize(
    ("switches", "complaint"),
    [
        ({"mode": "offline"}, "its mode is live"),
        ({"use_audio": False, "use_text": False}, "both off"),
        ({"hidden": 10, "heads": 4}, "must divide"),
        ({"temperature": 0.0}, "above 0"),
        ({"instance": -0.1}, "weights"),
    ],
)
def test_config_that_cannot_be_built_is_refused(switches: dict, complaint: str) -> None:
    """The error names the setting and what it may be."""
    with pytest.raises(ConfigError, match=complaint):
        replace(SMALL, **switches)


def test_config_takes_tokens() -> None:
    """Whoever extracts features learns from it that this network takes tokens."""
    assert SMALL.takes_tokens is True


def test_network_is_small_enough_to_ship() -> None:
    """At its usual size, fewer than 1.5 million parameters, the criterion's not among them."""
    usual = MGCMA(MgcmaConfig(audio_width=65))
    assert sum(weight.numel() for weight in usual.parameters()) == 490_631


# --- learning -----------------------------------------------------------------------------------


def test_gradient_reaches_every_parameter_and_none_is_nan() -> None:
    """Of the network and of the criterion, from a batch with absences and tokens of NaN."""
    net, features = network(dropout=0.0).train(), utterances(6, 4, present=0.7)
    criterion = net.criterion().double()
    output = net(features)
    mask = features.utterance_mask & features.audio_mask & features.text_mask
    labels = torch.randint(0, 3, mask.shape)
    loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    (loss + criterion(output, mask, labels)).backward()
    for module in (net, criterion):
        for name, weight in module.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name
            assert weight.grad.abs().sum() > 0, name


def marked(count: int, seed: int) -> tuple[Features, Tensor]:
    """One token of speech and one of text are marked, up or down; the label: whether they agree.

    All other tokens are noise, marked ones stand anywhere.
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


def learned(**switches) -> float:
    """Share of new utterances that are told right after training on the marked ones."""
    torch.manual_seed(0)
    net = MGCMA(replace(SMALL, hidden=16, layers=1, classes=2, dropout=0.0, **switches))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    features, labels = marked(128, 1)
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(features).logits[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, labels = marked(400, 2)
    with torch.no_grad():
        return (net(features).logits[0].argmax(-1) == labels).double().mean().item()


def test_network_learns_what_only_both_modalities_tell() -> None:
    """Whether a speech token and a text token agree; either modality alone is chance."""
    assert learned() > 0.95
    assert learned(use_token_alignment=False) > 0.95
    assert learned(use_audio=False) < 0.62
    assert learned(use_text=False) < 0.62


def test_network_trains_with_its_criterion() -> None:
    """All three parts of the loss together: eight utterances are learned, and their pairs told."""
    torch.manual_seed(0)
    net = MGCMA(replace(SMALL, hidden=16, dropout=0.0))
    criterion = net.criterion()
    features, labels = marked(8, 3)
    labels, mask = labels[None], torch.ones(1, 8, dtype=torch.bool)
    optimizer = torch.optim.Adam([*net.parameters(), *criterion.parameters()], lr=1e-2)
    beside = []
    for _ in range(60):
        output = net(features)
        beside.append(criterion(output, mask, labels))
        told = nn.functional.cross_entropy(output.logits[0], labels[0])
        optimizer.zero_grad()
        (told + beside[-1]).backward()
        optimizer.step()
    assert told.item() < 0.05
    assert beside[-1].item() < beside[0].item() / 5

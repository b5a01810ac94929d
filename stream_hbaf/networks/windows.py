"""Padding, windows and grouping: how HBAF computes a batch of dialogues fast.

The modules in hbaf.py see sequences of utterances, as in the paper, and neither padding nor masks
over time. Here padding is taken out before and put back after them, utterances that are seen in
windows of one length are computed together, and GRUs side by side. Letters as in hbaf.py;
V utterances of a batch that aren't padding, P places of a padded sequence, Q targets of a window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_hbaf.networks.network import PARTIES
from stream_hbaf.networks.stacked import gru_cell

FEW = 8  # windows that are compared with each other: those of a step that is explained
ByModality = Mapping[str, Tensor]  # by modality: "a" audio, "l" text


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows in which U new utterances of B dialogues are seen, in groups of one length.

    A group has N windows of n utterances, as rows of the sequences [B · P, ..], so that one
    window's result can't depend on what else is in the batch. There is at least one group; in a
    batch without utterances it has no window.
    """

    shape: torch.Size  # (B, U)
    groups: tuple[Tensor, ...]  # each [N, n] int64
    targets_of_all: Tensor  # [ΣNQ] int64, rows of [B · U, ..], in the order of the groups
    every: bool  # whether each utterance of a window is a target, or its last one alone

    @classmethod
    def live(cls, window_mask: Tensor, mask: Tensor, *, members: int = 1) -> "Windows":
        """For each utterance of ``mask`` [B, U] its window, itself the last and only target.

        ``window_mask`` [B, W-1] is of the utterances before, unused slots first; P = W-1 + U.
        With several ``members``, side by side in B, targets are in the order of the members.
        """
        slots = window_mask.shape[1]
        dialogue, turn = mask.nonzero(as_tuple=True)
        lengths = (window_mask.sum(dim=1)[dialogue] + turn + 1).clamp_max(slots + 1)
        ends = dialogue * (slots + mask.shape[1]) + slots + turn
        targets = dialogue * mask.shape[1] + turn
        groups, order = [], []
        for n, chosen in _by_length(lengths):
            before = torch.arange(1 - n, 1, device=mask.device)
            groups.append(ends[chosen][:, None] + before)
            order.append(targets[chosen])
        return cls(mask.shape, tuple(groups), joined(order, members=members), every=False)

    @classmethod
    def offline(cls, mask: Tensor) -> "Windows":
        """Each dialogue of ``mask`` [B, U] as one window, all of its utterances targets; P = U."""
        lengths = mask.sum(dim=1)
        starts = torch.arange(len(mask), device=mask.device) * mask.shape[1]
        groups = [
            starts[chosen][:, None] + torch.arange(n, device=mask.device)
            for n, chosen in _by_length(lengths)
        ]
        targets = torch.cat([rows.flatten() for rows in groups])
        return cls(mask.shape, tuple(groups), targets, every=True)

    def of(self, sequences: ByModality, modalities: Sequence[str]) -> list[ByModality]:
        """Sequences [B, P, D] of each modality → each group's windows [N, n, D]."""
        flat = {m: sequences[m].flatten(0, 1) for m in modalities}
        # Not flat[rows]: the gradient of index_select is the faster by far.
        return [
            {
                m: part.index_select(0, rows.flatten()).view(*rows.shape, part.shape[1])
                for m, part in flat.items()
            }
            for rows in self.groups
        ]

    def targets(self, window: ByModality) -> ByModality:
        """A group's windows [N, n, D] → their target utterances [N, Q, D]."""
        return window if self.every else {m: part[:, -1:] for m, part in window.items()}

    def scatter(self, targets: Tensor) -> Tensor:
        """All groups' targets [ΣNQ, D] → their places [B, U, D], zero elsewhere."""
        batch = targets.new_zeros(self.shape.numel(), targets.shape[1])
        placed = batch.index_copy(0, self.targets_of_all, targets)
        return placed.view(*self.shape, targets.shape[1])


def _by_length(lengths: Tensor) -> list[tuple[int, Tensor | slice]]:
    """Each length above 0 with its rows, shortest first; length 1 without rows if there is none."""
    different = set(lengths.tolist())
    if len(different) == 1 and 0 not in different:
        return [(different.pop(), slice(None))]  # for a single step: no mask, no copy
    return [(n, lengths == n) for n in sorted(different - {0}) or [1]]


def joined(groups: Sequence[Tensor], *, members: int = 1) -> Tensor:
    """All groups' rows [.., D]; several members', side by side in each group, by member."""
    if members == 1 or len(groups) == 1:
        return torch.cat(list(groups))
    each = [group.view(members, -1, *group.shape[1:]) for group in groups]
    return torch.cat(each, dim=1).flatten(0, 1)


def find_equal(windows: Tensor, *, members: int = 1) -> tuple[Tensor, Tensor] | None:
    """Which of a few windows [N, n, D] are needed, and where each one is among those.

    None where all differ, or where there are more than FEW a member. Windows of several members,
    side by side, count as equal if they are for each of them.
    """
    each = windows.reshape(members, len(windows) // members, -1)
    count = each.shape[1]
    if not 1 < count <= FEW:
        return None
    equal = (each[:, :, None] == each[:, None]).all(dim=-1).all(dim=0)  # [count, count]
    first = equal.byte().argmax(dim=1)
    kept = first.unique()
    if len(kept) == count:
        return None
    member = torch.arange(members, device=windows.device)[:, None]
    place = torch.searchsorted(kept, first)
    return (member * count + kept).flatten(), (member * len(kept) + place).flatten()


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where the V utterances of a batch stand in N padded sequences of at most n."""

    mask: Tensor  # [N, n] True where an utterance stands; padding is last
    sequence: Tensor  # [V]
    place: Tensor  # [V]

    @classmethod
    def of_dialogues(cls, mask: Tensor) -> "Sequences":
        """Each dialogue of ``mask`` [B, U] as one sequence."""
        return cls(mask, *mask.nonzero(as_tuple=True))

    def by_speaker(self, speaker: Tensor) -> tuple["Sequences", Tensor]:
        """The turns of each speaker of a dialogue as one sequence, for speakers [B, U].

        The second value [N] says which sequence is whose: dialogue · PARTIES + speaker.
        """
        owner = self.sequence * PARTIES + self.pack(speaker)
        used, sequence, counts = torch.unique(owner, return_inverse=True, return_counts=True)
        numbers = torch.arange(len(used), device=owner.device)
        # The utterances are in the order of their dialogues, then of their turns.
        so_far = (sequence[:, None] == numbers).cumsum(0)
        place = so_far.gather(1, sequence[:, None])[:, 0] - 1
        mask = torch.arange(int(counts.max()), device=owner.device) < counts[:, None]
        return Sequences(mask, sequence, place), used

    def pack(self, padded: Tensor) -> Tensor:
        """[N, n, ..] → [V, ..]."""
        return padded[self.sequence, self.place]

    def pad(self, rows: Tensor) -> Tensor:
        """[V, ..] → [N, n, ..], zero in padding."""
        padded = rows.new_zeros(*self.mask.shape, *rows.shape[1:])
        return padded.index_put((self.sequence, self.place), rows)

    def run(
        self, grus: Sequence[nn.GRU], inputs: Sequence[Tensor], before: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Each GRU over its own inputs [V, H], from its states ``before`` [N, H].

        Gives its states after each utterance [V, H], and after each sequence [N, H].
        """
        after = run_side_by_side(grus, [self.pad(rows) for rows in inputs], before)
        if self.mask.shape[1] == 1:
            last = [states[:, 0] for states in after]
        else:
            counts = self.mask.sum(dim=1)
            numbers = torch.arange(len(counts), device=counts.device)
            ways = zip(before, after, strict=True)
            last = [torch.cat([h[:, None], states], 1)[numbers, counts] for h, states in ways]
        return [self.pack(states) for states in after], last


def run_side_by_side(
    grus: Sequence[nn.GRU], inputs: Sequence[Tensor], before: Sequence[Tensor]
) -> list[Tensor]:
    """The states of each GRU over its own input [N, n, H], from its own state [N, H]: [N, n, H].

    On a CPU a step of a recurrent batch costs mostly calls, so that all GRUs share them. For one
    step laying the weights side by side costs more than it saves; on a GPU each GRU is one kernel.
    """
    if inputs[0].is_cuda or inputs[0].shape[1] == 1:
        ways = zip(grus, inputs, before, strict=True)
        return [gru(x, h[None].contiguous())[0] for gru, x, h in ways]
    weight = torch.stack([gru.get_parameter("weight_hh_l0") for gru in grus]).transpose(1, 2)
    bias = torch.stack([gru.get_parameter("bias_hh_l0") for gru in grus])[:, None]
    given = [
        F.linear(x, gru.get_parameter("weight_ih_l0"), gru.get_parameter("bias_ih_l0"))
        for gru, x in zip(grus, inputs, strict=True)
    ]
    hidden, states = torch.stack(list(before)), []  # [G, N, H] of G GRUs
    for step in torch.stack(given).unbind(2):  # [G, N, 3H]
        recurrent = torch.baddbmm(bias, hidden, weight)
        hidden = gru_cell(step, recurrent, hidden)
        states.append(hidden)
    return list(torch.stack(states, dim=2))

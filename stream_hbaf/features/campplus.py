"""CAM++ (Wang et al., Interspeech 2023, arXiv:2303.00332): filterbank frames → a speaker embedding.

Sections 2.1 to 2.3 of the paper, top to bottom: a convolution over time and frequency
(``FrontEnd``), a densely connected time delay network (D-TDNN) whose layers are masked by their
context (``ContextAwareMask``), and the mean and deviation over time. The attributes are named as in
the published weights, so that these load as they are.

Shapes: B windows, T frames, S = T/2 frames after the first time delay layer, C channels.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEL_BANDS = 80
EMBEDDING_WIDTH = 192

FRONT_CHANNELS = 32
FIRST_CHANNELS = 128  # out of the first time delay layer
GROWTH = 32  # channels that each dense layer adds
BOTTLENECK = 4 * GROWTH
BLOCKS = ((12, 1), (24, 2), (16, 2))  # layers and dilation of each D-TDNN block
SEGMENT = 100  # frames of a segment of the context
# The block whose activations tell most of emotions: later ones know only who speaks.
ACTIVE_BLOCK = "block2"
ACTIVATIONS_WIDTH = 2 * ((FIRST_CHANNELS + BLOCKS[0][0] * GROWTH) // 2 + BLOCKS[1][0] * GROWTH)


class CamPlusPlus(nn.Module):
    """Log mel frames [B, T, 80], without their mean over time → embeddings [B, 192]."""

    def __init__(self) -> None:
        super().__init__()
        self.head = FrontEnd()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = FIRST_CHANNELS
        layers["tdnn"] = TimeDelayLayer(FRONT_CHANNELS * MEL_BANDS // 8, channels)
        for number, (depth, dilation) in enumerate(BLOCKS, start=1):
            layers[f"block{number}"] = DenseBlock(channels, depth=depth, dilation=dilation)
            channels += depth * GROWTH
            layers[f"transit{number}"] = Transition(channels, channels // 2)
            channels //= 2
        layers["out_nonlinear"] = norm_relu(channels)
        layers["stats"] = StatisticsPooling()
        layers["dense"] = Embedding(2 * channels)
        self.xvector = nn.Sequential(layers)

    def forward(self, frames: Tensor) -> Tensor:
        embedding: Tensor = self.xvector(self.head(frames.mT))
        return embedding

    def activations(self, frames: Tensor) -> Tensor:
        """Log mel frames as ``forward`` → mean and deviation over time of block 2's, [B, 2048]."""
        activations = self.head(frames.mT)
        for name, layer in self.xvector.named_children():
            activations = layer(activations)
            if name == ACTIVE_BLOCK:
                break
        return torch.cat([activations.mean(dim=2), activations.std(dim=2)], dim=1)


class FrontEnd(nn.Module):
    """Section 2.2, the front-end convolution module: [B, 80, T] → [B, 320, T].

    Two-dimensional residual blocks that shrink the frequency by 8 and keep the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, FRONT_CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(FRONT_CHANNELS)
        self.layer1 = nn.Sequential(ResidualBlock(stride=2), ResidualBlock(stride=1))
        self.layer2 = nn.Sequential(ResidualBlock(stride=2), ResidualBlock(stride=1))
        self.conv2 = nn.Conv2d(
            FRONT_CHANNELS, FRONT_CHANNELS, 3, stride=(2, 1), padding=1, bias=False
        )
        self.bn2 = nn.BatchNorm2d(FRONT_CHANNELS)

    def forward(self, bands: Tensor) -> Tensor:
        maps = F.relu(self.bn1(self.conv1(bands[:, None])))
        maps = self.layer2(self.layer1(maps))
        maps = F.relu(self.bn2(self.conv2(maps)))  # [B, 32, 10, T]
        return maps.flatten(1, 2)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; ``stride`` shrinks the frequency alone."""

    def __init__(self, *, stride: int) -> None:
        super().__init__()
        width = FRONT_CHANNELS
        self.conv1 = nn.Conv2d(width, width, 3, stride=(stride, 1), padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(width, width, 1, stride=(stride, 1), bias=False))
            self.shortcut.append(nn.BatchNorm2d(width))

    def forward(self, maps: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(maps)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(maps))


class TimeDelayLayer(nn.Module):
    """The first time delay layer, which halves the frame rate: [B, 320, T] → [B, 128, S]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv1d(channels, out_channels, 5, stride=2, padding=2, bias=False)
        self.nonlinear = norm_relu(out_channels)

    def forward(self, frames: Tensor) -> Tensor:
        out: Tensor = self.nonlinear(self.linear(frames))
        return out


class DenseBlock(nn.ModuleDict):
    """A D-TDNN block: each layer takes all that came before it and adds ``GROWTH`` channels."""

    def __init__(self, channels: int, *, depth: int, dilation: int) -> None:
        super().__init__(
            {
                f"tdnnd{n + 1}": DenseLayer(channels + n * GROWTH, dilation=dilation)
                for n in range(depth)
            }
        )

    def forward(self, frames: Tensor) -> Tensor:
        for layer in self.values():
            frames = torch.cat([frames, layer(frames)], dim=1)
        return frames


class DenseLayer(nn.Module):
    """A layer of a D-TDNN block: [B, C, S] → [B, 32, S]."""

    def __init__(self, channels: int, *, dilation: int) -> None:
        super().__init__()
        self.nonlinear1 = norm_relu(channels)
        self.linear1 = nn.Conv1d(channels, BOTTLENECK, 1, bias=False)
        self.nonlinear2 = norm_relu(BOTTLENECK)
        self.cam_layer = ContextAwareMask(dilation=dilation)

    def forward(self, frames: Tensor) -> Tensor:
        out: Tensor = self.cam_layer(self.nonlinear2(self.linear1(self.nonlinear1(frames))))
        return out


class ContextAwareMask(nn.Module):
    """Section 2.3: a time delay layer times a mask from the window's and the segment's mean.

    Equations 2 to 4: M = σ(W₂ ReLU(W₁ (e_g + e_s) + b₁) + b₂), with e_g the mean over all frames
    and e_s that over the segment of 100 frames in which a frame lies.
    """

    def __init__(self, *, dilation: int) -> None:
        super().__init__()
        self.linear_local = nn.Conv1d(
            BOTTLENECK, GROWTH, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.linear1 = nn.Conv1d(BOTTLENECK, BOTTLENECK // 2, 1)
        self.linear2 = nn.Conv1d(BOTTLENECK // 2, GROWTH, 1)

    def forward(self, frames: Tensor) -> Tensor:
        segments = F.avg_pool1d(frames, SEGMENT, stride=SEGMENT, ceil_mode=True)  # [B, C, S/100]
        context = frames.mean(dim=2, keepdim=True) + segments
        # The mask is the same within a segment, so that it is computed once for each.
        mask = torch.sigmoid(self.linear2(F.relu(self.linear1(context))))
        mask = mask.repeat_interleave(SEGMENT, dim=2)[..., : frames.shape[2]]
        out: Tensor = self.linear_local(frames) * mask
        return out


class Transition(nn.Module):
    """Halves the channels between two blocks."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.nonlinear = norm_relu(channels)
        self.linear = nn.Conv1d(channels, out_channels, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        out: Tensor = self.linear(self.nonlinear(frames))
        return out


class StatisticsPooling(nn.Module):
    """Mean and standard deviation over time: [B, C, S] → [B, 2C]."""

    def forward(self, frames: Tensor) -> Tensor:
        return torch.cat([frames.mean(dim=2), frames.std(dim=2)], dim=1)


class Embedding(nn.Module):
    """The last, linear layer, normalised over the training data: [B, C] → [B, 192]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv1d(channels, EMBEDDING_WIDTH, 1, bias=False)
        self.nonlinear = nn.Sequential(
            OrderedDict(batchnorm=nn.BatchNorm1d(EMBEDDING_WIDTH, affine=False))
        )

    def forward(self, statistics: Tensor) -> Tensor:
        out: Tensor = self.nonlinear(self.linear(statistics[:, :, None]).squeeze(2))
        return out


def norm_relu(channels: int) -> nn.Sequential:
    """Batch normalisation, then ReLU."""
    return nn.Sequential(OrderedDict(batchnorm=nn.BatchNorm1d(channels), relu=nn.ReLU()))

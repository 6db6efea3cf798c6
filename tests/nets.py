"""Two networks for 8 x 8 pixels, as a user would bring them: model=module model.target=nets.Cnn."""

from collections import OrderedDict

from torch import nn
from torchvision.models import SwinTransformer


def convolution(in_channels, out_channels, stride=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class Cnn(nn.Sequential):
    """Four layers with BatchNorm, one of them with dropout."""

    def __init__(self):
        super().__init__(
            OrderedDict(
                stem=convolution(3, 8),
                stage1=nn.Sequential(convolution(8, 8), convolution(8, 8)),
                stage2=nn.Sequential(convolution(8, 8, 2), nn.Dropout(0.2), convolution(8, 8)),
                stage3=nn.Sequential(convolution(8, 16, 2), convolution(16, 16)),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                head=nn.Linear(16, 5),
            )
        )


class Swin(SwinTransformer):
    """Four layers with dropout, dropout of attention and stochastic depth."""

    def __init__(self):
        super().__init__(
            patch_size=[2, 2],
            embed_dim=8,
            depths=[1, 1, 1],
            num_heads=[1, 2, 2],
            window_size=[2, 2],
            mlp_ratio=2.0,
            dropout=0.1,
            attention_dropout=0.1,
            stochastic_depth_prob=0.3,
            num_classes=5,
        )

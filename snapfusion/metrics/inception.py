"""The features of FID: Inception v3 as first published for it. SnapFusion Sec. 5.

Its weights are those of "pt_inception-2015-12-05", saved as safetensors under the same names; the network
differs from torchvision's in its number of classes and in the pooling of nine blocks. FID depends on the
resize kernel too, so the kernel is a setting that is recorded with every number.
"""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import Inception3
from torchvision.models.inception import InceptionA, InceptionC, InceptionE

from snapfusion.metrics.images import resize_images
from snapfusion.metrics.pinned import load_pinned
from snapfusion.metrics.settings import INCEPTION_SIZE, Resize


class Inception(nn.Module):
    """images uint8 [B,3,H,W] -> 2048 features."""

    def __init__(self, *, resize: Resize = "bicubic") -> None:
        super().__init__()
        self.resize: Resize = resize
        network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        network.Mixed_5b = _BlockA(192, pool_features=32)
        network.Mixed_5c = _BlockA(256, pool_features=64)
        network.Mixed_5d = _BlockA(288, pool_features=64)
        network.Mixed_6b = _BlockC(768, channels_7x7=128)
        network.Mixed_6c = _BlockC(768, channels_7x7=160)
        network.Mixed_6d = _BlockC(768, channels_7x7=160)
        network.Mixed_6e = _BlockC(768, channels_7x7=192)
        network.Mixed_7b = _BlockE(1280)
        network.Mixed_7c = _LastBlock(2048)
        network.fc = nn.Identity()
        self.network = network.eval()

    def prepare(self, images: Tensor) -> Tensor:
        """The network's input float32 [B,3,299,299] in [-1, 1] of images uint8 [B,3,H,W].

        Raises:
            ValueError: unless the images are uint8 [B,3,H,W].
        """
        return 2.0 * resize_images(images, size=INCEPTION_SIZE, resize=self.resize) - 1.0

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B,2048] of uint8 [B,3,H,W]."""
        return self.network(self.prepare(images))


def load_inception(weights: Path, *, resize: Resize = "bicubic") -> Inception:
    """The network with weights from a file of safetensors.

    Raises:
        ValueError: if the file is in another format, or has missing or unexpected tensors.
    """
    inception = Inception(resize=resize)
    # The published file includes the classifier, which FID does not use.
    load_pinned(inception.network, weights, name="this Inception", unused=r"fc\..+")
    return inception


class _UnpaddedAverage:
    """A block whose average pooling leaves out the zeros of the padding."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        pooled = functional.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        return [*super()._forward(x)[:-1], self.branch_pool(pooled)]  # type: ignore[misc, attr-defined]


class _BlockA(_UnpaddedAverage, InceptionA):
    pass


class _BlockC(_UnpaddedAverage, InceptionC):
    pass


class _BlockE(_UnpaddedAverage, InceptionE):
    pass


class _LastBlock(InceptionE):
    """The last block uses maximum pooling: a quirk of the published network that its FID values depend on."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        pooled = functional.max_pool2d(x, kernel_size=3, stride=1, padding=1)
        return [*super()._forward(x)[:-1], self.branch_pool(pooled)]

"""One model of every family of the PyPI model zoo pytorchcv 0.0.67, with random weights and images to run it on.

    entry = load("resnet")                                # resnet10, (1, 3, 224, 224)
    calibration, held_out = entry.images(8, seed=1), entry.images(4, seed=2)

A family is a module of ``pytorchcv.models``; of its variants one of the smallest stands for it. Weights are random, as the zoo
initializes them, under one seed; batch-norm statistics come from a few forward passes with batch norm, and nothing else,
in train mode; images have the spectrum of photographs, so that different images give different outputs.

A few passes with the momentum of 0.1 leave the statistics between their initial values and those of the data, so that signals
fade with depth where no skip connection carries them. With converged statistics, on the other hand, deep networks with such weights
amplify noise, float32 rounding included, as trained ones do not. ``trained_like=True`` makes three of their properties trained
ones, for all networks alike:

* batch-norm statistics are the plain average over the passes;
* spatial kernels are smoothed over 3x3 taps: trained kernels are smooth like the images they look at, while white ones
  amplify white rounding noise over the image;
* batch norm's beta is 0.5 instead of 0, where a deep random network is chaotic: every rectified layer behind batch norm
  amplifies any deviation by pi / (pi - 1) = 1.7 dB (Yang et al. 2019, "A mean field theory of batch normalization"), and with
  beta 0.5 by 1.0 dB. Outputs then have more in common between images, which flatters the SQNR: look at "differences" too.

The input size is the model's own ``in_size``; images of more than ``LARGEST`` pixels are halved (to multiples of 32) until
they are not, and the model is built for that size. Every ``make`` target installs the zoo; later versions import torchvision.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 120_000  # pixels: 128 x 256 instead of the 1024 x 2048 of street scenes, but the 331 x 331 of some is kept
PIXEL_RANGE = (-2.0, 2.0)  # black and white of a photograph normalized to mean 0, standard deviation 1
FIXED_SIZE = ("ntsnet_cub",)  # its anchors are those of 448 x 448
IMAGE_CHANNELS = {"pfpcnet": 1, "superpointnet": 1}
BETA = 0.5
STATISTICS_PASSES, STATISTICS_BATCH = 3, 4

#: family -> model. What takes no image, or more than one thing, is in ``LEFT_OUT``.
FAMILIES = {
    "airnet": "airnet50_1x64d_r16",
    "airnext": "airnext50_32x4d_r2",
    "alexnet": "alexnet",
    "alphapose_coco": "alphapose_fastseresnet101b_coco",
    "bagnet": "bagnet9",
    "bamresnet": "bam_resnet18",
    "bisenet": "bisenet_resnet18_celebamaskhq",
    "bninception": "bninception",
    "cbamresnet": "cbam_resnet18",
    "centernet": "centernet_resnet18_voc",
    "cgnet": "cgnet_cityscapes",
    "channelnet": "channelnet",
    "condensenet": "condensenet74_c8_g8",
    "contextnet": "ctxnet_cityscapes",
    "dabnet": "dabnet_cityscapes",
    "danet": "danet_resnetd50b_cityscapes",
    "darknet": "darknet_tiny",
    "darknet53": "darknet53",
    "darts": "darts",
    "deeplabv3": "deeplabv3_resnetd50b_voc",
    "densenet": "densenet121",
    "densenet_cifar": "densenet40_k12_cifar10",
    "diapreresnet": "diapreresnet10",
    "diapreresnet_cifar": "diapreresnet20_cifar10",
    "diaresnet": "diaresnet10",
    "diaresnet_cifar": "diaresnet20_cifar10",
    "dicenet": "dicenet_wd5",
    "diracnetv2": "diracnet18v2",
    "dla": "dla46c",
    "dpn": "dpn68",
    "drn": "drnd22",
    "edanet": "edanet_cityscapes",
    "efficientnet": "efficientnet_b0",
    "efficientnetedge": "efficientnet_edge_small_b",
    "enet": "enet_cityscapes",
    "erfnet": "erfnet_cityscapes",
    "esnet": "esnet_cityscapes",
    "espnetv2": "espnetv2_wd2",
    "fastscnn": "fastscnn_cityscapes",
    "fastseresnet": "fastseresnet101b",
    "fbnet": "fbnet_cb",
    "fcn8sd": "fcn8sd_resnetd50b_voc",
    "fdmobilenet": "fdmobilenet_wd4",
    "fishnet": "fishnet99",
    "fpenet": "fpenet_cityscapes",
    "fractalnet_cifar": "fractalnet_cifar10",
    "ghostnet": "ghostnet",
    "hardnet": "hardnet39ds",
    "hrnet": "hrnet_w18_small_v1",
    "ibnbresnet": "ibnb_resnet50",
    "ibndensenet": "ibn_densenet121",
    "ibnresnet": "ibn_resnet50",
    "ibnresnext": "ibn_resnext50_32x4d",
    "ibppose_coco": "ibppose_coco",
    "icnet": "icnet_resnetd50b_cityscapes",
    "igcv3": "igcv3_wd4",
    "inceptionresnetv1": "inceptionresnetv1",
    "inceptionresnetv2": "inceptionresnetv2",
    "inceptionv3": "inceptionv3",
    "inceptionv4": "inceptionv4",
    "irevnet": "irevnet301",
    "isqrtcovresnet": "isqrtcovresnet18",
    "lednet": "lednet_cityscapes",
    "lffd": "lffd20x5s320v2_widerface",
    "lwopenpose_cmupan": "lwopenpose2d_mobilenet_cmupan_coco",
    "menet": "menet108_8x1_g3",
    "mixnet": "mixnet_s",
    "mnasnet": "mnasnet_small",
    "mobilenet": "mobilenet_wd4",
    "mobilenet_cub": "mobilenet_wd4_cub",
    "mobilenetb": "mobilenetb_wd4",
    "mobilenetv2": "mobilenetv2_wd4",
    "mobilenetv3": "mobilenetv3_small_w7d20",
    "msdnet": "msdnet22",
    "msdnet_cifar10": "msdnet22_cifar10",
    "nasnet": "nasnet_4a1056",
    "nin_cifar": "nin_cifar10",
    "ntsnet_cub": "ntsnet_cub",
    "octresnet": "octresnet10_ad2",
    "peleenet": "peleenet",
    "pfpcnet": "pfpcnet",
    "pnasnet": "pnasnet5large",
    "polynet": "polynet",
    "preresnet": "preresnet10",
    "preresnet_cifar": "preresnet20_cifar10",
    "prnet": "prnet",
    "proxylessnas": "proxylessnas_mobile",
    "proxylessnas_cub": "proxylessnas_mobile_cub",
    "pspnet": "pspnet_resnetd50b_voc",
    "pyramidnet": "pyramidnet101_a360",
    "pyramidnet_cifar": "pyramidnet110_a48_cifar10",
    "regnet": "regnety002",
    "resattnet": "resattnet56",
    "resdropresnet_cifar": "resdropresnet20_cifar10",
    "resnesta": "resnestabc14",
    "resnet": "resnet10",
    "resnet_cifar": "resnet20_cifar10",
    "resnet_cub": "resnet10_cub",
    "resneta": "resneta10",
    "resnetd": "resnetd50b",
    "resnext": "resnext14_16x4d",
    "resnext_cifar": "resnext20_16x4d_cifar10",
    "revnet": "revnet38",
    "rir_cifar": "rir_cifar10",
    "ror_cifar": "ror3_56_cifar10",
    "scnet": "scnet50",
    "segnet": "segnet_cityscapes",
    "selecsls": "selecsls42",
    "senet": "senet16",
    "sepreresnet": "sepreresnet10",
    "sepreresnet_cifar": "sepreresnet20_cifar10",
    "seresnet": "seresnet10",
    "seresnet_cifar": "seresnet20_cifar10",
    "seresnet_cub": "seresnet10_cub",
    "seresnext": "seresnext50_32x4d",
    "shakedropresnet_cifar": "shakedropresnet20_cifar10",
    "shakeshakeresnet_cifar": "shakeshakeresnet20_2x16d_cifar10",
    "sharesnet": "sharesnet18",
    "shufflenet": "shufflenet_g3_wd4",
    "shufflenetv2": "shufflenetv2_wd2",
    "shufflenetv2b": "shufflenetv2b_wd2",
    "simplepose_coco": "simplepose_resnet18_coco",
    "simpleposemobile_coco": "simplepose_mobile_mobilenetv3_small_w1_coco",
    "sinet": "sinet_cityscapes",
    "sknet": "sknet50",
    "sparsenet": "sparsenet121",
    "spnasnet": "spnasnet",
    "sqnet": "sqnet_cityscapes",
    "squeezenet": "squeezenet_v1_1",
    "squeezenext": "sqnxt23_w1",
    "superpointnet": "superpointnet",
    "unet": "unet_cityscapes",
    "vgg": "vgg11",
    "vovnet": "vovnet27s",
    "wrn": "wrn50_2",
    "wrn1bit_cifar": "wrn20_10_1bit_cifar10",
    "wrn_cifar": "wrn16_10_cifar10",
    "xception": "xception",
    "xdensenet": "xdensenet121_2",
    "xdensenet_cifar": "xdensenet40_2_k24_bc_cifar10",
    "zfnet": "zfnet",
}

#: family -> why it has no row of results.
LEFT_OUT = {
    "linknet": "the zoo itself fails to build it: 'Sequential' object has no attribute 'init_block'",
    "jasper": "takes audio features and their lengths",
    "jasperdr": "takes audio features and their lengths",
    "quartznet": "takes audio features and their lengths",
    "nvpattexp": "takes audio features and the number of a person",
    "voca": "takes audio features and the number of a person",
}


@dataclass(frozen=True)
class Entry:
    """A model of the zoo in eval mode and the shape (C, H, W) of the image it takes."""

    family: str
    name: str
    model: nn.Module
    shape: tuple[int, int, int]

    def images(self, count: int, seed: int) -> Tensor:
        return images(count, self.shape, seed)

    def call(self, count: int, seed: int) -> dict[str, Tensor]:
        """The images as the keyword argument of ``forward``."""
        return {"x": self.images(count, seed)}


def load(family: str, largest: int = LARGEST, trained_like: bool = False) -> Entry:
    """Build the family's model for images of at most ``largest`` pixels: seeded weights, batch-norm statistics, eval mode."""
    from pytorchcv.model_provider import get_model

    np.int = int  # removed in numpy 1.24; RegNet and NTS-Net of this zoo still say it
    name = FAMILIES[family]
    torch.manual_seed(0)
    model = get_model(name)
    size = own_size = tuple(getattr(model, "in_size", (224, 224)))
    while size[0] * size[1] > largest and family not in FIXED_SIZE:
        size = tuple(-(-n // 64) * 32 for n in size)
    if size != own_size:
        torch.manual_seed(0)
        model = get_model(name, in_size=size)
    shape = (IMAGE_CHANNELS.get(family, 3), *size)
    if trained_like:
        soften(model)
    settle_batch_norm(model, shape, converged=trained_like)
    return Entry(family, name, model.eval(), shape)


@torch.no_grad()
def soften(model: nn.Module) -> None:
    """Smooth kernels of the same spread, and beta away from 0 (see above)."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.bias.fill_(BETA)
        if isinstance(module, nn.Conv2d) and min(module.kernel_size) > 1:
            kernels = module.weight.flatten(0, 1)[:, None]
            smooth = F.avg_pool2d(F.pad(kernels, (1, 1, 1, 1), mode="replicate"), 3, 1)
            module.weight.copy_((smooth * kernels.std() / smooth.std()).reshape_as(module.weight))


def settle_batch_norm(model: nn.Module, shape: tuple[int, int, int], converged: bool) -> None:
    """Batch-norm statistics from a few batches of images; everything else is in eval mode meanwhile."""
    norms = [m.eval() for m in model.eval().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        if converged:
            norm.momentum = None  # a plain average instead of a decaying one
    with torch.no_grad():
        for seed in range(STATISTICS_PASSES):
            model(images(STATISTICS_BATCH, shape, 1000 + seed))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def images(count: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """(count, C, H, W) in ``PIXEL_RANGE``: noise of every scale, the coarser the stronger; each has its contrast and color."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(count, *size, generator=generator)

    total, cells = torch.zeros(count, *shape), 1
    while cells < 2 * min(shape[1:]):
        grid = (min(cells, shape[1]), min(cells, shape[2]))
        total += F.interpolate(noise(shape[0], *grid), size=shape[1:], mode="bilinear") / cells**0.5
        cells *= 2
    centered = (total - total.mean((2, 3), keepdim=True)) / total.std((1, 2, 3), keepdim=True)
    contrast, color = noise(1, 1, 1).mul(0.3).exp(), 0.3 * noise(shape[0], 1, 1)
    return (contrast * centered + color).clamp(*PIXEL_RANGE)

"""Counts of residual additions in networks of torchvision, timm and transformers.

Weights are random and sizes small. The expected counts are those of papers and configurations, as
the comments say, never the toolkit's own output. The extras `timm` and `transformers` install what
these tests need; without it they are skipped.
"""

import pytest
import torch

import analysis

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# Family: {constructor: (expected additions, options)}. Options: size, a tuple, of the input.
TORCHVISION = {
    "resnet18": 8,  # Table 1 of the paper: 2+2+2+2 blocks
    "resnet50": 16,  # 3+4+6+3 blocks
    "wide_resnet50_2": 16,  # the same blocks
    "resnext50_32x4d": 16,  # the same blocks
    "mobilenet_v2": 10,  # Table 2: 1,2,3,4,3,3,1 blocks; all but the first of a stage: 0+1+2+3+2+2+0
    "mobilenet_v3_large": 10,  # Table 1: 15 bnecks; 10 of them keep shape: rows 1,3,5,6,8,9,10,12,14,15
    "mobilenet_v3_small": 6,  # Table 2: 11 bnecks; rows 3,5,6,8,10,11 keep stride 1 and width
    "mnasnet1_0": 10,  # Fig. 7: 3,3,3,2,4,1 blocks; all but the first of a stack: 2+2+2+1+3+0
    "efficientnet_b0": 9,  # Table 1: 1,2,2,3,3,4,1 blocks; 0+1+1+2+2+3+0
    "efficientnet_v2_s": 35,  # Table 4: 2,4,4,6,9,15; the first stage keeps 24 channels: 2+3+3+5+8+14
    "regnet_y_400mf": 16,  # depths 1,3,6,6: every block has a shortcut
    "regnet_x_400mf": 22,  # depths 1,2,7,12
    "convnext_tiny": 18,  # depths 3,3,9,3
    "vit_b_16": 24,  # 12 layers of attention and MLP
    "swin_t": 24,  # depths 2,2,6,2, attention and MLP each
    "swin_v2_t": 24,  # the same
    "maxvit_t": 77,  # depths 2,2,5,2: 11 blocks of MBConv + 2 * (attention + MLP): 5 each; see below
    "vgg11_bn": 0,
    "densenet121": 0,  # concatenations
    "squeezenet1_1": 0,
    "shufflenet_v2_x1_0": 0,  # concatenations
    "googlenet": 0,  # concatenations
    "alexnet": 0,
}

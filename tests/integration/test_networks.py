"""Counts of residual additions in networks of torchvision, timm and transformers.

Weights are random and sizes small. The expected counts are those of papers and configurations, as
the comments say, never the toolkit's own output. The extras `timm` and `transformers` install what
these tests need; without them they are skipped.
"""

import importlib.util
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from analysis.additions.finding import recording_additions

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # other people's code
]

# name: (expected additions, side of the images)
TORCHVISION = {
    "resnet18": (8, 64),  # He et al. 2016, Table 1: 2+2+2+2 blocks
    "resnet50": (16, 64),  # 3+4+6+3 blocks
    "wide_resnet50_2": (16, 64),  # the same
    "resnext50_32x4d": (16, 64),  # the same
    "mobilenet_v2": (10, 64),  # Table 2: 1,2,3,4,3,3,1 blocks, all but the first of each stage
    "mobilenet_v3_large": (10, 64),  # Table 1: 10 of 15 rows keep stride 1 and width
    "mobilenet_v3_small": (6, 64),  # Table 2: 6 of 11 rows do
    "mnasnet1_0": (10, 64),  # 3,3,3,2,4,1 blocks, all but the first of each stack
    "efficientnet_b0": (9, 64),  # Table 1: 1,2,2,3,3,4,1 blocks, all but the first of each stage
    "efficientnet_v2_s": (
        35,
        64,
    ),  # Table 4: 2,4,4,6,9,15; the first stage keeps width, the 5th not
    "regnet_y_400mf": (16, 64),  # depths 1,3,6,6; each block has a shortcut
    "regnet_x_400mf": (22, 64),  # depths 1,2,7,12
    "convnext_tiny": (18, 64),  # depths 3,3,9,3
    "vit_b_16": (24, 224),  # 12 layers of attention and MLP
    "swin_t": (24, 64),  # depths 2,2,6,2 of attention and MLP
    "swin_v2_t": (24, 64),  # the same
    "maxvit_t": (55, 224),  # depths 2,2,5,2: MBConv and two times attention and MLP in each
    "vgg11_bn": (0, 64),  # plain
    "densenet121": (0, 64),  # concatenations
    "shufflenet_v2_x1_0": (0, 64),  # concatenations
}
TIMM = {
    "resnetv2_50": (16, 64),  # pre-activation: 3+4+6+3
    "seresnet50": (16, 64),  # gates are no additions
    "res2net50_26w_4s": (16, 64),  # sums of splits are no residual ones
    "skresnet18": (8, 64),  # 2+2+2+2
    "ghostnet_100": (16, 64),  # Table 1: 16 bottlenecks, each with a shortcut
    "hrnet_w18_small": (23, 64),  # blocks 1, 2*2, 3*2, 4*2 and 4 of the head; fusions do not count
    "dla34": (12, 64),  # trees of 2, 4, 4 and 2 basic blocks
    "nfnet_f0": (12, 64),  # depths 1,2,6,3
    "legacy_xception": (12, 64),  # Fig. 5: 12 modules with a shortcut
    "inception_resnet_v2": (40, 96),  # blocks 10 A, 20 B, 10 C
    "rexnet_100": (11, 64),  # 16 blocks: 4 of stride 2, and the first one narrows
    "repvgg_a2": (0, 64),  # parallel convolutions without an activation
    "mobileone_s0": (0, 64),  # the same
    "selecsls42": (0, 64),  # concatenations
    "convnextv2_atto": (12, 64),  # depths 2,2,6,2
    "inception_next_atto": (12, 64),  # depths 2,2,6,2
    "poolformer_s12": (24, 64),  # 12 blocks of pooling and MLP
    "efficientformer_l1": (16, 224),  # 15 MLPs and one attention; 14 poolings have no weights
    "mixer_s32_224": (16, 224),  # 8 layers of token and channel mixing
    "resmlp_12_224": (24, 224),  # 12 layers
    "gmlp_s16_224": (30, 224),  # 30 gated MLPs
    "cait_xxs24_224": (52, 224),  # 24 layers and 2 of class attention
    "deit3_small_patch16_224": (24, 224),  # 12 layers with LayerScale
    "beit_base_patch16_224": (24, 224),  # 12 layers
    "levit_128s": (20, 224),  # depths 2,3,4, and an MLP after each of 2 subsamplings
    "coatnet_0_rw_224": (23, 224),  # 2+3 convolution blocks, 7+2 layers of attention and MLP
    "xcit_nano_12_p16_224": (40, 224),  # 12 layers of three, 2 of class attention and MLP
    "twins_svt_small": (40, 224),  # depths 2,2,10,4, and 4 position convolutions
    "volo_d1_224": (40, 224),  # 4+4+8+2 layers, and 2 of class attention and MLP
    "focalnet_tiny_srf": (24, 64),  # depths 2,2,6,2
    "davit_tiny": (48, 64),  # depths 1,1,3,1, twice: two position convolutions, attention, MLP
    "visformer_tiny": (23, 224),  # 7 convolution blocks, 4+4 layers of attention and MLP
    "mobilevit_xxs": (21, 64),  # 2+4+3 layers of attention and MLP, 3 MobileNet blocks of stride 1
}
SMALL = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
TEXT = SMALL | {"num_hidden_layers": 3, "vocab_size": 99, "pad_token_id": 0}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
SEQUENCES = HEADS | {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
IMAGE = SMALL | {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3}
DOWN = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
# (expected additions, inputs, configuration): attention and MLP of 3 layers, unless a comment says
TRANSFORMERS = {
    "GPT2": (6, "ids", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99}),
    "GPTJ": (
        3,
        "ids",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
    ),  # one joint branch
    "GPTNeoX": (3, "ids", TEXT),  # one joint branch of attention and MLP
    "Llama": (6, "ids", TEXT),
    "Mistral": (6, "ids", GROUPED),
    "Mixtral": (6, "ids", GROUPED | {"num_local_experts": 4}),
    "Gemma2": (6, "ids", GROUPED),
    "Qwen3": (6, "ids", GROUPED),
    "Phi3": (6, "ids", TEXT),
    "Bloom": (6, "ids", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99}),
    "Bert": (6, "ids", TEXT),
    "Roberta": (6, "ids", TEXT | {"max_position_embeddings": 64}),
    "Albert": (6, "ids", TEXT | {"embedding_size": 16}),  # one layer, three times
    "DistilBert": (6, "ids", {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}),
    "DebertaV2": (6, "ids", TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "XLNet": (6, "ids", {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64}),
    "T5": (
        15,
        "both",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4},
    ),  # 2+3
    "Bart": (15, "ids", SEQUENCES | {"encoder_layers": 3, "decoder_layers": 3}),  # 2 and 3 a layer
    "Whisper": (
        13,  # 2 layers of 2 and 3 layers of 3
        "speech",
        SEQUENCES | {"encoder_layers": 2, "decoder_layers": 3, "max_source_positions": 50},
    ),
    "Mamba": (
        3,
        "ids",
        {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 99},
    ),  # one a layer
    "Rwkv": (6, "ids", {"hidden_size": 32, "num_hidden_layers": 3, "attention_hidden_size": 32}),
    "ViT": (6, "images", IMAGE),
    "Dinov2": (6, "images", IMAGE),
    "Segformer": (8, "images", {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32]}),
    "Detr": (  # 4 residual blocks, 2 layers of 2 and 3 layers of 3
        17,
        "images",
        HEADS | {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "num_queries": 7},
    ),
}
INPUTS = {
    "ids": {"input_ids": torch.arange(24).view(2, 12) + 3},
    "both": {
        "input_ids": torch.arange(24).view(2, 12),
        "decoder_input_ids": torch.ones(2, 5).long(),
    },
    "images": {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)},
    "speech": {
        "input_features": torch.linspace(-1, 1, 2 * 80 * 100).view(2, 80, 100),
        "decoder_input_ids": torch.ones(2, 5).long(),
    },
}


def imported(name):
    """A package of an extra.

    torchvision's wheel for GPUs cannot load its operators beside a torch for CPUs, but looks for
    two of them: these are declared if they are missing.
    """
    torchvision = importlib.util.find_spec("torchvision")
    if torchvision is not None:
        for library in Path(torchvision.origin).parent.glob("_C*.so"):
            with suppress(OSError):
                torch.ops.load_library(library)
    for operator in ("torchvision::nms", "torchvision::qnms"):
        with suppress(RuntimeError):  # it is there
            torch.library.define(operator, "(Tensor boxes, Tensor scores, float limit) -> Tensor")
    return pytest.importorskip(name, reason=f"the extra with {name} is not installed")


def kinds_of(model, *args, **kwargs):
    model.eval()
    with torch.no_grad(), recording_additions(model) as record:
        for _ in range(2):
            model(*args, **kwargs)
            record.end_pass()
    return Counter(addition.branch_kind for addition in record.additions)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    imported("torchvision")
    expected, side = TORCHVISION[name]
    model = getattr(importlib.import_module("torchvision.models"), name)()
    assert kinds_of(model, torch.randn(1, 3, side, side)).total() == expected


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = imported("timm")
    expected, side = TIMM[name]
    assert kinds_of(timm.create_model(name), torch.randn(1, 3, side, side)).total() == expected


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    transformers = imported("transformers")
    expected, inputs, options = TRANSFORMERS[name]
    if name == "Detr":
        backbone = transformers.ResNetConfig(**DOWN, out_features=["stage4"])
        options = options | {"backbone_config": backbone, "use_timm_backbone": False}
    config = getattr(transformers, f"{name}Config")(**options)
    model = transformers.AutoModel.from_config(config)
    assert kinds_of(model, **INPUTS[inputs]).total() == expected


def test_kinds_of_branches():
    timm = imported("timm")
    found = kinds_of(timm.create_model("coatnet_0_rw_224"), torch.randn(1, 3, 224, 224))
    assert found == {"convolution": 5, "attention": 9, "mlp": 9}
    found = kinds_of(timm.create_model("mixer_s32_224"), torch.randn(1, 3, 224, 224))
    assert found == {"mlp": 16}

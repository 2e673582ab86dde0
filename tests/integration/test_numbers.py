"""Stds and ratios of other people's networks, against float64 hooks placed by hand."""

import pytest
import torch

import analysis
from tests.integration.test_networks import imported

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # other people's code
]


def vit():
    model = imported("timm").create_model("vit_tiny_patch16_224", depth=3)
    return model, torch.randn(2, 3, 224, 224), timm_sites(model.blocks)


def layer_scale():
    timm = imported("timm")
    model = timm.create_model("deit3_small_patch16_224", depth=3)
    return model, torch.randn(2, 3, 224, 224), timm_sites(model.blocks)


def swin():
    model = imported("timm").create_model("swin_tiny_patch4_window7_224")
    blocks = [block for stage in model.layers for block in stage.blocks]
    return model, torch.randn(1, 3, 224, 224), timm_sites(blocks)


def timm_sites(blocks):
    """(module that takes in the stream, module that puts out the branch) of every addition."""
    return [
        site
        for block in blocks
        for site in ((block.norm1, block.drop_path1), (block.norm2, block.drop_path2))
    ]


def gpt2():
    transformers = imported("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=99)
    model = transformers.GPT2Model(config)
    sites = [s for block in model.h for s in ((block.ln_1, block.attn), (block.ln_2, block.mlp))]
    return model, {"input_ids": torch.randint(0, 99, (2, 12))}, sites


def mobilenet_v2():
    imported("torchvision")
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2()
    blocks = [block for block in model.features if getattr(block, "use_res_connect", False)]
    return model, torch.randn(2, 3, 64, 64), [(block, block.conv) for block in blocks]


@pytest.mark.parametrize("make", [vit, layer_scale, swin, gpt2, mobilenet_v2])
def test_numbers(make):
    model, batch, sites = make()
    model.eval()
    stds = {}

    def keep(key, tensor):
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor
        stds[key] = tensor.double().std(correction=0).item()

    for i, (taker, maker) in enumerate(sites):
        taker.register_forward_pre_hook(
            lambda module, args, i=i: keep((i, "shortcut_std"), args[0])
        )
        maker.register_forward_hook(
            lambda module, args, output, i=i: keep((i, "branch_std"), output)
        )
    frame = analysis.measure_branches(model, [batch])
    assert len(frame) == len(sites)
    for i, row in enumerate(frame.to_dict("records")):
        for column in ("shortcut_std", "branch_std"):
            assert row[column] == pytest.approx(stds[i, column], rel=1e-6), (i, column)
        assert row["ratio"] == pytest.approx(
            stds[i, "branch_std"] / stds[i, "shortcut_std"], rel=1e-6
        )

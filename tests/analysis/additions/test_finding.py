"""Residual additions are found by data flow, and measured as float64 hooks would."""

import math
from functools import partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analysis
from analysis.additions.finding import recording_additions
from analysis.additions.moments import AdditionMoments, additions_frame
from analysis.measuring.measurement import measuring
from models import build


class Function(nn.Module):
    """A network made of a function of the input and of linear layers a, b and c."""

    def __init__(self, function, size=8):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(size, size) for _ in "abc")
        self.scale = nn.Parameter(torch.rand(size))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def record_of(model, *inputs, passes=1, positions=False):
    model.eval()
    with torch.no_grad(), recording_additions(model, positions=positions) as record:
        for _ in range(passes):
            model(*inputs)
            record.end_pass()
    return record


def names_of(record):
    return [(a.name, a.branch, a.branch_kind, a.shortcut) for a in record.additions]


# --- what is residual ---------------------------------------------------------------------------

RESIDUAL = {
    "identity": (lambda m, x: x + m.a(x), "a", "identity"),
    "swapped": (lambda m, x: m.a(x) + x, "a", "identity"),
    "in place": (lambda m, x: m.a(x).add_(x), "a", "identity"),
    "subtracted": (lambda m, x: x - m.a(x), "a", "identity"),
    "scaled branch": (lambda m, x: torch.add(x, m.a(x), alpha=0.5), "a", "identity"),
    "addcmul": (lambda m, x: torch.addcmul(x, m.scale, m.a(x)), "a", "identity"),
    "layer scale": (lambda m, x: x + m.scale * m.a(x), "a", "identity"),
    "projection": (lambda m, x: m.a(x) + m.c(F.relu(m.b(x))), "c", "projection"),
    "in-place relu on the stream": (lambda m, x: F.relu_(x.clone() + m.a(x)), "a", "identity"),
    "view": (lambda m, x: x + m.a(x.view(-1, 8)).view(x.shape), "a", "identity"),
    "constant stream": (lambda m, x: m.scale.expand(x.shape) + m.a(m.scale * x), "a", "identity"),
}


@pytest.mark.parametrize("case", RESIDUAL)
def test_residual_additions_are_found(case):
    function, branch, shortcut = RESIDUAL[case]
    record = record_of(Function(function), torch.randn(4, 3, 8), passes=2)
    assert names_of(record) == [("", branch, "mlp", shortcut)]
    assert not record.others


def test_parallel_branches_are_two_additions():
    record = record_of(Function(lambda m, x: x + m.a(x) + m.b(x)), torch.randn(2, 8))
    assert [addition.branch for addition in record.additions] == ["a", "b"]


NOT_RESIDUAL = {
    "gelu's polynomial": (lambda m, x: cubed(m.a(x)), "no weights on the branch"),
    "GRN": (lambda m, x: x + m.scale * (x * x.norm(dim=1, keepdim=True)), "no weights"),
    "pooling": (lambda m, x: x + F.avg_pool1d(x, 3, 1, 1), "no weights on the branch"),
    "LoRA": (lambda m, x: m.a(x) + m.c(m.b(x)), "two ways without an activation"),
    "rotary": (lambda m, x: x * m.scale + x.roll(1, -1) * (1 - m.scale), "two ways without"),
    "highway gate": (lambda m, x: gate(m, x) * m.b(x) + (1 - gate(m, x)) * x, "no way without"),
    "HRNet's fusion": (lambda m, x: F.relu(m.a(x)) + m.c(F.relu(m.b(x))), "no way without"),
    "feature pyramid": (lambda m, x: pyramid(m, x), "used outside"),
    "Res2Net's split": (lambda m, x: split(m, x), "used outside"),
    "state-space skip": (lambda m, x: m.scale * x + m.b(F.silu(m.a(x))), "a vector scales"),
    "lerp": (lambda m, x: torch.lerp(x, m.a(x), 0.5), "inside lerp"),
    "stack and sum": (lambda m, x: torch.stack([x, m.a(x)]).sum(0), "a stack that is summed up"),
    "addmm": (lambda m, x: torch.addmm(x[0], x[0], m.a.weight), "inside addmm"),
    "baddbmm": (lambda m, x: torch.baddbmm(x, x, m.a.weight.expand(4, 8, 8)), "inside baddbmm"),
}


def cubed(y):
    return y + 0.044715 * y.pow(3)


def gate(m, x):
    return torch.sigmoid(m.a(x))


def pyramid(m, x):
    low = F.relu(m.a(x))
    high = F.relu(m.b(low))
    return m.c(low) + high, high


def split(m, x):
    first, second = m.a(x).chunk(2, dim=1)
    done = F.relu(m.b(first))
    return torch.cat([done, F.relu(m.c(done + second))], 1)


@pytest.mark.parametrize("case", NOT_RESIDUAL)
def test_other_sums_are_counted_with_their_reason(case):
    function, reason = NOT_RESIDUAL[case]
    record = record_of(Function(function), torch.randn(4, 8, 8))
    assert record.additions == []
    assert any(reason in why for (_, why) in record.others), record.others


SILENT = {
    "position embedding": lambda m, x: m.a(x) + m.scale.expand(x.shape),
    "bias": lambda m, x: m.a(x) + m.scale,
    "squeeze and excitation": lambda m, x: x * torch.sigmoid(m.a(x)),
    "concatenation": lambda m, x: torch.cat([x, m.a(x)], -1),
}


@pytest.mark.parametrize("case", SILENT)
def test_what_is_no_sum_of_data_is_not_even_counted(case):
    record = record_of(Function(SILENT[case]), torch.randn(4, 3, 8))
    assert (record.additions, dict(record.others)) == ([], {})


FOOLED = {
    "the input's position code": lambda m, x: x + m.a(x.cumsum(1).cos()),
    "wide and deep": lambda m, x: m.a(x) + m.c(F.relu(m.b(x))),
    "scores with a residual of their own": lambda m, x: scores(m, x, m.a(x) @ m.a(x).mT),
}


def scores(m, x, first):
    x = first.softmax(-1) @ m.b(x)
    return (first + m.c(x) @ m.c(x).mT).softmax(-1) @ x


@pytest.mark.parametrize("case", FOOLED)
def test_known_false_positives(case):
    assert len(record_of(Function(FOOLED[case]), torch.randn(4, 3, 8)).additions) == 1


def test_position_codes_that_are_added_again_are_no_streams():
    def function(m, x):
        code = m.scale.expand(x.shape)
        x = x + m.a(x + code)
        return x + m.b(x + code)

    record = record_of(Function(function), torch.randn(4, 3, 8))
    assert [addition.branch for addition in record.additions] == ["a", "b"]


def test_hooks_that_compute_with_a_branch_do_not_use_it():
    model = Function(lambda m, x: m.a(x) + m.c(F.relu(m.b(x))))
    model.b.register_forward_hook(
        lambda module, args, output: output.double().square().sum() and None
    )
    assert [a.shortcut for a in record_of(model, torch.randn(2, 8)).additions] == ["projection"]


# --- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet-20", "resnet-50"])
def test_our_networks_against_hooks_placed_by_hand(name):
    model, x = build(name).eval(), torch.randn(6, 3, 32, 32)
    blocks = {n: m for n, m in model.named_modules() if type(m).__name__ in BLOCKS}
    operands = {}
    for n, block in blocks.items():
        last = getattr(block, BLOCKS[type(block).__name__])
        for key, module in (("branch", last), ("shortcut", block.downsample)):
            hook = partial(keep, operands, (n, key))
            module.register_forward_hook(hook)
    with torch.no_grad():
        model(x)
    kept = {key: y.double().std(correction=0).item() for key, y in operands.items()}
    frame = analysis.measure_branches(model, [x[:4], x[4:]])
    assert frame["name"].tolist() == list(blocks)
    for column in ("branch", "shortcut"):
        expected = [kept[n, column] for n in blocks]
        assert frame[f"{column}_std"].tolist() == pytest.approx(expected, rel=1e-6)


BLOCKS = {"BasicBlock": "bn2", "Bottleneck": "bn3"}  # and the module that ends its branch


def keep(operands, key, module, args, output):
    operands.setdefault(key, output.clone())


class Block(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.f = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.f(x)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_all_columns_against_two_passes_in_float64(offset):
    model = Block(nn.LayerNorm(16), nn.Linear(16, 16))
    x = torch.randn(700, 5, 16) + offset
    with torch.no_grad():
        s, b = x.double(), model.f(x).double()
    frame = analysis.measure_branches(model, [x[:300], x[300:]], positions=True)
    [row] = frame.to_dict("records")
    ratios = []
    group = torch.arange(700) // 32 % 20
    for g in range(20):
        ratios.append((b[group != g].std(correction=0) / s[group != g].std(correction=0)).item())
    along = F.cosine_similarity(s, s + b, dim=-1)
    expected = {
        "branch_std": b.std(correction=0),
        "shortcut_std": s.std(correction=0),
        "after_std": (s + b).std(correction=0),
        "ratio": b.std(correction=0) / s.std(correction=0),
        "correlation": torch.corrcoef(torch.stack([s.flatten(), b.flatten()]))[0, 1],
        "std_error": math.sqrt(19 / 20 * sum((r - sum(ratios) / 20) ** 2 for r in ratios)),
        "norm_ratio": b.norm(dim=-1).mean() / s.norm(dim=-1).mean(),
        "growth": (s + b).norm(dim=-1).mean() / s.norm(dim=-1).mean(),
        "cosine": F.cosine_similarity(s, b, dim=-1).mean(),
    }
    for column, value in expected.items():
        assert row[column] == pytest.approx(
            float(value), rel=2e-5 if column == "std_error" else 1e-6
        ), column
    assert row["block_influence"] == pytest.approx(float(1 - along.mean()), rel=1e-5, abs=1e-7)
    assert row["count"] == 700 * 5 * 16


def test_normalised_branches_at_initialisation_have_ratios_of_one_over_root_l():
    """De & Smith (2020): a stream of variance l + 1, if every branch ends in BN."""
    torch.manual_seed(0)
    own = {"affine": True, "track_running_stats": False}
    layers = [Block(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64, **own)) for _ in range(8)]
    model = nn.Sequential(nn.BatchNorm2d(64, **own), *layers)
    for layer in layers:
        nn.init.orthogonal_(layer.f[0].weight)
    frame = analysis.measure_branches(model, [torch.randn(64, 64, 16, 16)])
    block = torch.arange(1, 9).double()
    assert frame["ratio"].tolist() == pytest.approx(block.rsqrt().tolist(), rel=0.01)
    assert frame["after_std"].tolist() == pytest.approx((block + 1).sqrt().tolist(), rel=0.01)


def test_orthogonal_unit_branches():
    """Stream and branches are unit vectors: Pythagoras gives all quantities of a position."""

    def function(m, x):
        for turn in range(1, 5):
            shift = torch.eye(8).roll(turn, 0)
            x = x + F.linear(F.one_hot(torch.zeros_like(x[..., 0]).long(), 8) * x[..., :1], shift)
        return x

    x = F.one_hot(torch.zeros(6, 3, dtype=torch.long), 8).float()
    frame = analysis.measure_branches(Function(function), [x], positions=True)
    for block, row in enumerate(frame.to_dict("records"), start=1):
        assert row["norm_ratio"] == pytest.approx(1 / math.sqrt(block))
        assert row["growth"] == pytest.approx(math.sqrt((block + 1) / block))
        assert row["cosine"] == pytest.approx(0, abs=1e-7)
        assert row["block_influence"] == pytest.approx(1 - math.sqrt(block / (block + 1)))
        assert row["angle"] == pytest.approx(math.atan(1 / math.sqrt(block)) / math.pi)


def test_positions_without_a_vector_have_no_angle():
    x = torch.ones(2, 3, 8)
    x[0, 0] = 0  # bias-free: no branch and no stream there
    model = Block(nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model.f[0].weight.copy_(torch.eye(8))
    [row] = analysis.measure_branches(model, [x], positions=True).to_dict("records")
    assert (row["cosine"], row["block_influence"]) == pytest.approx((1, 0), abs=1e-7)
    assert row["norm_ratio"] == pytest.approx(1)


def test_a_mask_leaves_positions_out():
    model = Block(nn.Linear(8, 8))
    x = torch.randn(40, 6, 8)
    masked = analysis.measure_branches(
        model, [x], mask=lambda batch: torch.arange(6).expand(40, 6) > 1, positions=True
    )
    rest = analysis.measure_branches(model, [x[:, 2:].contiguous()], positions=True)
    same = [column for column in rest if column not in ("shape", "network")]
    pd.testing.assert_frame_equal(masked[same], rest[same], rtol=1e-6)
    with pytest.raises(ValueError, match=r"^mask \(40, 5\) does not fit \(40, 6, 8\)$"):
        analysis.measure_branches(model, [x], mask=lambda batch: torch.ones(40, 5))


def test_sequence_first_tensors_are_grouped_by_image():
    layer = nn.Linear(8, 8)
    x = torch.randn(96, 7, 8)
    second = Function(lambda m, x: (x.transpose(0, 1) + layer(x.transpose(0, 1))).transpose(0, 1))
    first = Function(lambda m, x: x + layer(x))
    errors = [analysis.measure_branches(m, [x])["std_error"][0] for m in (first, second)]
    assert errors[0] > 0
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_moments_of_two_parts_merge():
    x = torch.randn(200, 8)
    model = Block(nn.Linear(8, 8))
    whole, part = record_of(model, x), record_of(model, x[:96])
    with torch.no_grad(), recording_additions(model) as record:
        record.images = 96  # the running index of the first image
        model(x[96:])
        record.end_pass()
    merged = [a.merge(b) for a, b in zip(part.additions, record.additions, strict=True)]
    frames = [additions_frame(a, network="n", images=200) for a in (merged, whole.additions)]
    pd.testing.assert_frame_equal(*frames, rtol=1e-6)
    assert math.isnan(AdditionMoments().std_error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = Block(nn.Linear(8, 8)).to(dtype)
    x = torch.randn(64, 8, dtype=dtype)
    with torch.no_grad():
        expected = model.f(x).double().std(correction=0) / x.double().std(correction=0)
    frame = analysis.measure_branches(model, [x])
    assert frame["ratio"][0] == pytest.approx(expected.item(), rel=1e-6)


def test_autocast():
    model = Block(nn.Linear(64, 64))
    x = torch.randn(64, 64)
    exact, rounded = (
        analysis.measure_branches(model, [x, x], precision=p)["ratio"][0]
        for p in ("float32", "bfloat16")
    )
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.01)
    with pytest.raises(ValueError, match="unknown precision 'half': one of float32, bfloat16"):
        analysis.measure_branches(model, [x], precision="half")


def test_tiny_values_and_constant_shortcuts():
    model = Block(nn.Linear(8, 8, bias=False))
    x = torch.randn(64, 8)
    usual = analysis.measure_branches(model, [x])["ratio"][0]
    assert analysis.measure_branches(model, [x * 1e-25])["ratio"][0] == pytest.approx(usual)
    constant = analysis.measure_branches(model, [torch.full((64, 8), 0.1)])
    assert constant["shortcut_std"][0] == 0
    assert math.isnan(constant["ratio"][0])


# --- passes, wrappers, errors -------------------------------------------------------------------


def test_layers_and_additions_from_the_same_passes():
    model = build("resnet-8").eval()
    x = torch.randn(24, 3, 32, 32)
    alone = analysis.measure(model, [x[:8], x[8:]])
    with recording_additions(model) as record, measuring(model) as measurement:
        for batch in (x[:8], x[8:]):
            measurement.add(batch)
            record.end_pass()
    frame = measurement.result().to_frame("network")
    pd.testing.assert_series_equal(frame["std"], alone["std"], rtol=1e-6)
    expected = analysis.measure_branches(model, [x])
    found = additions_frame(record.additions, network="network", images=24)
    pd.testing.assert_series_equal(found["ratio"], expected["ratio"], rtol=1e-6)
    assert not record.others


def test_a_failed_pass_leaves_no_trace():
    model = Block(nn.Linear(8, 8))
    x = torch.randn(4, 8)
    with torch.no_grad(), recording_additions(model) as record:
        for batch in (x, torch.randn(4, 9), x):
            try:
                model(batch)
            except RuntimeError:
                record.drop_pass()
            else:
                record.end_pass()
    assert record.passes == 2
    assert record.additions[0].moments.sums[:, 0].sum() == 2 * x.numel()


def test_another_path_is_an_error():
    def function(m, x):
        return x + m.a(x) if len(x) > 2 else x * 2

    def longer(m, x):
        return x + m.a(x) if len(x) > 2 else (x + m.a(x)) + m.b(x)

    for path in (function, longer):
        message = r"^batch 2 takes another path through the network than the first: the sums in "
        with pytest.raises(ValueError, match=message):
            analysis.measure_branches(Function(path), [torch.randn(4, 8), torch.randn(2, 8)])


def test_no_additions_and_what_was_seen():
    message = "^plain-8: no residual additions; no sum of two tensors of one shape that depend"
    with pytest.raises(ValueError, match=message):
        analysis.measure_branches(build("plain-8"), [torch.randn(2, 3, 32, 32)], network="plain-8")
    model = Function(lambda m, x: m.a(x) + m.b(x))
    message = r"its sums are: the network: two ways without an activation \(1x\)$"
    with pytest.raises(ValueError, match=message):
        analysis.measure_branches(model, [torch.randn(2, 8)])
    with pytest.raises(ValueError, match=r"^no images: there is nothing to measure$"):
        analysis.measure_branches(model, [])


def test_numbers_that_are_none():
    model = Block(nn.Linear(8, 8))
    x = torch.randn(4, 8)
    x[0, 0] = torch.nan
    message = "^NaN or infinity in the addition of f: look at the weights"
    with pytest.raises(ValueError, match=message):
        analysis.measure_branches(model, [x])


def test_fused_encoders_are_opened_and_fused_again():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3).eval()
    assert torch.backends.mha.get_fastpath_enabled()
    record = record_of(model, torch.randn(2, 5, 16))
    assert [a.branch_kind for a in record.additions] == ["attention", "mlp"] * 3
    assert torch.backends.mha.get_fastpath_enabled()


def test_wrapped_and_compiled_networks():
    model = build("resnet-8").eval()
    x = torch.randn(2, 3, 32, 32)
    expected = analysis.measure_branches(model, [x])
    wrapped = [nn.DataParallel(model), torch.compile(model, backend="eager")]
    for network in wrapped:
        pd.testing.assert_frame_equal(analysis.measure_branches(network, [x]), expected)


def test_several_inputs_dicts_and_checkpointing():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x, context):
            def step(x):
                return x + self.layer(x * context)

            return {"out": torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False)}

    batch = {"x": torch.randn(4, 8), "context": torch.randn(4, 8)}
    assert len(analysis.measure_branches(Network(), [batch])) == 1
    forward = {"forward": lambda model, batch: model(batch[0], context=batch[1])}
    assert len(analysis.measure_branches(Network(), [tuple(batch.values())], **forward)) == 1


def test_everything_is_as_it_was():
    model = build("resnet-8").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    analysis.measure_branches(model, [torch.randn(3, 3, 32, 32)] * 2, progress=seen.append)
    assert seen == [3, 3]
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

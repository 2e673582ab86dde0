import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import analysis
from analysis.measuring import measurement as hooks
from analysis.measuring.batches import compare_labels
from analysis.measuring.eval_mode import tf32_settings
from analysis.measuring.result import name_of
from models import build, load
from tests.conftest import ROOT


def conv(channels=4, kernel=3, inputs=4, **options):
    return nn.Conv2d(inputs, channels, kernel, padding=kernel // 2, **options)


def with_statistics(network):
    """BN numbers that are not the fresh ones, so that before and after BN differ."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


# What is measured


@pytest.mark.parametrize("name", ["resnet-8", "plain-14", "resnet-20"])
def test_our_networks_have_two_layers_a_block_and_the_first(name):
    network = build(name)
    frame = analysis.measure(network, [torch.randn(2, 3, 32, 32)], network="mine")
    assert len(frame) == network.config.depth - 1
    assert frame["layer"].tolist() == list(range(1, network.config.depth))
    assert frame["name"].iloc[[0, 1, -1]].tolist() == [
        "conv1",
        "layer1.0.conv1",
        f"layer3.{(network.config.depth - 2) // 6 - 1}.conv2",
    ]
    assert set(frame["kind"]) == {network.config.kind}
    assert set(frame["network"]) == {"mine"}
    half = (network.config.depth - 2) // 3
    assert frame["stage"].tolist() == [1] + [1] * half + [2] * half + [3] * half
    assert frame["height"].tolist() == [32] * (half + 1) + [16] * half + [8] * half
    assert (
        frame["count"].tolist()
        == (2 * frame["channels"] * frame["height"] * frame["width"]).tolist()
    )


def test_the_response_is_what_bn_puts_out_before_an_in_place_relu():
    network = with_statistics(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
    x = torch.randn(8, 4, 8, 8)
    [row] = analysis.measure(network, [x]).to_dict("records")
    response = network[1](network[0](x)).double()
    assert row["std"] == pytest.approx(response.std(correction=0).item(), rel=1e-6)
    assert row["mean"] == pytest.approx(response.mean().item(), rel=1e-5)
    assert row["std"] ** 2 == pytest.approx(row["within"] ** 2 + row["between"] ** 2)
    assert (row["images"], row["count"], row["source"]) == (8, 8 * 4 * 8 * 8, "hooks")


def stored_responses(network, batches):
    """All responses of a network of ours, stored: the slow, obvious reference."""
    stored = {}
    convs = {
        name: module
        for name, module in network.named_modules()
        if getattr(module, "kernel_size", 0) == (3, 3)
    }
    norms = dict(network.named_modules())
    for name in convs:
        norm = norms[name.replace("conv", "bn")]
        norm.register_forward_hook(
            lambda m, args, y, name=name: stored.setdefault(name, []).append(y.clone())
        )
    with torch.no_grad():
        for x in batches:
            network.eval()(x)
    return {name: torch.cat(parts) for name, parts in stored.items()}


@pytest.fixture(scope="module")
def real_network(akamaster):
    return lambda: load(akamaster[20], normalize="imagenet")


def test_real_responses_against_a_two_pass_in_float64(real_network, real_test):
    checkpoint = real_network()
    x = checkpoint.preprocessing(real_test.images[:500])
    frame = analysis.measure(checkpoint.model, x.split(128)).set_index("name")
    for name, response in stored_responses(checkpoint.model, x.split(128)).items():
        values = response.double().numpy()
        assert frame["std"][name] == pytest.approx(
            np.sqrt(np.mean((values - values.mean()) ** 2)), rel=1e-6
        )
        assert frame["mean"][name] == pytest.approx(values.mean(), rel=1e-5, abs=1e-6)


def test_any_batch_size_gives_the_same(real_network, real_test):
    checkpoint = real_network()
    x = checkpoint.preprocessing(real_test.images[:100])
    expected = analysis.measure(checkpoint.model, [x])
    for size in (7, 32):
        frame = analysis.measure(checkpoint.model, x.split(size))
        assert frame["std"].tolist() == pytest.approx(expected["std"].tolist(), rel=1e-6)
        assert frame["count"].tolist() == expected["count"].tolist()


def test_accuracy_comes_from_the_same_passes():
    network = build("resnet-8").eval()
    x = torch.randn(10, 3, 32, 32)
    labels = network(x).argmax(1)
    labels[:3] = (labels[:3] + 1) % 10
    batches = [(x[:6], labels[:6]), (x[6:], labels[6:])]
    assert analysis.measure(network, batches).attrs["accuracy"] == 0.7
    assert analysis.measure(network, [x]).attrs["accuracy"] is None


def test_a_device_without_float64_is_refused(monkeypatch):
    monkeypatch.setattr(hooks, "device_of", lambda model: torch.device("mps"))
    with pytest.raises(
        ValueError, match=r"the network is on mps, which has no float64: move it to the CPU"
    ):
        analysis.measure(nn.Sequential(conv(), nn.BatchNorm2d(4)), [torch.randn(2, 4, 8, 8)])


@pytest.mark.parametrize(("ignored", "classes"), [(255, 10), (-100, 10), (-1, 300)])
def test_labels_that_stand_for_nothing_do_not_count(ignored, classes):
    """Void pixels of segmentations, and torch's ignore_index."""
    logits = torch.randn(8, classes)
    labels = logits.argmax(1)
    labels[0] = (labels[0] + 1) % classes
    labels[1:5] = ignored
    assert compare_labels(logits, (logits, labels)).tolist() == [False, True, True, True]


def test_255_is_a_class_where_there_are_so_many():
    logits = torch.zeros(2, 300)
    logits[0, 255] = 1
    assert compare_labels(logits, (logits, torch.tensor([255, 255]))).tolist() == [True, False]


def test_passes_that_are_not_added_are_not_measured():
    """Such as a loader's own, which makes labels with the network that is measured."""
    network = with_statistics(build("resnet-8"))
    xs = torch.randn(3, 4, 3, 32, 32)
    expected = analysis.measure(network, xs)
    for count in (1, 3):
        frame = analysis.measure(network, ((x, network(x).argmax(1)) for x in xs[:count]))
        assert len(frame) == 7
        assert frame.attrs["accuracy"] == 1
    assert frame["std"].tolist() == pytest.approx(expected["std"].tolist(), rel=1e-5)


@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_empty_batch_is_passed_over(place):
    network = with_statistics(build("resnet-8"))
    xs = list(torch.randn(3, 4, 3, 32, 32))
    expected = analysis.measure(network, xs)
    xs.insert(place, torch.zeros(0, 3, 32, 32))
    assert analysis.measure(network, xs).equals(expected)
    with pytest.raises(ValueError, match="no images"):
        analysis.measure(network, [torch.zeros(0, 3, 32, 32)])


def test_in_a_block_of_autocast_the_weights_are_those_of_now():
    """Autocast keeps the weights that it cast until its outermost block ends."""
    network = with_statistics(build("resnet-8"))
    x = torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        network(x)
        with torch.no_grad():
            network.conv1.weight *= 3
        found = analysis.measure(network, [x], precision="bfloat16")
    assert (
        found["std"].tolist()
        == analysis.measure(network, [x], precision="bfloat16")["std"].tolist()
    )


def test_one_logit_is_no_class():
    network = nn.Sequential(conv(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 1))
    batch = torch.randn(4, 4, 8, 8), torch.zeros(4, dtype=torch.long)
    assert analysis.measure(network, [batch]).attrs["accuracy"] is None


@pytest.mark.parametrize(
    "config", [{"kind": "resnet", "depth": 3}, SimpleNamespace(kind="plain", depth=20, name="x")]
)
def test_a_config_of_others_names_no_network_of_ours(config):
    network = nn.Sequential(conv(), nn.BatchNorm2d(4))
    network.config = config
    frame = analysis.measure(network, [torch.randn(2, 4, 8, 8)])
    assert set(frame["kind"]) == {"other"}
    assert frame["depth"].isna().all()
    assert name_of(network) == "Sequential"


class Headed(nn.Module):
    """Two inputs, and an output of the kind that is asked for."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.bn, self.kind = conv(), nn.BatchNorm2d(4), kind

    def forward(self, image, shift=0.0):
        logits = (self.bn(self.conv(image)) + shift).mean((2, 3))
        return {
            "tuple": (logits, image),
            "out": {"aux": image, "out": logits},
            "logits": {"logits": logits},
        }[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "out", "logits"])
def test_several_inputs_and_outputs_in_tuples_and_dicts(kind):
    network, x = Headed(kind).eval(), torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        labels = network.bn(network.conv(x)).mean((2, 3)).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    shift = torch.ones(1)
    frames = [
        analysis.measure(network, [(x, labels)]),
        analysis.measure(
            network,
            [{"image": x, "shift": shift, "labels": labels}],
            forward=lambda m, b: m(x, shift),
        ),
        analysis.measure(
            network, [(x, labels, shift)], forward=lambda m, batch: m(batch[0], shift=batch[2])
        ),
    ]
    assert [frame.attrs["accuracy"] for frame in frames] == [0.75, 0.75, None]
    assert [frame["std"].tolist() for frame in frames] == [frames[0]["std"].tolist()] * 3
    frame = analysis.measure(network, [{"image": x, "shift": shift}])
    assert frame["images"].tolist() == [4]
    assert (frame.attrs["accuracy"], frame.attrs["unpaired"]) == (None, {})


def test_progress_counts_images():
    seen = []
    analysis.measure(build("resnet-8"), torch.randn(5, 3, 32, 32).split(2), progress=seen.append)
    assert seen == [2, 2, 1]


def test_bfloat16_is_near():
    network, x = build("resnet-8"), torch.randn(16, 3, 32, 32)
    exact = analysis.measure(network, [x])["std"]
    near = analysis.measure(network, [x], precision="bfloat16")["std"]
    assert not near.equals(exact)
    assert near.tolist() == pytest.approx(exact.tolist(), rel=0.02)
    with pytest.raises(ValueError, match="unknown precision 'int8': one of float32, bfloat16"):
        analysis.measure(network, [x], precision="int8")


# What is left behind: nothing


def state_of(network):
    tensors = {
        name: (tensor, tensor.clone())
        for name, tensor in network.state_dict(keep_vars=True).items()
    }
    flags = [module.training for module in network.modules()]
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in network.modules()
    ]
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    return tensors, flags, hooks, torch.is_grad_enabled(), tf32


def assert_unchanged(network, before):
    tensors, *rest = before
    after, *rest_after = state_of(network)
    assert rest == rest_after
    assert list(tensors) == list(after)
    for name, (tensor, value) in tensors.items():
        assert after[name][0] is tensor
        assert torch.equal(after[name][1], value)


def mixed_modes():
    """A network in training mode with a frozen part and a hook of its user's."""
    network = build("resnet-8").train()
    network.layer2.eval()
    network.fc.register_forward_hook(lambda *args: None)
    return network


@pytest.fixture(params=[True, False], ids=["TF32", "no TF32"])
def tf32(request):
    """Torch's setting for GPUs, which a test shall find as it left it."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = request.param
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def test_tf32_is_off_while_a_network_is_measured(tf32):
    network, seen = build("resnet-8"), []
    network.fc.register_forward_hook(
        lambda *args: seen.append([getattr(b, name) for b, name, _ in tf32_settings()])
    )
    analysis.measure(network, [torch.randn(2, 3, 32, 32)])
    assert seen == [[value for _, _, value in tf32_settings()]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_cpu_and_gpu_agree(tf32):
    network, x = with_statistics(build("resnet-20")), torch.randn(96, 3, 32, 32)
    expected = analysis.measure(network, x.split(32))
    frame = analysis.measure(network.to("cuda"), x.to("cuda").split(32))
    for column in ("std", "within", "between"):
        assert frame[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-5)
    assert frame["mean"].tolist() == pytest.approx(
        expected["mean"].tolist(), abs=1e-5 * expected["std"].min()
    )


def failing_batches():
    yield torch.randn(2, 3, 32, 32)
    raise OSError("the disk is gone")


@pytest.mark.parametrize("gradients", [True, False])
def test_measuring_leaves_a_network_as_it_was(gradients, tf32):
    network = mixed_modes()
    with torch.set_grad_enabled(gradients):
        before = state_of(network)
        analysis.measure(network, [torch.randn(4, 3, 32, 32)] * 2)
        assert_unchanged(network, before)


def test_also_when_the_network_writes_into_its_buffers():
    class Counting(nn.Sequential):
        def forward(self, x):
            self.calls += len(x)
            self.last = x.mean(0)
            return super().forward(x)

    network = Counting(conv(), nn.BatchNorm2d(4))
    network.register_buffer("calls", torch.zeros(()))
    network.register_buffer("last", torch.zeros(1))
    before = state_of(network)
    analysis.measure(network, [torch.randn(4, 4, 8, 8)] * 3)
    assert_unchanged(network, before)


def test_also_when_the_data_raises_half_way():
    network = mixed_modes()
    before = state_of(network)
    with pytest.raises(OSError, match="the disk is gone"):
        analysis.measure(network, failing_batches())
    assert_unchanged(network, before)


@pytest.mark.parametrize("size", [(2, 3), (2, 5, 32, 32)])
def test_also_when_the_network_raises(size):
    network = mixed_modes()
    before = state_of(network)
    with pytest.raises(RuntimeError):
        analysis.measure(network, [torch.randn(2, 3, 32, 32), torch.randn(size)])
    assert_unchanged(network, before)


def test_also_when_there_are_no_pairs():
    network = mixed_modes()
    before = state_of(network)
    with pytest.raises(
        ValueError,
        match=r"^no 5x5 convolution whose output goes unchanged into a BN and nowhere else: the netw",
    ):
        analysis.measure(network, [torch.randn(2, 3, 32, 32)], kernel_size=5)
    assert_unchanged(network, before)


def test_also_when_a_response_is_not_finite():
    network = mixed_modes()
    before = state_of(network)

    def batches():
        yield torch.randn(2, 3, 32, 32)
        variance = network.layer1[0].bn2.running_var.clone()
        network.layer1[0].bn2.running_var.fill_(-1)
        yield torch.randn(2, 3, 32, 32)
        network.layer1[0].bn2.running_var.copy_(variance)

    with pytest.raises(
        ValueError,
        match=r"NaN or infinity in the response of layer 3 \(layer1.0.conv2\) in batch 2: ",
    ):
        analysis.measure(network, batches())
    network.layer1[0].bn2.running_var.fill_(1)
    assert_unchanged(network, before)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images():
    script = textwrap.dedent("""
        import resource, sys, torch, analysis
        from models import build
        torch.set_num_threads(1)
        network, x = build("resnet-20"), torch.randn(32, 3, 32, 32)
        analysis.measure(network, [x] * 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        analysis.measure(network, (x for _ in range(30)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(run.stdout) < 16 * 1024  # KiB; the responses of 30 batches take 690 MiB


PEAKS = """
import resource, sys, torch, analysis
from torch import nn
from models import build

def peak(images=0):
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

torch.set_num_threads(1)
name, pixels = sys.argv[1:]
network, x = build(name).eval(), torch.randn(2, 3, int(pixels), int(pixels))
for module in network.modules():
    if isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.weight, 0.05)  # else the sums of 600 fresh blocks are infinite
analysis.measure(build("resnet-8"), [x])  # what is imported and set up once
with torch.no_grad():
    network(x)
peak()
analysis.measure(network, [x] * 5, progress=peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pixels", "responses", "weights"),
    [("resnet-152", 224, 25, 230), ("resnet-1202", 32, 87, 74)],
)
def test_memory_does_not_grow_with_depth_times_images(name, pixels, responses, weights):
    """Peaks of a plain pass, and of measuring five batches: `responses` of one and `weights` take
    so many MiB.
    """
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # what is freed leaves no holes in the heap
    command = [sys.executable, "-c", PEAKS, name, str(pixels)]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    plain, first, _, third, _, fifth = (
        int(line) / 1024 for line in run.stdout.split()
    )  # KiB -> MiB
    assert first - plain < responses / 2
    assert (
        third - plain < responses / 2 + 1.5 * weights
    )  # a folded copy may run from the second batch on
    assert fifth - third < responses / 2


# Bad input


def test_no_images():
    with pytest.raises(ValueError, match="no images: there is nothing to measure"):
        analysis.measure(build("resnet-8"), [])


def test_a_network_without_convolutions():
    with pytest.raises(
        ValueError,
        match=r"the network has no BN: analysis.measure_branches measures its residual additions",
    ):
        analysis.measure(nn.Linear(3, 3), [torch.zeros(1, 3)])


def test_a_network_without_values():
    with torch.device("meta"):
        network = build("resnet-8")
    with pytest.raises(
        ValueError,
        match="the network is on the meta device, where tensors have no values: load its w",
    ):
        analysis.measure(network, [torch.randn(2, 3, 32, 32)])


# Where memory is short


def short_of_memory(network, most, error, monkeypatch, fails_in="layer3.0.conv2"):
    """No more than so many images fit: the convolution of that name raises, after others were
    measured.
    """
    name = dict(network.named_modules())[fails_in].weight.shape
    forward, raised = nn.Conv2d._conv_forward, []

    def limited(self, x, *weights):
        if self.weight.shape == name and len(x) > most:
            raised.append(len(x))
            raise error
        return forward(self, x, *weights)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", limited)
    return raised


SHORT = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "hooks"])
def test_a_batch_that_does_not_fit_is_run_in_halves(folded, error, monkeypatch, capsys):
    network = with_statistics(build("resnet-8")).double()
    network.register_forward_hook(lambda *args: None) if not folded else None
    x, labels = torch.randn(43, 3, 32, 32).double(), torch.arange(43) % 10
    batches = [
        (x[:2], labels[:2]),
        (x[2:22], labels[2:22]),
        (x[22:39], labels[22:39]),
        (x[39:], labels[39:]),
    ]
    expected = analysis.measure(network, batches)
    raised = short_of_memory(network, 7, error, monkeypatch)
    frame = analysis.measure(network, batches)
    assert raised == [20, 10]  # once each, and never a larger batch again
    assert capsys.readouterr().err.splitlines() == [
        "resnet-8: out of memory at 20 images at a time, going on with 10",
        "resnet-8: out of memory at 10 images at a time, going on with 5",
    ]
    assert frame["count"].tolist() == expected["count"].tolist()
    assert set(frame["images"]) == {43}
    assert frame.attrs == expected.attrs
    for column in ("mean", "std", "within", "between"):
        assert frame[column].tolist() == pytest.approx(
            expected[column].tolist(), rel=1e-12, abs=1e-12
        ), column


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_batch_that_fails_leaves_no_trace(batch, monkeypatch):
    network = with_statistics(build("resnet-8")).double()
    batches = list(torch.randn(3, 4, 3, 32, 32).double())
    expected = analysis.measure(network, batches)
    with monkeypatch.context() as patch, hooks.measuring(network) as meter:
        for number, x in enumerate(batches):
            if number == batch:
                short_of_memory(network, 0, ZeroDivisionError("any"), patch)
                with pytest.raises(ZeroDivisionError):
                    meter.add(x)
                patch.undo()
            meter.add(x)
    assert meter.result().to_frame("network")["std"].tolist() == pytest.approx(
        expected["std"].tolist(), rel=1e-12
    )


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torch_jit_is_an_error():
    scripted = torch.jit.trace(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 8, 8)
    )
    for network in (scripted, nn.Sequential(nn.Conv2d(3, 3, 3), scripted)):
        with pytest.raises(
            ValueError,
            match=r"(the network|1) is a torch\.jit module, and hooks see nothing of what",
        ):
            analysis.measure(network, [torch.randn(2, 3, 8, 8)])


def test_another_error_is_not_taken_for_want_of_memory(monkeypatch, capsys):
    network = with_statistics(build("resnet-8")).double()
    raised = short_of_memory(
        network, 3, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), monkeypatch
    )
    with pytest.raises(RuntimeError, match="mat1"):
        analysis.measure(network, [torch.randn(6, 3, 32, 32).double()])
    assert raised == [6]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("splits", ["one image", "statistics of the batch", "forward"])
def test_a_batch_that_cannot_be_split_is_an_error(splits, monkeypatch):
    network = nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=splits[0] != "s"))
    options = {"forward": lambda model, x: model(x)} if splits == "forward" else {}
    short_of_memory(network, 0 if splits == "one image" else 3, MemoryError(), monkeypatch, "0")
    with pytest.raises(MemoryError):
        analysis.measure(network, [torch.randn(6, 4, 8, 8)], **options)


# What a batch is


def simple():
    return nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Flatten())


X = torch.randn(4, 4, 8, 8)
BAD = {
    "two views": ([[X, X]], r"a batch is .*, not list of 2 \(torch.float32, torch.float32\): pass"),
    "labels of floats": ([(X, torch.rand(4))], r"not tuple of 2 \(torch.float32, torch.float32\)"),
    "labels of bools": ([(X, torch.ones(4) > 0)], r"not tuple of 2 \(torch.float32, torch.bool\)"),
    "labels in a list": ([(X, [1, 2, 3, 4])], r"not tuple of 2 \(torch.float32, list\)"),
    "three of them": (
        [(X, torch.arange(4), X)],
        r"not tuple of 3 \(torch.float32, torch.int64, tor",
    ),
    "a string": ("images", r"no images in a batch of type str: a batch is a tensor of norm"),
    "an array": ([np.zeros((4, 4, 8, 8))], "in a batch of type ndarray: a batch is"),
    "a bare tensor": (
        X,
        r"0 took in one image without a batch dimension: a batch of images is \(N",
    ),
    "one image": ([X[0]], "0 took in one image without a batch dimension"),
    "uint8": ([X.byte()], "the images are torch.uint8 and the network does not take them: normal"),
}


@pytest.mark.parametrize(("batches", "message"), BAD.values(), ids=BAD)
def test_what_is_no_batch_is_an_error_that_says_what_one_is(batches, message):
    with pytest.raises(ValueError, match=message):
        analysis.measure(simple(), batches)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_integers_of_any_size_are_labels(dtype):
    network = simple().eval()
    labels = network(X).argmax(1)
    labels[0] += 1
    if dtype == torch.uint8:
        labels = labels.clamp(max=254)
    frame = analysis.measure(network, [(X, labels.to(dtype))])
    assert frame.attrs["accuracy"] in (0.75, None if dtype == torch.uint8 else 0.75)


def test_views_run_with_forward_and_count_once():
    views = [X, X.flip(3)]
    frame = analysis.measure(simple(), [views], forward=lambda model, batch: model(batch[0]))
    assert (frame["images"].tolist(), frame.attrs["accuracy"]) == ([4], None)


def test_a_network_that_takes_bytes_is_measured():
    class Scaling(nn.Sequential):
        def forward(self, x):
            return super().forward(x.float() / 255)

    frame = analysis.measure(Scaling(*simple()), [X.byte()])
    assert len(frame) == 1


# Sampling errors


@pytest.mark.slow
def test_sampling_errors_do_not_depend_on_the_batches_or_on_folding():
    torch.manual_seed(0)
    network, x = with_statistics(build("resnet-8")), torch.randn(700, 3, 16, 16)
    frames = [
        analysis.measure(network, [x]),
        analysis.measure(network, x.split(90)),
        analysis.measure(network, x.split([16, *[128] * 5, 44]), fold=False),
    ]
    for frame in frames:
        assert (frame["std_error"] > 0).all()
        assert frame["std_error"].tolist() == pytest.approx(
            frames[0]["std_error"].tolist(), rel=1e-4
        )
        assert frame["dominated"].tolist() == [False] * 7
    few = analysis.measure(network, [x[:600]])
    assert few["std_error"].isna().all()
    assert few["dominated"].isna().all()


def test_processes_that_share_the_images_give_what_one_gives():
    network, x = with_statistics(build("resnet-8")), torch.randn(700, 3, 8, 8)
    results = []
    for first, end in ((0, 700), (0, 350), (350, 700)):
        with hooks.measuring(network, first_image=first) as meter:
            for batch in x[first:end].split(100):
                meter.add(batch)
        results.append(meter.result())
    whole, first, second = results
    merged = second.merge(first)
    assert merged.images == 700
    assert merged.std_error.tolist() == pytest.approx(whole.std_error.tolist(), rel=1e-4)
    assert merged.std_without_groups().shape == (20, 7)
    np.testing.assert_allclose(merged.std_without_groups(), whole.std_without_groups(), rtol=1e-6)
    assert merged.dominated == [False] * 7
    assert np.isnan(first.std_error).all()
    assert np.isnan(first.std_without_groups()).all()


def test_one_image_that_dominates_a_layer_is_flagged():
    network, x = with_statistics(build("resnet-8")), torch.randn(700, 3, 8, 8)
    x[333] *= 100
    assert analysis.measure(network, x.split(100))["dominated"].tolist() == [True] * 7


def test_rows_that_are_not_the_images_have_no_sampling_error():
    network, x = with_statistics(build("resnet-8")), torch.randn(700, 3, 8, 8)
    both = lambda model, x: model(torch.cat([x, x.flip(3)]))  # noqa: E731
    frame = analysis.measure(network, x.split(350), forward=both)
    assert frame["std_error"].isna().all()
    assert frame["images"].unique().tolist() == [700]


def test_labels_of_another_number_of_classes_give_no_accuracy():
    network, batches = build("resnet-8"), [(torch.randn(4, 3, 32, 32), torch.arange(4))] * 2
    found = []
    for classes in (None, 10, 100):
        with hooks.measuring(network, classes=classes) as meter:
            for batch in batches:
                meter.add(batch)
        found.append(meter.result().accuracy)
    assert found[2] is None
    assert found[0] == found[1]
    assert found[0] is not None

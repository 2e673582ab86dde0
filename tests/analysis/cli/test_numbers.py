"""No wrong number without a word: labels, epsilon, modules that never ran, other weights, part of the images."""

import json
import re

import pytest
import torch
from torch import nn

from models import build
from models.checkpoints import loading
from models.checkpoints.custom import build_from
from models.data.labels import CLASSES
from tests.helpers import blobs, read_table, run, succeed, write_images

NETWORKS = """
from torch import nn

def eps():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3))

class Template(nn.Module):
    def __init__(self):
        super().__init__()
        self.template = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.second(self.first(x))

class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.blocks = nn.Sequential(*[
            nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            for _ in range(3)
        ])

    def forward(self, x):
        return self.blocks(self.stem(x))

class Without(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return x + self.a(x)
"""


@pytest.fixture
def write(tmp_path):
    """Return a function that writes networks of NETWORKS, after some training, as checkpoints."""
    (tmp_path / "nets.py").write_text(NETWORKS)

    def write(*names):
        for name in names:
            network = build_from(f"nets.py:{name}").train()
            for _ in range(20):
                network(torch.rand(4, 3, 32, 32) / 50)
            torch.save(network.state_dict(), f"{name}.pth")

    return write


@pytest.fixture
def line(images, out):
    return f"responses --data {images} --out {out} --format svg --normalize [0,1]"


@pytest.fixture
def formula(out):
    return f"responses --source batchnorm --out {out} --format svg"


def frame_in(out):
    return read_table(out / "responses.csv")


def accuracy(printed):
    return re.search(r"^ *resnet-8 +7 +(\S+)", printed, re.MULTILINE)[1]


def test_labels_follow_from_names_that_are_known(files, tmp_path, out):
    """Not from the position among the folders: there is no cat, and the numbers have a gap."""
    rename = {"airplane": "plane", "automobile": "Cars"}
    sets = {
        "true": CLASSES,
        "alias": [rename.get(name, name) for name in CLASSES],
        "numbers": [str(i) for i in range(10)],
        "own": [f"class {i}" for i in range(10)],
    }
    printed = {}
    for name, classes in sets.items():
        folder = write_images(tmp_path / name, blobs(40), classes)
        for file in (folder / classes[3]).iterdir():
            file.unlink()
        line = f"responses --checkpoint {files['resnet-8']} --data {folder} --out {out}"
        printed[name] = succeed(f"{line} --format svg").out
    known = accuracy(printed["true"])
    assert known != "-"
    assert [accuracy(printed[name]) for name in sets] == [known, known, known, "-"]
    said = "no accuracy: the class of the folder 'class 0' is not known\n"
    assert [printed[name].count(said) for name in sets] == [0, 0, 0, 1]


def test_the_epsilon_of_a_file_is_said_and_can_be_set(write, formula, line, out):
    write("eps")
    stds = {}
    for options in ("", "--eps 1e-3", "--model nets.py:eps"):
        printed = succeed(f"{formula} --checkpoint eps.pth {options}")
        stds[options] = frame_in(out)["std"][0]
        assumed = re.search(r"eps: epsilon (\S+) assumed; .* by up to (\S+) %\n", printed.out)
        expected = {"": "1e-05", "--eps 1e-3": "0.001"}.get(options)
        assert (assumed and assumed[1]) == expected
    variance = torch.load("eps.pth")["1.running_var"].double()  # gamma is 1 and beta 0
    right = [(variance / (variance + eps)).mean().sqrt().item() for eps in (1e-5, 1e-3, 1e-3)]
    assert list(stds.values()) == pytest.approx(right, rel=1e-6)
    model = "--checkpoint eps.pth --model nets.py:eps --eps 1e-4"
    assert (
        "eps: --eps: no effect, the network says its epsilon\n" in succeed(f"{formula} {model}").err
    )
    assert "--eps: no effect, it is for closed forms" in succeed(f"{line} {model}").err


def test_a_recognised_network_may_have_another_epsilon(formula, tmp_path, out):
    """Its file does not say it, if it is not one of ours."""
    network = build("resnet-8")
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.running_var, 1e-3)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    printed = succeed(f"{formula} --checkpoint a.pth --kind residual --eps 1e-3").out
    assert "resnet-8: epsilon 0.001 assumed; " in printed
    assert frame_in(out)["std"].tolist() == pytest.approx([0.5**0.5] * 7)


@pytest.mark.parametrize("name", ["Template", "Depthwise"])
def test_beside_hooks_the_closed_form_keeps_to_the_layers_that_ran(name, write, line, formula, out):
    """In the order in which they ran. Without the network, what is in doubt is left out, too."""
    write(name)
    rows = {"Template": ["first.0", "second.0"], "Depthwise": ["stem.0"]}[name]
    printed = succeed(f"{formula} --checkpoint {name}.pth").out
    assert sorted(frame_in(out)["name"]) == rows
    why = {"Template": "it never ran: template.1", "Depthwise": "no BN follows it: blocks.0.0, "}
    assert f"{name}: not computed, {why[name]}" in printed
    assert json.loads((out / "responses.json").read_text())[name]["unpaired"] != {}
    succeed(f"{line} --checkpoint {name}.pth --model nets.py:{name} --source batchnorm hooks")
    for _, part in frame_in(out).groupby("source"):
        assert part["name"].tolist() == rows
        assert part["layer"].tolist() == list(range(1, len(rows) + 1))


def test_one_builder_for_each_label(write, formula, out):
    write("eps", "Template", "Depthwise")
    paths = "--checkpoint a=eps.pth b=Template.pth Depthwise.pth"
    models = ("a=nets.py:eps", "b=nets.py:Template", "Depthwise=nets.py:Depthwise")
    succeed(f"{formula} {paths} {' '.join(f'--model {model}' for model in models)}")
    entries = json.loads((out / "responses.json").read_text())
    built = [f"{label}={entry['network']['model']}" for label, entry in entries.items()]
    assert built == list(models)
    error = run(f"{formula} {paths} --model c=nets.py:eps").error
    assert error == "error: --model c=nets.py:eps: no checkpoint is called c: Depthwise, a, b"
    error = run(f"{formula} {paths} --model nets.py:eps --model nets.py:Template").error
    assert "--model nets.py:Template: two without a label; write LABEL=" in error


def test_a_builder_for_a_group(write, out):
    write("eps")
    torch.save({name: x + 0.1 for name, x in torch.load("eps.pth").items()}, "b.pth")
    line = f"compare resnet-20 --group g=eps.pth,b.pth --out {out} --format svg"
    printed = succeed(f"{line} --source batchnorm --model g=nets.py:eps").out
    assert printed.count("network Sequential (built by --model)") == 2


def test_numbers_for_the_preprocessing(files, line, out):
    numbers = "--normalize 0.5,0.5,0.5/0.25,0.25,0.25"
    line = f"{line.replace('--normalize [0,1]', numbers)} --checkpoint {files['resnet-8']}"
    shown = succeed(line)
    assert "resnet-8: preprocessing 0.5,0.5,0.5/0.25,0.25,0.25, " in shown.out
    assert "no preprocessing fits" in shown.err
    model = loading.load(files["resnet-8"]).model
    x = torch.from_numpy(blobs(40)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = model.bn1(model.conv1((x - 0.5) / 0.25)).std(correction=0).item()
    assert frame_in(out)["std"][0] == pytest.approx(expected, rel=1e-5)
    error = run(line.replace("0.25,0.25,0.25", "0.25,0.25")).error
    assert "or the mean and std of the three channels" in error


def test_mmengine_saves_the_average_as_the_main_weights(formula, tmp_path):
    main, other = build("resnet-8").state_dict(), build("resnet-8").state_dict()
    tree = {"meta": {"mmengine_version": "0.10"}, "state_dict": main, "ema_state_dict": other}
    torch.save(tree, tmp_path / "a.pth")
    line = f"{formula} --checkpoint a.pth --kind residual"
    average = "weights: state_dict, an average as the file says; also in the file: ema_state_dict"
    assert all(average in succeed(f"{line} {option}").out for option in ("", "--ema"))
    raw = succeed(f"{line} --weights ema_state_dict").out
    assert "weights: ema_state_dict, not the average; also in the file: state_dict" in raw


def test_on_how_many_images_is_said_everywhere(files, line, out):
    printed = succeed(f"{line} --checkpoint {files['resnet-8']} --images 7 --html").out
    assert printed.startswith("7 of 40 test images, ")
    for name in ("fig7.svg", "decomposition.svg"):
        assert "measured on 7 of 40 images" in (out / name).read_text()
    assert "7 of 40 test images" in (out / "responses.html").read_text()
    assert not re.search("(holds|does not hold)$", printed, re.MULTILINE)


def test_the_papers_networks_under_other_names(formula, tmp_path, out):
    """The stem is called otherwise, and convolutions have a bias, which BN takes away."""
    state = build("resnet-20").state_dict()
    state = {re.sub("^(conv|bn)1", r"\g<1>0", name): x for name, x in state.items()}
    state["layer1.0.conv1.bias"] = torch.ones(16)
    torch.save(state, tmp_path / "a.pth")
    assert "resnet-20: network resnet-20 " in succeed(f"{formula} --checkpoint a.pth").out
    assert frame_in(out)["kind"].unique().tolist() == ["residual"]


FOREIGN = {
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "a Git LFS pointer, not",
    "\x08\x07\x12\x07pytorch\x1a\x052.1.0:": "an ONNX model; save",
    '{"metadata": {}, "weight_map": {"a": "b"}}': "the index of a checkpoint in several files",
}


@pytest.mark.parametrize("content", FOREIGN)
def test_what_a_file_is_instead(content, formula, tmp_path):
    (tmp_path / "a.pth").write_text(content)
    assert f"error: a.pth: {FOREIGN[content]}" in run(f"{formula} --checkpoint a.pth").error


def test_a_network_without_bn(formula, line, tmp_path):
    (tmp_path / "nets.py").write_text(NETWORKS)
    torch.save(build_from("nets.py:Without").state_dict(), tmp_path / "a.pth")
    error = run(f"{formula} --checkpoint a.pth").error
    assert "a.pth: it has no BN with recorded statistics to compute from; python -m" in error
    error = run(f"{line} --checkpoint a.pth --model nets.py:Without").error
    assert "a.pth: the network has no BN: " in error

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from analysis import measure
from analysis.probe import SHIPPED, main, nearest, parts_of
from analysis.probe_set import synthesis
from analysis.probe_set.synthesis import Goal
from models import build
from models.checkpoints import loading
from models.data import cifar10, probe
from models.data.preprocessing import PRESETS
from models.files import sha256
from tests.analysis.test_responses import images  # noqa: F401 (a fixture)
from tests.models.checkpoints.test_recognition import blobs, record


@pytest.fixture
def words(images, tmp_path, monkeypatch):  # noqa: F811
    """A command for two networks on a test set that is taken for the published one."""
    monkeypatch.setitem(cifar10.DIGESTS, "test", cifar10.load(images).digest)
    monkeypatch.setattr(synthesis, "EXCHANGES", 1)
    monkeypatch.setattr("analysis.probe.CANDIDATES", 2)
    for name in ("resnet-8", "plain-8"):
        network = record(build(name), PRESETS["imagenet"](blobs(40, seed=0)))
        loading.save(
            tmp_path / f"{name}.safetensors",
            network,
            PRESETS["imagenet"],
            crop_padding="none",
            training={},
        )
    networks = (
        tmp_path / "resnet-8.safetensors",
        "--held-out",
        f"other={tmp_path / 'plain-8.safetensors'}",
    )
    return (*networks, "--data", images, "--count", 70, "--rounds", 2)


def run(*words):
    return main([str(word) for word in words])


def test_the_command(words, tmp_path, capsys):
    assert run(*words, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "probe.csv",
        "probe.pdf",
        "probe.png",
        "probe.webp",
    ]
    data = probe.load(tmp_path / "out" / "probe.webp")
    assert data.images.shape == (70, 32, 32, 3)
    assert len(np.unique(data.images.reshape(70, -1), axis=0)) == 70
    table = pd.read_csv(tmp_path / "out" / "probe.csv").set_index("network")
    assert table["made_with"].to_dict() == {"resnet-8": True, "other": False}
    for name, file in (("resnet-8", "resnet-8"), ("other", "plain-8")):
        entry = data.card["networks"][name]
        assert entry["sha256"] == sha256(tmp_path / f"{file}.safetensors")
        assert entry["mean"] == pytest.approx(table.loc[name, "mean"])
        assert f"{100 * entry['mean']:.1f}" in printed
    assert data.card["versions"]["torch"] == torch.__version__
    assert {key: data.card[key] for key in ("count", "rounds", "seed")} == {
        "count": 70,
        "rounds": 2,
        "seed": 0,
    }
    assert (
        "the nearest of CIFAR-10's 80 images is " in printed
    )  # a folder without splits is taken for both


def test_a_shipped_network_has_more_weight(words, tmp_path, monkeypatch):
    weights = []

    def goal(*args):
        weights.append(args[-1])
        return Goal(*args)

    monkeypatch.setattr(synthesis, "Goal", goal)
    assert run("mine=resnet-20", *words, "--out", tmp_path / "out") == 0
    assert weights == [SHIPPED, 1]


def test_the_errors_are_those_that_responses_gives(words, images, tmp_path):  # noqa: F811
    """Measured again by the other command, on the images that were written."""
    from analysis.responses import main as responses

    assert run(*words, "--out", tmp_path / "out") == 0
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    data = probe.load(tmp_path / "out" / "probe.webp")
    for i, image in enumerate(data.images):
        Image.fromarray(image).save(pictures / f"{i}.png")
    means = {}
    for name, source in (("test", images), ("probe", pictures)):
        options = ["--data", str(source), "--format", "svg", "--out", str(tmp_path / name)]
        assert responses(["--checkpoint", str(tmp_path / "plain-8.safetensors"), *options]) == 0
        means[name] = pd.read_csv(tmp_path / name / "responses.csv")["std"]
    relative = (means["probe"] / means["test"] - 1).abs()
    entry = data.card["networks"]["other"]
    assert entry["mean"] == pytest.approx(relative.mean(), rel=1e-3)
    assert entry["largest"] == pytest.approx(relative.max(), rel=1e-3)
    assert entry["r"] == pytest.approx(np.corrcoef(means["probe"], means["test"])[0, 1], rel=1e-3)


def test_beside_them_stand_those_of_as_many_real_images(words, images, tmp_path):  # noqa: F811
    words = [20 if word == 70 else word for word in words]  # two parts of 20 images
    assert run(*words, "--out", tmp_path / "out") == 0
    entry = probe.load(tmp_path / "out" / "probe.webp").card["networks"]["other"]
    network, test = loading.load(tmp_path / "plain-8.safetensors").model, cifar10.load(images)

    def stds(images):
        return measure(network, [PRESETS["imagenet"](images)])["std"].to_numpy()

    parts = [stds(part.images) for part in parts_of(test, 20, seed=0)]
    apart = [np.abs(part / stds(test.images) - 1).mean() for part in parts]
    rs = [np.corrcoef(part, stds(test.images))[0, 1] for part in parts]
    assert max(apart) > 0.01
    expected = {
        "real_mean": np.mean(apart),
        "real_worst_mean": max(apart),
        "real_r": np.mean(rs),
        "real_worst_r": min(rs),
    }
    assert {name: entry[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("count", "sizes"), [(9, [10, 10, 10, 10]), (11, [14, 13, 13]), (70, [20, 20])]
)
def test_parts_are_all_of_the_test_set(count, sizes, images):  # noqa: F811
    """Not in the order of the files, which may be that of the classes."""
    test = cifar10.load(images)
    parts = parts_of(test, count, seed=0)
    assert [len(part) for part in parts] == sizes
    assert cifar10.digest(np.concatenate([part.images for part in parts]), None) == cifar10.digest(
        test.images, None
    )
    assert not np.array_equal(parts[0].images, test.images[: sizes[0]])


def test_it_goes_on_where_it_was_interrupted(words, tmp_path, capsys, monkeypatch):
    assert run(*words, "--out", tmp_path / "whole") == 0
    steps = synthesis.Synthesis.go_on

    def interrupted(self):
        for number, loss in enumerate(steps(self)):
            if number == 3:  # in the second round of two steps
                raise KeyboardInterrupt
            yield loss

    with monkeypatch.context() as patch:
        patch.setattr(synthesis.Synthesis, "go_on", interrupted)
        assert run(*words, "--out", tmp_path / "parts") == 130
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["state.pt"]
    capsys.readouterr()
    assert run(*words, "--seed", 1, "--out", tmp_path / "parts") == 2
    assert (
        "state.pt: images in the making with other seed; name another --out"
        in capsys.readouterr().err
    )
    with monkeypatch.context() as patch:  # it has more weight once it is shipped
        patch.setattr("models.zoo.shipped", lambda: ["resnet-8"])
        patch.setattr("models.zoo.find", lambda name: tmp_path / f"{name}.safetensors")
        assert run(*words, "--out", tmp_path / "parts") == 2
        assert (
            "state.pt: images in the making with other weights; name another --out"
            in capsys.readouterr().err
        )
    assert run(*words, "--out", tmp_path / "parts") == 0
    assert "state.pt: going on after step 2 of 4" in capsys.readouterr().out
    whole, parts = (probe.load(tmp_path / name / "probe.webp") for name in ("whole", "parts"))
    assert np.array_equal(whole.images, parts.images)
    assert whole.card == parts.card
    assert not (tmp_path / "parts" / "state.pt").exists()


@pytest.mark.parametrize("content", [b"", b"not a state", None])
def test_a_damaged_state_is_refused(content, words, tmp_path, capsys):
    state = tmp_path / "out" / "state.pt"
    state.parent.mkdir()
    torch.save([1], state) if content is None else state.write_bytes(content)
    assert run(*words, "--out", tmp_path / "out") == 2
    assert f"error: {state}: damaged; move it away" in capsys.readouterr().err
    assert state.exists()


def test_only_the_test_set_itself_will_do(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(cifar10.DIGESTS, "test", "of the published images")
    assert run(*words, "--out", tmp_path / "out") == 2
    assert "not CIFAR-10's test set, complete and exact" in capsys.readouterr().err


def test_without_cifar10_it_is_an_error(words, tmp_path, capsys):
    """The probe set does not stand for what it is made from."""
    assert run(words[0], "--out", tmp_path / "out") == 2
    assert "error: no CIFAR-10 test images found" in capsys.readouterr().err


def test_nearest_neighbours():
    others = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    mirrored = others[7, :, ::-1].astype(int)
    distances, numbers = nearest(
        np.stack([others[3], np.clip(mirrored + 3, 0, 255).astype(np.uint8)]), others
    )
    assert numbers[:, 0].tolist() == [3, 7]
    assert distances[0, 0] == pytest.approx(0, abs=0.5)
    assert distances[1, 0] == pytest.approx(3, abs=0.1)
    expected = np.sqrt(np.mean((others[3] - others[numbers[0, 1]].astype(float)) ** 2))
    straight = min(
        expected, np.sqrt(np.mean((others[3, :, ::-1] - others[numbers[0, 1]].astype(float)) ** 2))
    )
    assert distances[0, 1] == pytest.approx(straight, rel=1e-3)

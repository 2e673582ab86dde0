"""The command that makes a probe set and measures how far it is from the test set."""

import numpy as np
import pytest
import torch

from analysis import measure
from analysis import probe as command
from analysis.probe import nearest, parts_of
from analysis.probe_set import synthesis
from models import zoo
from models.checkpoints import loading
from models.data import cifar10, probe
from models.data.preprocessing import PRESETS
from models.files import sha256
from tests.helpers import files_in, fitting, read_table, run, save, succeed, write_images


@pytest.fixture
def line(images, files, monkeypatch):
    """Return the command for two networks, with a small test set that is taken for the published one."""
    monkeypatch.setitem(cifar10.DIGESTS, "test", cifar10.load(images).digest)
    monkeypatch.setattr(synthesis, "EXCHANGES", 1)
    monkeypatch.setattr(command, "CANDIDATES", 2)
    networks = f"{files['resnet-8']} --held-out other={files['plain-8']}"
    return f"probe {networks} --data {images} --count 70 --rounds 2"


def test_the_command(line, files, out):
    printed = succeed(f"{line} --out {out}").out
    assert list(files_in(out)) == ["probe.csv", "probe.pdf", "probe.png", "probe.webp"]
    data = probe.load(out / "probe.webp")
    assert data.images.shape == (70, 32, 32, 3)
    assert len(np.unique(data.images.reshape(70, -1), axis=0)) == 70
    table = read_table(out / "probe.csv").set_index("network")
    assert table["made_with"].to_dict() == {"resnet-8": True, "other": False}
    for name, path in (("resnet-8", files["resnet-8"]), ("other", files["plain-8"])):
        entry = data.card["networks"][name]
        assert entry["sha256"] == sha256(path)
        assert entry["mean"] == pytest.approx(table.loc[name, "mean"])
        assert f"{100 * entry['mean']:.1f}" in printed
    assert data.card["versions"]["torch"] == torch.__version__
    facts = {key: data.card[key] for key in ("count", "rounds", "seed")}
    assert facts == {"count": 70, "rounds": 2, "seed": 0}
    # A folder without splits is taken for both: 40 training and 40 test images.
    assert "the nearest of CIFAR-10's 80 images is " in printed


def test_a_shipped_network_has_more_weight(line, files, tmp_path, out, monkeypatch):
    """Here the networks of `files` are shipped."""
    weights, make = [], synthesis.Goal
    monkeypatch.setattr(synthesis, "Goal", lambda *args: weights.append(args[-1]) or make(*args))
    monkeypatch.setattr(zoo, "__file__", str(files["resnet-8"].parent / "__init__.py"))
    other = save(tmp_path / "other.safetensors", fitting("plain-8", preset="[0,1]"))
    options = line.partition("--data")[2]
    succeed(f"probe resnet-8 {other} --data {options} --out {out}")
    assert weights == [3, 1]


@pytest.mark.integration
def test_the_errors_are_those_that_responses_gives(line, images, files, tmp_path, out):
    """Measured again by the other command, on the images that were written."""
    succeed(f"{line} --out {out}")
    data = probe.load(out / "probe.webp")
    pictures = write_images(tmp_path / "pictures", data.images)
    stds = []
    for place in (images, pictures):
        options = f"--checkpoint {files['plain-8']} --data {place} --format svg --out {out}"
        succeed(f"responses {options}")
        stds.append(read_table(out / "responses.csv")["std"])
    relative = (stds[1] / stds[0] - 1).abs()
    entry = data.card["networks"]["other"]
    assert entry["mean"] == pytest.approx(relative.mean(), rel=1e-3)
    assert entry["largest"] == pytest.approx(relative.max(), rel=1e-3)
    assert entry["r"] == pytest.approx(np.corrcoef(*stds)[0, 1], rel=1e-3)


def test_beside_them_stand_those_of_as_many_real_images(line, images, files, out):
    """With 20 images there are two parts of the test set."""
    succeed(f"{line} --count 20 --out {out}")
    entry = probe.load(out / "probe.webp").card["networks"]["other"]
    network, test = loading.load(files["plain-8"]).model, cifar10.load(images)

    def stds(images):
        return measure(network, [PRESETS["imagenet"](images)])["std"].to_numpy()

    whole = stds(test.images)
    parts = [stds(part.images) for part in parts_of(test, 20, seed=0)]
    apart = [np.abs(part / whole - 1).mean() for part in parts]
    rs = [np.corrcoef(part, whole)[0, 1] for part in parts]
    assert max(apart) > 0.01
    names = ("real_mean", "real_worst_mean", "real_r", "real_worst_r")
    expected = [np.mean(apart), max(apart), np.mean(rs), min(rs)]
    assert [entry[name] for name in names] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("count", "sizes"), [(9, [10] * 4), (11, [14, 13, 13]), (70, [20, 20])])
def test_parts_are_all_of_the_test_set(count, sizes, images):
    """Not in the order of the files, which may be that of the classes."""
    test = cifar10.load(images)
    parts = parts_of(test, count, seed=0)
    assert [len(part) for part in parts] == sizes
    together = np.concatenate([part.images for part in parts])
    assert cifar10.digest(together, None) == cifar10.digest(test.images, None)
    assert not np.array_equal(parts[0].images, test.images[: sizes[0]])


@pytest.mark.slow
def test_it_goes_on_after_an_interruption(line, tmp_path, monkeypatch):
    succeed(f"{line} --out whole")
    steps = synthesis.Synthesis.go_on

    def interrupted(self):
        for number, loss in enumerate(steps(self)):
            if number == 3:  # in the second round of two steps
                raise KeyboardInterrupt
            yield loss

    with monkeypatch.context() as patch:
        patch.setattr(synthesis.Synthesis, "go_on", interrupted)
        assert run(f"{line} --out parts").status == 130
    assert list(files_in(tmp_path / "parts")) == ["state.pt"]
    error = run(f"{line} --seed 1 --out parts").error
    assert "state.pt: made with other seed; name another --out" in error
    printed = succeed(f"{line} --out parts").out
    assert "state.pt: continuing after step 2 of 4" in printed
    whole, parts = (probe.load(tmp_path / name / "probe.webp") for name in ("whole", "parts"))
    assert np.array_equal(whole.images, parts.images)
    assert whole.card == parts.card
    assert not (tmp_path / "parts" / "state.pt").exists()


@pytest.mark.parametrize("content", [b"", b"not a state", None])
def test_a_damaged_state_is_refused(content, line, out):
    out.mkdir()
    state = out / "state.pt"
    torch.save([1], state) if content is None else state.write_bytes(content)
    assert f"error: {state}: damaged; move it away" in run(f"{line} --out {out}").error
    assert state.exists()


def test_only_the_test_set_itself_will_do(line, out, monkeypatch):
    """The probe set does not stand for what it is made from."""
    monkeypatch.setitem(cifar10.DIGESTS, "test", "of the published images")
    assert "not CIFAR-10's test set, complete and exact" in run(f"{line} --out {out}").error
    error = run(f"probe resnet-20 --out {out}").error
    assert "error: no CIFAR-10 test images found" in error


def test_nearest_neighbours():
    others = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    mirrored = np.clip(others[7, :, ::-1].astype(int) + 3, 0, 255).astype(np.uint8)
    distances, numbers = nearest(np.stack([others[3], mirrored]), others)
    assert numbers[:, 0].tolist() == [3, 7]
    assert distances[0, 0] == pytest.approx(0, abs=0.5)
    assert distances[1, 0] == pytest.approx(3, abs=0.1)
    second = others[numbers[0, 1]].astype(float)
    ways = [np.sqrt(np.mean((image - second) ** 2)) for image in (others[3], others[3, :, ::-1])]
    assert distances[0, 1] == pytest.approx(min(ways), rel=1e-3)

"""What measuring costs beside a plain forward pass: the ways, the table and the command."""

import functools
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import benchmark
from analysis.baselines import METHODS, PLAIN, PLAIN_BFLOAT16, two_pass
from analysis.benchmark import COLUMNS, Job, largest_error, load_images, table_of
from models import build, zoo
from models.data import probe
from tests.helpers import ROOT, blobs, norms, read_table, run, succeed, write_images

MEASURING = [way for way in METHODS if way not in (PLAIN, PLAIN_BFLOAT16, "torchlens")]
SMALL = Job("resnet-8", 4, 4, None, "cpu", 1)


@pytest.fixture(scope="module")
def small():
    """Return a network, the names of its BNs in forward order, and batches of images."""
    torch.manual_seed(0)
    network = build("resnet-8").eval()
    names = [name for name, module in network.named_modules() if module in norms(network)]
    return network, names, torch.randn(10, 3, 32, 32).split(4)


@pytest.fixture
def same_process(monkeypatch):
    """Leave out the peaks of memory, for which other processes are started."""
    monkeypatch.setattr(benchmark, "peak_of", lambda job, way, names: (100.0 + len(way), ""))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The ways


def test_the_reference_is_the_std_of_all_values(small):
    network, names, batches = small
    stored = {name: [] for name in names}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: stored[name].append(y.detach().double())
        )
        for name in names
    ]
    expected = two_pass(network, names, lambda: batches)
    for handle in handles:
        handle.remove()
    for name, std in zip(names, expected, strict=True):
        assert std == pytest.approx(torch.cat(stored[name][:3]).std(correction=0).item(), rel=1e-12)


@pytest.mark.parametrize("way", MEASURING)
def test_every_way_measures_the_same(small, way):
    network, names, batches = small
    stds = METHODS[way](network, names, batches)
    rel = {"this toolkit, bfloat16": 0.02, "mean and var per channel": 0.01}.get(way, 1e-5)
    assert stds == pytest.approx(two_pass(network, names, lambda: batches), rel=rel)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("way", [PLAIN, PLAIN_BFLOAT16])
def test_the_plain_forward_pass_runs_every_batch_and_measures_nothing(small, way):
    network, names, batches = small
    seen = []
    with network.register_forward_hook(lambda module, args, output: seen.append(len(output))):
        assert METHODS[way](network, names, batches) == []
    assert seen == [4, 4, 2]


def test_torchlens_if_it_is_installed(small, monkeypatch):
    network, names, batches = small

    def keep(outputs, name, module, args, y):
        outputs[name] = types.SimpleNamespace(out=y)

    def trace(model, x):
        outputs, handles = {}, []
        for name in names:
            hook = functools.partial(keep, outputs, name)
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        model(x)
        for handle in handles:
            handle.remove()
        return types.SimpleNamespace(modules=outputs)

    monkeypatch.setitem(sys.modules, "torchlens", types.SimpleNamespace(trace=trace))
    stds = METHODS["torchlens"](network, names, batches)
    assert stds == pytest.approx(two_pass(network, names, lambda: batches))


# The command


def test_a_table_a_csv_and_a_figure(out, same_process, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchlens", None)  # as if it were not installed
    line = "benchmark --networks resnet-8 --images 5 --batch-size 2 --repeats 2 --threads 1"
    printed = succeed(f"{line} --out {out}").out
    assert "resnet-8: 5 images, 2 at a time, 2 rounds, cpu, 1 threads" in printed
    assert printed.count("wrote ") == 3
    assert {path.name for path in out.iterdir()} == {
        f"benchmark.{s}" for s in ("csv", "pdf", "png")
    }
    frame = read_table(out / "benchmark.csv")
    assert tuple(frame.columns) == COLUMNS
    assert frame["method"].tolist() == list(METHODS)
    facts = frame[["network", "device", "threads", "images", "batch_size", "repeats"]]
    assert facts.drop_duplicates().to_numpy().tolist() == [["resnet-8", "cpu", 1, 5, 2, 2]]
    frame = frame.set_index("method")
    assert frame["note"]["torchlens"] == "not installed"
    assert pd.isna(frame["ratio"]["torchlens"])
    ran = frame.drop(index="torchlens")
    assert ran["ratio"].to_numpy() == pytest.approx(ran["seconds"] / ran["seconds"][PLAIN])
    assert ran["images_per_s"].to_numpy() == pytest.approx(5 / ran["seconds"])
    assert ran["seconds"].between(ran["seconds_min"], ran["seconds_max"]).all()
    assert ran["above_plain_mb"].tolist() == (ran["peak_mb"] - ran["peak_mb"][PLAIN]).tolist()
    assert pd.isna(frame["error"][PLAIN])
    exact = ["this toolkit, float32", "float64 sums", "store, then std"]
    assert (ran.loc[exact, "error"] < 1e-5).all()
    assert 1e-5 < ran["error"]["this toolkit, bfloat16"] < 0.02


def test_ratios_are_of_medians(same_process, monkeypatch):
    """By a clock that says 10, 2 and 3 s for the plain forward pass, and 4, 6 and 100 s for another way."""
    ticks = [10, 4, 2, 6, 3, 100]
    clock = [float(time) for n in range(len(ticks)) for time in (1000 * n, 1000 * n + ticks[n])]
    monkeypatch.setattr(benchmark, "perf_counter", lambda: clock.pop(0))
    why_not = lambda way: "" if way in (PLAIN, "float64 sums") else "no"  # noqa: E731
    monkeypatch.setattr(benchmark, "why_not", why_not)
    rows = {row["method"]: row for row in benchmark.run_job(SMALL, 3)}
    assert clock == []
    assert (rows[PLAIN]["seconds"], rows[PLAIN]["ratio"]) == (3, 1)
    row = rows["float64 sums"]
    assert (row["seconds_min"], row["seconds"], row["seconds_max"], row["ratio"]) == (4, 6, 100, 2)
    assert "seconds" not in rows["store, then std"]


def test_all_ways_run_without_tf32(out, same_process, monkeypatch):
    """The reference too: on a GPU its errors would be taken for those of the ways."""
    seen = []

    def look(model, names, batches):
        matmul = torch.backends.cuda.matmul
        new = hasattr(
            matmul, "fp32_precision"
        )  # since torch 2.9, in which reading the old one fails
        seen.append(matmul.fp32_precision != "ieee" if new else matmul.allow_tf32)
        return []

    monkeypatch.setitem(METHODS, PLAIN, look)
    succeed(f"benchmark --networks resnet-8 --images 4 --repeats 1 --threads 1 --out {out}")
    assert seen
    assert not any(seen)


def test_the_table():
    row = {"network": "resnet-8", "images": 2000, "batch_size": 32, "repeats": 3}
    row |= {"device": "cpu", "threads": 2}
    known = {
        "method": "one",
        "seconds": 2.0,
        "seconds_min": 1.9,
        "seconds_max": 2.5,
        "ratio": 0.875,
    }
    known |= {"images_per_s": 1000.0, "peak_mb": 400.4, "above_plain_mb": -3.2}
    rows = [
        row | known | {"error": 2.34e-7, "note": ""},
        row | {"method": "two", "note": "not installed"},
    ]
    assert table_of(pd.DataFrame(rows, columns=list(COLUMNS))).splitlines() == [
        "resnet-8: 2,000 images, 32 at a time, 3 rounds, cpu, 2 threads",
        "method          seconds ratio images/s peak MB above plain error          note",
        "   one 2.00 (1.90-2.50)  0.88     1000     400          -3 2e-07              ",
        "   two                -     -        -       -           -     - not installed",
    ]


def test_the_error_is_the_largest_of_any_layer():
    assert largest_error([1.0, 2.2, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(0.25)
    assert largest_error([], [1.0]) is None


@pytest.mark.process
def test_memory_is_that_of_another_process():
    ballast = torch.ones(2**28)  # 1 GiB
    peak, note = benchmark.peak_of(SMALL, PLAIN, [])
    assert 50 < peak < 950
    assert note == ""
    del ballast


@pytest.mark.slow
@pytest.mark.process
def test_the_command_itself(out):
    """Started as users start it, when its own classes are those of __main__."""
    command = [
        sys.executable,
        "-m",
        "analysis.benchmark",
        "--networks",
        "resnet-8",
        "--images",
        "4",
    ]
    command += ["--repeats", "1", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    peaks = read_table(out / "benchmark.csv").set_index("method")["peak_mb"].drop("torchlens")
    assert peaks.between(50, 2000).all()


@pytest.mark.process
def test_what_fails_in_another_process_is_noted(monkeypatch, tmp_path):
    """That process is no child of multiprocessing, in which torchlens refuses to work."""
    source = "from multiprocessing import current_process\n"
    source += "def trace(model, x): raise OSError(current_process().name)"
    (tmp_path / "torchlens.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert benchmark.peak_of(SMALL, "torchlens", []) == (None, "OSError: MainProcess")


def test_a_process_that_is_killed_has_no_peak(monkeypatch, tmp_path):
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\ncat >/dev/null; kill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    assert benchmark.peak_of(SMALL, PLAIN, []) == (None, "out of memory in a process of its own")


def test_fresh_networks_have_the_statistics_of_their_images(monkeypatch):
    monkeypatch.setattr(zoo, "shipped", list)
    job = Job("plain-8", 8, 8, None, "cpu", 1)
    network = benchmark.load_network(job)
    assert not network.training
    with torch.no_grad():
        response = network.bn1(network.conv1(next(benchmark.batches_of(job, load_images(job)))))
    assert response.mean((0, 2, 3)).tolist() == pytest.approx([0.0] * 16, abs=1e-5)
    assert torch.equal(network.fc.weight, benchmark.load_network(job).fc.weight)


def test_images_by_name(tmp_path):
    """CIFAR-10 in a folder, and the probe set."""
    write_images(tmp_path / "cifar", blobs(3))
    loaded = load_images(Job("resnet-8", 2, 8, tmp_path / "cifar", "cpu", 1))
    assert np.array_equal(loaded, blobs(3)[:2])
    loaded = load_images(Job("resnet-8", 2, 8, benchmark.PROBE, "cpu", 1))
    assert np.array_equal(loaded, probe.load().images[:2])


BAD = {
    "--networks resnet-9": "error: no CIFAR-10 network has 9 layers: a depth is 6n + 2; the nearest are 8 ",
    "--networks resnet-8 lenet": "error: unknown network 'lenet': the names are resnet-DEPTH and ",
    "--networks resnet-8 --data nowhere": "error: nowhere: no such file or folder; --data takes ",
    "--networks resnet-8 --data cifar10": "error: no CIFAR-10 test images found: tried ",
    "--networks resnet-8 --data probe --images 9000": "error: --images 9000: there are 900 images in probe",
    "--networks resnet-8 --data cifar --images 9": "error: --images 9: there are 3 images in cifar",
    "--out /proc/nowhere": "error: --out /proc/nowhere: ",
    "--images 0": "argument --images: '0' is not a whole number of 1 or more",
    "--repeats 0": "argument --repeats: '0' is not a whole number of 1 or more",
    "--threads 0": "argument --threads: '0' is not a whole number of 1 or more",
    "--batch-size 0": "argument --batch-size: '0' is not a whole number of 1 or more",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line_and_status_2(options, tmp_path, out):
    write_images(tmp_path / "cifar", blobs(3))
    outcome = run(f"benchmark --out {out} {options}")
    assert BAD[options] in outcome.error
    assert outcome.out == ""


def test_a_device_that_is_not_there(out, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = run(f"benchmark --device cuda --out {out}").error
    assert "--device cuda: torch sees no CUDA device" in error


def test_debug_shows_the_traceback(out):
    with pytest.raises(ValueError, match="6n"):
        run(f"benchmark --networks resnet-9 --out {out} --debug")

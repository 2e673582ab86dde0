import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from analysis import benchmark
from analysis.baselines import PLAIN, PLAIN_BFLOAT16, WAYS, two_pass
from analysis.benchmark import COLUMNS, Job, layer_error, load_images, main, make_parser, table
from analysis.measuring import measurement as hooks
from models import build, zoo
from models.data import probe
from tests.conftest import ROOT

MEASURING = [way for way in WAYS if way not in (PLAIN, PLAIN_BFLOAT16, "torchlens")]


@pytest.fixture(scope="module")
def small():
    """A network, its BNs in forward order, and batches of images."""
    torch.manual_seed(0)
    network = build("resnet-8").eval()
    names = [
        name for name, module in network.named_modules() if isinstance(module, torch.nn.BatchNorm2d)
    ]
    return network, names, torch.randn(10, 3, 32, 32).split(4)


@pytest.fixture
def same_process(monkeypatch):
    """Peaks of memory in this process: to start others takes seconds."""
    monkeypatch.setattr(benchmark, "peak_of", lambda job, way, names: (100.0 + len(way), ""))


def run(tmp_path, *options):
    threads = torch.get_num_threads()
    try:
        return main(["--out", str(tmp_path / "out"), "--threads", "1", *options])
    finally:
        torch.set_num_threads(threads)


# The ways


def test_the_reference_is_the_std_of_all_values(small):
    network, names, batches = small
    stored = {name: [] for name in names}
    for name in names:
        module = network.get_submodule(name)
        module.register_forward_hook(
            lambda m, args, y, name=name: stored[name].append(y.detach().double())
        )
    expected = two_pass(network, names, lambda: batches)
    for module in network.modules():
        module._forward_hooks.clear()
    for name, std in zip(names, expected, strict=True):
        assert std == pytest.approx(torch.cat(stored[name][:3]).std(correction=0).item(), rel=1e-12)


@pytest.mark.parametrize("way", MEASURING)
def test_every_way_measures_the_same(small, way):
    network, names, batches = small
    stds = WAYS[way](network, names, batches)
    rel = {"this toolkit, bfloat16": 0.02, "mean and var per channel": 0.01}.get(way, 1e-5)
    assert stds == pytest.approx(two_pass(network, names, lambda: batches), rel=rel)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("way", [PLAIN, PLAIN_BFLOAT16])
def test_the_plain_forward_pass_runs_every_batch_and_measures_nothing(small, way):
    network, names, batches = small
    seen = []
    with network.register_forward_hook(lambda module, args, output: seen.append(len(output))):
        assert WAYS[way](network, names, batches) == []
    assert seen == [4, 4, 2]


def test_torchlens_where_it_is_installed(small, monkeypatch):
    network, names, batches = small

    def trace(model, x):
        outputs = {}
        for name in names:
            hook = lambda m, args, y, name=name: outputs.update(  # noqa: E731
                {name: types.SimpleNamespace(out=y)}
            )
            model.get_submodule(name).register_forward_hook(hook)
        model(x)
        return types.SimpleNamespace(modules=outputs)

    monkeypatch.setitem(sys.modules, "torchlens", types.SimpleNamespace(trace=trace))
    assert WAYS["torchlens"](network, names, batches) == pytest.approx(
        two_pass(network, names, lambda: batches)
    )
    for module in network.modules():
        module._forward_hooks.clear()


# The command


def test_a_table_a_csv_and_a_figure(tmp_path, capsys, same_process, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchlens", None)  # as if it were not installed
    assert (
        run(
            tmp_path,
            "--networks",
            "resnet-8",
            "--images",
            "5",
            "--batch-size",
            "2",
            "--repeats",
            "2",
        )
        == 0
    )
    frame = pd.read_csv(tmp_path / "out" / "benchmark.csv", keep_default_na=True)
    assert tuple(frame.columns) == COLUMNS
    assert frame["way"].tolist() == list(WAYS)
    frame = frame.set_index("way")
    assert set(frame["network"]) == {"resnet-8"}
    facts = (
        frame[["device", "threads", "images", "batch_size", "repeats"]]
        .drop_duplicates()
        .to_numpy()
        .tolist()
    )
    assert facts == [["cpu", 1, 5, 2, 2]]
    assert frame["note"]["torchlens"] == "not installed"
    assert pd.isna(frame["ratio"]["torchlens"])
    ran = frame.drop(index="torchlens")
    assert ran["ratio"].to_numpy() == pytest.approx(ran["seconds"] / ran["seconds"][PLAIN])
    assert ran["images_per_s"].to_numpy() == pytest.approx(5 / ran["seconds"])
    assert (ran["seconds_min"] <= ran["seconds"]).all()
    assert (ran["seconds"] <= ran["seconds_max"]).all()
    assert ran["above_plain_mb"].tolist() == (ran["peak_mb"] - ran["peak_mb"][PLAIN]).tolist()
    assert pd.isna(frame["error"][PLAIN])
    assert (
        ran.loc[["this toolkit, float32", "float64 sums", "store, then std"], "error"] < 1e-5
    ).all()
    assert 1e-5 < ran["error"]["this toolkit, bfloat16"] < 0.02
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "benchmark.csv",
        "benchmark.pdf",
        "benchmark.png",
    ]
    printed = capsys.readouterr().out
    assert "resnet-8: 5 images, 2 at a time, 2 rounds, cpu, 1 threads" in printed
    assert printed.count("wrote ") == 3


def test_ratios_are_of_medians(tmp_path, same_process, monkeypatch):
    """Seconds by a clock that jumps: 10, 2 and 3 for the plain forward pass, 4, 6 and 100 for the
    other.
    """
    ticks = [10, 4, 2, 6, 3, 100]
    clock = [float(time) for n in range(len(ticks)) for time in (1000 * n, 1000 * n + ticks[n])]
    monkeypatch.setattr(benchmark, "perf_counter", lambda: clock.pop(0))
    monkeypatch.setattr(
        benchmark,
        "why_not",
        lambda way, job, layers: "" if way in (PLAIN, "float64 sums") else "no",
    )
    job = Job("resnet-8", 4, 4, None, "cpu", torch.get_num_threads())
    rows = {row["way"]: row for row in benchmark.measure_job(job, 3)}
    assert clock == []
    assert (rows[PLAIN]["seconds"], rows[PLAIN]["ratio"]) == (3, 1)
    row = rows["float64 sums"]
    assert (row["seconds_min"], row["seconds"], row["seconds_max"], row["ratio"]) == (4, 6, 100, 2)
    assert "seconds" not in rows["store, then std"]


def test_all_ways_run_without_tf32(tmp_path, monkeypatch):
    """The reference too, or a GPU's errors would be its own."""
    seen = []

    def look(job, repeats):
        seen.extend(
            getattr(backend, setting) == value for backend, setting, value in hooks.tf32_settings()
        )
        raise ValueError("enough")

    monkeypatch.setattr(benchmark, "measure_job", look)
    assert benchmark.main(["--networks", "resnet-20", "--out", str(tmp_path)]) == 2
    assert len(seen) >= 2
    assert all(seen)


def test_the_table():
    row = {
        "network": "resnet-8",
        "images": 2000,
        "batch_size": 32,
        "repeats": 3,
        "device": "cpu",
        "threads": 2,
    }
    known = {
        "seconds": 2.0,
        "seconds_min": 1.9,
        "seconds_max": 2.5,
        "ratio": 0.875,
        "images_per_s": 1000.0,
    }
    rows = [
        row
        | known
        | {"way": "one", "peak_mb": 400.4, "above_plain_mb": -3.2, "error": 2.34e-7, "note": ""},
        row | {"way": "two", "note": "not installed"},
    ]
    assert table(pd.DataFrame(rows, columns=list(COLUMNS))).splitlines() == [
        "resnet-8: 2,000 images, 32 at a time, 3 rounds, cpu, 2 threads",
        "way          seconds ratio images/s peak MB above plain error          note",
        "one 2.00 (1.90-2.50)  0.88     1000     400          -3 2e-07              ",
        "two                -     -        -       -           -     - not installed",
    ]


def test_the_error_is_the_largest_of_any_layer():
    assert layer_error([1.0, 2.2, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(0.25)
    assert layer_error([], [1.0]) is None


def test_memory_is_that_of_another_process():
    job = Job("resnet-8", 4, 4, None, "cpu", 1)
    ballast = torch.ones(2**28)  # 1 GiB
    peak, note = benchmark.peak_of(job, PLAIN, [])
    assert 50 < peak < 950
    assert note == ""
    del ballast


def test_the_command_itself(tmp_path):
    """Started as users start it, when its own classes are those of __main__."""
    command = [
        sys.executable,
        "-m",
        "analysis.benchmark",
        "--networks",
        "resnet-8",
        "--images",
        "4",
        "--repeats",
        "1",
    ]
    subprocess.run([*command, "--out", tmp_path], check=True, capture_output=True, cwd=ROOT)
    table = pd.read_csv(tmp_path / "benchmark.csv").set_index("way").drop("torchlens")
    assert table.index.tolist() == [way for way in WAYS if way != "torchlens"]
    assert ((table["peak_mb"] > 50) & (table["peak_mb"] < 2000)).all()


def test_what_fails_in_another_process_is_noted(monkeypatch, tmp_path):
    """That process is no child of multiprocessing, where torchlens refuses to work."""
    trace = "from multiprocessing import current_process\ndef trace(model, x): raise OSError(current_process().name)"
    elsewhere = tmp_path / "packages"
    elsewhere.mkdir()
    (elsewhere / "torchlens.py").write_text(trace)
    monkeypatch.syspath_prepend(elsewhere)
    assert benchmark.peak_of(Job("resnet-8", 4, 4, None, "cpu", 1), "torchlens", []) == (
        None,
        "OSError: MainProcess",
    )


def test_a_process_that_is_killed_has_no_peak(monkeypatch, tmp_path):
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\ncat >/dev/null; kill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    expected = None, "out of memory in a process of its own"
    assert benchmark.peak_of(Job("resnet-8", 4, 4, None, "cpu", 1), PLAIN, []) == expected


def test_storing_more_than_a_third_of_the_memory_is_left_out(monkeypatch):
    layers = pd.DataFrame({"count": [2 * 10**6, 10**6], "images": [2, 2]})
    job = Job("resnet-8", 1000, 4, None, "cpu", 1)
    monkeypatch.setattr(benchmark, "memory_of_machine", lambda: 17.9)
    assert benchmark.why_not("store, then std", job, layers) == "would store 6 GB"
    assert benchmark.why_not("float64 sums", job, layers) == ""
    monkeypatch.setattr(benchmark, "memory_of_machine", lambda: 18.1)
    assert benchmark.why_not("store, then std", job, layers) == ""


def test_fresh_networks_have_the_statistics_of_their_images(monkeypatch):
    monkeypatch.setattr(zoo, "shipped", list)
    job = Job("plain-8", 8, 8, None, "cpu", 1)
    network = benchmark.load_network(job)
    assert not network.training
    with torch.no_grad():
        response = network.bn1(network.conv1(next(benchmark.batches_of(job))))
    assert response.mean((0, 2, 3)).tolist() == pytest.approx([0.0] * 16, abs=1e-5)
    assert torch.equal(network.fc.weight, benchmark.load_network(job).fc.weight)


def test_cifar10_where_it_is_named(tmp_path, same_process, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    folder = tmp_path / "test" / "cat"
    folder.mkdir(parents=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.png")
    job = Job("resnet-8", 2, 8, tmp_path, "cpu", 1)
    assert np.array_equal(load_images(job), pixels[:2])
    assert run(tmp_path, "--networks", "resnet-8", "--data", str(tmp_path), "--images", "9") == 2
    assert capsys.readouterr().err == f"error: --images 9: there are 3 images in {tmp_path}\n"


def test_the_probe_set_where_it_is_named(tmp_path, same_process, capsys):
    assert np.array_equal(
        load_images(Job("resnet-8", 2, 8, Path("probe"), "cpu", 1)), probe.load().images[:2]
    )
    assert run(tmp_path, "--networks", "resnet-8", "--data", "probe", "--images", "9000") == 2
    assert (
        capsys.readouterr().err
        == f"error: --images 9000: there are {len(probe.load())} images in probe\n"
    )
    args = make_parser().parse_args(["--data", "probe"])
    assert benchmark.make_job(args, "resnet-8").images == len(
        probe.load()
    )  # fewer than the default
    assert run(tmp_path, "--networks", "resnet-8", "--data", "cifar10") == 2
    assert capsys.readouterr().err.startswith("error: no CIFAR-10 test images found: tried ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--networks", "resnet-9"],
            "error: no CIFAR-10 network has 9 layers: a depth is 6n + 2; the nearest are 8 ",
        ),
        (
            ["--networks", "resnet-8", "lenet"],
            "error: unknown network 'lenet': the names are resnet-DEPTH and ",
        ),
        (
            ["--networks", "resnet-8", "--data", "nowhere"],
            "error: nowhere: no such file or folder; --data takes ",
        ),
        (["--out", "/proc/nowhere"], "error: --out /proc/nowhere: "),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, options, message):
    assert run(tmp_path, *options) == 2
    written = capsys.readouterr()
    assert written.err.startswith(message)
    assert written.err.count("\n") == 1
    assert written.out == ""


def test_a_device_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(tmp_path, "--device", "cuda") == 2
    assert "--device cuda: torch sees no CUDA device" in capsys.readouterr().err


def test_debug_shows_the_traceback_and_ctrl_c_writes_nothing(tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match="6n"):
        run(tmp_path, "--networks", "resnet-9", "--debug")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure_job", interrupt)
    assert run(tmp_path, "--networks", "resnet-8") == 130
    assert capsys.readouterr().err == "interrupted: no file is half-written\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_numbers_are_positive(capsys):
    for option in ("--images", "--repeats", "--threads", "--batch-size"):
        with pytest.raises(SystemExit, match="2"):
            make_parser().parse_args([option, "0"])


def test_help_imports_no_torch():
    script = "import sys; sys.argv = ['x', '--help']\nfrom analysis.benchmark import main\ntry: main()\nexcept SystemExit"
    script += ": print(sorted({'torch', 'pandas', 'matplotlib'} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.splitlines()[-1] == "[]"

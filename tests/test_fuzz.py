"""Damaged and forged files of every kind that is read: a result or one error in words, and nothing
else happens.

    python -m tests.test_fuzz --seconds 600

goes on for longer than the test does, from other random numbers each time (`--seed` repeats a run),
and writes what it finds into a folder. What was found stands among the cases of
tests/test_hostile.py.
"""

import argparse
import gzip
import io
import json
import os
import pickle
import pickletools
import resource
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from analysis.cli.entries import read_frames
from analysis.dynamics import read_config, read_metrics, read_snapshots
from analysis.measuring.frame import make_frame
from models import build, closed_form
from models.checkpoints import loading
from models.data import cifar10
from models.data.folder import ImageFolder
from models.data.preprocessing import PRESETS
from models.training.recipe import Recipe
from tests.conftest import ROOT

MEMORY = 400 * 2**20  # bytes that a reader may need above what it had before
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CALLS = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "ctypes.dlopen",
)
EXTREMES = (
    0,
    1,
    -1,
    127,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    -(2**63),
)
NUMBERS = (None, True, -1, 0, 1e308, float("nan"), 2**31, 2**63, 10**30)
VALUES = (*NUMBERS, "", "a\n\x1b[2J", [], [[]], {}, "F64", "F8_E4M3", "C64", "F4", "plain")
WORDS = (b"\n", b"\0", b'"', b",", b"9" * 5000, b"\x1b[2J", b"nan", b"[" * 2000, b"1e999")
INSTRUCTIONS = (
    b"N",
    b")",
    b"]",
    b"}",
    b"R",
    b"b",
    b"0",
    b"2",
    b"\x81",
    b"r\xff\xff\xff\x7f",
    b"q\0",
    b"\x85",
)

# What is read, and how


def read_checkpoint(folder):
    [path] = folder.iterdir()
    checkpoint = loading.load(path, need_model=False)
    closed_form(checkpoint.state if checkpoint.model is None else checkpoint.model)
    if checkpoint.preprocessing is not None:
        checkpoint.preprocessing(np.zeros((2, 32, 32, 3), np.uint8))


def read_images(folder):
    ImageFolder.open(folder).sample(4)


def read_cifar10(folder):
    path = next(folder.iterdir())
    cifar10.read(path if path.suffix in (".gz", ".parquet") else folder, "test")


def read_csv(folder):
    read_frames(folder / "responses.csv", None)


def read_run(folder):
    recipe = read_config(folder)
    read_metrics(folder)
    args = SimpleNamespace(
        run=folder, source=["batchnorm"], model=None, normalize="auto", ema=False
    )
    read_snapshots(args, recipe)


# Good files


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def image(form, mode="RGB", size=(32, 32), **options):
    buffer = io.BytesIO()
    pixels = np.arange(size[0] * size[1] * 4, dtype=np.uint8).reshape(*size, 4)
    Image.fromarray(pixels).convert("RGB").convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def deep_grey():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(buffer, "png")
    return buffer.getvalue()


def tiny():
    conv, norm = torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2)
    parts = {"0": conv.state_dict(), "1": norm.state_dict()}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.items()}


def snapshot(recipe):
    with tempfile.TemporaryDirectory() as folder:
        training = {**vars(recipe), "iteration": 4, "current_lr": 0.1}
        path = Path(folder) / "a.safetensors"
        loading.save(
            path, build("resnet-8"), PRESETS["imagenet"], crop_padding="zero", training=training
        )
        return path.read_bytes()


def batch():
    return {
        b"data": np.zeros((2, 3072), np.uint8),
        b"labels": [3, 4],
        b"filenames": [b"a.png", b"b.png"],
    }


def archive():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        content = pickle.dumps(batch(), 3)
        info = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def parquet():
    cells = [{"bytes": image("png"), "path": "a.png"}] * 2
    return pd.DataFrame({"img": cells, "label": [0, 1]}).to_parquet()


def frame():
    spread = {"mean": 0.1, "std": 5**0.5, "within": 1.0, "between": 2.0}
    rows = [
        {"layer": i, "name": "conv", "norm": "bn", "stage": 1, "channels": 8} | spread
        for i in (1, 2, 3)
    ]
    made = make_frame(rows, network="resnet-8", kind="residual", depth=8, source="batchnorm")
    return made.to_csv(index=False).encode()


def make_seeds():
    """By name: the reader, the files of its folder, and which of them is damaged."""
    torch.manual_seed(0)
    recipe = Recipe("residual", 8, iterations=8)
    run = {
        "config.json": json.dumps(vars(recipe)).encode(),
        "metrics.csv": b"iteration,lr,loss,error,mean_std\n2,0.1,2.3,90,1.0\n4,0.1,2.2,80,0.9\n",
        "snapshots/iteration-4.safetensors": snapshot(recipe),
    }
    wrapped = {
        "state_dict": tiny(),
        "epoch": 3,
        "arch": "resnet8",
        "best": (0.5, None),
        "optimizer": {"lr": 0.1},
    }
    labels = pickle.dumps(batch() | {b"labels": np.arange(2)}, 4)
    files = {
        read_checkpoint: {
            "zip.pth": saved(wrapped),
            "legacy.pth": saved(wrapped, _use_new_zipfile_serialization=False),
            "sparse.pth": saved({k: v.to_sparse() for k, v in tiny().items()}),
            "parameters.pth": saved(
                {k: torch.nn.Parameter(v) for k, v in tiny().items() if v.is_floating_point()}
            ),
            "tiny.safetensors": save(tiny()),
            "carded.safetensors": run["snapshots/iteration-4.safetensors"],
        },
        read_cifar10: {
            "test-0.parquet": parquet(),
            "test_batch": pickle.dumps(batch(), 3),
            "cifar-10-batches-py/test_batch": labels,
            "test_batch.bin": bytes(2 * 3073),
            "cifar-10-python.tar.gz": gzip.compress(archive()),
            "a.png": image("png"),
            "a.jpg": image("jpeg"),
        },
        read_images: {
            "a.png": image("png"),
            "grey.png": deep_grey(),
            "palette.png": image("png", "P", transparency=b"\0\1\2"),
            "animated.gif": image(
                "gif", "P", save_all=True, append_images=[Image.new("P", (32, 32), 3)]
            ),
            "a.webp": image("webp"),
            "a.tiff": image("tiff", compression="tiff_lzw"),
            "a.bmp": image("bmp"),
            "a.ppm": image("ppm"),
            "a.jpg": image("jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
        },
        read_csv: {"responses.csv": frame()},
    }
    seeds = {
        f"{read.__name__}, {name}": (read, {name: content}, name)
        for read, group in files.items()
        for name, content in group.items()
    }
    return seeds | {f"read_run, {name}": (read_run, run, name) for name in run}


# Damage


def damage(random, content, others):
    """Some bytes changed, cut out, put in, repeated or taken from another file."""
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at, to = sorted(random.randrange(len(content) + 1) for _ in range(2))
        to = min(to, at + random.choice((1, 4, 8, 64, 10**6)))
        kind = random.randrange(7)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            content[at:to] = random.randbytes(to - at)
        elif kind == 2:
            del content[at : random.choice((to, len(content)))]
        elif kind == 3:
            content[at:at] = content[at:to] * random.choice((1, 2, 100))
        elif kind == 4:
            form = random.choice(("<b", "<h", "<i", "<q", ">i", ">q"))
            number = random.choice(EXTREMES) & ((1 << 8 * struct.calcsize(form)) - 1)
            packed = number.to_bytes(struct.calcsize(form), "little" if form[0] == "<" else "big")
            content[at : at + len(packed)] = packed
        elif kind == 5:
            other = random.choice(others)
            start = random.randrange(len(other) + 1)
            content[at:to] = other[start : start + random.choice((1, 8, 64, 512))]
        else:
            content[at:at] = random.choice(WORDS)
    return bytes(content)


def damage_json(random, content):
    """One value or one key of a JSON document replaced, removed or repeated."""
    try:
        document = json.loads(content)
    except ValueError:
        return content
    place, key = {"": document}, ""
    while isinstance(place[key], dict | list) and place[key] and random.random() < 0.8:
        place = place[key]
        key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
    if isinstance(place[key], str) and place[key][:1] == "{" and random.random() < 0.9:
        place[key] = damage_json(random, place[key]).decode()
    elif isinstance(place, dict) and random.random() < 0.2:
        place[random.choice(("a", "preprocessing", "\x1b[2J", "dtype"))] = place.pop(key)
    elif isinstance(place[key], int) and random.random() < 0.5:
        place[key] += random.choice((-1, 1, 2**20, 2**40))
    else:
        place[key] = random.choice(VALUES)
    return json.dumps(document).encode()


def damage_pickle(random, content):
    """Instructions of a pickle left out, repeated, swapped, or with other numbers."""
    places = [place for _, _, place in pickletools.genops(content)]
    parts = [content[a:b] for a, b in zip(places, [*places[1:], len(content)], strict=True)]
    for _ in range(random.choice((1, 1, 2, 4))):
        at, other = random.randrange(len(parts)), random.randrange(len(parts))
        kind = random.randrange(6)
        if kind == 0:
            parts[at] = b""
        elif kind == 1:
            parts[at] = parts[at] * random.choice((2, 1000))
        elif kind == 2:
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3:
            parts[at] = parts[other]
        elif kind == 4:
            numbers = [
                i for i, part in enumerate(parts) if part[:1] in (b"K", b"M", b"J", b"\x8a")
            ] or [at]
            parts[random.choice(numbers)] = b"\x8a\x08" + struct.pack("<q", random.choice(EXTREMES))
        else:
            parts[at] += random.choice(INSTRUCTIONS)
    return b"".join(parts)


def damage_inside(random, content, others):
    """The same below the layer that would notice: an archive, a header, a checksum."""
    if content[:2] == b"\x1f\x8b":
        return gzip.compress(damage(random, gzip.decompress(content), others), 1)
    if content[:4] == b"PK\x03\x04":
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
            for name in old.namelist():
                part = old.read(name)
                new.writestr(name, damage_pickle(random, part) if name.endswith(".pkl") else part)
        return buffer.getvalue()
    if content[:1] == b"\x80":
        return damage_pickle(random, content)
    if content[:4] == b"\x89PNG":
        return repair_png(damage(random, content, others))
    if content[:1] == b"{":
        return damage_json(random, content)
    if content[8:9] == b"{":
        size = 8 + struct.unpack("<Q", content[:8])[0]
        header = damage_json(random, content[8:size])
        return struct.pack("<Q", len(header)) + header + content[size:]
    return damage(random, content, others)


def repair_png(content):
    """With checksums that are right."""
    result, at = content[:8], 8
    while at + 12 <= len(content):
        size = struct.unpack(">I", content[at : at + 4])[0]
        chunk = content[at + 4 : at + 8 + size]
        result += struct.pack(">I", size) + chunk + struct.pack(">I", zlib.crc32(chunk))
        at += 12 + size
    return result


# What must hold


@contextmanager
def watched(allowed: Path) -> Iterator[list[str]]:
    """What is done in the block that no reader should do: programs run, connections, files written
    elsewhere.
    """
    deeds: list[str] = []
    WATCHES.append((allowed, deeds))
    try:
        yield deeds
    finally:
        WATCHES.pop()


WATCHES: list[tuple[Path, list[str]]] = []


def audit(event, args):
    for allowed, deeds in WATCHES:
        if event in CALLS:
            deeds.append(f"{event} {args}")
        elif (
            event == "open" and isinstance(args[0], str | os.PathLike) and (args[2] or 0) & WRITING
        ):
            deeds.extend(
                [f"{event} {args}"] * (not os.fspath(args[0]).startswith((str(allowed), "/dev/")))
            )


sys.addaudithook(audit)


def check(read, files):
    """Read the files. AssertionError, or whatever came, unless it ends as it should."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        there = sorted(folder.rglob("*"))
        with watched(cifar10.cache_folder()) as deeds, warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", module="PIL")  # as the commands do
            said = "nothing wrong"
            try:
                read(folder)
            except (ValueError, OSError) as error:
                said = str(error)
        assert sorted(folder.rglob("*")) == there
    assert said
    assert not deeds
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"{grown / 2**20:.0f} MB"


SEEDS = make_seeds()
CONTENTS = [files[target] for _, files, target in SEEDS.values()]


def forge(random, name):
    """The reader, and the files of a seed with one of them damaged."""
    read, files, target = SEEDS[name]
    damaged = (damage_inside if random.random() < 0.6 else damage)(random, files[target], CONTENTS)
    return read, files | {target: damaged}


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(name=st.sampled_from(list(SEEDS)), state=st.integers(0, 2**64 - 1))
def test_damaged_files(name, state):
    check(*forge(Random(state), name))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", SEEDS)
def test_the_good_files_are_read(name, tmp_path):
    """Else nothing would be found behind the error that they end in. Of sparse tensors there is no
    good file.
    """
    read, files, _ = SEEDS[name]
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    expected = pytest.raises(ValueError, match="is sparse") if "sparse" in name else nullcontext()
    with expected:
        read(tmp_path)


def wordless(folder):
    raise ValueError


BAD = {
    "a program": lambda folder: os.system("true"),
    "a file elsewhere": lambda folder: Path("evil").write_text(""),
    "a file beside it": lambda folder: (folder / "evil").mkdir(),
    "an error without words": wordless,
    "another error": lambda folder: {}["evil"],
    "a warning": lambda folder: warnings.warn("evil", stacklevel=1),
}


@pytest.mark.parametrize("read", BAD.values(), ids=BAD)
def test_what_must_not_happen_is_noticed(read):
    with pytest.raises((AssertionError, KeyError, UserWarning)):
        check(read, {"a.pth": b""})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("found"))
    args = parser.parse_args()
    names = [name for name in SEEDS if args.only in name]
    random, end, count, kinds = Random(args.seed), time.monotonic() + args.seconds, 0, {}
    print(f"--seed {args.seed}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LAYER_RESPONSES_CACHE"] = cache
        while time.monotonic() < end:
            name = random.choice(names)
            state = random.getrandbits(64)
            read, files = forge(Random(state), name)
            args.out.mkdir(exist_ok=True)
            (args.out / "last").write_text(f"{name}\n{state}\n")
            started = time.monotonic()
            try:
                check(read, files)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)
                ours = [
                    f"{Path(f.filename).name}:{f.lineno}"
                    for f in where
                    if f.filename.startswith(str(ROOT))
                ][-1]
                kind = f"{type(error).__name__} {ours} {where[-1].name}"
                kinds[kind] = kinds.get(kind, 0) + 1
                if kinds[kind] == 1:
                    print(f"{name} {state}: {kind}: {str(error)[:300]}", flush=True)
            if (took := time.monotonic() - started) > 3:
                print(f"{name} {state}: took {took:.0f} s", flush=True)
            count += 1
    print(count, "files", kinds)


if __name__ == "__main__":
    main()

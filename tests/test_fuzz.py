"""Damaged and forged files of every kind that is read: a result or one error in words, and nothing else happens.

    python -m tests.test_fuzz --seconds 600

goes on for longer than the test does, from other random numbers each time (`--seed` repeats a run). What was found
stands among the cases of tests/test_hostile.py.
"""

import argparse
import gzip
import io
import json
import os
import pickletools
import resource
import struct
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from contextlib import nullcontext
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from models import closed_form
from models.checkpoints import loading
from models.data import cifar10
from models.data.folder import ImageFolder
from plots import draw_compare, draw_dynamics
from tests.helpers import (
    as_archive,
    as_batch,
    as_image,
    as_parquet,
    frame,
    run,
    watching,
    write_run,
)

assert draw_compare, draw_dynamics  # imported here, where warnings are no errors
MEMORY = 400 * 2**20  # bytes that a reader may need above what it had before
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CALLS = [
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "ctypes.dlopen",
]
EXTREMES = [0, 1, -1, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]
VALUES = [None, True, -1, 0, 1e308, float("nan"), 2**31, 2**63, 10**30]
VALUES += ["", "a\n\x1b[2J", [], [[]], {}, "F64", "F8_E4M3", "C64", "F4", "plain"]
WORDS = [b"\n", b"\0", b'"', b",", b"9" * 5000, b"\x1b[2J", b"nan", b"[" * 2000, b"1e999"]
INSTRUCTIONS = [b"N", b")", b"]", b"}", b"R", b"b", b"0", b"2", b"\x81", b"\x85", b"q\0"]
INSTRUCTIONS += [b"r\xff\xff\xff\x7f"]

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


def command(line):
    """Run a command without its figures. Raise ValueError with its line if it refuses the input."""
    with tempfile.TemporaryDirectory() as out, mock.patch("matplotlib.figure.Figure.savefig"):
        outcome = run(f"{line} --format svg --out {out}")
    if outcome.status:
        raise ValueError(outcome.error)


def read_frame(folder):
    command(f"compare {folder}/responses.csv b={folder}/responses.csv")


def read_run(folder):
    command(f"dynamics {folder}")


# Good files


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def deep_grey():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(buffer, "png")
    return buffer.getvalue()


def make_seeds():
    """Return by name: the reader, the files of its folder, and which of them is damaged."""
    torch.manual_seed(0)
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2)).state_dict()
    wrapped = {"state_dict": small, "epoch": 3, "best": (0.5, None), "optimizer": {"lr": 0.1}}
    floats = {name: x for name, x in small.items() if x.is_floating_point()}
    with tempfile.TemporaryDirectory() as name:
        folder = write_run(Path(name), [20])
        paths = [path for path in folder.rglob("*") if path.is_file()]
        written = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    [snapshot] = [name for name in written if name.endswith(".safetensors")]
    frames = [Image.new("P", (32, 32), 3)]
    files = {
        read_checkpoint: {
            "zip.pth": saved(wrapped),
            "legacy.pth": saved(wrapped, _use_new_zipfile_serialization=False),
            "sparse.pth": saved({name: x.to_sparse() for name, x in small.items()}),
            "parameters.pth": saved({name: torch.nn.Parameter(x) for name, x in floats.items()}),
            "tiny.safetensors": save(small),
            "carded.safetensors": written[snapshot],
        },
        read_cifar10: {
            "test-0.parquet": as_parquet(),
            "test_batch": as_batch(),
            "cifar-10-batches-py/test_batch": as_batch(labels=np.arange(2)),
            "test_batch.bin": bytes(2 * 3073),
            "cifar-10-python.tar.gz": as_archive(("cifar-10-batches-py/test_batch", as_batch())),
            "a.png": as_image(),
            "a.jpg": as_image("jpeg"),
        },
        read_images: {
            "a.png": as_image(),
            "grey.png": deep_grey(),
            "palette.png": as_image("png", "P", transparency=b"\0\1\2"),
            "animated.gif": as_image("gif", "P", save_all=True, append_images=frames),
            "a.webp": as_image("webp"),
            "a.tiff": as_image("tiff", compression="tiff_lzw"),
            "a.bmp": as_image("bmp"),
            "a.ppm": as_image("ppm"),
            "a.jpg": as_image("jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
        },
        read_frame: {"responses.csv": frame().to_csv(index=False).encode()},
    }
    seeds = {
        f"{read.__name__}, {name}": (read, {name: content}, name)
        for read, group in files.items()
        for name, content in group.items()
    }
    return seeds | {f"read_run, {name}": (read_run, written, name) for name in written}


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


def misdeeds(allowed, deeds):
    """Return a watch that notes programs, connections, and files written elsewhere than in `allowed`."""

    places = (*map(str, allowed), "/dev/")

    def writes(path, mode, flags):
        named = isinstance(path, str | os.PathLike) and (flags or 0) & WRITING
        return named and not os.fspath(path).startswith(places)

    def watch(event, args):
        if event in CALLS or (event == "open" and writes(*args)):
            deeds.append(f"{event} {args}")

    return watch


def check(read, files):
    """Read the files. Raise AssertionError, or whatever came, unless it ends as it should."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    deeds, said = [], "nothing wrong"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        there = sorted(folder.rglob("*"))
        places = [cifar10.cache_folder()] + [tempfile.gettempdir()] * (
            read in (read_frame, read_run)
        )
        with watching(misdeeds(places, deeds)), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", module="PIL")  # as the commands do
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


@pytest.mark.fuzz
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(name=st.sampled_from(list(SEEDS)), state=st.integers(0, 2**64 - 1))
def test_damaged_files(name, state):
    check(*forge(Random(state), name))


@pytest.mark.fuzz
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
    """Go on until the time is over, and print what must not happen, once for each place in the code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    args = parser.parse_args()
    random, end, found = Random(args.seed), time.monotonic() + args.seconds, set()
    print(f"--seed {args.seed}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LAYER_RESPONSES_CACHE"] = cache
        while time.monotonic() < end:
            name, state = random.choice(list(SEEDS)), random.getrandbits(64)
            try:
                check(*forge(Random(state), name))
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} in {place.filename}:{place.lineno}"
                if kind not in found:
                    print(f"{name} {state}: {kind}: {str(error)[:300]}", flush=True)
                found.add(kind)


if __name__ == "__main__":
    main()

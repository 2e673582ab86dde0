"""Files of strangers and slips of users: each gets one line that says what is wrong, and nothing else happens.

The readers of checkpoints and images are called; commands run only for what they add. A run of all cases writes
tests/HOSTILE.md. Frames and runs that someone edited are in tests/analysis/test_compare.py and test_dynamics.py.
"""

import contextlib
import gzip
import io
import os
import pickle
import resource
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from models.checkpoints import loading
from models.data import cifar10
from models.messages import one_line
from tests.helpers import (
    ROOT,
    as_archive,
    as_batch,
    as_image,
    as_parquet,
    files_in,
    frame,
    run,
    watching,
)

DOCUMENT = ROOT / "tests" / "HOSTILE.md"
MEMORY = 400 * 2**20  # bytes that a reader may need above what it had before, whatever a file says
CHECKPOINTS, IMAGES, COMMANDS = {}, {}, {}  # by name: what writes it, and words of the message
SAID = {}  # by name: the message
HEAD = "# Hostile and careless input\n\nWritten by `python -m pytest tests/test_hostile.py`.\n\n"
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
)


def case(cases, words):
    """Add a hostile input: the function writes it into a folder and returns what is read."""

    def add(function):
        cases[function.__name__.replace("_", " ")] = function, words
        return function

    return add


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


EVIL = Calls(os.system, "touch evil")
NORM = {name: torch.ones(4) for name in ("weight", "bias", "running_mean", "running_var")}
STATE = {"conv1.weight": torch.ones(4, 3, 3, 3), **{f"bn1.{name}": x for name, x in NORM.items()}}


def saved(path, content, **options):
    torch.save(content, path / "a.pth", **options)
    return path / "a.pth"


def changed(path, **tensors):
    """Write a state dict in which tensors are others; `bn1_weight` stands for bn1.weight."""
    return saved(path, STATE | {name.replace("_", ".", 1): x for name, x in tensors.items()})


def zipped(path, payload):
    """Write torch.save's zip format around a pickle."""
    with zipfile.ZipFile(path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    return path / "a.pth"


# Checkpoints: pickles

DAMAGED = "not a checkpoint, damaged or truncated"
NO_STATE = "no state dict in it"


@case(CHECKPOINTS, "os.system")
def code_in_the_first_protocol(path):
    (path / "a.pt").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    return path / "a.pt"


@case(CHECKPOINTS, "posix.system")
def a_bare_pickle(path):
    (path / "a.pth").write_bytes(pickle.dumps(EVIL))
    return path / "a.pth"


@case(CHECKPOINTS, DAMAGED)
def a_storage_that_says_it_is_huge(path):
    saved(path, {"conv1.weight": torch.zeros(16, 3, 3, 3)}, _use_new_zipfile_serialization=False)
    content = (path / "a.pth").read_bytes()
    at = content.rindex(struct.pack("<q", 432))  # the number of values before the storage
    (path / "a.pth").write_bytes(content[:at] + struct.pack("<q", 2**40) + content[at + 8 :])
    return path / "a.pth"


@case(CHECKPOINTS, "would take 8,589,934,588 bytes")
def a_tensor_larger_than_its_storage(path):
    torch.save({"conv1.weight": torch.zeros(4)}, path / "b.pth")
    with zipfile.ZipFile(path / "b.pth") as before, zipfile.ZipFile(path / "a.pth", "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85")
            after.writestr(name, content)
    return path / "a.pth"


@case(CHECKPOINTS, "is compressed")
def a_zip_bomb(path):
    """Half a megabyte that unpacks to half a gigabyte."""
    with zipfile.ZipFile(path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", "3\n")
        with archive.open("archive/data.pkl", "w", force_zip64=True) as file:
            for _ in range(512):
                file.write(bytes(2**20))
    return path / "a.pth"


@case(CHECKPOINTS, DAMAGED)
def a_zip_without_a_pickle(path):
    with zipfile.ZipFile(path / "a.pth", "w") as archive:
        archive.writestr("../../evil", "outside")
    return path / "a.pth"


@case(CHECKPOINTS, DAMAGED)
def an_archive_of_the_oldest_torch(path):
    with tarfile.open(path / "a.pth", "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
        tar.addfile(tarfile.TarInfo("../../evil"))
    return path / "a.pth"


# Checkpoints: safetensors


def safetensors(path, header, content=b"", size=None):
    encoded = header if isinstance(header, bytes) else repr(header).replace("'", '"').encode()
    length = struct.pack("<Q", len(encoded) if size is None else size)
    (path / "a.safetensors").write_bytes(length + encoded + content)
    return path / "a.safetensors"


def entry(start, end, shape=(4,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


def carded(path, card, mean=(3, 1, 1)):
    """Write a file that takes itself for one of ours."""
    ours = {"preprocessing.mean": torch.zeros(mean), "preprocessing.std": torch.ones(3, 1, 1)}
    save_file(STATE | ours, path / "a.safetensors", metadata={"card": card})
    return path / "a.safetensors"


CUT = "damaged or truncated safetensors file"
UNREADABLE = "its card cannot be read"


@case(CHECKPOINTS, CUT)
def offsets_beyond_the_end(path):
    header = {"a": entry(0, 16), "b": entry(16, 2**40, (2**38,))}
    return safetensors(path, header, bytes(16))


@case(CHECKPOINTS, CUT)
def an_empty_file(path):
    (path / "a.safetensors").touch()
    return path / "a.safetensors"


CHECKPOINTS |= {
    "code": (lambda path: saved(path, EVIL), "posix.system"),
    "code in a state dict": (
        lambda path: saved(path, {"state_dict": STATE | {"z": [[EVIL]]}}),
        "posix.system",
    ),
    "code of a builtin": (
        lambda path: saved(path, {"state_dict": Calls(eval, "open('evil', 'w')")}),
        "eval",
    ),
    "code in the legacy format": (
        lambda path: saved(path, EVIL, _use_new_zipfile_serialization=False),
        "posix.system",
    ),
    "a pickle that never ends": (lambda path: zipped(path, b"\x80\x02" + b"]" * 100_000), DAMAGED),
    "a pickle of deep nesting": (
        lambda path: zipped(path, b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."),
        NO_STATE,
    ),
    "an empty dictionary": (lambda path: saved(path, {}), NO_STATE),
    "numbers in place of names": (
        lambda path: saved(path, {0: torch.zeros(3), 1: torch.zeros(3)}),
        NO_STATE,
    ),
    "infinity": (
        lambda path: changed(path, bn1_weight=torch.full((4,), torch.inf)),
        "NaN or infinity in",
    ),
    "whole numbers for weights": (
        lambda path: changed(path, conv1_weight=torch.ones(4, 3, 3, 3, dtype=torch.int64)),
        "conv1.weight holds int64",
    ),
    "sparse weights": (
        lambda path: changed(path, conv1_weight=torch.ones(4, 3, 3, 3).to_sparse()),
        "conv1.weight is sparse",
    ),
    "tensors without data": (
        lambda path: changed(path, conv1_weight=torch.ones(4, 3, 3, 3, device="meta")),
        "without data",
    ),
    "a negative variance": (
        lambda path: changed(path, bn1_running_var=torch.full((4,), -1.0)),
        "bn1.running_var",
    ),
    "a matrix for a vector": (
        lambda path: changed(path, bn1_running_var=torch.ones(4, 2)),
        "bn1.running_var",
    ),
    "a name that is a formula": (
        lambda path: saved(path, {"=HYPERLINK(1).weight": torch.zeros(3)}),
        "is no name of a tensor",
    ),
    "a name with control characters": (
        lambda path: saved(path, {"a\nerror: all is well\n\x1b[2J": torch.zeros(3)}),
        "is no name of a tensor",
    ),
    "a header that says it is a terabyte": (lambda path: safetensors(path, b"{}", size=2**40), CUT),
    "a shape that overflows": (
        lambda path: safetensors(path, {"a": entry(0, 16, (2**32, 2**32, 2**32))}, bytes(16)),
        CUT,
    ),
    "a header that is no json": (lambda path: safetensors(path, b"{'a': "), CUT),
    "a card of deep nesting": (lambda path: carded(path, "[" * 100_000), UNREADABLE),
    "a card with a number of many digits": (lambda path: carded(path, "9" * 5000), UNREADABLE),
    "a card with control characters": (
        lambda path: carded(path, '{"preprocessing": "\\u001b[2J"}'),
        "preprocessing '\\x1b[2J'",
    ),
    "a preprocessing of another shape": (lambda path: carded(path, "{}", (3, 5)), "(3, 5)"),
}


# Images and CIFAR-10


def file(path, name, content):
    (path / "cifar").mkdir(exist_ok=True)
    (path / "cifar" / name).write_bytes(content)
    return path / "cifar"


def chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def declared(width, height):
    """Return a PNG of some bytes that says it is of this size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


NO_IMAGE = "damaged or no image"


@case(IMAGES, NO_IMAGE)
def an_image_with_a_bomb_of_text(path):
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(128 * 2**20)))
    return file(path, "a.png", as_image()[:33] + text + as_image()[33:])


@case(IMAGES, "no CIFAR-10 test images here")
def a_pipe_among_the_images(path):
    (path / "cifar").mkdir()
    os.mkfifo(path / "cifar" / "a.png")
    return path / "cifar"


def shard(path, content):
    (path / "test-0.parquet").write_bytes(content)
    return path / "test-0.parquet"


COLUMNS = "no columns img"


def repeated(path, value, rows):
    """Write a parquet file of some kilobytes that says it holds this value in every row."""
    zeros = pyarrow.array([0] * rows, pyarrow.int32())
    image = pyarrow.DictionaryArray.from_arrays(zeros, pyarrow.array([value]))
    images = pyarrow.StructArray.from_arrays([image], ["bytes"])
    table = pyarrow.table({"img": images, "label": zeros})
    parquet.write_table(table, path / "test-0.parquet", compression="snappy", store_schema=False)
    return path / "test-0.parquet"


def archive(path, content):
    (path / "cifar-10-python.tar.gz").write_bytes(content)
    return path / "cifar-10-python.tar.gz"


@case(IMAGES, "no test_batch")
def an_archive_with_links(path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("test_batch")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return archive(path, buffer.getvalue())


@case(IMAGES, "damaged or truncated archive")
def an_archive_with_a_header_of_megabytes(path):
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.XHDTYPE, 512 * 2**20
    return archive(path, gzip.compress(info.tobuf() + bytes(64 * 2**20), 1))


BATCH = "not a batch of CIFAR-10"


@case(IMAGES, BATCH)
def a_batch_of_any_memory(path):
    """Numpy would take these eight bytes for an address."""
    return file(
        path, "test_batch", as_batch(Calls(np.ndarray, (1,), np.dtype("u1"), b"A" * 8), [0])
    )


@case(IMAGES, BATCH)
def one_label_a_billion_times(path):
    labels = Calls(np.ndarray, (2**28,), np.dtype("u1"), b"A", 0, (0,))
    content = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": labels})
    return file(path, "test_batch", content)


@case(IMAGES, BATCH)
def labels_in_lists_of_lists(path):
    labels = [0] * 10
    for _ in range(7):
        labels = [labels] * 10
    return file(path, "test_batch", as_batch(labels=labels))


@case(IMAGES, "far larger than a batch of CIFAR-10")
def a_batch_of_gigabytes(path):
    folder = file(path, "test_batch", b"")
    os.truncate(folder / "test_batch", 2**36)  # it takes no room on the disk
    return folder


IMAGES |= {
    "an image bomb": (lambda path: file(path, "a.png", declared(60_000, 60_000)), NO_IMAGE),
    "a truncated image": (lambda path: file(path, "a.png", as_image()[:60]), NO_IMAGE),
    "postscript for an image": (
        lambda path: file(
            path, "a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(evil) (w) file\n"
        ),
        NO_IMAGE,
    ),
    "an image of another size": (
        lambda path: file(path, "a.png", as_image(size=(33, 32))),
        "33x32",
    ),
    "numbers for images": (lambda path: shard(path, as_parquet([1, 2])), COLUMNS),
    "more labels than images": (
        lambda path: shard(path, as_parquet([{"bytes": as_image(), "path": "a"}, None])),
        COLUMNS,
    ),
    "words for labels": (lambda path: shard(path, as_parquet(labels=["cat", "dog"])), "label"),
    "a parquet file cut off": (
        lambda path: shard(path, as_parquet()[:-20]),
        "damaged or truncated parquet file",
    ),
    "a parquet bomb": (lambda path: repeated(path, bytes(4 * 2**20), 500), NO_IMAGE),
    "a million images": (
        lambda path: repeated(path, as_image(), 10**6),
        "far larger than CIFAR-10",
    ),
    "an archive with paths outside": (
        lambda path: archive(
            path, as_archive(("../../evil", b"outside"), ("/tmp/evil", b"outside"))
        ),
        "no test_batch",
    ),
    "an archive bomb": (
        lambda path: archive(
            path, as_archive(("cifar-10-batches-py/test_batch", bytes(80 * 2**20)))
        ),
        "far larger than a batch of CIFAR-10",
    ),
    "an archive of much else": (
        lambda path: archive(
            path, as_archive(*((f"file{i}", bytes(32 * 2**20)) for i in range(4)))
        ),
        "no test_batch",
    ),
    "code in an archive": (
        lambda path: archive(path, as_archive(("test_batch", pickle.dumps(EVIL)))),
        "posix.system",
    ),
    "code in a batch": (lambda path: file(path, "test_batch", as_batch(Calls(eval, "1"))), "eval"),
    "a batch of python objects": (
        lambda path: file(
            path, "test_batch", as_batch(Calls(np.ndarray, (1,), np.dtype("O"), b"A" * 8), [0])
        ),
        "only arrays of whole numbers",
    ),
    "a batch that remembers too much": (
        lambda path: file(path, "test_batch", b"\x80\x02}r" + struct.pack("<I", 2**27) + b"."),
        BATCH,
    ),
    "a batch of another shape": (
        lambda path: file(path, "test_batch", as_batch(np.zeros((2, 100), np.uint8))),
        BATCH,
    ),
}


# Commands


def compared(path, content):
    (path / "a.csv").write_bytes(content)
    return f"compare {path}/a.csv b={path}/a.csv"


def measured(path, label="", options=""):
    """Return words that compute a good network under this label."""
    saved(path, STATE)
    return f"responses --checkpoint '{label}{path}/a.pth' --source batchnorm {options}"


@case(COMMANDS, "not a frame")
def a_frame_that_is_an_archive(path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a.csv"), frame().to_csv())  # always of the same date
    return compared(path, buffer.getvalue())


@case(COMMANDS, "67,108,864 bytes")
def a_frame_of_gigabytes(path):
    words = compared(path, b"")
    os.truncate(path / "a.csv", 2**36)
    return words


@case(COMMANDS, "can be written")
def a_file_for_the_results(path):
    (path / "file").touch()
    return measured(path, options=f"--out {path}/file")


@case(COMMANDS, "no CIFAR-10 test images here")
def a_pipe_for_data(path):
    os.mkfifo(path / "pipe.parquet")
    return f"responses --depth 20 --data {path}/pipe.parquet"


COMMANDS |= {
    "code among checkpoints": (
        lambda path: f"responses --checkpoint {saved(path, EVIL)} --source batchnorm",
        "posix.system",
    ),
    "code among what is compared": (
        lambda path: f"compare a={saved(path, EVIL)} resnet-20 --source batchnorm",
        "posix.system",
    ),
    "a frame with control characters": (
        lambda path: compared(
            path, frame(network="a\x1b[2J\nerror: ok").to_csv(index=False).encode()
        ),
        "is unprintable, or a formula",
    ),
    "a layer of many digits": (
        lambda path: compared(path, frame(layer=[1, 2, "9" * 5000]).to_csv(index=False).encode()),
        "not a frame",
    ),
    "a frame in one line": (lambda path: compared(path, b"network," * 10**6), "not a frame"),
    "a label with a newline": (lambda path: measured(path, "a\nb="), "cannot be a label"),
    "a label with control characters": (
        lambda path: measured(path, "a\x1b[2J="),
        "cannot be a label",
    ),
    "a label that is a formula": (lambda path: measured(path, "@SUM(1)="), "cannot be a label"),
    "a file name that is a formula": (
        lambda path: (
            f"responses --checkpoint {saved(path, STATE).rename(path / '=1+1.pth')} --source batchnorm"
        ),
        "cannot be a label",
    ),
    "a label that is very long": (
        lambda path: f"responses --checkpoint {'a' * 100_000}=gone.pth",
        "too long",
    ),
    "a path with a null": (lambda path: "responses --checkpoint a\0.pth", "no such file"),
    "a preset with markup": (
        lambda path: measured(path, options="--normalize '<b>'"),
        "unknown normalisation",
    ),
    "a number of another script": (
        lambda path: measured(path, options="--images ²"),
        "not a whole number",
    ),
    "a number of many digits": (
        lambda path: f"responses --depth {'9' * 5000}",
        "not a whole number",
    ),
    "a device for a file": (lambda path: "responses --checkpoint /dev/zero", "no such file"),
}


# The tests and the document


@contextlib.contextmanager
def unharmed(folder):
    """Assert that the block starts no program, needs little memory and leaves no file."""
    deeds, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    there = sorted(folder.rglob("*"))
    with watching(lambda event, args: deeds.append(event) if event in FORBIDDEN else None):
        yield
    assert deeds == []
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"{grown / 2**20:.0f} MB"
    assert [path for path in sorted(folder.rglob("*")) if path.name != "out"] == there
    places = (Path(), Path("/tmp"), folder.parent, ROOT)
    assert not [place for place in places if (place / "evil").exists()]


def check(name, said, words, folder):
    assert words in said
    assert said.isprintable()
    assert len(said) < 1000
    assert " at 0x" not in said  # an object's address says nothing, and differs each time
    SAID[name] = said.replace(str(folder), "...").replace("|", "\\|")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_refused(name, tmp_path):
    write, words = CHECKPOINTS[name]
    path = write(tmp_path)
    with unharmed(tmp_path), pytest.raises((ValueError, OSError), match=path.name) as caught:
        loading.load(path, need_model=False)
    check(name, one_line(caught.value), words, tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", IMAGES)
def test_images_are_refused(name, tmp_path):
    write, words = IMAGES[name]
    path = write(tmp_path)
    with unharmed(tmp_path), pytest.raises((ValueError, OSError), match=path.name) as caught:
        cifar10.load(path)
    check(name, one_line(caught.value), words, tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_with_one_line(name, tmp_path):
    write, words = COMMANDS[name]
    line = write(tmp_path)
    with unharmed(tmp_path):
        error = run(f"{line} --out {tmp_path}/out" if "--out" not in line else line).error
    assert not (tmp_path / "out").exists() or files_in(tmp_path / "out") == {}
    check(name, error, words, tmp_path)


def test_good_files_are_read(tmp_path):
    """Without these the tests above would pass if nothing could be read."""
    assert loading.load(saved(tmp_path, STATE), need_model=False).state.keys() == STATE.keys()
    assert len(cifar10.load(shard(tmp_path, as_parquet())).images) == 2
    assert len(cifar10.load(archive(tmp_path, as_archive(("test_batch", as_batch())))).images) == 2


def test_the_document_is_written():
    cases = [*CHECKPOINTS, *IMAGES, *COMMANDS]
    assert len(cases) >= 60
    if set(cases) <= SAID.keys():  # all of the tests have run, and passed
        rows = (f"| {name} | {SAID[name][:150]}{'…' * (len(SAID[name]) > 150)} |" for name in cases)
        DOCUMENT.write_text(f"{HEAD}| input | message |\n| --- | --- |\n" + "\n".join(rows) + "\n")
    assert all(f"| {name} | " in DOCUMENT.read_text() for name in cases)

"""Every layout is written from the same twenty images and must give them back."""

import gzip
import http.server
import io
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import tarfile
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from models.data import cifar10
from models.data.labels import CLASSES

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(20) % 10
DIGEST = cifar10.digest(IMAGES, LABELS)
PLANES = IMAGES.transpose(0, 3, 1, 2).reshape(-1, 3072)
ALL = slice(None)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(file, part=ALL, label=LABELS):
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(image), "path": None} for image in IMAGES[part]]
    parquet.write_table(pyarrow.table({"img": cells, "label": label[part]}), file)
    return file


def python2_pickle(part=ALL):
    """A batch as Python 2 wrote the official ones, without the memo: byte strings, old names."""

    def text(value):  # BINSTRING
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value):  # BININT
        return b"J" + struct.pack("<i", value)

    data = PLANES[part]
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    )
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|")
    dtype += b"NNN" + integer(-1) + integer(-1) + b"K\x00tb"
    shape = b"".join(map(integer, data.shape)) + b"\x86"
    state = b"(K\x01" + shape + dtype + b"\x89" + text(data.tobytes()) + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([n]) for n in LABELS[part].tolist()) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + state + text(b"labels") + labels + b"u."


def records(part=ALL):
    return np.hstack([LABELS[part, None].astype(np.uint8), PLANES[part]]).tobytes()


def write_archive(path, **files):  # test_batch_bin: test_batch.bin
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name.replace('_bin', '.bin')}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def parquet_folder(path):
    write_parquet(path / "plain_text" / "test-00000-of-00002.parquet", slice(12))
    write_parquet(path / "plain_text" / "test-00001-of-00002.parquet", slice(12, 20))
    return path


def pickled(path, protocol=4, labels=None):
    names = [f"{n}.png" for n in range(20)]
    batch = {b"data": PLANES, b"labels": LABELS.tolist() if labels is None else labels}
    put(path / "test_batch", pickle.dumps(batch | {b"filenames": names}, protocol))
    return path


def class_folders(path, names=CLASSES):
    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        put(path / "test" / names[label] / f"{i}.png", png(image))
    return path


def python2(path):
    return put(path / "cifar-10-batches-py" / "test_batch", python2_pickle()).parents[1]


def binary(path):
    return put(path / "cifar-10-batches-bin" / "test_batch.bin", records()).parent


def python_archive(path):
    return write_archive(path / "cifar-10-python.tar.gz", test_batch=python2_pickle())


def binary_archive(path):
    return write_archive(path / "cifar-10-binary.tar.gz", test_batch_bin=records()).parent


PYTHON, BINARY = "official python version", "official binary version"
HUB, ARCHIVE, FOLDERS = "parquet shards of the hub", "official archive", "folders of images"
PLAIN = ["plane", "Car", "birds", *CLASSES[3:]]
LAYOUTS = {
    "parquet folder": (HUB, parquet_folder),
    "parquet file": (HUB, lambda p: write_parquet(p / "any.parquet")),
    "python 2": (PYTHON, python2),
    "python 3": (PYTHON, pickled),
    "protocol 5": (PYTHON, partial(pickled, protocol=5)),
    "labels in an array": (PYTHON, partial(pickled, labels=LABELS)),
    "binary": (BINARY, binary),
    "python archive": (ARCHIVE, python_archive),
    "binary archive": (ARCHIVE, binary_archive),
    "class folders": (FOLDERS, class_folders),
    "plain names": (FOLDERS, partial(class_folders, names=PLAIN)),
    "numbered folders": (FOLDERS, partial(class_folders, names="0123456789")),
}


@pytest.mark.parametrize(("layout", "write"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_images(layout, write, tmp_path):
    data = cifar10.load(write(tmp_path))
    assert (data.layout, data.labels_known) == (layout, "")
    assert (data.images.shape, data.images.dtype) == ((20, 32, 32, 3), np.uint8)
    order = np.lexsort(data.images.reshape(20, -1).T)
    expected = np.lexsort(IMAGES.reshape(20, -1).T)
    assert np.array_equal(data.images[order], IMAGES[expected])
    assert np.array_equal(data.labels[order], LABELS[expected])
    assert data.digest == DIGEST
    assert f"20 test images, incomplete: 9,980 of 10,000 are missing ({layout}" in data.describe()


def test_training_batches_are_joined_in_order(tmp_path):
    parts = {f"data_batch_{i}": python2_pickle(slice(4 * i - 4, 4 * i)) for i in (4, 1, 3, 5, 2)}
    data = cifar10.load(write_archive(tmp_path / "a.tar.gz", **parts), "train")
    assert np.array_equal(data.images, IMAGES)
    assert np.array_equal(data.labels, LABELS)


def test_missing_parts_are_named(tmp_path):
    for i in (1, 2, 4, 5):
        put(tmp_path / "py" / f"data_batch_{i}", python2_pickle(slice(i, i + 1)))
    assert "incomplete: data_batch_3 not there" in cifar10.load(tmp_path / "py", "train").describe()
    write_parquet(tmp_path / "hub" / "train-00001-of-00002.parquet")
    words = "incomplete: train-00000-of-00002.parquet not there"
    assert words in cifar10.load(tmp_path / "hub", "train").describe()


def test_images_of_other_modes_become_rgb_and_a_flat_folder_has_no_labels(tmp_path):
    Image.fromarray(IMAGES[0, :, :, 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([IMAGES[1], IMAGES[1, :, :, :1]])).save(tmp_path / "alpha.PNG")
    data = cifar10.load(tmp_path)
    assert (data.labels, data.labels_known) == (None, "the images are not in class folders")
    assert np.array_equal(data.images[1], np.repeat(IMAGES[0, :, :, :1], 3, axis=2))
    assert np.array_equal(data.images[0], IMAGES[1])
    assert "incomplete: 9,998 of 10,000 are missing" in data.describe()


def test_a_numbered_folder_that_is_missing_moves_no_other(tmp_path):
    names = "0123456789"
    for file in (class_folders(tmp_path, names) / "test" / "4").iterdir():
        file.unlink()
    data = cifar10.load(tmp_path)
    assert sorted(set(data.labels.tolist())) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert {data.labels[(data.images == IMAGES[7]).all((1, 2, 3))].item()} == {7}


def test_unknown_class_folders_have_no_labels_and_the_reason(tmp_path):
    data = cifar10.load(class_folders(tmp_path, ["lorry", *CLASSES[1:]]))
    assert data.labels_known == "the class of the folder 'lorry' is not known"
    assert [labels for _, labels in data.batches(15)] == [None, None]


def test_the_digest_does_not_depend_on_the_order_but_on_every_byte():
    order = RNG.permutation(20)
    assert cifar10.digest(IMAGES[order], LABELS[order]) == DIGEST
    assert cifar10.digest(IMAGES, LABELS[order]) != DIGEST
    changed = IMAGES.copy()
    changed[7, 3, 3, 1] ^= 1
    assert cifar10.digest(changed, LABELS) != DIGEST


@pytest.fixture
def published(monkeypatch):
    """The twenty images are taken for the published ones."""
    monkeypatch.setitem(cifar10.SIZES, "test", 20)
    monkeypatch.setitem(cifar10.DIGESTS, "test", DIGEST)


def test_a_part_says_so(tmp_path, published):
    data = cifar10.load(pickled(tmp_path))
    part = data.some(10).some(5)
    where = f"test images, complete and exact (official python version, {tmp_path})"
    assert data.describe() == data.some(99).describe() == f"20 {where}"
    assert part.describe() == f"5 of 20 {where}"
    assert (len(part), part.total, part.provenance()) == (5, 20, data.provenance())
    assert np.array_equal(data.sample(3), data.images[[0, 9, 19]])


def test_a_part_of_incomplete_images_says_what_is_missing(tmp_path):
    data = cifar10.load(write_parquet(tmp_path / "a.parquet", slice(8))).some(3)
    assert data.describe().startswith("3 of 8 test images, incomplete: 9,992 of 10,000 are missing")


def test_a_file_replaced_with_size_and_time_kept_is_not_called_exact(tmp_path, published):
    file = pickled(tmp_path) / "test_batch"
    assert cifar10.load(tmp_path).exact
    times = file.stat()
    file.write_bytes(file.read_bytes().replace(PLANES[0].tobytes(), bytes(3072)))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = cifar10.load(tmp_path)
    assert not again.images[0].any()
    assert "not exact: other images or labels than the published ones" in again.describe()


@pytest.mark.parametrize("split", ["test", pytest.param("train", marks=pytest.mark.slow)])
def test_the_real_images_are_complete_and_exact(shared_cifar10, split):
    data = cifar10.load(shared_cifar10, split)
    assert data.exact
    words = f"{cifar10.SIZES[split]:,} {split} images, complete and exact (parquet shards"
    assert data.describe().startswith(words)
    assert np.bincount(data.labels).tolist() == [cifar10.SIZES[split] // 10] * 10


# Finding and downloading


def refuse(words, *arguments, **options):
    with pytest.raises((ValueError, OSError), match=words):
        cifar10.load(*arguments, **options)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYER_RESPONSES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_places_are_searched_in_order(cache, monkeypatch):
    refuse(r"tried \$CIFAR10 \(not set\), data, .*cache; name its folder or archive")
    pickled(cache)
    assert cifar10.load().path == cache
    pickled(Path("data"))
    assert str(cifar10.load().path) == "data"
    monkeypatch.setenv("CIFAR10", "nowhere")
    refuse(r"^\$CIFAR10: nowhere: no such file or folder")
    monkeypatch.setenv("CIFAR10", "")
    assert str(cifar10.load().path) == "data"


def test_other_data_are_passed_over(cache):
    table = pyarrow.table({"text": ["a", "b"], "label": [0, 1]})
    Path("data").mkdir()
    Image.new("RGB", (640, 480)).save("data/photograph.jpg")
    refuse("no CIFAR-10 test images found")
    parquet.write_table(table, "data/test.parquet")
    refuse("no CIFAR-10 test images found")
    refuse(r"test\.parquet: no columns img", "data")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `half/` sends half of a file and hangs up."""

    def do_GET(self):
        if not self.path.startswith("/half/"):
            return super().do_GET()
        content = (Path(self.directory) / self.path.removeprefix("/half/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def log_message(self, *args):
        pass


@contextmanager
def served(folder):
    """The address of a server on loopback."""
    handler = partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(tmp_path, cache, monkeypatch):
    """A server on loopback whose test-good.parquet is taken for CIFAR-10's test images."""
    monkeypatch.setitem(cifar10.DIGESTS, "test", DIGEST)
    write_parquet(tmp_path / "served" / "test-good.parquet")
    write_parquet(tmp_path / "served" / "test-short.parquet", slice(7))
    (tmp_path / "served" / "page.parquet").write_text("<html>log in first</html>")
    with served(tmp_path / "served") as url:
        yield url


def test_download(server, monkeypatch, capsys):
    monkeypatch.setitem(cifar10.SOURCES, "test", (f"{server}/test-good.parquet",))
    assert cifar10.load().exact
    assert "100%" in capsys.readouterr().err  # the progress bar
    monkeypatch.setitem(cifar10.SOURCES, "test", ())
    assert cifar10.load().exact  # from the cache


@pytest.mark.parametrize(
    ("first", "why"),
    [
        ("absent.parquet", "404"),
        ("half/test-good.parquet", "IncompleteRead"),
        ("test-short.parquet", "its content differs from the published images"),
        ("page.parquet", "the download is not CIFAR-10"),
    ],
)
def test_a_bad_source_is_left_for_the_next_one(server, cache, monkeypatch, first, why):
    monkeypatch.setitem(cifar10.SOURCES, "test", (f"{server}/{first}",))
    refuse(f"{first} .*{why}")
    assert not [file for file in cache.rglob("*") if file.is_file()]
    good = f"{server}/test-good.parquet"
    monkeypatch.setitem(cifar10.SOURCES, "test", (f"{server}/{first}", good))
    assert cifar10.load().exact


def test_no_server(monkeypatch):
    monkeypatch.setitem(cifar10.SOURCES, "test", ("http://127.0.0.1:9/x.parquet",))
    refuse(r"x.parquet \(connection refused\)")
    refuse("^(?!.*refused)", download=False)


def test_one_time_out_is_enough(monkeypatch):
    monkeypatch.setattr(cifar10, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setitem(cifar10.SOURCES, "test", (f"{url}/1.parquet", f"{url}/2.parquet"))
        refuse(r"1.parquet \(timed out\); name its folder")


def test_an_unknown_split():
    refuse("unknown split 'val': one of test, train", split="val")


# Bad input: what, where, and what to do


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def batch(path, **values):
    content = {"data": PLANES, "labels": LABELS.tolist()} | values
    return put(path / "test_batch", pickle.dumps(content)).parent


def table(path, img=None, **columns):
    columns = {"img": [{"bytes": png(IMAGES[0])}] if img is None else img, "label": [0]} | columns
    parquet.write_table(pyarrow.table(columns), path / "test.parquet")
    return path


def half(file):
    return put(file, file.read_bytes()[: file.stat().st_size // 2])


def photograph(path):
    return put(path / "dogs" / "rex.png", png(np.zeros((48, 64, 3), np.uint8))).parents[1]


OBJECTS = np.array([[1, "a"]], dtype=object)
LOOKED = (
    "no CIFAR-10 test images here; looked for test*.parquet, test_batch, test_batch.bin, "
    "cifar-10-python.tar.gz, cifar-10-binary.tar.gz and folders of images"
)
BAD = [
    ("gone: no such file or folder; --data takes a folder or an", lambda p: p / "gone"),
    (LOOKED, lambda p: p),
    (
        "a.tgz: damaged or truncated archive; copy or download it",
        lambda p: half(write_archive(p / "a.tgz", a=records())),
    ),
    ("no test_batch in this archive; it is not", lambda p: write_archive(p / "a.tar", a=b"b")),
    ("test_batch: refused: the pickle asks for io.open, and", lambda p: batch(p, data=Evil())),
    ("refused: an array of O8, and only arrays of whole", lambda p: batch(p, data=OBJECTS)),
    ("test_batch: damaged, truncated or not", lambda p: half(batch(p) / "test_batch").parent),
    ("test_batch: damaged, truncated or not a batch", lambda p: batch(p, labels=[0.5] * 20)),
    ("test_batch: damaged, truncated or not a batch", lambda p: batch(p, labels=[[0]] * 20)),
    ("not an integer from 0 to 9", lambda p: batch(p, labels=np.zeros((20, 1), int))),
    ("not an integer from 0 to 9", lambda p: batch(p, labels=[10] * 20)),
    (
        "61,459 bytes are not a multiple of 3073",
        lambda p: put(p / "test_batch.bin", records()[1:]).parent,
    ),
    ("test.parquet: no columns img (struct with bytes) and label", lambda p: table(p, img=[1])),
    (
        "test.parquet: damaged or truncated parquet file; copy",
        lambda p: half(table(p) / "test.parquet"),
    ),
    ("test.parquet: row 0: damaged or no image (of no", lambda p: table(p, [{"bytes": b"x"}])),
    ("not an integer from 0 to 9", lambda p: table(p, label=[300])),
    ("not an integer from 0 to 9", lambda p: table(p, label=[3.0])),
    ("not an integer from 0 to 9", lambda p: table(p, label=["3"])),
    ("rex.png: 64x48 pixels; CIFAR-10's images have 32x32", photograph),
    ("cat.png: damaged or no image (of no known", lambda p: put(p / "cat.png", b"x").parent),
    ("cat.png: damaged or no image (", lambda p: half(put(p / "cat.png", png(IMAGES[0]))).parent),
]


@pytest.mark.parametrize(("words", "write"), BAD)
def test_bad_input_gets_one_line(words, write, tmp_path):
    refuse(re.escape(words), write(tmp_path))
    assert not (tmp_path / "evil").exists()


# Hostile input: memory stays bounded


def peak_memory(path):
    """Return the words of the error that loading gives, and its peak of memory in MiB."""
    code = (
        "import resource, sys, pyarrow.parquet, PIL.Image, pooch\n"
        "from models.data import cifar10\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    cifar10.load(sys.argv[1])\n"
        "except (ValueError, OSError) as error:\n    print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    root = Path(cifar10.__file__).parents[2]
    command = [sys.executable, "-c", code, str(path)]
    *words, peak = subprocess.check_output(command, cwd=root, text=True).splitlines()
    return " ".join(words), float(peak)


def many_members(path):
    with tarfile.open(path / "a.tar.gz", "w:gz", compresslevel=1) as archive:
        for i in range(2000):
            archive.addfile(tarfile.TarInfo(str(i)))
    return path / "a.tar.gz"


def long_header(path):
    member = tarfile.TarInfo("a")
    member.type, member.size = tarfile.XHDTYPE, 2**26
    with gzip.open(path / "a.tar.gz", "w", compresslevel=1) as file:
        file.write(member.tobuf())
        file.write(bytes(2**26))
    return path / "a.tar.gz"


def huge_cells(path, **options):
    """A megabyte or less that says in every row that it holds the same 16 MiB."""
    values = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 500, pyarrow.int32()), pyarrow.array([bytes(2**24)])
    )
    img = pyarrow.StructArray.from_arrays([values], ["bytes"])
    columns = pyarrow.table({"img": img, "label": [0] * 500})
    parquet.write_table(columns, path / "test.parquet", store_schema=False, **options)
    return path / "test.parquet"


def modest_footer(path):
    """The same with a footer that says that each column holds a thousand bytes."""

    def varint(number, length):  # of a signed number, padded to a length
        bits = [2 * number >> 7 * i & 127 for i in range(length)]
        return bytes([*(part | 128 for part in bits[:-1]), bits[-1]])

    file = huge_cells(path)
    group = parquet.read_metadata(file).row_group(0)
    content = file.read_bytes()
    for size in (group.total_byte_size, group.column(0).total_uncompressed_size):
        assert content.count(varint(size, 4))
        content = content.replace(varint(size, 4), varint(1000, 4))
    put(file, content)
    assert parquet.read_metadata(file).row_group(0).total_byte_size == 1000
    return file


def tar(path, content):
    return write_archive(path / "a.tar.gz", test_batch=content)


HOSTILE = {
    "lists": ("more than 100,000 parts", lambda p: tar(p, b"\x80\x02" + b"]" * 30_000_000 + b".")),
    "sets": ("more than 100,000 parts", lambda p: tar(p, b"\x80\x04(" + b"\x8f" * 9_000_000)),
    "memo": ("more than 100,000 parts", lambda p: tar(p, b"\x80\x02}r" + b"\xff\xff\xff\x07.")),
    "text memo": ("more than 100,000 parts", lambda p: tar(p, b"}p99999999\n.")),
    "huge string": (
        "damaged, truncated or not",
        lambda p: tar(p, b"\x80\x04\x8e" + bytes(7) + b"\x0fa."),
    ),
    "large member": ("far larger than a batch", lambda p: tar(p, bytes(2**26))),
    "many members": ("far larger than the official", many_members),
    "long header": ("damaged or truncated", long_header),
    "huge cells": ("row 0: damaged or no image (more than", huge_cells),
    "modest footer": ("row 0: damaged or no image (more than", modest_footer),
    "zstd": ("packed with ZSTD; write it with Snappy", partial(huge_cells, compression="zstd")),
}


@pytest.mark.parametrize(("words", "write"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_costs_little_memory(words, write, tmp_path):
    file = write(tmp_path)
    said, peak = peak_memory(file)
    assert words in said
    assert peak < 4 * file.stat().st_size / 2**20 + 300


def test_more_images_than_cifar10_has(tmp_path):
    content = (b"\0" + PLANES[:1].tobytes()) * 10_001
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(1, 6):
            member = tarfile.TarInfo(f"data_batch_{i}.bin")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    refuse("a.tar: far larger than CIFAR-10", tmp_path / "a.tar", "train")

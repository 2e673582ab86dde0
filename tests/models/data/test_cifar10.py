"""Every layout is written from the same twenty images and must give them back."""

import http.server
import io
import pickle
import socket
import struct
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
from models.data.formats import CLASSES, NoData, decode_archive

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(20) % 10
DIGEST = cifar10.digest(IMAGES, LABELS)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder, part, name):
    folder.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(image), "path": None} for image in IMAGES[part]]
    parquet.write_table(pyarrow.table({"img": cells, "label": LABELS[part]}), folder / name)


def planes(part=slice(None)):
    return IMAGES[part].transpose(0, 3, 1, 2).reshape(-1, 3072)


def python2_pickle(data, labels):
    """A batch as Python 2 wrote the official ones: protocol 2, byte strings, numpy's old module
    names.
    """

    def text(value):  # BINSTRING
        return b"T" + struct.pack("<i", len(value)) + value

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = b"".join(b"J" + struct.pack("<i", size) for size in data.shape) + b"\x86"
    state = b"(K\x01" + shape + dtype + b"\x89" + text(data.tobytes()) + b"tb"
    items = (
        text(b"data")
        + array
        + state
        + text(b"labels")
        + b"]"
        + b"("
        + b"".join(b"K" + bytes([n]) for n in labels)
        + b"e"
    )
    return b"\x80\x02}(" + items + b"u."


def write_python(folder, part, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(python2_pickle(planes(part), LABELS[part].tolist()))


def write_binary(folder, part, name):
    folder.mkdir(parents=True, exist_ok=True)
    records = np.concatenate([LABELS[part, None].astype(np.uint8), planes(part)], axis=1)
    (folder / name).write_bytes(records.tobytes())


def write_archive(path, folder):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


def write_folders(folder):
    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        (folder / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        (folder / CLASSES[label] / f"{i}.png").write_bytes(png(image))


def parquet_folder(path):
    write_parquet(path / "plain_text", slice(0, 12), "test-00000-of-00002.parquet")
    write_parquet(path / "plain_text", slice(12, 20), "test-00001-of-00002.parquet")
    return path


def parquet_file(path):
    write_parquet(path, slice(None), "anything.parquet")
    return path / "anything.parquet"


def python_folder(path):
    write_python(path / "cifar-10-batches-py", slice(None), "test_batch")
    return path


def python_archive(path):
    return write_archive(path / "cifar-10-python.tar.gz", python_folder(path) / "cifar-10-batches-py")


def python3_pickles(path):
    batch = {b"data": planes(), b"labels": LABELS.tolist(), b"batch_label": b"testing batch 1 of 1"}
    (path / "test_batch").write_bytes(pickle.dumps(batch))
    return path


def binary_folder(path):
    write_binary(path / "cifar-10-batches-bin", slice(None), "test_batch.bin")
    return path / "cifar-10-batches-bin"


def binary_archive(path):
    write_archive(path / "cifar-10-binary.tar.gz", binary_folder(path))
    for file in (path / "cifar-10-batches-bin").iterdir():
        file.unlink()
    return path


def class_folders(path):
    write_folders(path / "test")
    return path


LAYOUTS = {
    parquet_folder: "parquet shards of the hub",
    parquet_file: "parquet shards of the hub",
    python_folder: "official python version",
    python3_pickles: "official python version",
    python_archive: "official archive",
    binary_folder: "official binary version",
    binary_archive: "official archive",
    class_folders: "folders of images",
}


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_every_layout_gives_the_same_images(write, tmp_path):
    data = cifar10.load(write(tmp_path))
    assert data.layout == LAYOUTS[write]
    assert data.images.shape == (20, 32, 32, 3)
    assert data.images.dtype == np.uint8
    order = np.lexsort(data.images.reshape(20, -1).T)
    expected = np.lexsort(IMAGES.reshape(20, -1).T)
    assert np.array_equal(data.images[order], IMAGES[expected])
    assert np.array_equal(data.labels[order], LABELS[expected])
    assert data.digest == DIGEST
    assert f"20 test images, incomplete: 9,980 of 10,000 are missing ({LAYOUTS[write]}" in data.describe()


def test_training_batches_are_joined_in_order(tmp_path):
    for i in range(5):
        write_binary(tmp_path, slice(4 * i, 4 * i + 4), f"data_batch_{i + 1}.bin")
    data = cifar10.load(tmp_path, "train")
    assert np.array_equal(data.images, IMAGES)
    assert np.array_equal(data.labels, LABELS)


def test_missing_parts_are_named(tmp_path):
    for i in (1, 2, 4, 5):
        write_python(tmp_path / "py", slice(i, i + 1), f"data_batch_{i}")
    assert "incomplete: data_batch_3 not there" in cifar10.load(tmp_path / "py", "train").describe()
    write_parquet(tmp_path / "hub", slice(5), "train-00001-of-00002.parquet")
    assert "incomplete: train-00000-of-00002.parquet not there" in cifar10.load(tmp_path / "hub", "train").describe()


def test_images_of_other_modes_become_rgb_and_a_flat_folder_has_no_labels(tmp_path):
    Image.fromarray(IMAGES[0, :, :, 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([IMAGES[1], IMAGES[1, :, :, :1]])).save(tmp_path / "alpha.PNG")
    data = cifar10.load(tmp_path)
    assert data.labels is None
    assert np.array_equal(data.images[1], np.repeat(IMAGES[0, :, :, :1], 3, axis=2))
    assert np.array_equal(data.images[0], IMAGES[1])
    assert "without labels" not in data.describe()  # that most are missing comes first
    assert "incomplete: 9,998 of 10,000 are missing" in data.describe()


def test_the_digest_does_not_depend_on_the_order_but_on_every_byte():
    order = RNG.permutation(20)
    assert cifar10.digest(IMAGES[order], LABELS[order]) == DIGEST
    assert cifar10.digest(IMAGES, LABELS[order]) != DIGEST
    changed = IMAGES.copy()
    changed[7, 3, 3, 1] ^= 1
    assert cifar10.digest(changed, LABELS) != DIGEST


def test_wrong_content_of_the_right_size_is_not_called_exact(tmp_path, monkeypatch):
    monkeypatch.setitem(cifar10.SIZES, "test", 20)
    data = cifar10.load(python_folder(tmp_path))
    assert "not exact: other images or labels than the published ones" in data.describe()
    monkeypatch.setitem(cifar10.DIGESTS, "test", DIGEST)
    assert "20 test images, complete and exact" in data.describe()


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_real_images_are_complete_and_exact(shared_cifar10, split):
    data = cifar10.load(shared_cifar10, split)
    assert data.exact
    assert f"{cifar10.SIZES[split]:,} {split} images, complete and exact (parquet" in data.describe()
    assert np.bincount(data.labels).tolist() == [cifar10.SIZES[split] // 10] * 10


def test_decoded_images_are_kept_until_the_files_change(tmp_path, monkeypatch):
    folder = class_folders(tmp_path)
    first = cifar10.load(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)  # decoding again would fail
        again = cifar10.load(folder)
    assert np.array_equal(again.images, first.images)
    assert np.array_equal(again.labels, first.labels)
    write_parquet(folder, slice(3), "test.parquet")
    assert len(cifar10.load(folder).images) == 3


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYER_RESPONSES_CACHE", str(tmp_path / "cache"))
    folder = class_folders(tmp_path / "data")
    cifar10.load(folder)
    [store] = (tmp_path / "cache" / "decoded").iterdir()
    store.write_bytes(store.read_bytes()[:1000])
    assert len(cifar10.load(folder).images) == 20


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYER_RESPONSES_CACHE", str(tmp_path / "file"))
    assert len(cifar10.load(python_folder(tmp_path / "data")).images) == 20


# Finding and downloading


def test_places_are_searched_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYER_RESPONSES_CACHE", str(tmp_path / "cache"))
    with pytest.raises(NoData, match=r"tried \$CIFAR10 \(not set\), data, .*cache; name its folder or archive"):
        cifar10.load()
    python_archive_in_cache = python_archive(tmp_path / "cache")
    assert cifar10.load().path == tmp_path / "cache"
    python_folder(tmp_path / "data")  # the working folder is tmp_path
    assert str(cifar10.load().path) == "data"
    monkeypatch.setenv("CIFAR10", str(python_archive_in_cache))
    assert cifar10.load().path == python_archive_in_cache
    monkeypatch.setenv("CIFAR10", str(tmp_path / "nowhere"))
    with pytest.raises(NoData, match=r"^\$CIFAR10: .*nowhere: no such file or folder"):
        cifar10.load()
    monkeypatch.setenv("CIFAR10", "")
    assert str(cifar10.load().path) == "data"


def test_a_data_folder_of_photographs_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYER_RESPONSES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    Image.new("RGB", (640, 480)).save(tmp_path / "data" / "photograph.jpg")
    with pytest.raises(NoData, match="no CIFAR-10 test images found"):
        cifar10.load()


def test_other_peoples_parquet_files_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYER_RESPONSES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "data" / "test.parquet")
    with pytest.raises(NoData, match="no CIFAR-10 test images found"):
        cifar10.load()
    with pytest.raises(ValueError, match=r"test\.parquet: no columns img"):
        cifar10.load("data")


def test_an_archive_that_vanished_is_not_said_to_be_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        decode_archive([tmp_path / "cifar-10-python.tar.gz"], "test")


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
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on loopback whose good.parquet is taken for CIFAR-10's test images."""
    monkeypatch.setenv("LAYER_RESPONSES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(cifar10.DIGESTS, "test", DIGEST)
    folder = tmp_path / "served"
    write_parquet(folder, slice(None), "test-good.parquet")
    write_parquet(folder, slice(7), "test-short.parquet")
    (folder / "page.parquet").write_text("<html>log in first</html>")
    with served(folder) as url:
        yield url


def test_download(server, tmp_path, monkeypatch, capsys):
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
def test_a_bad_source_is_left_for_the_next_one_and_leaves_nothing_behind(server, tmp_path, monkeypatch, first, why):
    monkeypatch.setitem(cifar10.SOURCES, "test", (f"{server}/{first}",))
    with pytest.raises(NoData, match=f"{first} .*{why}"):
        cifar10.load()
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.suffix != ".npz"]
    monkeypatch.setitem(cifar10.SOURCES, "test", (f"{server}/{first}", f"{server}/test-good.parquet"))
    assert cifar10.load().exact


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setitem(cifar10.SOURCES, "test", ("http://127.0.0.1:9/x.parquet",))
    with pytest.raises(NoData, match=r"x.parquet \(connection refused\)"):
        cifar10.load()
    with pytest.raises(NoData, match=r"^(?!.*refused)"):
        cifar10.load(download=False)


def test_where_no_server_answers_one_time_out_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setitem(cifar10.SOURCES, "test", (f"{url}/first.parquet", f"{url}/second.parquet"))
        with pytest.raises(NoData, match=r"first.parquet \(timed out\); name its folder"):
            cifar10.load()


# Bad input: what, where, and what to do


def truncated(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def evil_pickle(path):
    (path / "test_batch").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    return path


def object_array(path):
    (path / "test_batch").write_bytes(pickle.dumps({b"data": np.array([[1, "a"]], dtype=object), b"labels": [0]}))
    return path


def cut_record(path):
    truncated(binary_folder(path) / "test_batch.bin", 0.99)
    return path


def cut_pickle(path):
    truncated(python_folder(path) / "cifar-10-batches-py" / "test_batch")
    return path


def other_archive(path):
    (path / "readme.txt").write_text("hello")
    return write_archive(path / "other.tar.gz", path / "readme.txt")


def other_parquet(path):
    parquet.write_table(pyarrow.table({"text": ["a"]}), path / "test.parquet")
    return path


def text_parquet(path):
    (path / "test.parquet").write_text("no parquet")
    return path


def photographs(path):
    (path / "dogs").mkdir()
    Image.new("RGB", (640, 480)).save(path / "dogs" / "rex.jpg")
    return path


def text_image(path):
    (path / "cat.png").write_text("no image")
    return path


def text_in_parquet(path):
    parquet.write_table(pyarrow.table({"img": [{"bytes": b"no image"}], "label": [0]}), path / "test.parquet")
    return path


def cut_image(path):
    (path / "cat.png").write_bytes(png(IMAGES[0]))
    truncated(path / "cat.png")
    return path


def label_out_of_range(path):
    write_parquet(path, slice(2), "test.parquet")
    table = parquet.read_table(path / "test.parquet").set_column(1, "label", pyarrow.array([3, 300]))
    parquet.write_table(table, path / "test.parquet")
    return path


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path / "gone", "gone: no such file or folder; --data takes a folder or an archive of CIFAR-10"),
        (lambda path: path, "no CIFAR-10 test images here; looked for test*.parquet, test_batch, test_batch.bin, "
         "cifar-10-python.tar.gz, cifar-10-binary.tar.gz and folders of PNG or JPEG files"),
        (lambda path: truncated(python_archive(path)), "cifar-10-python.tar.gz: damaged or truncated archive"),
        (other_archive, "no test_batch in this archive; it is not the official CIFAR-10"),
        (evil_pickle, "test_batch: refused: the pickle asks for io.open, and only numpy arrays are admitted"),
        (object_array, "test_batch: refused: it holds an array of O8, and only arrays of whole numbers are"),
        (cut_pickle, "test_batch: damaged, truncated or not a batch of CIFAR-10"),
        (cut_record, "test_batch.bin: 60,845 bytes are no multiple of 3073: damaged or truncated"),
        (other_parquet, "test.parquet: no columns img (struct with bytes) and label; this is not the layout"),
        (text_parquet, "test.parquet: damaged or truncated parquet file; copy or download it again"),
        (photographs, "rex.jpg: 640x480 pixels; the images of CIFAR-10 have 32x32"),
        (text_image, "cat.png: damaged or no image (of no known format)"),
        (text_in_parquet, "test.parquet: image 0: damaged or no image (of no known format)"),
        (cut_image, "cat.png: damaged or no image"),
        (label_out_of_range, "a label is not between 0 and 255"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_input(write, message, tmp_path):
    with pytest.raises((ValueError, NoData)) as error:
        cifar10.load(write(tmp_path))
    assert message in str(error.value)
    assert not (tmp_path / "evil").exists()


def test_an_unknown_split():
    with pytest.raises(ValueError, match="unknown split 'val': one of test, train"):
        cifar10.load(split="val")

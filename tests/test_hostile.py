"""Files of strangers and slips of users: every one ends in one line and status 2, and nothing else
happens.

`python -m tests.test_hostile` runs the table and writes what each command said to tests/HOSTILE.md.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file

from analysis import compare, dynamics, responses
from analysis.measuring.frame import make_frame
from models import build
from models.checkpoints import loading
from models.data.preprocessing import PRESETS
from models.training.recipe import Recipe
from tests.conftest import ROOT

CASES = {}
DOCUMENT = ROOT / "tests" / "HOSTILE.md"
MEMORY = (
    400 * 2**20
)  # bytes that a command may need above what it had before, whatever a file says of itself


def case(message):
    """A hostile input: the function writes it into a folder and gives the words of the command.

    The words begin with the command's module, where it is not analysis.responses.
    """

    def add(function):
        CASES[function.__name__.replace("_", " ")] = (function, message)
        return function

    return add


def checkpoint(path, *more):
    return ["--checkpoint", path, "--source", "batchnorm", *more]


def data(path, *more):
    """The words that measure a good network on hostile data."""
    good = path.parent / "good.safetensors"
    if path.name == "good.safetensors" or not good.exists():
        good = path.parent / "good.safetensors"
        loading.save(good, network(), PRESETS["imagenet"], crop_padding="none", training={})
    return ["--checkpoint", good, "--data", path, *more]


def network():
    torch.manual_seed(0)
    return build("resnet-8")


def pickled(path, payload, protocol=2):
    """A file of torch.save's zip format whose pickle is the payload."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "archive/data.pkl",
            payload if isinstance(payload, bytes) else pickle.dumps(payload, protocol),
        )
        archive.writestr("archive/version", "3\n")
    return path


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


# Checkpoints: pickles


@case("refused: it asks for posix.system, which could run code")
def pickle_with_reduce(path):
    torch.save(Calls(os.system, "touch evil"), path / "a.pth")
    return checkpoint(path / "a.pth")


@case("refused: it asks for")
def pickle_with_builtins(path):
    torch.save({"state_dict": Calls(eval, "open('evil', 'w')")}, path / "a.pth")
    return checkpoint(path / "a.pth")


@case("refused: it asks for")
def pickle_with_getattr(path):
    torch.save(
        {"state_dict": Calls(getattr, os, "system")} if False else Calls(getattr, "", "join"),
        path / "a.pth",
    )
    return checkpoint(path / "a.pth")


@case("refused: it asks for")
def pickle_nested_in_a_state_dict(path):
    torch.save(
        {"state_dict": {**network().state_dict(), "z": [[Calls(os.system, "touch evil")]]}},
        path / "a.pth",
    )
    return checkpoint(path / "a.pth")


@case("refused: it asks for")
def pickle_in_the_legacy_format(path):
    torch.save(Calls(os.system, "touch evil"), path / "a.pth", _use_new_zipfile_serialization=False)
    return checkpoint(path / "a.pth")


@case("not a checkpoint, damaged or truncated")
def bare_pickle(path):
    (path / "a.pth").write_bytes(pickle.dumps(Calls(os.system, "touch evil")))
    return checkpoint(path / "a.pth")


@case("refused: it asks for")
def pickle_that_builds_an_object(path):
    torch.save(Calls(subprocess.Popen, ["touch", "evil"]), path / "a.pth")
    return checkpoint(path / "a.pth")


@case("refused: it asks for os.system")
def pickle_of_the_first_protocol(path):
    (path / "a.pt").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    return checkpoint(path / "a.pt")


@case("refused: it asks for")
def zipped_pickle(path):
    return checkpoint(pickled(path / "a.pth", b"cos\nsystem\n(S'touch evil'\ntR."))


@case("not a checkpoint, damaged or truncated")
def pickle_that_never_ends(path):
    return checkpoint(pickled(path / "a.pth", b"\x80\x02" + b"]" * 100_000))


@case("no state dict in it")
def pickle_of_deep_nesting(path):
    return checkpoint(pickled(path / "a.pth", b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."))


@case("not a checkpoint, damaged or truncated")
def pickle_with_a_huge_declared_string(path):
    return checkpoint(pickled(path / "a.pth", b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc."))


@case("not a checkpoint, damaged or truncated")
def pickle_with_a_huge_declared_storage(path):
    state = {"state_dict": {"conv1.weight": torch.zeros(16, 3, 3, 3)}}
    torch.save(state, path / "a.pth", _use_new_zipfile_serialization=False)
    content = (path / "a.pth").read_bytes()
    position = content.rindex(struct.pack("<q", 432))  # the number of values before the storage
    (path / "a.pth").write_bytes(
        content[:position] + struct.pack("<q", 2**40) + content[position + 8 :]
    )
    return checkpoint(path / "a.pth")


@case("not a checkpoint, damaged or truncated")
def tensor_larger_than_its_storage(path):
    torch.save({"conv1.weight": torch.zeros(4)}, path / "b.pth")
    with zipfile.ZipFile(path / "b.pth") as before, zipfile.ZipFile(path / "a.pth", "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85")
            after.writestr(name, content)
    return checkpoint(path / "a.pth")


@case("in it is compressed, which torch.save never does")
def zip_bomb(path):
    """Some megabytes that unpack to gigabytes."""
    with zipfile.ZipFile(path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", "3\n")
        with archive.open("archive/data.pkl", "w", force_zip64=True) as file:
            for _ in range(2048):
                file.write(bytes(2**20))
    return checkpoint(path / "a.pth")


@case("not a checkpoint, damaged or truncated")
def zip_without_a_pickle(path):
    with zipfile.ZipFile(path / "a.pth", "w") as archive:
        archive.writestr("../../evil", "outside")
    return checkpoint(path / "a.pth")


@case("no state dict in it")
def a_list_of_tensors(path):
    torch.save([torch.zeros(3)], path / "a.pth")
    return checkpoint(path / "a.pth")


@case("no state dict in it")
def an_empty_dictionary(path):
    torch.save({}, path / "a.pth")
    return checkpoint(path / "a.pth")


@case("no state dict in it")
def numbers_in_place_of_names(path):
    torch.save({0: torch.zeros(3), 1: torch.zeros(3)}, path / "a.pth")
    return checkpoint(path / "a.pth")


@case("NaN or infinity in")
def infinity_in_a_checkpoint(path):
    torch.save(
        network().state_dict() | {"bn1.weight": torch.full((16,), torch.inf)}, path / "a.pth"
    )
    return checkpoint(path / "a.pth")


@case("conv1.weight holds int64, not floating-point numbers")
def integers_for_weights(path):
    torch.save(
        {name: tensor.long() for name, tensor in network().state_dict().items()}, path / "a.pth"
    )
    return checkpoint(path / "a.pth")


@case("conv1.weight holds complex64, not floating-point numbers")
def complex_weights(path):
    state = {name: tensor.to(torch.complex64) for name, tensor in network().state_dict().items()}
    torch.save(state, path / "a.pth")
    return checkpoint(path / "a.pth")


@case("bn1.num_batches_tracked holds complex64, not floating-point numbers")
def complex_counters(path):
    torch.save(
        network().state_dict() | {"bn1.num_batches_tracked": torch.tensor(1j)}, path / "a.pth"
    )
    return checkpoint(path / "a.pth")


@case("conv1.weight is sparse, quantized or without data")
def sparse_weights(path):
    torch.save(
        {name: tensor.to_sparse() for name, tensor in network().state_dict().items()},
        path / "a.pth",
    )
    return checkpoint(path / "a.pth")


@case("conv1.weight is sparse, quantized or without data")
def tensors_without_data(path):
    torch.save(
        {name: tensor.to("meta") for name, tensor in network().state_dict().items()}, path / "a.pth"
    )
    return checkpoint(path / "a.pth")


@case("bn1.running_var is no vector of variances")
def negative_variance(path):
    torch.save(
        network().state_dict() | {"bn1.running_var": torch.full((16,), -1.0)}, path / "a.pth"
    )
    return checkpoint(path / "a.pth")


@case("bn1.running_var is no vector of variances")
def a_scalar_for_a_vector(path):
    torch.save(
        {"conv1.weight": torch.zeros(4, 3, 3, 3), "bn1.running_var": torch.tensor(1.0)},
        path / "a.pth",
    )
    return checkpoint(path / "a.pth")


@case("bn1.running_var is no vector of variances")
def a_matrix_for_a_vector(path):
    torch.save(network().state_dict() | {"bn1.running_var": torch.ones(16, 2)}, path / "a.pth")
    return checkpoint(path / "a.pth")


@case("")
def a_thousand_stages(path):
    state = {f"layer1.{i}.conv1.weight": torch.zeros(1) for i in range(3000)}
    torch.save(
        state | {"conv1.weight": torch.zeros(16, 3, 3, 3), "fc.weight": torch.zeros(10, 64)},
        path / "a.pth",
    )
    return checkpoint(path / "a.pth")


@case("is no name of a tensor: unprintable, or a formula")
def name_with_a_formula(path):
    torch.save({"=HYPERLINK(1).weight": torch.zeros(3)}, path / "a.pth")
    return checkpoint(path / "a.pth")


@case("conv1.weight would take 1,073,741,824 bytes, and the file has ")
def one_number_that_says_it_is_gigabytes(path):
    torch.save({"conv1.weight": torch.zeros(1).expand(2**28)}, path / "a.pth")
    return checkpoint(path / "a.pth")


@case("no state dict in it; looked under state_dict")
def keys_that_are_tuples_of_tuples(path):
    key = ()
    for _ in range(20):
        key = (key, key)
    torch.save({key: 1}, path / "a.pth")
    return checkpoint(path / "a.pth")


@case("not a checkpoint, damaged or truncated")
def archive_of_the_oldest_torch(path):
    with tarfile.open(path / "a.pth", "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
        tar.addfile(tarfile.TarInfo("../../evil"))
    return checkpoint(path / "a.pth")


@case("is no name of a tensor: unprintable, or a formula")
def a_name_with_newlines(path):
    torch.save({"a\nerror: all is well\n\x1b[2J": torch.zeros(3)}, path / "a.pth")
    return checkpoint(path / "a.pth")


# Checkpoints: safetensors


def safetensors(path, header, content=b"", size=None):
    encoded = header if isinstance(header, bytes) else repr(header).replace("'", '"').encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if size is None else size) + encoded + content)
    return checkpoint(path)


def entry(start, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@case("damaged or truncated safetensors file")
def header_of_gigabytes(path):
    return safetensors(path / "a.safetensors", b"{}", size=2**40)


@case("damaged or truncated safetensors file")
def overlapping_offsets(path):
    return safetensors(path / "a.safetensors", {"a": entry(0, 16), "b": entry(8, 24)}, bytes(24))


@case("damaged or truncated safetensors file")
def offsets_beyond_the_end(path):
    return safetensors(
        path / "a.safetensors", {"a": entry(0, 16), "b": entry(16, 2**40, (2**38,))}, bytes(16)
    )


@case("damaged or truncated safetensors file")
def negative_offsets(path):
    return safetensors(path / "a.safetensors", {"a": entry(-16, 0)}, bytes(16))


@case("damaged or truncated safetensors file")
def unknown_dtype(path):
    return safetensors(path / "a.safetensors", {"a": entry(0, 16, dtype="F7")}, bytes(16))


@case("damaged or truncated safetensors file")
def shape_that_is_not_the_size(path):
    return safetensors(path / "a.safetensors", {"a": entry(0, 16, (5,))}, bytes(16))


@case("damaged or truncated safetensors file")
def shape_that_overflows(path):
    return safetensors(
        path / "a.safetensors", {"a": entry(0, 16, (2**32, 2**32, 2**32))}, bytes(16)
    )


@case("damaged or truncated safetensors file")
def header_that_is_no_json(path):
    return safetensors(path / "a.safetensors", b"{'a': ")


@case("damaged or truncated safetensors file")
def empty_safetensors(path):
    (path / "a.safetensors").touch()
    return checkpoint(path / "a.safetensors")


@case("none of the paper's networks")
def bytes_for_weights(path):
    save_file({"a": torch.zeros(3, dtype=torch.uint8)}, path / "a.safetensors")
    return ["--checkpoint", path / "a.safetensors", "--source", "hooks", "--data", path]


@case("")
def safetensors_without_tensors(path):
    return safetensors(path / "a.safetensors", {})


def carded(path, card):
    save_file(network().state_dict(), path / "a.safetensors", metadata={"card": card})
    return checkpoint(path / "a.safetensors")


@case("the card in its metadata is no JSON object")
def card_that_is_a_list(path):
    return carded(path, "[]")


@case("unknown kind")
def card_of_an_unknown_kind(path):
    return carded(path, '{"kind": "<script>"}')


@case("")
def card_with_a_list_for_the_kind(path):
    return carded(path, '{"kind": ["plain"], "padding": {}, "stride": 3}')


@case("")
def card_of_deep_nesting(path):
    return carded(path, "[" * 100_000)


@case("damaged or truncated safetensors file")
def card_with_a_number_of_many_digits(path):
    return carded(path, '{"training": {"iteration": ' + "9" * 5000 + "}}")


@case("its card says preprocessing '\\x1b[2J', which is none of")
def card_with_control_characters(path):
    return carded(path, '{"preprocessing": "\\u001b[2J"}')


@case("its card says crop_padding ['black'], which is none of")
def card_with_a_list_for_the_padding(path):
    return carded(path, '{"crop_padding": ["black"]}')


@case("the preprocessing has a mean of shape (3, 5) and a std of (2,)")
def preprocessing_of_another_shape(path):
    tensors = {"preprocessing.mean": torch.zeros(3, 5), "preprocessing.std": torch.ones(2)}
    save_file(network().state_dict() | tensors, path / "good.safetensors")
    return checkpoint(path / "good.safetensors")


# CIFAR-10


def png(mode="RGB", size=(32, 32)):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "png")
    return buffer.getvalue()


def folder(path, content, name="a.png"):
    (path / "cifar").mkdir()
    (path / "cifar" / name).write_bytes(content)
    return data(path / "cifar")


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def declared(width, height):
    """A PNG of some bytes that says it is of this size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@case("damaged or no image (Image size (3600000000 pixels) exceeds limit")
def image_bomb(path):
    return folder(path, declared(60_000, 60_000))


@case("damaged or no image")
def truncated_image(path):
    return folder(path, png()[:60])


@case("damaged or no image")
def image_of_zero_size(path):
    return folder(path, declared(0, 0))


@case("damaged or no image")
def empty_image(path):
    return folder(path, b"")


@case("damaged or no image")
def image_with_a_bomb_of_text(path):
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(512 * 2**20)))
    return folder(path, png()[:33] + text + png()[33:])


@case("damaged or no image (of no known format)")
def postscript_for_an_image(path):
    return folder(
        path,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(evil) (w) file\n%%EOF\n",
    )


@case("no CIFAR-10 test images here")
def a_pipe_among_the_images(path):
    (path / "cifar").mkdir()
    os.mkfifo(path / "cifar" / "a.png")
    return data(path / "cifar")


@case("images of CIFAR-10 have 32x32")
def image_of_another_size(path):
    return folder(path, png(size=(33, 32)))


@case("no columns img (struct with bytes) and label")
def parquet_with_other_columns(path):
    pd.DataFrame({"a": [1]}).to_parquet(path / "test-0.parquet")
    return data(path / "test-0.parquet")


@case("no columns img (struct with bytes) and label")
def parquet_with_numbers_for_images(path):
    pd.DataFrame({"img": [1, 2], "label": [0, 1]}).to_parquet(path / "test-0.parquet")
    return data(path / "test-0.parquet")


@case("no columns img (struct with bytes) and label")
def parquet_with_more_labels_than_images(path):
    cells = [{"bytes": png(), "path": "a"}]
    pd.DataFrame({"img": [*cells, None], "label": [0, 1]}).to_parquet(path / "test-0.parquet")
    return data(path / "test-0.parquet")


@case("test-0.parquet: a label is no number")
def parquet_with_words_for_labels(path):
    pd.DataFrame({"img": [{"bytes": png(), "path": "a"}], "label": ["cat"]}).to_parquet(
        path / "test-0.parquet"
    )
    return data(path / "test-0.parquet")


@case("damaged or truncated parquet file")
def parquet_cut_off(path):
    pd.DataFrame({"img": [{"bytes": png(), "path": "a"}], "label": [0]}).to_parquet(
        path / "test-0.parquet"
    )
    (path / "test-0.parquet").write_bytes((path / "test-0.parquet").read_bytes()[:-20])
    return data(path / "test-0.parquet")


@case("parquet shards of the hub without a single image")
def parquet_without_rows(path):
    frame = pd.DataFrame({"img": [{"bytes": png(), "path": "a"}], "label": [0]})
    frame.iloc[:0].to_parquet(path / "test-0.parquet")
    return data(path / "test-0.parquet")


def repeated(path, value, rows):
    """A parquet file of some kilobytes that says in every row that it holds this value."""
    image = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([value])
    )
    table = {
        "img": pyarrow.StructArray.from_arrays([image], ["bytes"]),
        "label": pyarrow.array([0] * rows),
    }
    parquet.write_table(
        pyarrow.table(table), path / "test-0.parquet", compression="zstd", store_schema=False
    )
    return data(path / "test-0.parquet")


@case("image 0: damaged or no image (of no known format)")
def parquet_bomb(path):
    return repeated(path, bytes(4 * 2**20), 500)


@case("test-0.parquet: far larger than CIFAR-10")
def parquet_with_a_million_images(path):
    return repeated(path, png(), 10**6)


def archive(path, *members):
    """A tar archive of (name, content or type)."""
    with tarfile.open(path / "cifar-10-python.tar.gz", "w:gz") as tar:
        types = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE}
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = types[content], "/etc/passwd"
                tar.addfile(info)
    return data(path / "cifar-10-python.tar.gz")


@case("no test_batch in this archive")
def archive_with_paths_outside(path):
    return archive(path, ("../../evil", b"outside"), ("/tmp/evil", b"outside"))


@case("no test_batch in this archive")
def archive_with_links(path):
    return archive(path, ("test_batch", "link"), ("test_batch", "hard link"), ("pipe", "pipe"))


@case("test_batch is far larger than a batch of CIFAR-10")
def archive_bomb(path):
    return archive(path, ("cifar-10-batches-py/test_batch", bytes(300 * 2**20)))


@case("damaged or truncated archive")
def archive_with_a_header_of_gigabytes(path):
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.XHDTYPE, 512 * 2**20
    with gzip.open(path / "cifar-10-python.tar.gz", "w", compresslevel=1) as file:
        file.write(info.tobuf())
        for _ in range(512):
            file.write(bytes(2**20))
    return data(path / "cifar-10-python.tar.gz")


@case("refused: the pickle asks for posix.system")
def archive_with_code(path):
    return archive(path, ("test_batch", pickle.dumps(Calls(os.system, "touch evil"))))


@case("refused: the pickle asks for")
def batch_with_code(path):
    (path / "cifar").mkdir()
    (path / "cifar" / "test_batch").write_bytes(
        pickle.dumps({b"data": Calls(eval, "1"), b"labels": []})
    )
    return data(path / "cifar")


def batch(path, payload):
    (path / "cifar").mkdir()
    (path / "cifar" / "test_batch").write_bytes(
        payload if isinstance(payload, bytes) else pickle.dumps(payload)
    )
    return data(path / "cifar")


@case("damaged, truncated or not a batch of CIFAR-10")
def batch_of_any_memory(path):
    """numpy would take these eight bytes for the address of a Python object."""
    return batch(path, {b"data": Calls(np.ndarray, (1,), np.dtype("u1"), b"A" * 8), b"labels": [0]})


@case("and only arrays of whole numbers are admitted")
def batch_of_python_objects(path):
    return batch(path, {b"data": Calls(np.ndarray, (1,), np.dtype("O"), b"A" * 8), b"labels": [0]})


@case("damaged, truncated or not a batch of CIFAR-10")
def batch_with_one_label_a_billion_times(path):
    labels = Calls(np.ndarray, (2**28,), np.dtype("u1"), b"A", 0, (0,))
    return batch(path, {b"data": np.zeros((1, 3072), np.uint8), b"labels": labels})


@case("damaged, truncated or not a batch of CIFAR-10")
def batch_with_lists_in_lists(path):
    labels = [0] * 10
    for _ in range(7):
        labels = [labels] * 10
    return batch(path, {b"data": np.zeros((1, 3072), np.uint8), b"labels": labels})


@case("damaged, truncated or not a batch of CIFAR-10 (it remembers more than it holds)")
def batch_that_remembers_too_much(path):
    return batch(path, b"\x80\x02}r" + struct.pack("<I", 2**27) + b".")


@case("far larger than a batch of CIFAR-10")
def batch_of_gigabytes(path):
    (path / "cifar").mkdir()
    with open(path / "cifar" / "test_batch", "wb") as file:
        file.truncate(2**36)  # it takes no room on the disk
    return data(path / "cifar")


@case("damaged, truncated or not a batch of CIFAR-10")
def batch_of_another_shape(path):
    (path / "cifar").mkdir()
    batch = {b"data": np.zeros((2, 100), np.uint8), b"labels": [0, 1]}
    (path / "cifar" / "test_batch").write_bytes(pickle.dumps(batch))
    return data(path / "cifar")


@case("damaged, truncated or not a batch of CIFAR-10")
def batch_with_labels_out_of_range(path):
    (path / "cifar").mkdir()
    batch = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10**30]}
    (path / "cifar" / "test_batch").write_bytes(pickle.dumps(batch))
    return data(path / "cifar")


@case("")
def batch_of_binary_that_is_cut_off(path):
    (path / "cifar").mkdir()
    (path / "cifar" / "test_batch.bin").write_bytes(bytes(5000))
    return data(path / "cifar")


@case("damaged or truncated archive")
def archive_that_is_no_archive(path):
    (path / "a.tar.gz").write_bytes(b"PK\x03\x04")
    return data(path / "a.tar.gz")


@case("")
def archive_that_never_ends(path):
    """A gzip bomb with nothing in it that is asked for."""
    return archive(path, *((f"file{i}", bytes(32 * 2**20)) for i in range(8)))


# Frames that are compared


def frame(**columns):
    """A frame of three layers, in which some columns are others."""
    rows = [
        {"layer": i, "name": "conv", "norm": "bn", "stage": 1, "channels": 8, "std": 5.0}
        for i in (1, 2, 3)
    ]
    constants = {
        "network": "a",
        "kind": "other",
        "source": "batchnorm",
        "mean": 0.0,
        "within": 3.0,
        "between": 4.0,
    }
    return make_frame(rows, **constants).assign(**columns)


def compared(path, content):
    """The words that compare a frame, or any bytes, with itself."""
    content = content if isinstance(content, bytes) else content.to_csv(index=False).encode()
    (path / "responses.csv").write_bytes(content)
    return [compare, *(f"{label}={path / 'responses.csv'}" for label in "ab")]


@case("not a frame of analysis.responses: its columns are network, kind, depth")
def frame_without_a_column(path):
    return compared(path, frame().drop(columns="std"))


@case("layer 2 do not belong together")
def frame_with_nan(path):
    return compared(path, frame(std=[5, float("nan"), 5]))


@case("layer 1 do not belong together")
def frame_with_infinity(path):
    return compared(path, frame(std=float("inf"), within=float("inf")))


@case("layer 1 do not belong together")
def frame_of_gigantic_numbers(path):
    return compared(path, frame(std=5e200, within=3e200, between=4e200))


@case("not a frame of analysis.responses")
def frame_with_an_infinite_layer(path):
    return compared(path, frame(layer=[1, 2, float("inf")]))


@case("not a frame of analysis.responses")
def frame_with_a_layer_of_many_digits(path):
    return compared(path, frame(layer=[1, 2, "9" * 5000]))


@case("not a frame of analysis.responses: could not convert string to float: 'high'")
def frame_with_words_for_numbers(path):
    return compared(path, frame(std="high"))


@case("the layers of a are not 1 to 3: rows are missing, or were added")
def frame_with_a_layer_twice(path):
    return compared(path, frame(layer=[1, 2, 2]))


@case("'=1+1' in column name is unprintable, or a formula")
def frame_with_a_formula(path):
    return compared(path, frame(name="=1+1"))


@case("in column network is unprintable, or a formula")
def frame_with_control_characters(path):
    return compared(path, frame(network="a\x1b[2J\nerror: all is well"))


@case("not a frame of analysis.responses")
def frame_that_is_an_archive(path):
    with zipfile.ZipFile(path / "a.zip", "w") as file:
        file.writestr(
            zipfile.ZipInfo("responses.csv"), frame().to_csv()
        )  # of no date: the table stays the same
    return compared(path, (path / "a.zip").read_bytes())


@case("not a frame of analysis.responses")
def frame_in_one_line(path):
    return compared(path, b"network," * 10**6)


@case("not a frame of analysis.responses: it has no rows")
def frame_without_rows(path):
    return compared(path, frame().iloc[:0])


@case("responses.csv: not a frame of analysis.responses: it has more than 67,108,864 bytes")
def frame_of_gigabytes(path):
    words = compared(path, b"")
    os.truncate(path / "responses.csv", 2**36)
    return words


@case("no such file")
def frame_that_is_a_folder(path):
    (path / "a.csv").mkdir()
    return [compare, path / "a.csv", path / "a.csv"]


@case("refused: it asks for")
def code_among_what_is_compared(path):
    compared(path, frame())
    torch.save(Calls(os.system, "touch evil"), path / "a.pth")
    return [compare, f"b={path / 'a.pth'}", path / "responses.csv", "--source", "batchnorm"]


# Runs


def trained(path, config="{}", metrics="iteration,lr,mean_std\n4,0.1,1\n", card="{}"):
    """The words that draw a run, with other values in its recipe, as JSON, and in the card of its
    snapshot.
    """
    recipe = vars(Recipe("residual", 8, iterations=8))
    (path / "run" / "snapshots").mkdir(parents=True)
    (path / "run" / "config.json").write_text(json.dumps(recipe | json.loads(config)))
    (path / "run" / "metrics.csv").write_text(metrics)
    training = recipe | {"iteration": 4, "current_lr": 0.1} | json.loads(card)
    snapshot = path / "run" / "snapshots" / "iteration-4.safetensors"
    loading.save(snapshot, network(), PRESETS["imagenet"], crop_padding="zero", training=training)
    return [dynamics, path / "run"]


@case("no such folder; a run is a folder that")
def run_that_is_not_there(path):
    return [dynamics, path / "run"]


@case("no config.json in it")
def run_that_is_an_empty_folder(path):
    return [dynamics, path]


@case("no snapshots; python -m models.train --snapshots 9 makes a run with some")
def run_without_snapshots(path):
    words = trained(path)
    (path / "run" / "snapshots" / "iteration-4.safetensors").unlink()
    return words


@case("config.json: damaged (iterations is 1000000000000000000000000000000)")
def run_of_very_many_iterations(path):
    return trained(path, config='{"iterations": 1000000000000000000000000000000}')


@case("snapshot of another run: iterations is 8 in its card and 1000000000000 in config.json")
def run_of_many_iterations(path):
    return trained(path, config='{"iterations": 1000000000000}')


@case("config.json: damaged (iterations is [8])")
def run_with_a_list_for_a_number(path):
    return trained(path, config='{"iterations": [8]}', card='{"iterations": [8]}')


@case("config.json: damaged (it says kind '<script>'")
def run_of_an_unknown_kind(path):
    return trained(path, config='{"kind": "<script>"}', card='{"kind": "<script>"}')


@case("config.json: damaged (lr is nan)")
def run_at_no_learning_rate(path):
    return trained(path, config='{"lr": NaN}')


@case("config.json: damaged (maximum recursion depth exceeded")
def run_of_deep_nesting(path):
    words = trained(path)
    (path / "run" / "config.json").write_text("[" * 100_000)
    return words


@case("metrics.csv: damaged (the iterations do not ascend, or not all numbers are finite)")
def run_with_gigantic_numbers(path):
    return trained(path, metrics="iteration,lr,mean_std\n4,0.1,1e308\n8,0.1,-1e308\n")


@case("metrics.csv: damaged (could not convert string to float")
def run_with_words_for_numbers(path):
    return trained(path, metrics="iteration,lr,mean_std\n4,0.1,high\n")


@case("metrics.csv: damaged (no column lr)")
def run_without_a_column(path):
    return trained(path, metrics="iteration,mean_std\n4,1\n")


@case("iteration-4.safetensors: damaged: its card says iteration -1 of 8")
def snapshot_before_the_first_iteration(path):
    return trained(path, card='{"iteration": -1}')


@case("at a learning rate of nan; move it away")
def snapshot_at_no_learning_rate(path):
    return trained(path, card='{"current_lr": NaN}')


@case("iteration-4.safetensors: no snapshot")
def snapshot_without_a_card(path):
    words = trained(path)
    save_file(network().state_dict(), path / "run" / "snapshots" / "iteration-4.safetensors")
    return words


@case("iteration-4.safetensors: damaged or truncated safetensors file")
def snapshot_cut_off(path):
    words = trained(path)
    os.truncate(path / "run" / "snapshots" / "iteration-4.safetensors", 1000)
    return words


@case("of iteration 4, as is iteration-4.safetensors; move one of them away")
def snapshot_twice(path):
    words = trained(path)
    snapshots = path / "run" / "snapshots"
    (snapshots / "iteration-5.safetensors").write_bytes(
        (snapshots / "iteration-4.safetensors").read_bytes()
    )
    return words


# Labels, options, folders


def labelled(path, label):
    torch.save(network().state_dict(), path / "a.pth")
    return checkpoint(f"{label}={path / 'a.pth'}")


@case("is no label: 1 to 80 printable characters")
def label_with_a_newline(path):
    return labelled(path, "a\nb")


@case("is no label: 1 to 80 printable characters")
def label_with_control_characters(path):
    return labelled(path, "a\x1b[2J")


@case("is no label: 1 to 80 printable characters")
def label_that_begins_like_a_formula(path):
    return labelled(path, "@SUM(1)")


@case("is no label: 1 to 80 printable characters")
def file_name_that_is_a_formula(path):
    torch.save(
        {"conv1.weight": torch.zeros(4, 3, 3, 3), "bn1.running_var": torch.ones(4)},
        path / "=1+1.pth",
    )
    return checkpoint(path / "=1+1.pth")


@case("File name too long")
def label_that_is_very_long(path):
    return ["--checkpoint", f"{'a' * 100_000}={path / 'gone.pth'}"]


@case("no such file")
def path_with_a_null(path):
    return ["--checkpoint", "a\0.pth"]


@case("name a folder that can be written")
def out_is_a_file(path):
    (path / "file").touch()
    return [*labelled(path, "a"), "--out", path / "file"]


@case("unknown preset")
def preset_with_markup(path):
    return [*labelled(path, "a"), "--normalize", "<b>"]


@case("not a whole number")
def images_of_another_script(path):
    return [*labelled(path, "a"), "--images", "²"]


@case("")
def very_many_images(path):
    return [*labelled(path, "a"), "--images", "9" * 5000]


@case("")
def depth_of_many_digits(path):
    return ["--depth", "9" * 5000]


@case("")
def a_device_for_a_file(path):
    return ["--checkpoint", "/dev/zero"]


@case("")
def a_pipe_for_data(path):
    os.mkfifo(path / "pipe.parquet")
    return data(path / "pipe.parquet")


def run(name, folder):
    """Run a case's command in a folder: its exit status, and the bytes by which the process grew at
    most.
    """
    module, *words = CASES[name][0](folder)
    module, words = (
        (module, words) if module in (compare, dynamics) else (responses, [module, *words])
    )
    words = [str(word) for word in words]
    if "--out" not in words:
        words += ["--out", str(folder / "out")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        status = module.main(words)
    except SystemExit as end:
        status = end.code
    return status, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_else(name, tmp_path, capsys):
    status, memory = run(name, tmp_path)
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if "error: " in line]
    assert status == 2
    assert len(lines) == 1
    assert shown.endswith(lines[0] + "\n")
    assert CASES[name][1] in lines[0]
    assert len(lines[0]) < 1000
    assert "Traceback" not in shown
    assert " at 0x" not in shown  # an object's address says nothing, and is another each time
    assert not [character for character in shown if ord(character) < 32 and character != "\n"]
    assert memory < MEMORY
    assert not list(tmp_path.glob("out/*"))
    assert not [
        place
        for place in (Path(), Path("/tmp"), tmp_path.parent, ROOT)
        if (place / "evil").exists()
    ]


def test_the_table_is_complete():
    assert len(CASES) >= 60
    table = DOCUMENT.read_text()
    assert [name for name in CASES if f"| {name} | 2 | " not in table] == []


def write_table():
    """Run every case and write what it said."""
    rows = []
    for name in CASES:
        shown, printed = io.StringIO(), io.StringIO()
        streams = contextlib.redirect_stderr(shown), contextlib.redirect_stdout(printed)
        with tempfile.TemporaryDirectory() as folder, streams[0], streams[1]:
            status, _ = run(name, Path(folder))
        message = shown.getvalue().splitlines()[-1].replace(folder, "...").replace("|", "\\|")
        rows.append(
            f"| {name} | {status} | `{message if len(message) < 300 else message[:300] + ' ...'}` |"
        )
    head = "# Hostile and careless input\n\nMade by `python -m tests.test_hostile`.\n\n| input | status | message |\n"
    DOCUMENT.write_text(head + "| --- | --- | --- |\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    write_table()

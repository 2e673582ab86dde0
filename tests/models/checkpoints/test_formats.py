"""What torch.save and safetensors write, and what attackers and accidents make of it."""

import collections
import datetime
import decimal
import io
import os
import pathlib
import pickle
import struct
import types
import uuid
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from models.checkpoints.loading import read

TENSORS = {
    "a.weight": torch.randn(2, 3, 3, 3),
    "a.half": torch.randn(4).half(),
    "a.bfloat": torch.randn(3, 4).bfloat16().t(),
    "a.double": torch.randn(2).double(),
    "a.view": torch.arange(10)[2:8:2],
    "a.parameter": nn.Parameter(torch.randn(2)),
    "a.scalar": torch.tensor(3),
    "a.empty": torch.zeros(0, 3),
    "a.flag": torch.tensor([True, False]),
}
SAVES = [
    {},
    {"_use_new_zipfile_serialization": False},
    {"pickle_protocol": 1},
    {"pickle_protocol": 4},
    {"pickle_protocol": 5},
]


@pytest.mark.parametrize("options", SAVES)
def test_what_torch_saves_comes_out_in_memory_of_its_own(options, tmp_path):
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "a.pth", **options)
    found = read(tmp_path / "a.pth").tensors
    (tmp_path / "a.pth").write_bytes(b"")
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
        assert type(found[name]) is torch.Tensor


def test_tied_weights_are_read_once_and_may_be_larger_than_the_file(tmp_path):
    tensor = torch.randn(10_000)
    torch.save({f"a{i}.weight": tensor for i in range(50)}, tmp_path / "a.pth")
    found = read(tmp_path / "a.pth").tensors
    assert len({x.data_ptr() for x in found.values()}) == 1


BESIDE = {
    "datetime": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    "timedelta": datetime.timedelta(1),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "deque": collections.deque([1, 2]),
    "frozenset": frozenset([1]),
    "set": {(1, 2)},
    "namespace": types.SimpleNamespace(a=1),
    "path": pathlib.PurePosixPath("a"),
    "version": torch.__version__,
    "decimal": decimal.Decimal(1),
    "uuid": uuid.UUID(int=1),
    "array": np.ones(3),
    "random state": np.random.RandomState(0).get_state(),
    "dtype": torch.float32,
    "bytearray": bytearray(b"a"),
    "counter": collections.Counter("aab"),
    "complex": 3 + 4j,
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("options", SAVES[:4])
def test_plain_objects_beside_the_weights_are_passed_over(beside, options, tmp_path):
    content = {"state_dict": {"a.weight": torch.ones(3)}, "beside": beside, "last": 1}
    torch.save(content, tmp_path / "a.pth", **options)
    assert read(tmp_path / "a.pth").tensors["a.weight"].tolist() == [1, 1, 1]


class Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def archive(path, payload):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", payload)
        file.writestr("archive/version", "3\n")


NESTED = b"N\x85" + b"2\x86" * 60  # a tuple of tuples whose hash takes 2^60 steps
PICKLES = {
    "system": (
        pickle.dumps(Calls(os.system, "touch evil"), 2),
        "refused: it asks for posix.system,",
    ),
    "eval": (pickle.dumps(Calls(eval, "1"), 2), "refused: it asks for builtins.eval, which could"),
    "torch.load": (pickle.dumps(Calls(torch.load, "a"), 2), "refused: it asks for torch"),
    "module": (
        pickle.dumps(nn.Linear(1, 1), 2),
        r"it asks for torch.nn.modules.linear.Linear.*save",
    ),
    "state of a function": (b"ctorch._utils\n_rebuild_tensor_v2\n}b.", "no state dict in it"),
    "nested key": (b"\x80\x02}" + NESTED + b"Ns.", "no state dict in it"),
    "nested in a set": (b"\x80\x04\x8f(" + NESTED + b"\x90.", "no state dict in it"),
    "huge number": (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x20\x85R.", "no state dict"),
    "huge bytes": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "damaged or truncated"),
    "huge memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "no state dict in it"),
    "many objects": (b"\x80\x02" + b"}" * 2_000_000, "it holds more objects than a checkpoint"),
    "many marks": (b"\x80\x02" + b"(" * 2_000_000, "it holds more objects than a checkpoint"),
    "without end": (b"\x80\x02" + b"]" * 1000, "damaged or truncated"),
    "empty stack": (b"\x80\x02R.", "damaged or truncated"),
}


@pytest.mark.parametrize(("payload", "words"), PICKLES.values(), ids=PICKLES)
def test_hostile_pickles(payload, words, tmp_path):
    archive(tmp_path / "a.pth", payload)
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


def edit(path, change):
    """Change the entries of an archive's directory: objects that zipfile writes as they are."""
    with zipfile.ZipFile(path) as before:
        entries = [(entry, before.read(entry)) for entry in before.infolist()]
    with zipfile.ZipFile(path, "w") as after:
        for entry, content in entries:
            after.writestr(entry, content)
        change(after)


def as_folder(file):
    file.infolist()[-3].external_attr |= 0x10


def pointing_twice(file):
    data = [entry for entry in file.infolist() if "/data/" in entry.filename]
    data[1].header_offset = data[0].header_offset


def encrypted(file):
    file.infolist()[0].flag_bits |= 1


def another_size(file):
    file.infolist()[0].file_size += 1


@pytest.mark.parametrize("change", [as_folder, pointing_twice, encrypted, another_size])
def test_archives_that_torch_does_not_write(change, tmp_path):
    torch.save({"a.weight": torch.randn(9), "b.weight": torch.randn(9)}, tmp_path / "a.pth")
    edit(tmp_path / "a.pth", lambda file: None)
    assert len(read(tmp_path / "a.pth").tensors) == 2
    edit(tmp_path / "a.pth", change)
    with pytest.raises(ValueError, match="damaged or truncated"):
        read(tmp_path / "a.pth")


def test_the_sum_of_all_tensors_is_bounded_by_the_file(tmp_path):
    flat = torch.zeros(40_000)
    for tensors in (
        {"a.weight": torch.zeros(1).expand(2**28)},
        {f"a{i}.weight": torch.zeros(1).expand(2**14 + i) for i in range(300)},
        {f"a{i}.weight": flat[i:] for i in range(300)},
    ):
        torch.save(tensors, tmp_path / "a.pth")
        with pytest.raises(
            ValueError, match=r"its tensors would take [\d,]+ bytes .* it is damaged"
        ):
            read(tmp_path / "a.pth")


def quantised():
    return torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:.*[Qq]uantize")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (quantised, r"a\.weight is quantised: .* before it was quantised"),
        (lambda: torch.eye(3).to_sparse(), r"a\.weight is sparse, quantized or without data"),
        (lambda: torch.zeros(3, device="meta"), r"a\.weight is sparse, quantized or without data"),
        (lambda: torch.zeros(3, dtype=torch.complex64), r"a\.weight holds complex64, not"),
        (lambda: torch.zeros(3).to(torch.float8_e4m3fn), r"a\.weight is sparse, quantized or"),
    ],
)
def test_tensors_that_are_no_plain_numbers(make, words, tmp_path):
    torch.save({"a.weight": make()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "a.pth")


def test_checksums_that_torch_left_out_are_not_missed(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a.weight": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(tmp_path / "a.pth").tensors["a.weight"].tolist() == [1, 1, 1]


def test_a_legacy_storage_of_another_size(tmp_path):
    stream = io.BytesIO()
    torch.save({"a.weight": torch.zeros(432)}, stream, _use_new_zipfile_serialization=False)
    content = stream.getvalue()
    position = content.rindex(struct.pack("<q", 432))
    for count in (2**40, -1, 431):
        changed = content[:position] + struct.pack("<q", count) + content[position + 8 :]
        (tmp_path / "a.pth").write_bytes(changed)
        with pytest.raises(ValueError, match="damaged or truncated"):
            read(tmp_path / "a.pth")

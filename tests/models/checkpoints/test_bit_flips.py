"""One flipped bit at a time: the true tensors come out, or one line of error.

A sample of the bytes by default; with ALL_FLIPS=1 in the environment every byte of the headers.
"""

import io
import os
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from models import build
from models.checkpoints import loading
from models.data.preprocessing import PRESETS

PAGE = 4096  # bytes of tensor data for one flip
STEP = 1 if os.environ.get("ALL_FLIPS") else 61  # bytes of headers for one flip

pytestmark = pytest.mark.fuzz


def flips(path, positions):
    """Flip one bit at each position; return how many files gave tensors, and how many an error.

    Fails if other tensors come out than were saved, or an error of another kind.
    """
    data = bytearray(path.read_bytes())
    true = loading.read(path).tensors
    target = path.with_name(f"flipped{path.suffix}")
    whole = errors = 0
    for position in positions:
        data[position] ^= 1 << (position % 8)
        target.write_bytes(data)
        try:
            found = loading.read(target).tensors
        except ValueError as error:
            lines = str(error).splitlines()
            errors += len(lines) == 1 and lines[0].startswith(f"{target}: ")
        else:
            assert found.keys() == true.keys(), position
            assert all(torch.equal(found[name], true[name]) for name in true), position
            whole += 1
        data[position] ^= 1 << (position % 8)
    assert whole + errors == len(positions)
    return whole, errors


def zip_headers(path):
    """Return the positions of an archive's headers, pickle and directory, and of its tensor data."""
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    inside = set()
    for entry in entries:
        name, extra = struct.unpack_from("<2H", data, entry.header_offset + 26)
        first = entry.header_offset + 30 + name + extra
        inside.update(range(first, first + entry.file_size))
    return [n for n in range(len(data)) if n not in inside], sorted(inside)[::PAGE]


def test_the_headers_of_a_zip_archive(tmp_path):
    """The names and shapes of a resnet-20, and few numbers: reading them takes most of the time."""
    few = {name: x.flatten()[:2].clone() for name, x in build("resnet-20").state_dict().items()}
    torch.save(few, tmp_path / "a.pth")
    headers, _ = zip_headers(tmp_path / "a.pth")
    whole, errors = flips(tmp_path / "a.pth", headers[::STEP])
    print(f"{whole} flips gave the true tensors, {errors} one line")
    assert errors > whole > 0


def test_the_numbers_of_a_zip_archive(tmp_path):
    torch.save(build("resnet-20").state_dict(), tmp_path / "a.pth")
    _, data = zip_headers(tmp_path / "a.pth")
    assert flips(tmp_path / "a.pth", data) == (0, len(data))


def test_a_safetensors_file_of_ours(tmp_path):
    """Its digest shows every flip that changes its tensors or its card."""
    path = tmp_path / "a.safetensors"
    loading.save(path, build("resnet-8"), PRESETS["[0,1]"], crop_padding="none", training={})
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    whole, errors = flips(path, range(0, header, STEP))
    print(f"{whole} flips gave the true tensors, {errors} one line")
    assert errors > whole
    assert flips(path, range(header, size, PAGE))[0] == 0


def test_a_safetensors_file_of_others(tmp_path):
    """Nothing in it shows a flip in a name or a number: names may change, but no shape and dtype."""
    path = tmp_path / "a.safetensors"
    true = build("resnet-8").state_dict()
    save_file(true, path)
    data = bytearray(path.read_bytes())
    shapes = sorted((str(x.dtype), tuple(x.shape)) for x in true.values())
    for position in range(0, 8 + int.from_bytes(data[:8], "little"), STEP):
        data[position] ^= 1
        (tmp_path / "b.safetensors").write_bytes(data)
        data[position] ^= 1
        try:
            found = loading.read(tmp_path / "b.safetensors").tensors
        except ValueError:
            continue
        assert sorted((str(x.dtype), tuple(x.shape)) for x in found.values()) == shapes

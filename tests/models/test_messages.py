import pytest
import torch

from models.messages import LENGTH, is_out_of_memory, one_line, report


def test_one_line_without_control_characters():
    assert one_line("a\n  b\tc\x1b[2J\0\u2028d é") == "a b c\\x1b[2J\\x00 d é"
    assert one_line(OSError(2, "No such file", "a\u202eb")) == "[Errno 2] No such file: 'a\\u202eb'"


def test_a_long_message_is_cut_in_the_middle():
    words = one_line("a" * 5000 + "the end")
    assert len(words) == LENGTH + 5
    assert words.endswith("the end")


def test_report(capsys):
    assert report(ValueError("wrong\nfile")) == 2
    assert capsys.readouterr().err == "error: wrong file\n"


def test_a_file_that_vanished_is_said_to_have_been_there(capsys):
    report(FileNotFoundError(2, "No such file or directory", "a.pth"))
    said = "error: a.pth: No such file or directory, and it was there before; run the command again when it is back\n"
    assert capsys.readouterr().err == said
    report(FileNotFoundError("a.pth: no such file; a checkpoint is ..."))
    assert capsys.readouterr().err == "error: a.pth: no such file; a checkpoint is ...\n"


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("HIP"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
            True,
        ),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_ways_to_say_that_memory_is_short(error, short):
    assert is_out_of_memory(error) == short


def test_torchs_own_words_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)

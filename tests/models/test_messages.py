from models.messages import LENGTH, one_line, report


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

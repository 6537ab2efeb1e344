from common.refusal import first_of, one_line


def test_an_error_is_quoted_in_one_line_of_limited_length():
    assert one_line(ValueError("node  7\n\tis damaged ")) == "node 7 is damaged"
    assert one_line(ValueError("x" * 300)) == "x" * 200
    assert one_line(ValueError("too long"), 3) == "too"
    assert one_line(MemoryError()) == "MemoryError"  # which says nothing itself


def test_long_lists_are_cut_and_say_how_many_more_there_are():
    assert first_of(["a", "b"]) == "a, b"
    assert first_of("abcde") == "a, b, c and 2 more"
    assert first_of("abcde", 5) == "a, b, c, d, e"

"""Tables and sentences as text."""

from rich.table import Table

from fxcompress.terminal import WIDTH, printed

PLACE = "conv2d_3 [layer1.0.conv1 (model.py:31)] :warning:"


def test_places_are_no_markup():
    table = Table("where", title=PLACE)
    table.add_row(PLACE)
    assert printed(table, PLACE).count(PLACE) == 3


def test_tables_fit_and_sentences_are_not_broken():
    table = Table("a", "b")
    table.add_row("x " * 100, "y " * 100)
    sentence = "word " * 100 + "end"
    *rows, last = printed(table, sentence).splitlines()
    assert last == sentence
    assert max(map(len, rows)) <= WIDTH

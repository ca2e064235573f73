"""Which cases the quick run leaves out, and that a name which is not there is noticed."""

import pytest

from tests import exhaustive


class Item:
    def __init__(self, nodeid):
        self.nodeid, self.marks = nodeid, []

    def add_marker(self, mark):
        self.marks.append(mark.name)


@pytest.fixture
def kept(monkeypatch):
    table = {"a.py::test_all": [], "a.py::test_some": ["x"], "a.py::test_second": 2}
    monkeypatch.setattr(exhaustive, "KEPT", table)
    return table


def items_of(*names):
    return [Item(f"tests/a.py::test_{name}") for name in names]


def test_cases_that_are_not_kept_are_marked(kept):
    items = items_of("all", "some[x]", "some[y]", "second[1]", "second[2]", "second[3]", "other", "other[y]")
    exhaustive.mark_exhaustive(items)
    assert [item.nodeid.partition("test_")[2] for item in items if item.marks == ["exhaustive"]] == [
        "all",
        "some[y]",
        "second[2]",
    ]
    assert exhaustive.stale(items) == []


def test_what_is_not_there_is_stale(kept):
    assert exhaustive.stale(items_of("some[y]", "second[1]")) == ["a.py::test_all", "a.py::test_some[x]"]

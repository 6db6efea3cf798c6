"""Tables of images: what is read, and every bad row at once."""

import pytest
from PIL import Image

from finetune.data.csv import csv
from finetune.errors import DataError


@pytest.fixture
def table(tmp_path):
    """Writes tmp_path/labels.csv, and images 0.png to 9.png beside it."""
    for value in range(10):
        Image.new("RGB", (2, 2), (value, value, value)).save(tmp_path / f"{value}.png")

    def write(text, encoding="utf-8"):
        path = tmp_path / "labels.csv"
        path.write_bytes(text.encode(encoding))
        return str(path)

    return write


def contents(part):
    return [(int(part[i][0][0, 0, 0]), part[i][1]) for i in range(len(part))]


def test_splits_are_those_of_the_table(table):
    splits = csv(
        table("path,label,split\n0.png,dog,train\n1.png,cat,train\n2.png,dog,val\n3.png,cat,test\n")
    )
    assert splits.classes == ("cat", "dog")
    assert contents(splits.train) == [(0, 1), (1, 0)]
    assert contents(splits.val) == [(2, 1)]
    assert contents(splits.test) == [(3, 0)]


def test_a_split_without_rows_is_none(table):
    splits = csv(table("path,label,split\n0.png,a,train\n1.png,b,Training\n2.png,a,valid\n"))
    assert len(splits.train) == 2
    assert len(splits.val) == 1
    assert splits.test is None


def test_without_splits_the_table_is_cut_by_the_seed(table):
    path = table("path,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(10)))
    splits = csv(path)
    parts = (splits.train, splits.val, splits.test)
    assert [len(part) for part in parts] == [6, 2, 2]
    found = sorted(pair for part in parts for pair in contents(part))
    assert found == [(i, i % 2) for i in range(10)]
    assert contents(csv(path).test) == contents(splits.test)


def test_columns_go_by_name_and_others_are_ignored(table):
    splits = csv(table("who,label, path ,split\nme,b,0.png,train\n,a,1.png,train\n"))
    assert contents(splits.train) == [(0, 1), (1, 0)]


def test_quoted_fields_and_other_line_ends_are_read(table, tmp_path):
    (tmp_path / "0.png").rename(tmp_path / "a, b.png")
    splits = csv(table('path,label,split\r\n"a, b.png","x, y",train\r\n\r\n1.png,z,train\r\n'))
    assert splits.classes == ("x, y", "z")


def test_paths_may_be_relative_to_another_folder(table, tmp_path):
    path = table("path,label,split\n0.png,a,train\n1.png,b,train\n")
    moved = tmp_path / "elsewhere" / "labels.csv"
    moved.parent.mkdir()
    moved.write_text((tmp_path / "labels.csv").read_text())
    assert contents(csv(str(moved), root=str(tmp_path)).train) == contents(csv(path).train)


def test_spaces_around_labels_are_stripped_with_a_warning(table, caplog):
    splits = csv(table("path,label,split\n0.png, a,train\n1.png,a ,train\n2.png,b,train\n"))
    assert splits.classes == ("a", "b")
    assert "spaces around 2 labels were stripped" in caplog.text


def test_a_byte_order_mark_is_read_over_with_a_warning(table, caplog):
    text = "path,label,split\n0.png,é,train\n1.png,b,train\n"
    assert csv(table(text, encoding="utf-8-sig")).classes == ("b", "é")
    assert "begins with a byte order mark" in caplog.text


def test_double_rows_count_once_with_a_warning(table, caplog):
    splits = csv(table("path,label,split\n0.png,a,train\n1.png,b,train\n./0.png,a,train\n"))
    assert len(splits.train) == 2
    assert "1 rows stand there twice" in caplog.text


def test_all_bad_rows_are_told_at_once_with_their_lines(table):
    text = (
        "path,label,split\n0.png,a,train\ngone.png,a,train\n1.png, ,train\n2.png,nan,train\n"
        "../../etc/passwd,a,train\n/etc/passwd,a,train\n3.png,b,trian\n,a,train\n"
        "0.png,b,train\n0.png,a,test\n4.png,b,\n"
    )
    with pytest.raises(DataError) as caught:
        csv(table(text))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(
        "labels.csv: 10 problems: 2 no label, 2 path outside the folder, 2 unknown split, "
        "2 contradiction, 1 missing file, 1 no path"
    )
    assert lines[-1].startswith("Paths are relative to ")
    assert lines[1:-1] == [
        "  line 3: 'gone.png' does not exist",
        "  line 4: '1.png' has no label (' ')",
        "  line 5: '2.png' has no label ('nan')",
        "  line 6: '../../etc/passwd' is outside the folder",
        "  line 7: '/etc/passwd' is outside the folder",
        "  line 8: unknown split 'trian': one of train, val, test",
        "  line 9: no path",
        "  line 10: labelled 'b' here and 'a' in line 2",
        "  line 11: in test here and in train in line 2",
        "  line 12: unknown split '': one of train, val, test",
    ]


def test_twenty_bad_rows_are_shown_and_the_rest_counted(table):
    text = "path,label\n" + "".join(f"no{i}.png,a\n" for i in range(25))
    with pytest.raises(DataError, match="25 problems: 25 missing file") as caught:
        csv(table(text))
    assert str(caught.value).count("does not exist") == 20
    assert "\n  and 5 more\nPaths are relative to" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"lacks the columns 'path', 'label': its first line must be path,label\[,split\]"),
        ("file,label\n0.png,a\n", "lacks the columns 'path': .* but is 'file,label'"),
        ("path;label\n0.png;a\n", "separate the columns by commas"),
        ("path,label\n", "has a header but no rows"),
        ("path,label\n0.png,a,b\n", "line 2: 3 fields where the header has 2; quote"),
        ("path,label\n0.png\n", "line 2: 1 fields where the header has 2"),
        ('path,label\n"0.png,a\n', "line 2: "),
        ("path,label,split\n0.png,a,val\n1.png,b,test\n", "no row has split train; it has 'val'"),
    ],
)
def test_what_is_wrong_with_the_table_is_said(table, text, message):
    with pytest.raises(DataError, match=message):
        csv(table(text))


def test_another_encoding_is_refused(table):
    with pytest.raises(DataError, match=r"is not UTF-8 .*; save it as UTF-8"):
        csv(table("path,label\n0.png,é\n", encoding="latin-1"))


def test_a_missing_table_or_root_is_named(table, tmp_path):
    with pytest.raises(DataError, match=r"data\.table=.*nix\.csv: .* does not exist"):
        csv(str(tmp_path / "nix.csv"))
    with pytest.raises(DataError, match="is a folder, not a table"):
        csv(str(tmp_path))
    with pytest.raises(DataError, match=r"data\.root=.*nowhere: .* does not exist"):
        csv(table("path,label\n0.png,a\n"), root=str(tmp_path / "nowhere"))

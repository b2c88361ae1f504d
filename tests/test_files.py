"""What atomic leaves behind, when it ends well and when it does not."""

import pytest

from machinery.files import atomic


def test_a_file_and_a_folder_appear_complete(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    with atomic(file) as scratch, atomic(folder) as room:
        scratch.write_text("new")
        room.mkdir()
        (room / "part").write_text("part")
        assert file.read_text() == "old" and not folder.exists()
    assert file.read_text() == "new" and (folder / "part").read_text() == "part"
    assert sorted(tmp_path.iterdir()) == [file, folder]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_everything_unchanged(error, tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(error), atomic(file) as scratch, atomic(tmp_path / "folder") as room:
        scratch.write_text("new")
        room.mkdir()
        (room / "part").write_text("part")
        raise error
    with pytest.raises(OSError), atomic(tmp_path / "folder"):
        pass  # nothing was made
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "old"

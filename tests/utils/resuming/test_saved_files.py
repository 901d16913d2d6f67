import os

from utils.checkpoints import STAGE
from utils.resuming.saved_files import foreign_origin


def test_checkpoints_that_were_not_written_here_are_known(tmp_path, monkeypatch):
    (tmp_path / STAGE).touch()
    assert foreign_origin(tmp_path, {"working_directory": os.getcwd()}) == ""
    assert "was written in /home/other, not in" in foreign_origin(tmp_path, {"working_directory": "/home/other"})
    assert "unknown folder" in foreign_origin(tmp_path, {})
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert f"another user (uid {owner})" in foreign_origin(tmp_path, {"working_directory": os.getcwd()})

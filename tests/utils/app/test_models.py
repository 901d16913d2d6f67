"""The last model of each kind is kept, until its checkpoint changes or another one is asked for."""

from utils.app.models import Models


def test_a_model_is_loaded_once_per_checkpoint_content_and_settings(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "COMPLETE.json").write_text(name)
    models, loaded = Models(), []

    def get(kind, name, *settings):
        return models.get(kind, tmp_path / name, lambda: loaded.append(name) or len(loaded), *settings)

    assert [get("x", "a"), get("x", "a"), get("y", "b"), get("x", "a")] == [1, 1, 2, 1]
    (tmp_path / "a" / "COMPLETE.json").write_text("changed")
    assert [get("x", "a"), get("x", "a", "raw"), get("x", "a", "raw"), get("x", "b"), get("x", "a")] == [3, 4, 4, 5, 6]
    assert get("y", "b") == 2

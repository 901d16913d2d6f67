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


def test_a_pipeline_is_loaded_anew_where_what_it_was_loaded_from_has_changed(tmp_path):
    for name, file in (("model", "COMPLETE.json"), ("vae", "COMPLETE.json"), ("encoder", "model.safetensors")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("first")
    models, loaded = Models(), []

    class Pipeline:
        def __init__(self):
            loaded.append(self)
            names = ("vae_checkpoint", "text_encoder")
            folders = (tmp_path / "vae", tmp_path / "encoder")
            self.record = {**dict(zip(names, map(str, folders))), "vocoder_checkpoint": "", "weights": "ema"}

    def n_loaded():
        models.get("x", tmp_path / "model", Pipeline)
        return len(loaded)

    assert [n_loaded(), n_loaded()] == [1, 1]
    (tmp_path / "vae" / "COMPLETE.json").write_text("exchanged")
    assert [n_loaded(), n_loaded()] == [2, 2]
    (tmp_path / "encoder" / "model.safetensors").write_text("longer than before")
    assert [n_loaded(), n_loaded()] == [3, 3]
    (tmp_path / "vae" / "COMPLETE.json").unlink()
    assert n_loaded() == 4

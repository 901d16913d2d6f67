"""Features by networks in files and folders: the network's own numbers, and what is refused."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from dataset_loading.image.pixels import to_uint8
from tests.helpers.text_encoder_folder import PooledPixels, save_clip, save_dinov2, save_torchscript
from utils.metrics.given_features import given_scores, open_features


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return {"clip": save_clip(folder / "clip"), "dinov2": save_dinov2(folder / "dinov2")}


@pytest.fixture(scope="module")
def images():
    return torch.rand(10, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_file_gets_8_bit_images_and_is_asked_for_features(tmp_path, images):
    file = save_torchscript(tmp_path / "network.pt")
    features = open_features(str(file))
    assert torch.allclose(features(images), PooledPixels()(to_uint8(images), True), atol=1e-5)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert features.describe() == {
        "path": str(file),
        "kind": "TorchScript",
        "width": 6,
        "sha256": {"network.pt": digest},
    }
    assert not any(parameter.requires_grad for parameter in features.parameters())


class Asked(PooledPixels):
    """The network without its argument."""

    def forward(self, image):
        return super().forward(image, True)


def test_the_frechet_distance_is_that_of_torchmetrics(tmp_path, images):
    features = open_features(str(save_torchscript(tmp_path / "network.pt")))
    other = (images * 0.7).roll(1, 0)
    metric = FrechetInceptionDistance(feature=Asked(), input_img_size=(3, 48, 48), normalize=False)
    metric.set_dtype(torch.float64)
    metric.update(to_uint8(images), real=True)
    metric.update(to_uint8(other), real=False)
    scores = given_scores(features(other), features(images))
    assert scores["features_frechet"] == pytest.approx(metric.compute().item(), rel=1e-3)
    assert set(given_scores(features(other[:3]), features(images[:3])).values()) == {None}


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_a_folder_gives_the_embeddings_of_transformers(folders, images, kind):
    model, processor = AutoModel.from_pretrained(folders[kind]), AutoImageProcessor.from_pretrained(folders[kind])
    pixels = [Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in to_uint8(images)]
    values = processor(images=pixels, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if kind == "clip":
            tokens = torch.ones(1, 4, dtype=torch.long)
            expected = model(input_ids=tokens, pixel_values=values).image_embeds  # Of unit length.
        else:
            expected = model(pixel_values=values).last_hidden_state[:, 0]
    features = open_features(str(folders[kind]))
    result = features(images)
    if kind == "clip":
        result = torch.nn.functional.normalize(result, dim=1)
    assert torch.allclose(result, expected, atol=2e-3)
    assert features.kind == kind and set(features.files) >= {"config.json", "model.safetensors"}


def test_the_clip_score_is_that_of_the_models_logits(folders, images):
    captions = ["a red disc", "a very long caption"] * 5
    features = open_features(str(folders["clip"]))
    model, tokenizer = AutoModel.from_pretrained(folders["clip"]), AutoTokenizer.from_pretrained(folders["clip"])
    values = AutoImageProcessor.from_pretrained(folders["clip"])(list(to_uint8(images)), return_tensors="pt")
    with torch.no_grad():
        output = model(**tokenizer(captions, padding=True, return_tensors="pt"), **values)
        cosine = output.logits_per_image.diagonal() / model.logit_scale.exp()
    score = features.clip_score(features(images), captions)
    assert score == pytest.approx((100 * cosine.clamp_min(0)).mean().item(), rel=1e-4) and score > 0
    assert open_features(str(folders["dinov2"])).clip_score(features(images), captions) is None


class FixedSize(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.reshape(-1, 3, 299, 299).flatten(1)


class Maps(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.float()


def test_networks_that_give_no_features_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match=r"fixed.pt.*3x48x48.*resizes its input"):
        open_features(str(save_torchscript(tmp_path / "fixed.pt", FixedSize())))(images)
    with pytest.raises(ValueError, match=r"maps.pt.*\(10, 3, 48, 48\), not \(B, D\)"):
        open_features(str(save_torchscript(tmp_path / "maps.pt", Maps())))(images)


def test_paths_that_hold_no_network_are_refused(tmp_path, folders):
    with pytest.raises(FileNotFoundError, match=r"nothing.pt does not exist; .*inception-2015-12-05.pt"):
        open_features(str(tmp_path / "nothing.pt"))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth is no TorchScript file.*only weights"):
        open_features(str(tmp_path / "weights.pth"))
    with pytest.raises(ValueError, match=r"no readable config.json"):
        open_features(str(tmp_path))
    # Folders: another model, no preprocessing, no tokenizer, weights that lack a tensor.
    for kind, name in (("clip", "bert"), ("clip", "bare"), ("clip", "mute"), ("dinov2", "half")):
        shutil.copytree(folders[kind], tmp_path / name)
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"model_type='bert', known: clip, dinov2"):
        open_features(str(tmp_path / "bert"))
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"bare has no preprocessor_config.json"):
        open_features(str(tmp_path / "bare"))
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / "mute" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"mute has no tokenizer, which the CLIP score needs"):
        open_features(str(tmp_path / "mute")).clip_score(torch.ones(1, 8), ["a"])
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    (tmp_path / "half" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"half: the weights lack .*layer.1"):
        open_features(str(tmp_path / "half"))

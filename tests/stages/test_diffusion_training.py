"""The text-to-image stage in one process: exactness under accumulation, checkpointing, resume; clear refusals."""

import json

import pytest
import torch

import evaluate
from dataset_loading.image.latents import ImageLatentDataset
from model.image.diffusion import ImageDiffusion
from pretrain_image_diffusion import ImageDiffusionStage
from tests.helpers.image_diffusion_checkpoint import save_diffusion_checkpoint
from tests.helpers.latent_cache import save_vae
from tests.helpers.runs import SMALL_DIFFUSION, edit_record, largest_difference, move_alone
from utils.checkpoints import load_model
from utils.command_line import parse_arguments
from utils.generation.arguments.image import SamplingArguments
from utils.generation.latents import vae_fingerprint
from utils.generation.text_to_image import TextToImagePipeline


def test_record_names_the_vae_and_the_model_fits_its_latents(train_diffusion, latent_cache):
    run = train_diffusion("record", 2, "--batch_size", "4")
    record = json.loads((run.folder / "stage.json").read_text())
    settings = ImageLatentDataset(latent_cache, "train").manifest["settings"]
    assert record["latents"]["vae_fingerprint"] == settings["vae_fingerprint"]
    model = load_model(ImageDiffusion, run.folder)
    assert list(model.latent_shape()) == settings["latent_shape"] == [16, 4, 4]
    assert model.config.max_tokens == settings["max_tokens"]


def test_accumulation_equals_one_batch(train_diffusion):
    whole = train_diffusion("whole", 6, "--batch_size", "8")
    parts = train_diffusion("parts", 6, "--batch_size", "2", "--gradient_accumulation_steps", "4")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert largest_difference(whole.weights(), parts.weights()) <= 1e-4


def test_gradient_checkpointing_changes_nothing(train_diffusion):
    plain = train_diffusion("plain", 4, "--batch_size", "8")
    recomputed = train_diffusion("recomputed", 4, "--batch_size", "8", "--use_gradient_checkpointing")
    assert recomputed.losses == pytest.approx(plain.losses, rel=1e-6)


def test_resumed_equals_straight_through(train_diffusion, tmp_path):
    flags = ["--batch_size", "8", "--save_steps", "4"]
    straight = train_diffusion("straight", 8, *flags)
    half = tmp_path / "image_diffusion" / "half"
    half.mkdir()
    (straight.folder.parent / "checkpoint-4").rename(half / "checkpoint-4")
    resumed = train_diffusion("half", 8, *flags, "--resume_from_checkpoint")
    for name in ("model", "ema"):
        assert largest_difference(straight.weights(name), resumed.weights(name)) == 0
    assert straight.losses[4:] == resumed.losses[4:]


def test_training_learns_and_evaluations_compare(train_diffusion):
    run = train_diffusion(
        "learns", 40, "--batch_size", "8", "--eval_steps", "20", "--ema_decay", "0.9", "--eval_images", "6"
    )
    values = run.logged("eval_loss")
    assert len(values) == 2 and values[1] < 0.97 * values[0]
    assert all(name in run.history[-1] for name in ("eval_kid", "eval_frechet", "eval_agreement"))
    buckets = [run.history[-1][f"eval_loss_t{low}-{high}"] for low, high in (("0.00", "0.50"), ("0.50", "1.00"))]
    assert sum(buckets) / 2 == pytest.approx(values[1], rel=1e-5)


def test_bf16_reaches_the_loss_of_fp32_with_fp32_weights(train_diffusion):
    flags = ["--batch_size", "8", "--ema_decay", "0.9"]
    runs = [train_diffusion("fp32", 40, *flags), train_diffusion("bf16", 40, *flags, "--bf16")]
    assert sum(runs[1].losses[-10:]) == pytest.approx(sum(runs[0].losses[-10:]), rel=0.01)
    assert all(value.dtype == torch.float32 for value in runs[1].weights().values())


@pytest.mark.parametrize(
    "flags",
    [
        "--override schedule=cosine prediction=v --loss_weighting min_snr",
        "--override schedule=scaled_linear prediction=epsilon --time_sampling uniform",
        "--override schedule=linear prediction=x0 zero_terminal_snr=true --sampler ddim",
        "--override schedule=edm prediction=v --sampler heun",
    ],
)
def test_every_objective_trains_and_samples(flags, train_diffusion):
    small = SMALL_DIFFUSION[SMALL_DIFFUSION.index("--override") + 1 : SMALL_DIFFUSION.index("--learning_rate")]
    words = flags.replace("--override", f"--override {' '.join(small)}").split()
    run = train_diffusion("objective", 3, "--batch_size", "8", *words)
    assert all(loss == loss and loss < 10 for loss in run.losses)


def test_channel_weights_weigh_the_loss_of_each_channel(train_diffusion, latent_cache):
    plain = train_diffusion("plain", 1, "--batch_size", "8")
    weighted = train_diffusion("weighted", 1, "--batch_size", "8", "--channel_weight_power", "1")
    assert weighted.losses[0] != pytest.approx(plain.losses[0], rel=1e-4)
    # The network starts at zero, so that the loss is the mean square of its target in either weighting.
    history = [run.history[0] for run in (plain, weighted)]
    assert history[0]["loss/mse"] == history[1]["loss/mse"] == pytest.approx(plain.losses[0], rel=1e-5)


def test_half_of_the_mirrored_latents_are_used(train_diffusion, latent_cache):
    """The trainer's draw is the plain or the mirrored posterior, both often, and depends on step and sample alone."""
    from utils.training.diffusion import DiffusionTrainer

    data = ImageLatentDataset(latent_cache, "train")
    trainer = object.__new__(DiffusionTrainer)
    trainer.args = type("Args", (), {"seed": 1, "device": torch.device("cpu")})
    trainer.state = type("State", (), {"global_step": 3})
    trainer.noise_ahead = None
    names = ("mean", "std", "flipped_mean", "flipped_std", "index")
    batch = {name: torch.stack([data[i][name] for i in range(len(data))]) for name in names}
    draws = trainer.draw_latents(batch)
    mirrored = [
        (draw - flipped).abs().mean() < (draw - plain).abs().mean()
        for draw, plain, flipped in zip(draws, batch["mean"], batch["flipped_mean"])
    ]
    assert 0.3 < sum(map(bool, mirrored)) / len(mirrored) < 0.7
    rows = torch.tensor([5, 2])
    assert torch.equal(trainer.draw_latents({name: value[rows] for name, value in batch.items()}), draws[rows])


def test_another_vae_is_refused(train_diffusion, image_cache, tmp_path):
    other = save_vae(tmp_path / "other", image_cache, latent_mean=0.3)
    with pytest.raises(ValueError, match=r"has fingerprint \w+, but the latents in .* come from the VAE \w+"):
        train_diffusion("other", 2, "--vae_checkpoint", str(other))
    with pytest.raises(ValueError, match="preset 'tiny', not 'small'"):
        train_diffusion("preset", 2, "--vae_config", "small")


def test_a_run_draws_without_the_folders_of_its_vae_and_data(train_diffusion, latent_cache, tmp_path, monkeypatch):
    run = train_diffusion("keeps", 2, "--batch_size", "4")
    latents = move_alone(run.folder.parent, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    pipeline = TextToImagePipeline.load("moved")
    assert vae_fingerprint("moved/vae") == latents["vae_fingerprint"]
    images = pipeline.images(["a red disc"], [0], SamplingArguments(n_steps=1))
    assert images.shape == (1, 3, 32, 32)
    with pytest.raises(FileNotFoundError, match=r"gone does not exist, .*checkpoint-2 .*--cached_dataset"):
        evaluate.evaluate(parse_arguments(evaluate.EvaluateArguments, ["--checkpoint", "moved"], ""))


def test_starting_from_a_model_of_another_vae_or_stage_is_refused(
    train_diffusion, latent_cache, image_cache, tmp_path
):
    folder = save_diffusion_checkpoint(tmp_path / "image_diffusion" / "first", latent_cache)
    edit_record(folder / "stage.json", lambda record: record["latents"].update(vae_fingerprint="another"))
    with pytest.raises(ValueError, match=r"vae_fingerprint='another'.*preprocess_image_diffusion.* --vae_checkpoint "):
        train_diffusion("second", 2, "--init_from", str(folder))
    vae = next((latent_cache / "vae").glob("checkpoint-*"))
    with pytest.raises(ValueError, match="is of stage 'image_vae'; one of stage 'image_diffusion' is needed"):
        train_diffusion("second", 2, "--init_from", str(vae))


def test_a_damaged_checkpoint_is_passed_over_on_resume(train_diffusion, caplog):
    run = train_diffusion("damaged", 2, "--batch_size", "4", "--save_steps", "1")
    file = run.folder / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"optimizer\.pt is damaged.*checkpoint-1"):
        train_diffusion("damaged", 3, "--batch_size", "4", "--resume_from_checkpoint", str(run.folder))
    train_diffusion("damaged", 3, "--batch_size", "4", "--resume_from_checkpoint", "latest")
    assert f"{file} is damaged" in caplog.text and "checkpoint-1" in caplog.text


def test_an_override_that_contradicts_the_latents_is_refused(train_diffusion):
    with pytest.raises(ValueError, match=r"latent_channels=8 does not fit .* latent_channels=16"):
        train_diffusion("override", 2, "--override", "latent_channels=8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min_snr_gamma", "3"], "--min_snr_gamma has no effect with loss_weighting='none'"),
        (["--time_sampling", "uniform", "--time_mean", "1"], "--time_mean has no effect"),
        (["--guidance_interval", "0.9", "0.1"], "guidance_interval"),
        (["--sampler", "dpmpp"], "sampler"),
        (["--caption_droput", "0.2"], "did you mean"),
        (["--n_prompts", "4", "--prompts", "a"], "--n_prompts has no effect"),
    ],
)
def test_wrong_flags_say_what_to_do(flags, message, capsys):
    with pytest.raises(SystemExit):
        ImageDiffusionStage.main(["--run_name", "x", *flags])
    assert message in capsys.readouterr().err


def test_a_missing_cache_is_a_message(tmp_path, caplog, fresh_logging):
    with pytest.raises(SystemExit) as end:
        ImageDiffusionStage.main(["--run_name", "x", "--cached_dataset", str(tmp_path / "nowhere")])
    assert end.value.code == 2 and "nowhere does not exist; make it with" in caplog.text

"""The recurrent VAE stage in one process: the steps it draws, its losses, exactness, evaluation, refusals."""

import json

import pytest
import torch

from dataset_loading.image.pixels import ImageDataset
from model.image.recurrent_vae import RecurrentVAE, RecurrentVAEOutput
from pretrain_recurrent_vae import RecurrentVAEStage
from tests.helpers.runs import SMALL_RUN, changed, largest_difference, named_runs
from utils.checkpoints import load_model
from utils.evaluation.arguments.image import ImageVAEEvaluationArguments
from utils.evaluation.recurrent_vae import RecurrentVAEEvaluator
from utils.metrics.images import psnr
from utils.training.arguments.image_vae import RecurrentVAEArguments
from utils.training.recurrent_vae import EVALUATED_STEPS, distillation_error, draw_n_steps, intermediate_error


@pytest.fixture(scope="module")
def runs(image_cache, tmp_path_factory):
    yield from named_runs(RecurrentVAEStage, SMALL_RUN, image_cache, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs):
    return runs("whole", 6, "--batch_size", "8", "--save_steps", "3")


# ---- The number of decoder steps.


def test_drawn_steps_have_the_distribution_asked_for():
    steps = {"mean": 6.0, "sigma": 0.5, "minimum": 2, "maximum": 12}
    numbers = [draw_n_steps(0, step, **steps) for step in range(2000)]
    assert min(numbers) == 2 and max(numbers) == 12
    # The same by numerical integration over the log-normal rate.
    log_rates = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    weights = torch.exp(-log_rates.square() / 2)
    rates = torch.exp(log_rates * 0.5 + torch.log(torch.tensor(6.0)) - 0.125)
    k = torch.arange(2, 13, dtype=torch.float64)
    chances = (weights[:, None] * torch.distributions.Poisson(rates[:, None]).log_prob(k).exp()).sum(0)
    expected = (chances * k).sum() / chances.sum()
    assert sum(numbers) / len(numbers) == pytest.approx(expected.item(), abs=0.25)
    assert len({draw_n_steps(seed, 0, **steps) for seed in range(30)}) > 5
    assert draw_n_steps(3, 9, mean=1.0, sigma=0.0, minimum=1, maximum=1) == 1


@pytest.mark.parametrize(("minimum", "maximum"), [(0, 12), (7, 12), (2, 5)])
def test_bounds_that_exclude_the_mean_are_refused(minimum, maximum):
    with pytest.raises(ValueError, match=r"1 <= minimum=\d <= mean=6\.0 <= maximum"):
        draw_n_steps(0, 0, mean=6.0, sigma=0.5, minimum=minimum, maximum=maximum)


def test_steps_belong_to_seed_and_optimizer_step(whole):
    args = RecurrentVAEArguments()
    steps = {"mean": args.mean_decoder_steps, "sigma": args.decoder_steps_sigma}
    steps |= {"minimum": args.min_decoder_steps, "maximum": args.max_decoder_steps}
    assert whole.logged("decoder_steps") == [draw_n_steps(42, step, **steps) for step in range(6)]


def test_accumulation_equals_one_batch(runs, whole):
    parts = runs("parts", 6, "--batch_size", "2", "--gradient_accumulation_steps", "4", "--save_steps", "3")
    assert parts.logged("decoder_steps") == whole.logged("decoder_steps")
    # Rounding of the first steps grows along the recurrence.
    assert parts.losses == pytest.approx(whole.losses, rel=5e-5)
    assert parts.adversary["updates"] == whole.adversary["updates"] == 4


# ---- Losses.


def test_terms_of_intermediate_images_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(2, 3, 8, 8, generator=generator)
    last = torch.rand(2, 3, 8, 8, generator=generator).requires_grad_()
    before = torch.rand(3, 2, 3, 8, 8, generator=generator).requires_grad_()
    output = RecurrentVAEOutput(reconstruction=last, intermediates=before)
    errors = [(image - real).abs().mean().item() for image in before]
    distances = [(image - last).abs().mean().item() for image in before]
    assert intermediate_error(output, real).item() == pytest.approx(sum(errors) / 3)
    distillation = distillation_error(output, real)
    assert distillation.item() == pytest.approx(sum(distances) / 3)
    distillation.backward()
    assert before.grad.abs().sum() > 0 and last.grad is None
    output.intermediates = before[:0]
    assert intermediate_error(output, real) is distillation_error(output, real) is None


def test_terms_are_weighted(runs, whole):
    flags = ["--intermediate_weight", "0", "--distillation_weight", "2"]
    run = runs("weighted", 3, "--batch_size", "8", *flags)
    assert not run.logged("loss/intermediate")
    # Nothing is corrected before the first update: all depths are equal.
    assert run.logged("loss/distillation")[0] == whole.logged("loss/distillation")[0] == 0
    assert run.logged("loss/distillation")[2] > 0
    assert run.logged("loss/l1")[0] == whole.logged("loss/l1")[0]


def test_all_terms_are_logged_and_validation_covers_several_depths(whole):
    names = ("loss/l1", "loss/kl", "loss/intermediate", "loss/distillation", "gan/generator")
    assert all(whole.logged(name) for name in names)
    model = load_model(RecurrentVAE, whole.folder)
    dataset = ImageDataset(json.loads((whole.folder / "stage.json").read_text())["data"]["folder"], "validation")
    image = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    with torch.no_grad():
        images = model.decode_steps(model.encode(image)[0], list(EVALUATED_STEPS))
    for k, reconstruction in zip(EVALUATED_STEPS, images):
        (value,) = whole.logged(f"eval_psnr_{k}_steps")
        assert value == pytest.approx(psnr(reconstruction, image).mean().item(), abs=1e-3)
    assert whole.logged("eval_psnr") == pytest.approx(whole.logged("eval_psnr_8_steps"), abs=1e-3)


# ---- Exactness.


def test_gradient_checkpointing_changes_nothing(runs, whole):
    recomputed = runs(
        "recomputed", 4, "--batch_size", "8", "--use_gradient_checkpointing", "--lr_scheduler_type", "constant"
    )
    plain = runs("plain", 4, "--batch_size", "8", "--lr_scheduler_type", "constant")
    assert recomputed.losses == pytest.approx(plain.losses, rel=1e-6)


def test_resumed_equals_straight_through(runs, whole):
    run_dir = whole.folder.parent.parent / "resumed"
    run_dir.mkdir()
    (run_dir / "checkpoint-3").symlink_to(whole.folder.parent / "checkpoint-3")
    resumed = runs("resumed", 6, "--batch_size", "8", "--save_steps", "3", "--resume_from_checkpoint")
    for name in ("model", "ema"):
        assert largest_difference(whole.weights(name), resumed.weights(name)) == 0
    assert whole.losses == resumed.losses


def test_refined_posterior_trains(runs):
    run = runs("refined", 2, "--batch_size", "8", "--override", "image_size=32", "n_posterior_refinements=1", "--bf16")
    assert run.weights()["refiner.head.weight"].any()


# ---- Evaluation.


def test_evaluation_over_steps_and_thresholds(whole):
    args = ImageVAEEvaluationArguments(checkpoint=str(whole.folder), references=[], batch_size=3)
    args.given = []
    evaluator = RecurrentVAEEvaluator(args, whole.folder)
    dataset = evaluator.build_dataset()
    indices = list(range(5))
    with torch.inference_mode():
        evaluation = evaluator.measure(dataset, indices)
        image = torch.stack([dataset[i]["image"] for i in indices]).to(evaluator.device)
        latents, _ = evaluator.model.encode(image)
        expected = psnr(evaluator.model.decode(latents, n_steps=32), image).mean().item()
        decoded, taken = evaluator.model.decode_until_settled(latents, 0.05)
    assert evaluation.metrics["decoder_steps"].keys() == {"1", "2", "4", "8", "16", "32"}
    assert evaluation.metrics["decoder_steps"]["32"] == pytest.approx(expected, abs=1e-4)
    assert evaluation.metrics["scores"]["model"]["psnr_db"] == pytest.approx(
        evaluation.metrics["decoder_steps"]["8"], abs=1e-4
    )
    row = next(row for row in evaluation.metrics["early_exit"] if row["threshold"] == 0.05)
    assert row["mean_steps"] == pytest.approx(taken.float().mean().item())
    assert row["psnr_db"] == pytest.approx(psnr(decoded, image).mean().item(), abs=1e-4)
    assert row["saved"] == pytest.approx(1 - row["mean_steps"] / 8)
    assert json.dumps(evaluation.metrics) and len(evaluation.tables) == 5
    assert evaluator.definitions.keys() >= {"decoder_steps", "early_exit", "psnr_db"}


# ---- Refusals.


@pytest.mark.parametrize(
    "words, message",
    [
        ("--mean_decoder_steps 1", "--mean_decoder_steps=1.0 must lie between --min_decoder_steps=2"),
        ("--max_decoder_steps 5", "and --max_decoder_steps=5"),
        ("--n_backprop_steps 13", "--n_backprop_steps=13 must be <= --max_decoder_steps=12"),
        (
            "--n_backprop_steps 1 --distillation_weight 1",
            "--distillation_weight has no effect with n_backprop_steps=1",
        ),
        ("--n_backprop_steps 0", "--n_backprop_steps=0 must be > 0"),
        ("--gan_weight 0", "has no effect with gan_weight=0"),
    ],
)
def test_flags_that_cannot_take_effect_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        RecurrentVAEStage.main(changed(SMALL_RUN, *words.split()))
    assert message in capsys.readouterr().err


def test_the_cache_of_the_image_vae_is_the_default():
    assert str(RecurrentVAEStage(RecurrentVAEArguments()).cache_dir) == "cached_datasets/image_vae"

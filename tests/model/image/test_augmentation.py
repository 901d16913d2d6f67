import itertools

import pytest
import torch

from model.image.augmentation import AUGMENTATIONS, N_UNIFORMS, diff_augment

POLICIES = [list(names) for n in (1, 2, 3) for names in itertools.combinations(AUGMENTATIONS, n)]
EVERYTHING = POLICIES[-1]


def inputs(n=4, rows=16, columns=24):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(n, 3, rows, columns, generator=generator) * 2 - 1
    return image, torch.rand(n, N_UNIFORMS, generator=generator)


def uniform_row(**columns):
    """One row of random numbers: the middle everywhere but at the given columns, `u3=0.0`."""
    uniforms = torch.full((1, N_UNIFORMS), 0.5)
    for name, value in columns.items():
        uniforms[0, int(name[1:])] = value
    return uniforms


def test_empty_policy_is_the_identity():
    image, uniforms = inputs()
    assert torch.equal(diff_augment(image, uniforms, []), image)


@pytest.mark.parametrize("policy", POLICIES, ids="+".join)
def test_each_image_depends_on_its_own_row_only(policy):
    image, uniforms = inputs()
    augmented = diff_augment(image, uniforms, policy)
    assert augmented.shape == image.shape
    for b in range(len(image)):
        assert torch.equal(diff_augment(image[b : b + 1], uniforms[b : b + 1], policy)[0], augmented[b])
    others, _ = inputs(5)
    changed_image, changed_uniforms = others[1:].clone(), uniforms.flip(0)
    changed_image[2], changed_uniforms[2] = image[2], uniforms[2]
    assert torch.equal(diff_augment(changed_image, changed_uniforms, policy)[2], augmented[2])


@pytest.mark.parametrize("policy", POLICIES, ids="+".join)
def test_gradient_equals_finite_differences(policy):
    image, uniforms = inputs(1, 8, 8)
    image = image.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, uniforms.double(), policy), image)
    diff_augment(image, uniforms.double(), policy).square().sum().backward()
    assert image.grad.abs().sum() > 0


def test_the_policy_is_a_set():
    image, uniforms = inputs()
    forwards = diff_augment(image, uniforms, EVERYTHING)
    assert torch.equal(diff_augment(image, uniforms, EVERYTHING[::-1]), forwards)


@pytest.mark.parametrize("name, columns", [("color", {0, 1, 2}), ("translation", {3, 4}), ("cutout", {5, 6})])
def test_each_augmentation_has_its_own_random_numbers(name, columns):
    image, uniforms = inputs()
    before = diff_augment(image, uniforms, [name])
    for column in range(N_UNIFORMS):
        changed = uniforms.clone()
        changed[:, column] = (changed[:, column] + 0.5) % 1.0
        assert torch.equal(diff_augment(image, changed, [name]), before) == (column not in columns)


def test_color_in_the_middle_is_the_identity():
    image, _ = inputs(1)
    torch.testing.assert_close(diff_augment(image, uniform_row(), ["color"]), image)


def test_color_by_its_parts():
    image, _ = inputs(1)
    brighter = diff_augment(image, uniform_row(u0=0.75), ["color"])
    torch.testing.assert_close(brighter, image + 0.25)
    gray = diff_augment(image, uniform_row(u1=0.0), ["color"])
    torch.testing.assert_close(gray, image.mean(dim=1, keepdim=True).expand_as(image))
    flat = diff_augment(image, uniform_row(u2=0.0), ["color"])
    torch.testing.assert_close(flat, image.mean() + 0.5 * (image - image.mean()))


def test_color_stays_in_its_documented_range():
    image, _ = inputs(64)
    uniforms = torch.rand(64, N_UNIFORMS, generator=torch.Generator().manual_seed(1))
    augmented = diff_augment(image.sign(), uniforms, ["color"])
    # Around the brightness, +-0.5: saturation makes 1 into 2 + 1/3, contrast makes that 1.5 * (2 + 1/3) + 0.5 = 4.
    assert 1.0 < augmented.abs().max() <= 4.5
    assert augmented.isfinite().all()


@pytest.mark.parametrize("policy", [["translation"], ["cutout"], ["translation", "cutout"]], ids="+".join)
def test_moved_and_cut_images_hold_old_values_and_zeros(policy):
    image, uniforms = inputs()
    for before, after in zip(image, diff_augment(image, uniforms, policy)):
        values = set(before.flatten().tolist()) | {0.0}
        assert set(after.flatten().tolist()) <= values
        assert not torch.equal(before, after)


@pytest.mark.parametrize("down, right", [(0.0, 0.0), (0.999, 0.999), (0.0, 0.999), (0.5, 0.5), (0.3, 0.8)])
def test_translation_equals_a_loop(down, right):
    image, _ = inputs(1)
    shifts = [int(u * (2 * limit + 1)) - limit for u, limit in ((down, 2), (right, 3))]  # 1/8 of 16 and 24
    expected = torch.zeros_like(image)
    for y, x in itertools.product(range(16), range(24)):
        source_y, source_x = y - shifts[0], x - shifts[1]
        if 0 <= source_y < 16 and 0 <= source_x < 24:
            expected[0, :, y, x] = image[0, :, source_y, source_x]
    assert torch.equal(diff_augment(image, uniform_row(u3=down, u4=right), ["translation"]), expected)


def test_cutout_cuts_a_quarter_in_the_middle_and_at_a_corner():
    image = torch.ones(1, 3, 16, 24)
    middle = diff_augment(image, uniform_row(), ["cutout"])[0, 0]
    assert middle.sum() == 16 * 24 - 8 * 12
    assert middle[4:12, 6:18].sum() == 0
    corner = diff_augment(image, uniform_row(u5=0.0, u6=0.0), ["cutout"])[0, 0]
    assert corner.sum() == 16 * 24 - 4 * 6  # the centre lies on the corner
    assert corner[:4, :6].sum() == 0


def test_wrong_inputs_are_named():
    image, uniforms = inputs()
    with pytest.raises(ValueError, match="'colour' is not known; did you mean 'color'"):
        diff_augment(image, uniforms, ["colour"])
    with pytest.raises(ValueError, match=r"uniforms has shape \(4, 7\), expected \(4, 8\)"):
        diff_augment(image, uniforms[:, :7], [])
    with pytest.raises(ValueError, match=r"uniforms has shape \(1, 8\), expected \(4, 8\)"):
        diff_augment(image, uniforms[:1], ["color"])

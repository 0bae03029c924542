import pytest
import torch

from neuroexapt.data.augment import Augmentation, augment, normalise

IDENTITY = torch.zeros(3), torch.full((3,), 1 / 255)  # leaves the grey levels as they are


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def distinct_pixels(batch, height=6, width=8):
    """Every pixel of an image has a value of its own, none is black."""
    image = torch.arange(1, 3 * height * width + 1, dtype=torch.uint8).view(1, 3, height, width)
    return image.repeat(batch, 1, 1, 1)


def test_normalise_is_the_published_formula():
    images = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8, generator=generator())
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.1])
    expected = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(normalise(images, mean, std), expected, rtol=1e-5, atol=1e-5)


def test_the_empty_policy_only_normalises():
    images = distinct_pixels(4)
    assert torch.equal(augment(images, *IDENTITY, Augmentation(), generator()), normalise(images, *IDENTITY))


def test_crop_shifts_the_content_and_pads_with_black():
    images, padding = distinct_pixels(300), 2
    cropped = augment(images, *IDENTITY, Augmentation(crop_padding=padding), generator()).round()
    padded = torch.nn.functional.pad(images[0].float(), (padding,) * 4)
    windows = {
        (top, left): padded[:, top : top + 6, left : left + 8]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }
    seen = [next(at for at, window in windows.items() if torch.equal(window, image)) for image in cropped]
    assert set(seen) == set(windows)  # each of the 25 offsets occurs among 300 images


def test_flip_mirrors_half_of_the_images():
    images = distinct_pixels(1000)
    flipped = augment(images, *IDENTITY, Augmentation(flip=True), generator()).round()
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 430 < mirrored.sum() < 570  # 500 ± 4.4 standard deviations


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_removes_one_square_clipped_at_the_border(side):
    images = torch.full((2000, 3, 9, 12), 255, dtype=torch.uint8)
    removed = augment(images, *IDENTITY, Augmentation(cutout=side), generator()) == 0
    assert (removed == removed[:, :1]).all()
    removed = removed[:, 0]
    rows, columns = removed.any(2).sum(1), removed.any(1).sum(1)
    assert torch.equal(removed.sum((1, 2)), rows * columns)  # a rectangle
    assert rows.max() == columns.max() == side
    assert rows.min() >= side // 2
    assert (rows < side).any() == (side > 1)  # some are clipped
    assert removed.any(0).all()  # everywhere in the image


def test_cutout_sets_to_the_mean():
    images = torch.full((2, 1, 4, 4), 200, dtype=torch.uint8)
    out = augment(images, torch.tensor([0.3]), torch.tensor([0.2]), Augmentation(cutout=8), generator())
    assert (out == 0).any()


def test_each_image_draws_for_itself_and_the_seed_decides():
    images = distinct_pixels(64)
    policy = Augmentation(crop_padding=2, flip=True, cutout=3)
    once = augment(images, *IDENTITY, policy, generator(1))
    assert len(once.flatten(1).unique(dim=0)) > 32
    assert torch.equal(once, augment(images, *IDENTITY, policy, generator(1)))
    assert not torch.equal(once, augment(images, *IDENTITY, policy, generator(2)))
    assert once.shape == images.shape
    assert once.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_device():
    images = distinct_pixels(16).cuda()
    mean, std = (value.cuda() for value in IDENTITY)
    cuda_generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(images, mean, std, Augmentation(2, True, 3), cuda_generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")

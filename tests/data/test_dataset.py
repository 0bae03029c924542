import numpy as np
import pytest
import torch
from PIL import Image

from neuroexapt.data.augment import Augmentation
from neuroexapt.data.dataset import ImageDataset, channel_statistics
from neuroexapt.data.parts import ResidentImages, decode_image
from neuroexapt.errors import UserError


def test_statistics_equal_the_definition():
    images = torch.randint(256, (50, 3, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), rel=1e-12)


def test_a_constant_channel_has_a_usable_deviation():
    assert channel_statistics(torch.full((4, 1, 2, 2), 51, dtype=torch.uint8)) == (
        (pytest.approx(0.2),),
        (1 / 255,),
    )


def test_the_facts_a_network_needs():
    part = ResidentImages(torch.zeros(2, 3, 5, 7, dtype=torch.uint8), torch.tensor([0, 1]))
    dataset = ImageDataset("x", part, part, ("a", "b"), (0.0,) * 3, (1.0,) * 3, Augmentation())
    assert (dataset.in_channels, dataset.input_size, dataset.num_classes) == (3, (5, 7), 2)


def test_the_baseline_is_the_commonest_class_of_training():
    pictures = torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
    train, test = (
        ResidentImages(pictures, torch.tensor(labels)) for labels in ([0, 1, 1, 1, 0], [0, 0, 0, 0, 1])
    )
    data = ImageDataset("x", train, test, ("cat", "dog"), (0.0,), (1.0,), Augmentation())
    assert data.baseline == ("“dog”", pytest.approx(0.2))


def test_decoding_keeps_a_picture_of_the_right_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png", (3, 6, 8))
    assert torch.equal(decoded, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_decoding_crops_the_overhang_evenly(tmp_path, size):
    picture = Image.new("L", size, 0)
    left, top = (size[0] - 20) // 2, (size[1] - 20) // 2
    picture.paste(255, (left, top, left + 20, top + 20))
    picture.save(tmp_path / "a.png")
    assert (decode_image(tmp_path / "a.png", (1, 10, 10))[:, 1:-1, 1:-1] == 255).all()


def test_decoding_turns_a_picture_upright(tmp_path):
    picture = Image.new("RGB", (8, 8))
    picture.paste((255, 255, 255), (0, 0, 8, 4))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # Orientation: turned by 180°
    picture.save(tmp_path / "a.png", exif=exif)
    decoded = decode_image(tmp_path / "a.png", (3, 8, 8))
    assert (decoded[:, 4:] == 255).all()
    assert (decoded[:, :4] == 0).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decoding_converts_every_mode(tmp_path, mode, channels):
    Image.new(mode, (4, 4)).save(tmp_path / "a.tiff")
    assert decode_image(tmp_path / "a.tiff", (channels, 4, 4)).shape == (channels, 4, 4)


def test_a_truncated_picture_is_named(tmp_path):
    Image.effect_noise((64, 64), 80).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"a\.png is not a readable picture .*repair or remove it"):
        decode_image(tmp_path / "a.png", (1, 64, 64))

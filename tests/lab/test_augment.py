import pytest
import torch

from steppe.lab.augment import augment, normalize

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
OFF = {"flip": False, "crop": 0, "cutout": 0}


def pixels(batch=64, size=(7, 9), channels=3):
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, channels, *size), dtype=torch.uint8, generator=g)


def run(images, seed=0, **settings):
    channels = images.shape[1]
    g = torch.Generator().manual_seed(seed)
    return augment(images, g, mean=MEAN[:channels], std=STD[:channels], **{**OFF, **settings})


def slow_normalize(image):
    """One image, channel by channel, in double precision."""
    planes = [(plane.double() / 255 - m) / s for plane, m, s in zip(image, MEAN, STD, strict=True)]
    return torch.stack(planes).float()


def slow_crop(image, top, left, pad):
    c, h, w = image.shape
    padded = torch.zeros(c, h + 2 * pad, w + 2 * pad, dtype=torch.uint8)
    padded[:, pad : pad + h, pad : pad + w] = image
    return padded[:, top : top + h, left : left + w]


def slow_cutout(image, y, x, length):
    _, h, w = image.shape
    out = image.clone()
    top, left = y - length // 2, x - length // 2
    out[:, max(top, 0) : min(top + length, h), max(left, 0) : min(left + length, w)] = 0
    return out


def which(result, candidates):
    """Names of the candidates (a dict of images) that the result equals."""
    near = (torch.stack(list(candidates.values())) - result).abs() < 1e-5
    return {name for name, same in zip(candidates, near.flatten(1).all(1).tolist(), strict=True) if same}


def test_normalize_against_the_slow_reference():
    images = pixels()
    expected = torch.stack([slow_normalize(image) for image in images])
    torch.testing.assert_close(normalize(images, MEAN, STD), expected)
    torch.testing.assert_close(run(images), expected)


def test_statistics_of_the_images_normalize_them():
    images = pixels(200)
    scaled = images.double() / 255
    mean, std = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3), correction=0)
    batch = normalize(images, tuple(mean.tolist()), tuple(std.tolist())).double()
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(batch.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [OFF, {"flip": True, "crop": 2, "cutout": 4}])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_result_is_contiguous_float_and_the_input_untouched(settings, channels):
    images = pixels(channels=channels).to(memory_format=torch.channels_last)
    before = images.clone()
    batch = run(images, **settings)
    assert batch.dtype == torch.float32
    assert batch.shape == images.shape
    assert batch.is_contiguous()
    assert torch.equal(images, before)


def test_flip_mirrors_about_half_of_the_images_left_to_right():
    images = pixels(400)
    flipped = 0
    for image, result in zip(images, run(images, flip=True), strict=True):
        kept, mirrored = slow_normalize(image), slow_normalize(image.flip(2))
        found = which(result, {"kept": kept, "mirrored": mirrored})
        assert len(found) == 1
        flipped += found == {"mirrored"}
    assert 150 < flipped < 250  # 5 standard deviations


@pytest.mark.parametrize("pad", [1, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_shifts_each_image_by_its_own_draw(pad, flip):
    images = pixels(500 if flip else 250, size=(5, 6))
    seen = set()
    for image, result in zip(images, run(images, crop=pad, flip=flip), strict=True):
        places = [(y, x) for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
        candidates = {(place, False): slow_crop(image, *place, pad) for place in places}
        if flip:
            candidates |= {(place, True): crop.flip(2) for (place, _), crop in candidates.items()}
        found = which(result, {name: slow_normalize(crop) for name, crop in candidates.items()})
        assert len(found) == 1
        seen |= found
    assert len(seen) == (2 * pad + 1) ** 2 * (1 + flip)  # every window, flipped and not, has occurred


def test_padding_is_black_before_normalization():
    white = torch.full((50, 3, 4, 4), 255, dtype=torch.uint8)
    corner_values = run(white, crop=2)[:, :, 0, 0].unique(dim=0)
    black_and_white = torch.stack([slow_normalize(torch.full((3, 1, 1), v)) for v in (0, 255)])[:, :, 0, 0]
    torch.testing.assert_close(corner_values, black_and_white)


@pytest.mark.parametrize("length", [1, 3, 4, 8])
def test_cutout_against_the_slow_reference(length):
    size = (6, 8)
    images = pixels(700, size=size)
    seen = set()
    for image, result in zip(images, run(images, cutout=length), strict=True):
        plain = slow_normalize(image)
        centres = [(y, x) for y in range(size[0]) for x in range(size[1])]
        found = which(result, {centre: slow_cutout(plain, *centre, length) for centre in centres})
        assert found  # more than one where clipping makes squares alike
        seen |= found
    assert len(seen) == size[0] * size[1]  # every pixel has been a centre, those on the border too


def test_cutout_is_clipped_at_the_border_as_in_the_paper():
    images = torch.full((2000, 1, 32, 32), 200, dtype=torch.uint8)
    area = (run(images, cutout=16) == 0).sum((1, 2, 3))
    assert area.max() == 16 * 16
    assert area.min() == 8 * 8  # centre in the first corner
    side = sum(min(y + 8, 32) - max(y - 8, 0) for y in range(32)) / 32
    assert area.double().mean().item() == pytest.approx(side**2, rel=0.02)


def test_cutout_comes_after_the_crop():
    black = torch.zeros(100, 3, 8, 8, dtype=torch.uint8)
    assert ((run(black, crop=2, flip=True, cutout=4) == 0).sum((1, 2, 3)) >= 3 * 2 * 2).all()


def test_one_generator_state_gives_one_result_whatever_the_global_generator():
    images = pixels()
    settings = {"flip": True, "crop": 2, "cutout": 4}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = run(images, seed=3, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(run(images, seed=3, **settings), first)
    assert not torch.equal(run(images, seed=4, **settings), first)


def test_the_generator_moves_on_from_batch_to_batch_and_rests_when_all_is_off():
    images, g = pixels(), torch.Generator().manual_seed(0)
    state = g.get_state()
    augment(images, g, mean=MEAN, std=STD, **OFF)
    assert torch.equal(g.get_state(), state)
    first, second = (augment(images, g, mean=MEAN, std=STD, flip=True, crop=2, cutout=0) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("setting", ["crop", "cutout"])
def test_negative_pixels_are_refused(setting):
    with pytest.raises(ValueError, match=rf"{setting}=-1"):
        run(pixels(), **{setting: -1})


def test_floats_and_wrong_statistics_are_refused():
    g = torch.Generator()
    with pytest.raises(TypeError, match="uint8"):
        augment(pixels().float(), g, mean=MEAN, std=STD, flip=True, crop=4, cutout=0)
    with pytest.raises(ValueError, match="1 means and 3 deviations for 3 channels"):
        normalize(pixels(), (0.5,), STD)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    images = pixels().cuda()
    with pytest.raises(ValueError, match="on one device"):
        augment(images, torch.Generator(), mean=MEAN, std=STD, flip=True, crop=2, cutout=0)
    torch.testing.assert_close(normalize(images, MEAN, STD).cpu(), normalize(images.cpu(), MEAN, STD))
    batch = augment(images, torch.Generator("cuda"), mean=MEAN, std=STD, flip=True, crop=2, cutout=4)
    assert batch.device == images.device

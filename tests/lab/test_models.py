import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steppe.lab.models import NAMES, build

TINY = {  # the narrowest width that still shows every part of the network, and a small image
    "cnn": (2, 8),
    "resnet18": (2, 16),
    "resnet20": (2, 8),
    "vgg16": (2, 32),
    "wrn-16-8": (1, 8),
    "wrn-28-10": (1, 8),
    "pyramidnet-110": (9, 8),
    "vit": (64, 8),
    "mixer": (16, 8),
}


def tiny(name, **options):
    torch.manual_seed(0)
    width, size = TINY[name]
    return build(name, size=size, width=width, **options), torch.randn(2, options.get("channels", 3), size, size)


def parameters(name, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in build(name, **options).parameters())


# resnet18: the CIFAR form of He et al. 2016, 11.17 M. resnet20: 0.27 M there, with shortcuts that have no weights;
# 1×1 convolutions and their BatchNorm add 2,752 to its 269,722. vgg16: configuration D of Simonyan & Zisserman 2015,
# whose 13 convolutions have 14,714,688 parameters, with 2·4,224 of BatchNorm and 5,130 of the linear layer.
# wrn: 11.0 M and 36.5 M in Zagoruyko & Komodakis 2016. pyramidnet: α / 54 = 5 is whole, so how channels are
# rounded plays no part; imgclsmob counts the same, Han et al. 2017 print 28.3 M.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_173_962),
        ("resnet20", 269_722 + 2_752),
        ("vgg16", 14_714_688 + 2 * 4_224 + 5_130),
        ("wrn-16-8", 10_961_370),
        ("wrn-28-10", 36_479_194),
        ("pyramidnet-110", 28_485_477),
    ],
)
def test_parameter_counts_are_those_of_the_literature(name, count):
    assert parameters(name) == count


@pytest.mark.parametrize(("alpha", "millions"), [(48, 1.7), (84, 3.8)])
def test_pyramidnet_has_the_size_of_the_papers_table(alpha, millions):
    # The table of Han et al. 2017; the figures are cut, not rounded: their formula makes 1.740 M and 3.855 M.
    assert parameters("pyramidnet-110", width=alpha) // 100_000 == round(10 * millions)


def test_vit_parameter_count():
    d, tokens = 192, 64 + 1
    embed = 3 * 4 * 4 * d + d + d + tokens * d  # patches, class token, positions
    attention = (d * 3 * d + 3 * d) + (d * d + d)
    mlp = (d * 4 * d + 4 * d) + (4 * d * d + d)
    block = attention + mlp + 2 * 2 * d
    assert parameters("vit") == embed + 12 * block + 2 * d + (d * 10 + 10)


def test_mixer_parameter_count():
    d, tokens, across_tokens, across_channels = 512, 64, 256, 2048  # Tolstikhin et al. 2021, table 1, S/32
    embed = 3 * 4 * 4 * d + d
    token_mlp = 2 * tokens * across_tokens + across_tokens + tokens
    channel_mlp = 2 * d * across_channels + across_channels + d
    block = token_mlp + channel_mlp + 2 * 2 * d
    assert parameters("mixer") == embed + 8 * block + 2 * d + (d * 10 + 10)


def test_cnn_parameter_count():
    assert parameters("cnn", channels=1, size=8) == 9 * (16 + 16 * 32 + 32 * 64) + 2 * (16 + 32 + 64) + 650


@pytest.mark.parametrize("name", NAMES)
def test_classes_and_channels(name):
    network, images = tiny(name, classes=7, channels=1)
    assert network(images).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [True, False])
def test_memory_format_does_not_change_the_logits(name, train):
    network, images = tiny(name)
    network = network.double().train(train)
    plain = network(images.double())
    network = network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(images.double().to(memory_format=torch.channels_last)), plain)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    network, images = tiny(name)
    F.cross_entropy(network(images), torch.tensor([0, 1])).backward()
    for key, p in network.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.grad.any(), key


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name):
    network, images = tiny(name)
    weights = list(network.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(network(images), torch.tensor([0, 1]))
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        product = torch.autograd.grad(sum(g.square().sum() for g in gradient), weights)
    assert all(h.isfinite().all() for h in product)
    assert any(h.any() for h in product)


@pytest.mark.parametrize("name", NAMES)
def test_width_widens(name):
    width, size = TINY[name]
    assert parameters(name, size=size, width=2 * width) > 1.5 * parameters(name, size=size, width=width)


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "wrn-16-8", "pyramidnet-110"])
def test_convolutions_start_with_the_variance_of_he(name):
    torch.manual_seed(0)
    for layer in build(name, width=None if name != "pyramidnet-110" else 48).modules():
        if isinstance(layer, torch.nn.Conv2d):
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2
            n = layer.weight.numel()
            scaled = layer.weight.square().mean().item() * fan_out / 2
            assert abs(scaled - 1) < 5 * (2 / n) ** 0.5  # the mean of n squared normals deviates by √(2/n)
            assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize("name", ["vit", "mixer"])
def test_linears_start_narrow(name):
    torch.manual_seed(0)
    for layer in build(name).modules():
        if isinstance(layer, torch.nn.Linear):
            n = layer.weight.numel()
            assert abs(layer.weight.square().mean().item() / 0.02**2 - 1) < 5 * (2 / n) ** 0.5
            assert not layer.bias.any()


def test_pyramidnet_widens_by_alpha_and_pads_with_zeros():
    network, _ = tiny("pyramidnet-110")
    first_wider = next(block for block in network.blocks if block.gain > 0)
    first_wider.norm3.weight.data.zero_()  # silences the residual branch
    x = torch.randn(2, first_wider.conv1.in_channels, 8, 8)
    y = first_wider(x)
    assert torch.equal(y[:, :-1], x)
    assert not y[:, -1].any()
    assert network.head.in_features == 16 + 9


def test_vit_attends_to_where_the_patches_are():
    network, images = tiny("vit")
    assert not torch.allclose(network(images), network(images.flip(3).flip(2)))


@pytest.mark.parametrize(("asked", "near"), [("resnet-18", "resnet18"), ("WRN-28-10", "wrn-28-10"), ("ViT-Ti", "vit")])
def test_unknown_name_lists_the_names_and_the_nearest(asked, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}'") as error:
        build(asked)
    assert all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize(("name", "smallest"), [("vgg16", 32), ("resnet18", 8), ("wrn-16-8", 4), ("vit", 4)])
def test_too_small_images_are_refused(name, smallest):
    message = f"{name} needs images of at least {smallest}×{smallest} pixels, got size {smallest - 1}"
    with pytest.raises(ValueError, match=message):
        build(name, size=smallest - 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["classes", "channels", "width"])
def test_numbers_below_one_are_refused(name, what):
    with pytest.raises(ValueError, match=f"{what} of {name} must be at least 1, got 0"):
        build(name, **{what: 0})


def test_widths_and_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"ViT: width must be a positive multiple of 64, .* got 100"):
        build("vit", width=100)
    with pytest.raises(ValueError, match="Mixer: width must be positive and even, got 33"):
        build("mixer", width=33)
    for name in ("vit", "mixer"):
        with pytest.raises(ValueError, match="a positive multiple of the patch 4, got 30"):
            build(name, size=30)


def test_a_narrow_residual_network_goes_around_a_fault_of_torch():
    """Backward of a strided 1×1 convolution of fewer than 8 channels, channels last, ends the process in 2.13."""
    narrow, wide = (build("resnet18", width=width).blocks[2].shortcut[0] for width in (4, 16))
    assert type(wide) is nn.Conv2d
    assert type(narrow) is not nn.Conv2d
    x = torch.randn(3, 4, 8, 8)
    assert torch.allclose(narrow(x), nn.Conv2d.forward(narrow, x), atol=1e-6)
    narrow(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    assert narrow.weight.grad.isfinite().all()

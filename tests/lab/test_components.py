import re

import pytest

from steppe.lab.components import components
from steppe.lab.models import NAMES, build

WIDTHS = {
    "resnet18": 4,
    "resnet20": 4,
    "vgg16": 4,
    "wrn-16-8": 1,
    "wrn-28-10": 1,
    "pyramidnet-110": 10,
    "vit": 64,
    "mixer": 16,
}


def cut(name):
    model = build(name, width=WIDTHS.get(name))
    names = [each for each, _ in model.named_parameters()]
    parts = components(name, model)
    return names, {label: [each for each in names if re.search(pattern, each)] for label, pattern in parts.items()}


@pytest.mark.parametrize("name", NAMES)
def test_components_have_parameters(name):
    _, parts = cut(name)
    assert all(parts.values())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("vit", "mixer")])
def test_every_parameter_of_a_convolutional_network_is_in_one_component(name):
    names, parts = cut(name)
    assert [each for part in parts.values() for each in part] == names


@pytest.mark.parametrize(
    ("name", "spatial", "channel", "blocks"),
    [("vit", "attention", "MLP", (1, 6, 12)), ("mixer", "token MLP", "channel MLP", (1, 4, 8))],
)
def test_components_of_the_lectures_table(name, spatial, channel, blocks):
    _, parts = cut(name)
    assert list(parts) == ["embedding", spatial, channel, *(f"block {k}" for k in blocks), "head"]
    assert parts["embedding"] == ["embed.weight", "embed.bias"]
    depth = blocks[-1]
    assert len(parts[spatial]) == len(parts[channel]) == 4 * depth
    assert not set(parts[spatial]) & set(parts[channel])
    for k in blocks:
        assert {each.split(".")[1] for each in parts[f"block {k}"]} == {str(k - 1)}
    assert {each.split(".")[1] for each in parts[spatial]} == {str(k) for k in range(depth)}

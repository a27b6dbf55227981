"""The generator computes what its published description says, in whatever order its layers are evaluated."""

import copy

import pytest
import torch

from models.nn.generator import Generator, GeneratorConfig
from scripts.benchmarks import bench_generator


def network(size: int, channels: int, training: bool) -> Generator:
    """In float64, with attention switched on and statistics of normalisation that differ from 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Generator(GeneratorConfig(12, 6, 4, True, [1, 2]), size, channels, 5).double()
        for module in made.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        for layer in made.attention[:2]:
            torch.nn.init.constant_(layer.scale, 0.7)
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    return made.train(training)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_images_and_gradients_are_those_of_the_plain_layers(size, channels, training):
    fast = network(size, channels, training)
    plain = copy.deepcopy(fast)
    noise = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 4, 1])
    found, expected = fast(noise, labels), bench_generator.plain_forward(plain, noise, labels)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, one), other in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            one.grad, other.grad, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-9, atol=1e-9)


def test_the_benchmark_prints_a_line_per_way(capsys):
    argv = ["--image_size", "8", "--g_conv_dim", "2", "--batch_size", "4", "--rounds", "1"]
    assert bench_generator.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("s per step of 4 images" in line for line in lines)

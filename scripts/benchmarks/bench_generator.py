"""Compare a training step of the generator of DP-MERF, DP-NTK and DP-Kernel with plain layer-by-layer code.

python scripts/benchmarks/bench_generator.py                          the published network for 28x28 images, one thread
python scripts/benchmarks/bench_generator.py --g_conv_dim 8 --no_attention --threads 2 --rounds 9

A step is forward and backward through the generator alone. Prints medians. The ways take turns, so that other load
slows all of them.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

from models.nn.generator import Generator, GeneratorConfig
from utils.arguments import Parser, whole_number
from utils.program import program, run_process


def plain_forward(generator: Generator, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`generator(noise, labels)`, with every layer written as in the published description."""
    chunks = noise.chunk(generator.num_chunks, dim=1)
    h = generator.first(chunks[0]).reshape(len(noise), -1, generator.base, generator.base)
    embedded = generator.embedding(labels)
    for block, attention, chunk in zip(generator.blocks, generator.attention, chunks[1:], strict=True):
        condition = torch.cat([embedded, chunk], dim=1)
        inner = F.interpolate(_normed(block.norm_in, h, condition), scale_factor=2)
        inner = block.conv_out(_normed(block.norm_out, block.conv_in(inner), condition))
        h = inner + block.shortcut(F.interpolate(h, scale_factor=2))
        if not isinstance(attention, torch.nn.Identity):
            h = h + attention.scale * _attended(attention, h)
    return torch.tanh(generator.output(F.relu(generator.norm(h))))


def _normed(layer: torch.nn.Module, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    gain, bias = layer.gain(condition)[:, :, None, None], layer.bias(condition)[:, :, None, None]
    return F.relu(layer.norm(x) * (1 + gain) + bias)


def _attended(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    query, key, value = layer.query(x), F.max_pool2d(layer.key(x), 2), F.max_pool2d(layer.value(x), 2)
    weights = torch.softmax(torch.einsum("bchw,bcij->bhwij", query, key).flatten(3), dim=-1)
    return layer.output(torch.einsum("bhwk,bck->bchw", weights, value.flatten(2)))


def step_of(generator: Generator, forward: Callable, batch_size: int, precision: str) -> Callable[[], None]:
    labels = torch.arange(batch_size) % generator.embedding.num_embeddings
    noise = torch.randn(batch_size, generator.z_dim)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            images = forward(generator, noise, labels)
        images.float().square().sum().backward()
        generator.zero_grad(set_to_none=True)

    return step


def medians(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Name -> median seconds per step. An additional first round, which allocates and chooses kernels, is dropped."""
    seconds = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


@program
def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=whole_number, default=28)
    parser.add_argument("--channels", type=whole_number, default=1)
    parser.add_argument("--g_conv_dim", type=whole_number, default=41)
    parser.add_argument("--no_attention", action="store_true")
    parser.add_argument("--batch_size", type=whole_number, default=100)
    parser.add_argument("--threads", type=whole_number, default=1)
    parser.add_argument("--rounds", type=whole_number, default=5)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    config = GeneratorConfig(60, 128, given.g_conv_dim, not given.no_attention, [2])
    generator = Generator(config, given.image_size, given.channels, 10)
    ways = {"layer by layer": plain_forward, "this project": Generator.forward}
    steps = {
        f"{name}, {precision}": step_of(generator, forward, given.batch_size, precision)
        for precision in ("float32", "bf16")
        for name, forward in ways.items()
    }
    for name, seconds in medians(steps, given.rounds).items():
        print(f"{name:24} {seconds:8.3f} s per step of {given.batch_size} images")
    return 0


if __name__ == "__main__":
    run_process(main)

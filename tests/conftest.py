"""Shared fixtures: a toy dataset with a public one, every method at toy size, and the distribution of tests."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import settings

from data.public import has_public_images
from data.spec import DataSpec, PublicData, Samples
from models import METHODS
from opacus_ext.ledger import Budget, Ledger
from opacus_ext.noise import NoiseSource
from opacus_ext.private_data import PrivateData
from utils.config import load_config
from utils.runtime import Runtime

# Small sums in many threads are slower, and a fixed number of threads makes their rounding repeat.
torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

# Module-wide fixtures that take seconds: all of their tests run in one process of pytest-xdist (see Makefile).
PREPARED_ONCE = {"finished"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in PREPARED_ONCE & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}:{name}"))


NUM_RECORDS, NUM_CLASSES, RESOLUTION, PUBLIC_CLASSES = 60, 3, 8, 6

DIFFUSION = [
    "model.network.nf=8",
    "model.network.ch_mult=[1,2]",
    "model.network.attn_resolutions=[4]",
    "model.network.num_res_blocks=1",
    "model.sampler.num_steps=2",
    "model.sampler_acc.type=edm",
    "model.sampler_acc.num_steps=3",
    "train.batch_size=60",
    "train.n_epochs=4",
    "train.snapshot_freq=2",
    "train.loss.n_noise_samples=2",
    "train.dp.max_physical_batch_size=32",
    "gen.batch_size=8",
]
QUERY = [
    "pretrain.query.network=small_cnn",
    "pretrain.query.image_size=8",
    "pretrain.query.n_epochs=1",
    "pretrain.query.batch_size=16",
]
QUERIED = [
    "public_data.name=glyphs",
    "public_data.selective.ratio=0.5",
    "public_data.selective.sigma=100.0",
    *QUERY,
]
PRETRAIN = [
    "public_data.name=glyphs",
    "pretrain.n_epochs=1",
    "pretrain.batch_size=16",
    "pretrain.snapshot_freq=2",
    *QUERY,
]
CENTRAL = [
    "public_data.central.sample_num=2",
    "public_data.central.sigma=50.0",
    "public_data.central.batch_size=60",  # every record in every query: the accounting is then a closed form
    "pretrain.warm_up.batch_size=4",
    "pretrain.warm_up.n_epochs=3",
    "pretrain.snapshot_freq=2",
]
FREQUENCY = [
    "freq.sigma=50.0",
    "freq.image_size=8",
    "freq.Generator.z_dim=6",
    "freq.Generator.g_shared_dim=4",
    "freq.Generator.g_conv_dim=4",
    "freq.d_rff=20",
    "freq.fit.epochs=1",
    "freq.fit.batch_size=10",
    "freq.data_num=24",
    "freq.batch_size=8",
    "freq.n_epochs=1",
]
LATENT = [
    "model.network.nf=8",
    "model.network.ch_mult=[1,2]",
    "model.network.attn_resolutions=[2]",
    "model.network.num_res_blocks=1",
    "model.network.head_width=4",
    "model.network.context_dim=6",
    "model.sampler.num_steps=2",
    "model.sampler_acc.num_steps=3",
    "pretrain.autoencoder.ch=4",
    "pretrain.autoencoder.n_epochs=1",
    "pretrain.autoencoder.batch_size=16",
    "pretrain.autoencoder.snapshot_freq=2",
    *[setting for setting in DIFFUSION if not setting.startswith("model.")],
]
SMALL: dict[str, list[str]] = {
    "Noise": [],
    "DP-MERF": [
        "model.Generator.z_dim=6",
        "model.Generator.g_shared_dim=4",
        "model.Generator.g_conv_dim=4",
        "model.d_rff=20",
        "train.epochs=1",
        "train.batch_size=10",
        "gen.batch_size=8",
    ],
    "DPGAN": [
        "model.Generator.z_dim=6",
        "model.Generator.g_shared_dim=4",
        "model.Generator.g_conv_dim=2",
        "model.Discriminator.d_conv_dim=2",
        "train.batch_size=60",
        "train.n_epochs=4",
        "train.d_updates=2",
        "train.g_batch_size=8",
        "train.g_part_size=4",
        "train.snapshot_freq=2",
        "train.dp.max_physical_batch_size=32",
        "gen.batch_size=8",
    ],
    "PE": [
        "model.feature_extractor=pixels",
        "train.num_samples_schedule=[30,30,30]",
        "train.variation_degree_schedule=[0,1,2]",
        "train.lookahead_degree=1",
        "train.count_threshold=0",
    ],
    "PE-SD": [
        "public_data.name=glyphs",
        "model.feature_extractor=pixels",
        "model.api_params.network.nf=4",
        "model.api_params.network.ch_mult=[1,2]",
        "model.api_params.network.attn_resolutions=[]",
        "model.api_params.network.num_res_blocks=1",
        "model.api_params.sampler.num_steps=4",
        "model.api_params.pretrain.batch_size=16",
        "model.api_params.pretrain.n_epochs=1",
        "model.api_params.pretrain.snapshot_freq=2",
        "train.num_samples_schedule=[30,30,30]",
        "train.variation_degree_schedule=[0,1,2]",
        "train.lookahead_degree=1",
        "train.count_threshold=0",
    ],
    "DP-NTK": [
        "model.Generator.z_dim=6",
        "model.Generator.g_shared_dim=4",
        "model.Generator.g_conv_dim=4",
        "model.ntk_width=10",
        "train.n_iter=4",
        "train.batch_size=10",
        "train.snapshot_freq=2",
        "pretrain.snapshot_freq=2",
        "gen.batch_size=8",
    ],
    "GS-WGAN": [
        "model.Generator.z_dim=4",
        "model.Generator.g_conv_dim=2",
        "model.Discriminator.d_conv_dim=2",
        "model.num_discriminators=4",
        "pretrain.iterations=2",
        "pretrain.critic_iters=2",
        "pretrain.batch_size=8",
        "train.iterations=5",
        "train.critic_iters=2",
        "train.batch_size=8",
        "train.refresh_iters=1",
        "train.refresh_every=2",
        "train.snapshot_freq=2",
        "train.pretrain.iterations=2",
        "train.pretrain.critic_iters=2",
        "train.pretrain.batch_size=4",
        "train.pretrain.at_once=3",
        "gen.batch_size=8",
        "public_data.name=null",
        "public_data.selective.ratio=1.0",
    ],
    "DP-Kernel": [
        "model.Generator.z_dim=6",
        "model.Generator.g_shared_dim=4",
        "model.Generator.g_conv_dim=4",
        "model.sigma_list=[2.0,8.0]",
        "model.d_rff=20",
        "train.max_iter=6",
        "train.vis_step=3",
        "train.batch_size=10",
        "gen.batch_size=8",
    ],
    "DPDM": DIFFUSION,
    "PDP-Diffusion": [*DIFFUSION, *PRETRAIN],
    "DP-LDM-SD": [*DIFFUSION, *PRETRAIN],
    "PrivImage": [
        *DIFFUSION,
        *PRETRAIN,
        "public_data.selective.ratio=0.5",
        "public_data.selective.sigma=100.0",
    ],
    "DP-FETA": [*DIFFUSION, *CENTRAL],
    "DP-FETA-Pro": [*DIFFUSION, *CENTRAL, *FREQUENCY],
    "DP-LDM": [*LATENT, *PRETRAIN],
    "DP-LoRA": [*LATENT, *PRETRAIN, "train.rank=2", "train.dp.max_grad_norm=1e-4"],
}


@functools.cache
def small_config(name: str, settings: tuple[str, ...], epsilon: str):
    """The method's own configuration at the toy's size, through the command line; `settings` win."""
    argv = ["--method", name, "--data_name", "digits_8", "--epsilon", epsilon, "preset=quick"]
    values = dict(setting.split("=", 1) for setting in (*SMALL[name], *settings))
    return load_config([*argv, *(f"{key}={value}" for key, value in values.items())], METHODS).method_config


def random_samples(seed: int, num_records: int, num_classes: int) -> Samples:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_records, 1, RESOLUTION, RESOLUTION), dtype=np.uint8)
    return Samples(images, np.arange(num_records, dtype=np.int64) % num_classes)


@pytest.fixture
def samples() -> Samples:
    """60 random 8x8 grey images in 3 classes."""
    return random_samples(0, NUM_RECORDS, NUM_CLASSES)


@pytest.fixture
def spec() -> DataSpec:
    names = tuple(f"kind {label}" for label in range(NUM_CLASSES))
    return DataSpec("toy", RESOLUTION, 1, NUM_CLASSES, NUM_RECORDS, names)


@pytest.fixture
def public() -> PublicData:
    """48 random 8x8 grey images in 6 classes."""
    names = tuple(f"public {label}" for label in range(PUBLIC_CLASSES))
    return PublicData("toy-public", random_samples(1, 48, PUBLIC_CLASSES), names)


@pytest.fixture
def make_private(samples, spec) -> Callable[..., PrivateData]:
    """make_private(plan, epsilon=inf, noise_seed=None, samples=None, relation=...) -> PrivateData with adopted plan."""

    def make(plan, epsilon=float("inf"), noise_seed=None, records=None, **ledger_options) -> PrivateData:
        ledger = Ledger(Budget(epsilon, 1e-5), **ledger_options)
        ledger.adopt(plan)
        return PrivateData(records or samples, spec, ledger, NoiseSource(noise_seed))

    return make


@dataclasses.dataclass
class Trial:
    """A method with its private data and ledger, ready to run."""

    name: str
    synthesizer: object
    private: PrivateData
    public: PublicData | None

    def run(self) -> None:
        self.synthesizer.pretrain(self.public, self.private)
        self.synthesizer.train(self.private)


@pytest.fixture
def make_method(spec) -> Callable[..., object]:
    """make_method(name, *settings, epsilon=10, runtime=None) -> the small synthesizer; reads no data."""

    def make(name: str, *settings: str, epsilon=10, runtime: Runtime | None = None):
        config = small_config(name, settings, str(epsilon))
        if hasattr(config, "public_data") and has_public_images(config.public_data):
            section = dataclasses.replace(config.public_data, n_classes=PUBLIC_CLASSES)
            config = dataclasses.replace(config, public_data=section)
        return METHODS.resolve(name)(config, spec, runtime or Runtime())

    return make


@pytest.fixture
def make_trial(make_method, make_private, public) -> Callable[..., Trial]:
    """make_trial(name, *settings, epsilon=10, noise_seed=None, runtime=None) -> Trial with the plan adopted."""

    def make(name: str, *settings: str, epsilon=10, noise_seed=None, runtime=None, records=None) -> Trial:
        synthesizer = make_method(name, *settings, epsilon=epsilon, runtime=runtime)
        private = make_private(synthesizer.privacy_plan(), float(epsilon), noise_seed, records)
        section = getattr(synthesizer.config, "public_data", None)
        without = section is None or not has_public_images(section)
        return Trial(name, synthesizer, private, None if without else public)

    return make

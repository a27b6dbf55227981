"""Generators of Private Evolution that are models: the toolkit's own diffusion, ImageNet diffusion, Stable Diffusion,
OpenAI's endpoint. Nothing here needs a network or published weights."""

import base64
import dataclasses
import http.server
import io
import json
import math
import re
import sys
import threading
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import call

import run
from models import METHODS
from models.diffusion.config import NetworkConfig, OptimConfig, OptimParams
from models.diffusion.loss import LossConfig
from models.diffusion.public_pretraining import PublicStageConfig
from models.diffusion.samplers import SamplerConfig, noise_levels, resample, sample
from models.diffusion.timesteps import cosine_schedule, linear_schedule, respaced
from models.evolution.apis.api import Candidates, ImageAPI, checked
from models.evolution.apis.diffusion import MODEL_LABEL, DiffusionAPI, DiffusionAPIConfig
from models.evolution.apis.guided_diffusion import (
    GuidedDiffusionAPI,
    GuidedDiffusionAPIConfig,
    ImprovedDiffusionAPI,
)
from models.evolution.apis.openai import OpenAIAPI, OpenAIAPIConfig, Responses
from models.evolution.apis.stable_diffusion import StableDiffusionAPI, StableDiffusionAPIConfig
from models.fitting.batches import in_batches
from models.nn.guided_unet import GuidedUNet, GuidedUNetConfig
from pipeline.checkpoints import Checkpoints
from pipeline.compose import compose
from pipeline.record import require_same_config
from utils.config import load_config
from utils.errors import FieldError, MissingWeights, UserError
from utils.runtime import Runtime
from utils.typed import changeable_keys

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1])


def assert_same(one: Candidates, other: Candidates) -> None:
    assert np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)
    assert one.info.keys() == other.info.keys()
    assert all(np.array_equal(one.info[name], other.info[name]) for name in one.info)


def difference(one: Candidates, other: Candidates) -> float:
    """Mean absolute difference in grey levels."""
    return np.abs(one.images.astype(float) - other.images).mean()


# ------------------------------------------------------------------------------------------ what a generator is given


class Listener(ImageAPI):
    """A generator of one's own, which keeps whatever it is given."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        step: int

    given: ClassVar[list] = []

    def prepare(self, public):
        self.given.append(public)

    def random_api(self, labels, rng_name):
        self.given.append(labels)
        rng = np.random.default_rng(len(rng_name))
        return Candidates(rng.integers(0, 256, (len(labels), *self.image_shape), dtype=np.uint8), labels)

    def variation_api(self, candidates, degree, rng_name):
        self.given.append(candidates.images)
        return Candidates(candidates.images + np.uint8(self.config.step), candidates.labels)


def test_a_generator_is_given_no_private_image(make_trial, samples, tmp_path):
    Listener.given.clear()
    settings = [f"model.api={__name__}:Listener", "model.api_options=[step=3]"]
    trial = make_trial("PE", *settings, runtime=Runtime(folder=tmp_path))
    trial.run()
    assert Listener.given[0] is None  # no public set
    records = {image.tobytes() for image in samples.images}
    shown = [image for images in Listener.given[2:] for image in images]
    assert len(shown) >= 60 and not any(image.tobytes() in records for image in shown)
    assert np.array_equal(np.bincount(Listener.given[1]), [10, 10, 10])  # labels by public shares
    reached = [vars(trial.synthesizer.api)[name] for name in ("config", "spec", "runtime")]
    assert len(reached) == len(vars(trial.synthesizer.api))


def test_max_requests_may_be_raised_on_resume(tmp_path):
    changeable = tuple(changeable_keys({"model.api_params.openai": OpenAIAPIConfig}))
    snapshot = {"model": {"api_params": {"openai": {"max_requests": 9, "size": 8}}}}
    settings = SimpleNamespace(snapshot=snapshot, changeable=changeable)
    (tmp_path / "config.yaml").write_text("model: {api_params: {openai: {max_requests: 5, size: 8}}}")
    require_same_config(tmp_path, settings)
    (tmp_path / "config.yaml").write_text("model: {api_params: {openai: {max_requests: 5, size: 4}}}")
    with pytest.raises(UserError, match=r"model\.api_params\.openai\.size=4 \(now 8\)"):
        require_same_config(tmp_path, settings)


@pytest.mark.parametrize("count", [1, 10])
def test_processes_share_the_batches_of_one(count, monkeypatch):
    def draw(rows: slice) -> np.ndarray:
        assert rows.start % 3 == 0 and rows.stop - rows.start <= 3
        return np.arange(rows.start, rows.stop, dtype=np.uint8).reshape(-1, 1, 1, 1)

    whole = in_batches(count, 3, draw, (1, 1, 1), "alone")
    assert whole.ravel().tolist() == list(range(count))
    parts = []
    monkeypatch.setattr("utils.distributed.concatenate", lambda rows: rows)
    for rank in range(3):
        monkeypatch.setattr("utils.distributed.share", lambda n, r=rank: slice(n * r // 3, n * (r + 1) // 3))
        parts.append(in_batches(count, 3, draw, (1, 1, 1), "together"))
    assert np.array_equal(np.concatenate(parts), whole)


# ------------------------------------------------------------------------------------------ sampling from a candidate

SAMPLER = SamplerConfig("ddim", 10, 0.002, 80.0, 7.0, 0.0, 0.0, 0.0, 50.0)


def gaussian_denoiser(noisy, sigma, labels):
    """The exact denoiser of images that are N(0, 1/4) everywhere."""
    return noisy * 0.25 / (0.25 + sigma[:, None, None, None] ** 2)


@pytest.mark.parametrize("kind", ["ddim", "edm", "dpmpp"])
@pytest.mark.parametrize("first", [0, 40, 70, 99])
def test_a_variation_is_its_candidate_with_noise_denoised(kind, first):
    """For Gaussian images the sampler's equation has a solution in closed form: x / sqrt(1 + 4 t^2)."""
    config = dataclasses.replace(SAMPLER, type=kind, num_steps=100)
    labels = torch.zeros(3, dtype=torch.int64)
    images = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)) / 2
    found = resample(gaussian_denoiser, config, images, first, labels, torch.Generator().manual_seed(2))
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    level = noise_levels(config)[first]
    expected = (images + level * noise) / (1 + 4 * level**2) ** 0.5
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


def test_random_images_start_at_the_noisiest_level():
    labels = torch.zeros(3, dtype=torch.int64)
    nothing = torch.zeros(3, 1, 4, 4)
    seeded = [torch.Generator().manual_seed(2) for _ in range(2)]
    drawn = sample(gaussian_denoiser, SAMPLER, (1, 4, 4), labels, seeded[0])
    assert torch.equal(drawn, resample(gaussian_denoiser, SAMPLER, nothing, 0, labels, seeded[1]))


def test_timesteps_are_chosen_as_published():
    assert respaced(4000, "10") == [0, 444, 889, 1333, 1777, 2222, 2666, 3110, 3555, 3999]
    assert respaced(4000, "ddim10") == list(range(0, 4000, 400))
    assert respaced(7, "2,1") == [0, 3, 4]  # the first part is longer by one
    assert respaced(1000, "1000") == list(range(1000))
    for wrong in ("11", "0", "x", "3,8", "ddim7", "ddim", ""):
        with pytest.raises(FieldError, match="timestep_respacing"):
            respaced(10, wrong)


def test_schedules_follow_their_formulas():
    cosine = cosine_schedule(4000)
    t = torch.arange(1, 4000, dtype=torch.float64) / 4000
    expected = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(cosine[:-1], expected)
    torch.testing.assert_close(cosine[-1] / cosine[-2], torch.tensor(0.001, dtype=torch.float64))  # the cap
    linear = linear_schedule(1000)
    betas = 1 - linear[1:] / linear[:-1]
    torch.testing.assert_close(betas[[0, -1]].float(), torch.tensor([1e-4 + 0.0199 / 999, 0.02]))
    assert linear[0] == pytest.approx(1 - 1e-4)


# ------------------------------------------------------------------------------------------ the toolkit's own diffusion

OPTIM = OptimConfig("Adam", OptimParams(1e-2, 0.0))
STAGE = PublicStageConfig(
    cond=True, batch_size=16, n_epochs=1, snapshot_freq=100, flip=False, optim=OPTIM,
    loss=LossConfig(-1.2, 1.2, 1, 0.1),
)  # fmt: skip
OWN = DiffusionAPIConfig(
    ckpt=None,
    ckpt_weights="ema",
    network=NetworkConfig(8, 1, 4, [1, 2], [], 1),
    ema_rate=0.9,
    sampler=SAMPLER,
    batch_size=3,
    pretrain=STAGE,
)


@pytest.fixture
def own(spec, public):
    """own(runtime=None, prepared=True, pretrain={..}, **changes) -> DiffusionAPI."""

    def make(runtime=None, prepared=True, pretrain=None, **changes):
        config = dataclasses.replace(OWN, pretrain=dataclasses.replace(STAGE, **(pretrain or {})), **changes)
        api = DiffusionAPI(config, spec, runtime or Runtime())
        if prepared:
            api.prepare(public)
        return api

    return make


@pytest.fixture
def checkpoint(make_trial, tmp_path):
    """checkpoint(stage, *settings) -> (file, state) of a PDP-Diffusion run with the network of OWN."""

    def make(stage: str, *settings: str):
        network = ["model.network.nf=4", "model.network.ch_mult=[1,2]", "model.network.attn_resolutions=[]"]
        trial = make_trial("PDP-Diffusion", *network, "model.network.num_res_blocks=1", *settings)
        trial.synthesizer.pretrain(trial.public, trial.private)
        if stage == "train":
            trial.synthesizer.train(trial.private)
        Checkpoints(tmp_path, "PDP-Diffusion", trial.synthesizer, trial.private.ledger).save(stage, "final")
        return str(tmp_path / stage / "checkpoints" / "final_checkpoint.pth"), trial.synthesizer.state_dict()

    return make


def same_weights(api: DiffusionAPI, weights: dict) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in api.network.state_dict().items())


def test_random_images_and_variations_repeat_by_name(own):
    api = own()
    drawn = checked(api.random_api(LABELS, "initial"), LABELS, api.image_shape, "random_api")
    assert drawn.images.shape == (8, 1, 8, 8)
    assert_same(drawn, api.random_api(LABELS, "initial"))
    assert difference(drawn, api.random_api(LABELS, "other")) > 1
    varied = checked(api.variation_api(drawn, 3, "v"), LABELS, api.image_shape, "variation_api")
    assert np.array_equal(varied.info[MODEL_LABEL], drawn.info[MODEL_LABEL])
    assert_same(varied, api.variation_api(drawn, 3, "v"))
    assert difference(varied, api.variation_api(drawn, 3, "w")) > 1


def test_a_higher_degree_changes_less(own):
    api = own()
    drawn = api.random_api(LABELS, "initial")
    changes = [difference(drawn, api.variation_api(drawn, degree, "v")) for degree in (0, 3, 6, 9)]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > 20 and changes[-1] < 5


def test_degrees_mean_the_noise_of_the_published_schedule(own):
    """Entry n - 1 - d of a cosine schedule of 1000 timesteps respaced to n, rounded down to the sampler's grid."""
    api = own(prepared=False)
    kept = np.round(np.arange(10) * 999 / 9).astype(int)
    levels = np.array(noise_levels(SAMPLER))
    for degree in range(10):
        alpha_bar = cosine_schedule(1000)[kept[9 - degree]].item()
        below = levels <= ((1 - alpha_bar) / alpha_bar) ** 0.5
        assert api.first_level(degree) == (below.argmax() if below.any() else 9)
    assert api.first_level(0) == 0
    api.check_degree(9)
    for wrong in (10, -1, 0.5):
        with pytest.raises(UserError, match=f"^{wrong:g} is .* from 0 to 9"):
            api.check_degree(wrong)


def test_a_network_of_public_labels_gets_random_ones(own, public):
    api = own(sampler=dataclasses.replace(SAMPLER, num_steps=2), batch_size=500)
    drawn = api.random_api(np.zeros(500, np.int64), "initial")
    counts = np.bincount(drawn.info[MODEL_LABEL], minlength=public.num_classes)
    assert len(counts) == public.num_classes and counts.min() > 50
    assert (drawn.labels == 0).all()


def test_a_network_without_labels_gets_the_null_label(own, public):
    api = own(pretrain={"cond": False})
    assert (api.random_api(LABELS, "initial").info[MODEL_LABEL] == public.num_classes).all()


@pytest.mark.parametrize("cond", [True, False])
def test_a_network_of_selected_public_classes_knows_the_private_ones(cond, make_trial, own, tmp_path):
    """PrivImage relabels what its query has selected, unless its pretraining ignores labels; that has cost what the
    checkpoint says."""
    network = ["model.network.nf=4", "model.network.ch_mult=[1,2]", "model.network.attn_resolutions=[]"]
    trial = make_trial("PrivImage", *network, "model.network.num_res_blocks=1", f"pretrain.cond={cond}")
    trial.synthesizer.pretrain(trial.public, trial.private)
    Checkpoints(tmp_path, "PrivImage", trial.synthesizer, trial.private.ledger).save("pretrain", "final")
    path = tmp_path / "pretrain" / "checkpoints" / "final_checkpoint.pth"
    api = own(ckpt=str(path), pretrain={"cond": cond})
    expected = LABELS if cond else np.full_like(LABELS, 3)
    assert api.random_api(LABELS, "initial").info[MODEL_LABEL].tolist() == expected.tolist()
    assert [release.name for release in api.releases()] == ["checkpoint: semantic query"]


def test_the_recorded_labels_are_those_passed_to_the_network(own, monkeypatch):
    api, asked = own(), []
    forward = type(api.network).forward

    def spy(self, x, condition, labels):
        asked.append(labels.clone())
        return forward(self, x, condition, labels)

    monkeypatch.setattr(type(api.network), "forward", spy)
    drawn = api.random_api(LABELS[:3], "initial")
    api.variation_api(drawn, 2, "v")
    assert all(labels.tolist() == drawn.info[MODEL_LABEL].tolist() for labels in asked)
    assert len(asked) > 10


def test_a_checkpoint_gives_its_averaged_weights_or_the_raw_ones(own, checkpoint, monkeypatch):
    path, state = checkpoint("pretrain")
    averaged, raw = own(ckpt=path), own(ckpt=path, ckpt_weights="raw")
    assert same_weights(averaged, {**state["network"], **state["ema"]["weights"]})
    assert same_weights(raw, state["network"])
    assert not same_weights(averaged, state["network"])
    assert averaged.releases() == [] and not averaged.needs_public_images
    assert averaged.parameter_counts() == {"UNet": sum(t.numel() for t in state["ema"]["weights"].values())}


def test_own_pretraining_ends_with_its_averaged_weights(own, public):
    api = own(prepared=False)
    trained = api._new_pretraining(public.num_classes)
    trained.pretrain(public, None)
    api.prepare(public)
    state = trained.state_dict()
    assert same_weights(api, {**state["network"], **state["ema"]["weights"]})
    assert not same_weights(api, state["network"])
    assert api.needs_public_images


def test_a_checkpoint_of_the_private_stage_knows_the_classes_and_costs_what_it_has_spent(own, checkpoint):
    path, _ = checkpoint("train")
    api = own(ckpt=path)
    drawn = api.random_api(LABELS, "initial")
    assert np.array_equal(drawn.info[MODEL_LABEL], LABELS)
    (inherited,) = api.releases()
    assert inherited.name == "checkpoint: dp-sgd" and inherited.num_steps > 0
    assert inherited.noise_multiplier > 0


def test_the_published_command_starts_from_a_checkpoint_of_the_published_size(tmp_path):
    public = load_config(["--method", "PDP-Diffusion", "--data_name", "cifar10_32", "-e", "inf"], METHODS)
    Checkpoints(tmp_path, "PDP-Diffusion", compose(public).synthesizer, None).save("pretrain", "snapshot")
    command = ["--method", "PE-SD", "--data_name", "cifar10_32", "--epsilon", "10.0", "eval.mode=val"]
    path = tmp_path / "pretrain" / "checkpoints" / "snapshot_checkpoint.pth"
    outcome = call(run.main, [*command, f"model.api_params.ckpt={path}", "--dry_run"])
    assert outcome.code == 0, outcome.err
    assert "UNet 3,867,299" in outcome.out and "missing: public_data" not in outcome.out
    assert float(re.search(r"\n  votes +([\d.]+)", outcome.out)[1]) == pytest.approx(1.181, rel=2e-3)


def test_without_a_checkpoint_the_public_set_is_wanted(tmp_path):
    command = ["--method", "PE-SD", "--data_name", "cifar10_32", "--data_root", str(tmp_path), "--dry_run"]
    outcome = call(run.main, command)
    assert outcome.code == 0, outcome.err
    assert "missing: public_data.name: 'imagenet'" in outcome.out


def test_a_mismatched_checkpoint_is_refused_in_one_line(own, checkpoint, spec):
    path, _ = checkpoint("pretrain")
    with pytest.raises(UserError, match="another architecture"):
        own(ckpt=path, network=NetworkConfig(8, 1, 8, [1, 2], [], 1))
    larger = dataclasses.replace(spec, resolution=16)
    with pytest.raises(UserError, match=r"\(1, 8, 8\)"):
        DiffusionAPI(dataclasses.replace(OWN, ckpt=path), larger, Runtime())


def test_interrupted_pretraining_resumes(own, public):
    whole, kept = own(), []
    runtime = Runtime(snapshot=lambda stage: kept.append(_copied(started.state_dict())))
    started = own(runtime, prepared=False, pretrain={"snapshot_freq": 2})
    started.prepare(public)
    assert [state["pretraining"]["step"] for state in kept] == [2]  # of 3
    again = own(prepared=False)
    again.load_state_dict(kept[0])
    again.prepare(public)
    assert same_weights(again, whole.network.state_dict())


def _copied(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def test_a_prepared_generator_comes_back_from_its_state(own):
    api = own()
    again = own(prepared=False)
    again.load_state_dict(_copied(api.state_dict()))
    assert_same(api.random_api(LABELS, "initial"), again.random_api(LABELS, "initial"))


# ------------------------------------------------------------------------------------------ ImageNet diffusion

IMAGENET_64 = GuidedUNetConfig(64, 192, [1, 2, 3, 4], 3, [16, 8], 4, 1000, True, True, False)
IMAGENET_128 = GuidedUNetConfig(128, 256, [1, 1, 2, 3, 4], 2, [32, 16, 8], 4, 1000, True, True, True)
TINY = GuidedUNetConfig(8, 32, [1, 2], 1, [4], 2, 5, True, True, False)
RESPACED = GuidedDiffusionAPIConfig(None, TINY, 4000, "cosine", "10", 3)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (IMAGENET_64, 273_049_350),
        (IMAGENET_128, 421_529_606),
        # ADM at 64 px, "296M" in table 11 of arXiv:2105.05233: heads of 64 channels need no weights of their own
        (
            dataclasses.replace(IMAGENET_64, attention_resolutions=[32, 16, 8], resblock_updown=True),
            295_904_454,
        ),
    ],
)
def test_published_networks_have_their_sizes(config, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in GuidedUNet(config).parameters()) == count


def test_published_networks_have_their_names():
    """As the weights files of both repositories name them; compared in full, and numerically, when this was written."""
    names = {"improved": IMAGENET_64, "guided": IMAGENET_128}
    with torch.device("meta"):
        shapes = {
            name: {key: tuple(tensor.shape) for key, tensor in GuidedUNet(config).state_dict().items()}
            for name, config in names.items()
        }
    for found in shapes.values():
        everywhere = {
            "time_embed.0.weight",
            "time_embed.2.bias",
            "label_emb.weight",
            "out.0.weight",
            "out.2.bias",
        }
        everywhere |= {
            "input_blocks.0.0.weight",
            "middle_block.1.qkv.weight",
            "middle_block.2.in_layers.0.weight",
        }
        assert everywhere <= set(found)
        assert found["label_emb.weight"][0] == 1000 and found["out.2.weight"][0] == 6
    improved, guided = shapes["improved"], shapes["guided"]
    assert improved["input_blocks.4.0.op.weight"] == (192, 192, 3, 3)
    assert improved["input_blocks.9.0.skip_connection.weight"] == (576, 384, 1, 1)
    assert improved["input_blocks.9.1.proj_out.weight"] == (576, 576, 1)
    assert improved["output_blocks.3.2.conv.weight"] == (768, 768, 3, 3)
    assert improved["output_blocks.15.0.out_layers.3.weight"] == (192, 192, 3, 3)
    assert improved["input_blocks.1.0.emb_layers.1.weight"] == (384, 768)
    assert guided["input_blocks.3.0.in_layers.2.weight"] == (256, 256, 3, 3)  # a residual block that halves
    assert guided["output_blocks.2.2.out_layers.3.weight"] == (1024, 1024, 3, 3)
    assert not [key for key in guided if ".op." in key or key.endswith("conv.weight")]


@pytest.fixture
def weights(tmp_path):
    """A file of random weights of TINY, as the published ones are stored."""
    torch.manual_seed(0)
    network = GuidedUNet(TINY)
    state = {name: torch.randn_like(tensor) * 0.1 for name, tensor in network.state_dict().items()}
    path = tmp_path / "tiny.pt"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", [ImprovedDiffusionAPI, GuidedDiffusionAPI])
def test_imagenet_networks_make_colour_images_for_any_data(kind, spec, weights):
    api = kind(dataclasses.replace(RESPACED, model_path=str(weights)), spec, Runtime())
    api.prepare(None)
    assert api.image_shape == (3, 8, 8) and api.parameter_counts() == {"UNet": sum(
        tensor.numel() for tensor in torch.load(weights).values()
    )}  # fmt: skip
    drawn = checked(api.random_api(LABELS, "initial"), LABELS, api.image_shape, "random_api")
    assert_same(drawn, api.random_api(LABELS, "initial"))
    (labels,) = drawn.info.values()
    assert set(labels) <= set(range(5)) and len(set(labels)) > 1
    varied = checked(api.variation_api(drawn, 9, "v"), LABELS, api.image_shape, "variation_api")
    assert difference(drawn, varied) < difference(drawn, api.variation_api(drawn, 0, "v"))
    with pytest.raises(UserError, match=f"^10 is .* {api.name}; .* from 0 to 9"):
        api.check_degree(10)


def test_ddim_with_the_true_noise_finds_the_image(spec):
    """A network that knows the image: the noise that it names leads back to exactly that image, from any start."""
    config = dataclasses.replace(RESPACED, timestep_respacing="ddim10")
    api = ImprovedDiffusionAPI(config, spec, Runtime())
    alpha_bar = cosine_schedule(4000).float()
    truth, seen = torch.linspace(-1, 1, 64).view(8, 8).expand(1, 3, 8, 8), []

    def network(x, timesteps, labels):
        kept = alpha_bar[timesteps][:, None, None, None]
        seen.append(timesteps[0].item())
        noise = (x - kept.sqrt() * truth) / (1 - kept).sqrt()
        return torch.cat([noise, torch.full_like(noise, 7.0)], dim=1)  # and a variance that nobody asks for

    api.network = lambda: network
    drawn = api.random_api(LABELS[:2], "initial")
    expected = ((truth[0] + 1) * 127.5).round().byte().numpy()
    assert np.abs(drawn.images.astype(int) - expected).max() <= 1
    assert seen == [3600, 3200, 2800, 2400, 2000, 1600, 1200, 800, 400, 0]
    seen.clear()
    varied = api.variation_api(drawn, 7, "v")
    assert seen == [800, 400, 0]
    assert np.abs(varied.images.astype(int) - expected).max() <= 1


def test_a_variation_starts_from_the_candidate_at_the_right_noise(spec):
    api = ImprovedDiffusionAPI(RESPACED, spec, Runtime())
    starts = []
    api._denoised = lambda x, left, labels: starts.append((x, left)) or np.zeros(x.shape, np.uint8)
    white = Candidates(np.full((3, 3, 8, 8), 255, np.uint8), LABELS[:3], {"imagenet label": LABELS[:3]})
    api.variation_api(white, 4, "v")
    ((x, left),) = starts
    kept = cosine_schedule(4000)[2222].item()
    assert left == 6  # timesteps 0 .. 2222
    assert x.mean().item() == pytest.approx(kept**0.5, abs=0.1)
    assert x.std().item() == pytest.approx((1 - kept) ** 0.5, rel=0.1)


def test_missing_and_wrong_weights_are_refused_in_one_line(spec, tmp_path, weights):
    api = GuidedDiffusionAPI(RESPACED, spec, Runtime(weights_root=tmp_path / "w"))  # planning needs none
    with pytest.raises(MissingWeights, match=r"w/128x128_diffusion\.pt; fetch it: curl .*openaipublic"):
        api.prepare(None)
    other = dataclasses.replace(
        RESPACED, model_path=str(weights), network=dataclasses.replace(TINY, num_channels=64)
    )
    with pytest.raises(UserError, match="another architecture"):
        ImprovedDiffusionAPI(other, spec, Runtime()).prepare(None)
    weights.write_bytes(b"<html>not found</html>")
    broken = ImprovedDiffusionAPI(dataclasses.replace(RESPACED, model_path=str(weights)), spec, Runtime())
    with pytest.raises(UserError, match="not readable") as caught:
        broken.prepare(None)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ Stable Diffusion

PICTURES = StableDiffusionAPIConfig(
    source="",
    prompt="a {}",
    prompts=None,
    resolution=16,
    image_size=8,
    num_steps=4,
    guidance_scale=2.0,
    batch_size=3,
)


@pytest.fixture
def pipeline(tmp_path) -> str:
    """A folder with a tiny Stable Diffusion of random weights, as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers", reason="the optional package diffusers is missing")
    transformers = pytest.importorskip("transformers", reason="the optional package transformers is missing")
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789")
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16
    )
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    found = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    found.save_pretrained(tmp_path / "pipeline")
    return str(tmp_path / "pipeline")


def test_stable_diffusion_draws_by_prompt_and_varies_by_strength(pipeline, spec):
    api = StableDiffusionAPI(dataclasses.replace(PICTURES, source=pipeline), spec, Runtime())
    api.prepare(None)
    assert api.image_shape == (3, 8, 8)
    drawn = checked(api.random_api(LABELS, "initial"), LABELS, api.image_shape, "random_api")
    assert_same(drawn, api.random_api(LABELS, "initial"))
    assert drawn.images.std() > 0
    varied = checked(api.variation_api(drawn, 1.0, "v"), LABELS, api.image_shape, "variation_api")
    assert_same(varied, api.variation_api(drawn, 1.0, "v"))

    asked = []
    for pipe in api.pipelines():
        encode = pipe.encode_prompt

        def spy(prompt, *arguments, encode=encode, **options):
            asked.extend(prompt)
            return encode(prompt, *arguments, **options)

        pipe.encode_prompt = spy
    api.random_api(LABELS, "initial")
    assert asked == [f"a kind {label}" for label in LABELS]


def test_the_strength_is_the_share_of_steps(pipeline, spec, monkeypatch):
    api = StableDiffusionAPI(dataclasses.replace(PICTURES, source=pipeline), spec, Runtime())
    drawn = api.random_api(LABELS[:3], "initial")
    calls = []
    unet = api.pipelines()[1].unet
    monkeypatch.setattr(type(unet), "forward", _counted(type(unet).forward, calls))
    for strength, steps in ((0.25, 1), (0.5, 2), (1.0, 4)):
        calls.clear()
        api.variation_api(drawn, strength, "v")
        assert len(calls) == steps


def _counted(function, calls):
    def counted(*arguments, **options):
        calls.append(1)
        return function(*arguments, **options)

    return counted


def test_stable_diffusion_refuses_in_one_line(spec, tmp_path, monkeypatch):
    api = StableDiffusionAPI(dataclasses.replace(PICTURES, source=str(tmp_path)), spec, Runtime())
    for degree in (0.1, 1.5, 0):
        with pytest.raises(UserError, match=r"0\.25.* to 1"):
            api.check_degree(degree)
    with pytest.raises(FieldError, match=r"prompts: .*\b2\b.*\b3\b"):
        StableDiffusionAPI(dataclasses.replace(PICTURES, prompts=["a", "b"]), spec, Runtime())
    for wrong in ("no place", "{} and {}", "a {name}"):
        with pytest.raises(FieldError, match=r"prompt: .*\{\}"):
            dataclasses.replace(PICTURES, prompt=wrong)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="diffusers transformers"):
        api.prepare(None)


def test_a_missing_pipeline_is_refused_in_one_line(spec, tmp_path):
    pytest.importorskip("diffusers", reason="the optional package diffusers is missing")
    api = StableDiffusionAPI(dataclasses.replace(PICTURES, source=str(tmp_path)), spec, Runtime())
    with pytest.raises(UserError, match=r"stable_diffusion\.source: ") as caught:
        api.prepare(None)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ OpenAI's endpoint

SECRET = "sk-test-0123456789"


class Service(http.server.ThreadingHTTPServer):
    """A local server that answers like OpenAI's images endpoint. `failures` are the statuses that it gives first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.failures: list[int] = []
        self.broken_after = math.inf  # answers with status 400 from this request on
        self.asked: list[tuple[str, dict, bytes]] = []  # path, JSON, raw body of what was answered
        self.refused = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        service: Service = self.server
        if self.headers["Authorization"] != f"Bearer {SECRET}":
            return self._send(401, {"error": {"message": f"Incorrect API key provided: {SECRET[:9]}"}})
        if service.failures:
            service.refused += 1
            return self._send(service.failures.pop(0), {"error": {"message": "slow down"}})
        if len(service.asked) >= service.broken_after:
            return self._send(400, {"error": {"message": "your request\nwas rejected"}})
        content = json.loads(body) if self.headers["Content-Type"] == "application/json" else {}
        service.asked.append((self.path, content, body))
        grey = len(service.asked)  # every request has its own shade
        answer = [{"b64_json": base64.b64encode(_png(grey)).decode()}] * content.get("n", 1)
        return self._send(200, {"created": 0, "data": answer})

    def _send(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def _png(grey: int, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def service(monkeypatch):
    pytest.importorskip("openai", reason="the optional package openai is missing")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = Service()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


REMOTE = OpenAIAPIConfig(
    model="gpt-image-1", base_url=None, prompt="a {}", prompts=None, variation="edits", variation_prompt="like {}",
    quality="low", size=32, image_size=8, images_per_request=2, max_requests=100, max_retries=3, timeout=20.0,
)  # fmt: skip


@pytest.fixture
def remote(service, spec):
    """remote(runtime=None, **changes) -> OpenAIAPI that talks to the local server."""

    def make(runtime=None, **changes):
        config = dataclasses.replace(REMOTE, base_url=service.url, **changes)
        return OpenAIAPI(config, spec, runtime or Runtime())

    return make


def test_random_images_come_in_batches_by_the_prompt_of_their_class(remote, service):
    api = remote()
    drawn = checked(api.random_api(LABELS, "initial"), LABELS, api.image_shape, "random_api")
    assert [(path, content["prompt"], content["n"]) for path, content, _ in service.asked] == [
        ("/v1/images/generations", "a kind 0", 2),
        ("/v1/images/generations", "a kind 0", 1),
        ("/v1/images/generations", "a kind 1", 2),
        ("/v1/images/generations", "a kind 1", 1),
        ("/v1/images/generations", "a kind 2", 2),
    ]
    assert all(
        (content["model"], content["size"]) == ("gpt-image-1", "32x32") for _, content, _ in service.asked
    )
    # Rows 0, 3, 6 are of class 0: two from the first request, one from the second.
    assert drawn.images[:, 0, 0, 0].tolist() == [1, 3, 5, 1, 3, 5, 2, 4]


@pytest.mark.parametrize("variation", ["edits", "variations"])
def test_a_variation_sends_its_candidate_and_nothing_else(remote, service, variation):
    api = remote(variation=variation, model="dall-e-2" if variation == "variations" else "gpt-image-1")
    shades = np.array([10, 200], np.uint8)
    candidates = Candidates(
        np.broadcast_to(shades[:, None, None, None], (2, 3, 8, 8)).copy(), np.array([2, 0])
    )
    varied = checked(
        api.variation_api(candidates, 5, "v"), candidates.labels, api.image_shape, "variation_api"
    )
    assert varied.images[:, 0, 0, 0].tolist() == [1, 2]
    for (path, _, body), shade, name in zip(service.asked, shades, ("kind 2", "kind 0"), strict=True):
        assert path == f"/v1/images/{variation}"
        start = body.index(b"\x89PNG")
        sent = np.asarray(Image.open(io.BytesIO(body[start:])))
        assert sent.shape == (32, 32, 3) and (sent == shade).all()
        assert (f"like {name}".encode() in body) == (variation == "edits")


def test_a_busy_service_is_retried(remote, service):
    service.failures = [429, 500, 429]
    drawn = remote().random_api(LABELS[:1], "initial")
    assert service.refused == 3 and len(service.asked) == 1 and len(drawn) == 1
    service.failures = [429] * 4
    with pytest.raises(UserError, match="slow down"):
        remote().random_api(LABELS[:1], "initial")
    assert service.failures == []  # max_retries more, and no further


def test_the_budget_is_refused_before_more_is_spent(remote, service):
    api = remote(max_requests=6)
    drawn = api.random_api(LABELS, "initial")  # 5 requests
    with pytest.raises(UserError, match=r"max_requests: 6 .*\b5\b.*\b8\b") as caught:
        api.variation_api(drawn, 0, "v")
    assert len(service.asked) == 5 and "\n" not in str(caught.value)
    api.variation_api(drawn.take(slice(0, 1)), 0, "v")  # the last one


def test_what_was_paid_for_is_not_paid_for_again(remote, service, tmp_path):
    service.broken_after = 3
    with pytest.raises(UserError, match=r"rejected.*--resume_exp"):
        remote(Runtime(folder=tmp_path)).random_api(LABELS, "initial")
    service.broken_after = math.inf
    again = remote(Runtime(folder=tmp_path), max_requests=5)
    drawn = again.random_api(LABELS, "initial")
    assert len(service.asked) == 5
    assert drawn.images[:, 0, 0, 0].tolist() == [1, 3, 5, 1, 3, 5, 2, 4]
    with pytest.raises(UserError, match="5 are spent"):  # across starts of the program
        remote(Runtime(folder=tmp_path), max_requests=5).random_api(LABELS[:1], "another")
    assert len(service.asked) == 5
    remote(Runtime(folder=tmp_path), max_requests=6).random_api(
        LABELS[:1], "another"
    )  # equal words, a new image
    assert len(service.asked) == 6


def test_a_truncated_response_is_not_counted(tmp_path):
    Responses(tmp_path).keep("a", np.ones(3))
    (tmp_path / ".b.1.partial.npy").write_bytes(b"half")
    found = Responses(tmp_path)
    assert len(found) == 1 and "a" in found and found["a"].tolist() == [1, 1, 1]


def test_too_few_images_are_noticed(remote, monkeypatch):
    monkeypatch.setattr(
        "json.dumps", lambda value, dumps=json.dumps, **options: dumps(_shorter(value), **options)
    )
    with pytest.raises(UserError, match=r"\b2 images\b.*\b1\b"):
        remote().random_api(np.array([0, 0]), "initial")


def _shorter(value):
    return {**value, "data": value["data"][:1]} if isinstance(value, dict) and "data" in value else value


def test_an_api_key_is_required_and_never_printed(remote, service, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("DEBUG")
    api = remote(Runtime(folder=tmp_path))
    api.random_api(LABELS, "initial")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-987654")
    with pytest.raises(UserError, match=r"OPENAI_API_KEY: .*\b401\b") as caught:
        remote().random_api(LABELS[:1], "initial")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY: not set"):
        remote().prepare(None)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    told = [caplog.text, *capsys.readouterr(), str(caught.value), repr(api.config), repr(api.state_dict())]
    for key in (SECRET, "sk-wrong-987654"):
        assert not any(key[:9] in text for text in told)
        assert written and not any(key.encode() in content for content in written)


def test_a_failed_connection_is_reported_in_one_line(remote, spec):
    config = dataclasses.replace(REMOTE, base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v1"):
        OpenAIAPI(config, spec, Runtime()).random_api(LABELS[:1], "initial")


def test_openai_refuses_in_one_line(spec, monkeypatch):
    for changes, message in (
        ({"variation": "edit"}, "one of edits, variations"),
        ({"images_per_request": 11}, "from 1 to 10"),
        ({"prompt": "a picture"}, r"one \{\} for the class name"),
    ):
        with pytest.raises(FieldError, match=message):
            dataclasses.replace(REMOTE, **changes)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="pip install 'openai>=2'"):
        OpenAIAPI(REMOTE, spec, Runtime()).prepare(None)

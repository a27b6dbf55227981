"""DP-LoRA: latent diffusion pretrained on public data; DP-SGD on low-rank adapters of its attention layers and on the
class embedder (Tsai et al. 2024, arXiv:2406.01355; adapters of Hu et al. 2021, arXiv:2106.09685)."""

import copy
from dataclasses import asdict, dataclass

from torch import nn

from data.spec import DataSpec
from models.diffusion.checkpoint import spent_releases
from models.diffusion.latent import LatentDiffusion, LatentModelConfig, LatentTrainConfig
from models.nn.lora import (
    adapter_state,
    adapters,
    add_adapters,
    base_fingerprint,
    load_adapter_state,
    merge_adapters,
)
from opacus_ext.private_data import PrivateData
from utils import distributed
from utils.checkpoint_files import read, write
from utils.errors import UserError
from utils.runtime import Runtime, log
from utils.sections import check_least

MERGED = "merged"  # the stage after training: adapters are part of the weights again

# What the query, key, value and output layers of an attention are called: here, and in the diffusers library.
ATTENTION_LAYERS = ("query", "key", "value", "output", "to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class ModelConfig(LatentModelConfig):
    backbone: str | None  # diffusers:<name or folder>: a pretrained UNet; None: model.network
    adapters: str | None  # adapters.pt of an earlier run, merged into the weights that were loaded


@dataclass(frozen=True)
class TrainConfig(LatentTrainConfig):
    rank: int  # of the adapters

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "rank")


class DPLoRA(LatentDiffusion):
    """The family with the private stage on adapters of q, k, v and o of every self- and cross-attention.

    The published code clips the K noise draws of a record one by one, which lets a record move the sum by K bounds;
    here they are averaged first. Its adapters miss the output layers by a misspelt name, and its class embedder starts
    anew.
    The private stage writes adapters.pt next to its checkpoint and then merges the adapters: the checkpoint holds a
    network without any, from which every method of the family can continue.
    """

    @dataclass(frozen=True)
    class Config(LatentDiffusion.Config):
        model: ModelConfig
        train: TrainConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        if config.model.adapters is not None:
            self._merge_saved(config.model.adapters)
            self._start_stage("start")

    # Seams

    def _build_network(self, label_dim: int) -> nn.Module:
        if self.config.model.backbone is None:
            return super()._build_network(label_dim)
        from models.nn.pretrained import load_unet, require_schedule

        network = load_unet(self.config.model.backbone, self.latents.shape, label_dim)
        require_schedule(self.config.model.backbone, asdict(self.config.model.schedule))
        return network

    def _prepare_network(self, stage: str) -> None:
        if stage == "train":
            with self.runtime.seeded("adapters"):
                _add_adapters(self.network, self.config.train.rank)

    def _trained_parameters(self) -> set[str]:
        return {name for name, _ in self.network.named_parameters() if _is_trained(name)}

    # Stages

    def train(self, private: PrivateData) -> None:
        super().train(private)
        self.ema.copy_to(self.network)
        self.runtime.snapshot("train")  # first: the adapters must not outlive the booking of their steps
        if self.runtime.folder is not None and distributed.is_main():
            path = self.runtime.folder / "train" / "checkpoints" / "adapters.pt"
            write(path, {"state": self._learnt(), "ledger": private.ledger.state_dict()})
            log.info(f"adapters: {path}")
        merge_adapters(self.network)
        self._start_stage(MERGED)

    def _learnt(self) -> dict:
        """What the private stage has learnt, without the pretrained weights, of which it names the fingerprint."""
        return {
            "base": self._base(),
            "rank": self.config.train.rank,
            "adapters": adapter_state(self.network),
            "label_embedding": self.network.label_embedding.weight.detach().clone(),
        }

    def _base(self) -> str:
        return base_fingerprint(self.network, leave_out=["label_embedding.weight"])

    def _merge_saved(self, path: str) -> None:
        """Add what `_learnt` gave to the weights; what its learning spent is booked again."""
        content = read(path)
        state = content["state"]
        if "adapters" not in state:
            raise UserError(f"model.adapters: {path} holds no adapters of DP-LoRA")
        if state["label_embedding"].shape != self.network.label_embedding.weight.shape:
            raise UserError(f"model.adapters: {path} was trained with another number of labels")
        if state["base"] != self._base():
            raise UserError(
                f"model.adapters: {path} was trained on other weights (fingerprint {state['base']}) than those loaded "
                f"({self._base()}); give the model.ckpt, model.ckpt_weights or model.backbone of its run"
            )
        _add_adapters(self.network, state["rank"])
        load_adapter_state(self.network, state["adapters"])
        merge_adapters(self.network)
        self.network.label_embedding.weight.data.copy_(state["label_embedding"])
        self.inherited += spent_releases(content, "adapters")

    # --dry_run

    def parameter_counts(self) -> dict[str, int]:
        adapted = copy.deepcopy(self.network)
        if not adapters(adapted):
            _add_adapters(adapted, self.config.train.rank)
        trained = sum(p.numel() for name, p in adapted.named_parameters() if _is_trained(name))
        return {**super().parameter_counts(), "UNet, trained with DP-SGD": trained}


def _add_adapters(network: nn.Module, rank: int) -> None:
    def is_attention(name: str) -> bool:
        return name.endswith(tuple(f".{kind}" for kind in ATTENTION_LAYERS))

    add_adapters(network, is_attention, rank)


def _is_trained(name: str) -> bool:
    return name.endswith((".down.weight", ".up.weight")) or name.startswith("label_embedding.")

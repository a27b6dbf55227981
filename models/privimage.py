"""PrivImage: pretrain on the public classes that a noisy semantic query selects (Li et al., USENIX Security 2024)."""

from data.spec import DataSpec
from models.diffusion.synthesizer import DiffusionSynthesizer
from utils.runtime import Runtime
from utils.sections import check


class PrivImage(DiffusionSynthesizer):
    """The family with the semantic query: a classifier trained on the public set votes, for every private image, on
    the public classes; the noisy histogram picks disjoint classes per private class; their images, relabelled with
    the private class, pretrain the network. The query is one Gaussian release in addition to DP-SGD."""

    def __init__(self, config: DiffusionSynthesizer.Config, spec: DataSpec, runtime: Runtime) -> None:
        public = config.public_data
        starts_elsewhere = config.model.ckpt is not None or not config.pretrain.n_epochs
        check(
            public.name is not None or starts_elsewhere,
            "public_data.name",
            None,
            "a public set for PrivImage",
        )
        ratio = public.selective.ratio
        check(ratio < 1, "public_data.selective.ratio", ratio, "below 1 for PrivImage; 1 is PDP-Diffusion")
        super().__init__(config, spec, runtime)

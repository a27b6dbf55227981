"""The table of methods. A class outside this repository registers itself with METHODS.register in a --plugin module."""

from models.public.config import PublicDataConfig
from utils.config import MethodRegistry

METHODS = MethodRegistry(
    {
        "Noise": "models.noop:Noise",
        "IDPS": "models.idps:IDPS",
        "DP-Linear": "models.dp_linear:DPLinear",
        "DP-Distill": "models.dp_distill:DPDistill",
        "DP-MERF": "models.dp_merf:DPMERF",
        "DP-NTK": "models.dp_ntk:DPNTK",
        "DPGAN": "models.dpgan:DPGAN",
        "PE": "models.pe:PE",
        "PE-SD": "models.pe_sd:PESD",
        "GS-WGAN": "models.gs_wgan:GSWGAN",
        "DP-Kernel": "models.dp_kernel:DPKernel",
        "DPDM": "models.dpdm:DPDM",
        "PDP-Diffusion": "models.pdp_diffusion:PDPDiffusion",
        "PrivImage": "models.privimage:PrivImage",
        "DP-LDM-SD": "models.dp_ldm_sd:DPLDMSD",
        "DP-FETA": "models.dp_feta:DPFETA",
        "DP-FETA-Pro": "models.dp_feta_pro:DPFETAPro",
        "DP-LDM": "models.dp_ldm:DPLDM",
        "DP-LoRA": "models.dp_lora:DPLoRA",
    },
    extended={"public_data": PublicDataConfig},
    aliases={"DPTrainer": "IDPS"},  # the published program
)

TEACHERS = "DP-Linear"  # whose settings, presets included, the teacher of gen.teacher has
FASTEST = "DP-MERF"  # what a run that takes too long is advised to use

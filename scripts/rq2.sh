#!/usr/bin/env bash
# What budget and size of the network do: every method at six budgets on one dataset, and the methods with a size at
# several sizes on another. See grid.sh for SETTINGS, NAME, EXP_ROOT and --dry_run; the grids are
#
#   METHODS="DPDM DP-LDM" DATA="fmnist_28" EPSILONS="0.2 1 5 10 15 20" SIZE_DATA="cifar10_32" SIZE_EPSILON=10 scripts/rq2.sh
. "$(dirname "$0")/grid.sh"

METHODS=${METHODS:-$(registered)}
DATA=${DATA:-fmnist_28}
EPSILONS=${EPSILONS:-0.2 1 5 10 15 20}
SIZE_DATA=${SIZE_DATA:-cifar10_32}
SIZE_EPSILON=${SIZE_EPSILON:-10}

# Label and settings per size: millions of parameters of the denoising networks, widths of the generators. These have
# 3.8, 6.6, 10.1, 14.4 and 19.4 million at 32 pixels, as published; GS-WGAN has a generator of its own, whose widths are
# those at which it has as many.
sizes() { # method
    case "$1" in
        DPDM | PDP-Diffusion | PrivImage | DP-LDM-SD | DP-FETA | DP-FETA-Pro) cat <<'END' ;;
3.8M model.network.nf=32 model.network.ch_mult=[2,4] model.network.attn_resolutions=[16]
11.1M model.network.nf=64 model.network.ch_mult=[1,2,3] model.network.attn_resolutions=[16,8]
19.6M model.network.nf=64 model.network.ch_mult=[1,2,2,4] model.network.attn_resolutions=[16,8,4]
44.2M model.network.nf=96 model.network.ch_mult=[1,2,2,4] model.network.attn_resolutions=[16,8,4]
78.5M model.network.nf=128 model.network.ch_mult=[1,2,2,4] model.network.attn_resolutions=[16,8,4]
END
        DP-LDM | DP-LoRA) cat <<'END' ;;
3.9M model.network.nf=32 model.network.ch_mult=[1,2,2]
11.9M model.network.nf=64 model.network.ch_mult=[1,2,2]
23.6M model.network.nf=64 model.network.ch_mult=[1,2,2,4]
39.7M model.network.nf=96 model.network.ch_mult=[1,2,2,3]
77.4M model.network.nf=128 model.network.ch_mult=[1,1,2,4]
END
        DP-MERF | DP-NTK | DP-Kernel | DPGAN) cat <<'END' ;;
g60 model.Generator.g_conv_dim=60
g80 model.Generator.g_conv_dim=80
g100 model.Generator.g_conv_dim=100
g120 model.Generator.g_conv_dim=120
g140 model.Generator.g_conv_dim=140
END
        GS-WGAN) cat <<'END' ;;
g64 model.Generator.g_conv_dim=64
g84 model.Generator.g_conv_dim=84
g104 model.Generator.g_conv_dim=104
g125 model.Generator.g_conv_dim=125
g145 model.Generator.g_conv_dim=145
END
    esac
}

for data in $DATA; do
    for epsilon in $EPSILONS; do
        for method in $METHODS; do
            cell "$method" "$data" "$epsilon" "$NAME"
        done
    done
done
for data in $SIZE_DATA; do
    for method in $METHODS; do
        while read -r size settings; do
            # shellcheck disable=SC2086  # a list of arguments
            cell "$method" "$data" "$SIZE_EPSILON" "$NAME-$size" $settings </dev/null
        done < <(sizes "$method")
    done
done
finish

"""Architectures whose attention is no ordinary softmax attention, or that have none at all."""

from __future__ import annotations

_RECURRENT = "recurrent: no attention"
_MLA = "multi-head latent attention"
_CONVOLUTION = "convolutions: no attention"

# (kind, model type) would repeat itself: a type is the same in every kind.
OTHER_ATTENTION: dict[str, str] = {
    **dict.fromkeys(["falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"], _RECURRENT),
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "dots3_note",
            "dots3_note_text",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "hy_v4",
            "longcat_flash",
            "minicpm3",
            "youtu",
        ],
        _MLA,
    ),
    **dict.fromkeys(["bailing_hybrid", "kimi_linear"], "linear and multi-head latent attention"),
    "deepseek_v4": "one latent KV head with compressors",
    "diffllama": "differential attention",
    "reformer": "hashed attention in every other layer",
    "fnet": "Fourier transforms: no attention",
    "mra": "an approximation of attention",
    "nystromformer": "an approximation of attention",
    "yoso": "an approximation of attention",
    **dict.fromkeys(
        [
            "bit",
            "convnext",
            "convnextv2",
            "efficientnet",
            "focalnet",
            "hgnet_v2",
            "mobilenet_v1",
            "mobilenet_v2",
            "poolformer",
            "pp_lcnet",
            "regnet",
            "resnet",
            "textnet",
        ],
        _CONVOLUTION,
    ),
    "swiftformer": "additive attention",
    "mobilevitv2": "linear attention",
}

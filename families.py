"""Translates a published Hugging Face `config.json` into `ModelArgs`.

`FAMILIES` holds what a `model_type` implies and the file does not say. Errors name the file's own
keys. A folder without a `config.json`, as gpt-fast writes it, is matched by name to a published
configuration in `presets.json`, which benchmarks also use.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from cli import UserError
from files import read_json
from keys import Keys
from kinds import (
    EXPERTS,
    FFN,
    MAX_LAYERS,
    QKV,
    Family,
    all_but_every,
    context_length,
    glm_mixture,
    layer_kinds,
    mixture_of,
    original_length,
    qwen_mixture,
    qwen_window,
    shared_qwen_mixture,
    without_rope,
)
from model import Mixture, ModelArgs

PRESETS = Path(__file__).with_name("presets.json")
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# ------------------------------------------------------------------------------------------------
# The families


def post_norms(attention: str, ffn: str) -> dict[str, str]:
    return {"attention_post_norm": f"{attention}_layernorm", "ffn_post_norm": f"{ffn}_layernorm"}


def granite(config: Keys) -> dict:
    embed, residual = (config.number(f"{of}_multiplier", 1.0) for of in ("embedding", "residual"))
    logits = 1 / config.number("logits_scaling", 1.0)
    return {"embed_scale": embed, "residual_scale": residual, "logit_scale": logits}


def granite_scale(config: Keys) -> dict:
    return {"scale": config.number("attention_multiplier", 1.0)}


def gemma(config: Keys) -> dict:
    cap = "final_logit_softcapping"
    caps = {"logit_cap": config.number(cap)} if config.has(cap) else {}
    return caps | {"embed_scale": math.sqrt(config.count("hidden_size"))}


def ministral(config: Keys) -> dict:
    rope = config.section("rope_parameters", "rope_scaling")
    return {"query_scale": (rope.number("llama_4_scaling_beta"), original_length(config, rope))}


ALWAYS = {"windowed": lambda config, layer: True}
NO_WINDOW = {"use_sliding_window": False}
QKV_BIAS = {"qkv_bias": True}
EPS = {"rms_norm_eps": 1e-5}
TIED = {"tie_word_embeddings": True}
POST = {"norms": "post", "names": post_norms("post_attention", "post_feedforward")}
# Some Gemma files omit nearly every key.
GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
GEMMA |= {"max_position_embeddings": 131072, "hidden_activation": "gelu_pytorch_tanh"} | TIED
GEMMA |= {"sliding_window": 4096, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
GLM = {"rms_norm_eps": 1.5625e-7, "head_dim": 128, "partial_rotary_factor": 0.5}

MIXTRAL = {f"expert_{name}": f"block_sparse_moe.experts.{{}}.{name}" for name in FFN}
MIXTRAL |= {"router": "block_sparse_moe.gate"}

FAMILIES = {
    "llama": Family(),
    "mistral": Family(**ALWAYS),
    "ministral3": Family(EPS, kind=ministral, **ALWAYS),
    "qwen2": Family(NO_WINDOW | QKV_BIAS, biases={"qkv_bias": QKV}, windowed=qwen_window),
    "qwen3": Family(NO_WINDOW, qk_norm="head", windowed=qwen_window),
    "smollm3": Family(
        {"rope_theta": 2e6} | TIED | NO_WINDOW, windowed=without_rope, unrotated=without_rope
    ),
    "granite": Family(model=granite, kind=granite_scale),
    "phi3": Family(EPS, partial_rotary=True, names={"wqkv": "self_attn.qkv_proj"}, **ALWAYS),
    "seed_oss": Family(
        {"head_dim": 128, "attention_bias": True},
        biases={"attention_bias": QKV, "attention_out_bias": ("wo",), "mlp_bias": FFN},
    ),
    "ernie4_5": Family(
        {"head_dim": 128, "rope_theta": 5e5} | EPS | TIED,
        biases={"use_bias": (*QKV, "wo", *FFN)},
        interleaved=True,
    ),
    "olmo2": Family(EPS, qk_norm="flat", **POST),
    "olmo3": Family(
        {"rope_theta": 5e5, "sliding_window": 4096} | EPS,
        **{"qk_norm": "flat", "windowed": all_but_every(4), "local_rope": True} | POST,
    ),
    "gemma3_text": Family(
        GEMMA,
        norms="both",
        qk_norm="head",
        windowed=all_but_every(6),
        local_rope=True,
        model=gemma,
        kind=lambda config: {"scale": config.number("query_pre_attn_scalar", 256) ** -0.5},
        names=POST["names"] | {"ffn_norm": "pre_feedforward_layernorm"},
        norm_offset=1.0,
    ),
    "glm4": Family(
        GLM | {"attention_bias": True},
        norms="both",
        biases={"attention_bias": QKV},
        partial_rotary=True,
        names=post_norms("post_self_attn", "post_mlp"),
        interleaved=True,
    ),
    "exaone4": Family(
        {"sliding_window": 4096} | EPS,
        qk_norm="head",
        windowed=all_but_every(4),
        unrotated=lambda config, _, windowed: config.has("sliding_window") and not windowed,
        **POST,
    ),
    "mixtral": Family(
        {"rope_theta": 1e6} | EPS,
        mixture=lambda config: mixture_of(config, "intermediate_size", renormalize=True),
        names=MIXTRAL,
        **ALWAYS,
    ),
    "qwen3_moe": Family(NO_WINDOW, qk_norm="head", mixture=qwen_mixture, **ALWAYS),
    "qwen2_moe": Family(
        NO_WINDOW | QKV_BIAS,
        biases={"qkv_bias": QKV},
        windowed=lambda config, layer: layer % 2 == 0 and not qwen_window(config, layer),
        mixture=shared_qwen_mixture,
    ),
    "granitemoe": Family(
        model=granite,
        kind=granite_scale,
        mixture=lambda config: mixture_of(config, "intermediate_size", renormalize=True),
        names={"router": "block_sparse_moe.router.layer"},
    ),
    "glm4_moe": Family(
        {"partial_rotary_factor": 0.5} | EPS,
        biases={"attention_bias": QKV},
        partial_rotary=True,
        model=lambda config: {"qk_norm": "head" if config.flag("use_qk_norm") else ""},
        mixture=glm_mixture,
    ),
    "olmoe": Family(
        EPS,
        qk_norm="flat",
        mixture=lambda config: mixture_of(
            config, "intermediate_size", renormalize=config.flag("norm_topk_prob")
        ),
    ),
}
# Checkpoints with a vision tower, and the text model inside, for files that do not name it.
WRAPPERS = {"mistral3": "mistral", "gemma3": "gemma3_text"}
# Unsupported features, and the keys that ask for them.
UNKNOWN = {
    "a mixture of experts": EXPERTS,
    "a clip of q, k and v": ("clip_qkv",),
    "a cap on attention scores": ("attn_logit_softcapping",),
    "attention to later tokens": ("use_bidirectional_attention",),
    "latent attention": ("kv_lora_rank",),
    "linear attention": ("linear_num_value_heads",),
    "layers that share their keys and values": ("num_kv_shared_layers",),
    "embeddings in every layer": ("hidden_size_per_layer_input",),
}


def find_family(config: dict) -> tuple[Keys, Family]:
    """The keys of the text model in a published `config.json`, and its family."""
    keys = Keys(config)
    if keys.get("model_type") in (*WRAPPERS,):
        text = keys.section("text_config")
        outer = {key: config[key] for key in TIED if keys.has(key)}
        kind = {"model_type": WRAPPERS[config["model_type"]]}
        keys = Keys(kind | text.values | outer, section="text_config")
    kind = keys.get("model_type")
    for part in (keys, keys.section("text_config")):  # also of an unknown wrapper
        for what, asking in UNKNOWN.items():
            known = asking is EXPERTS and getattr(FAMILIES.get(str(kind)), "mixture", None)
            for key in () if known else filter(part.values.get, asking):
                why = f"of a {kind!r:.60} model with {what}, which is not supported"
                raise part.refusal(key, why, "use another model")
    family = FAMILIES[keys.choice("model_type", (*FAMILIES,), None)]
    return Keys(family.defaults | keys.values, section=keys.path.rstrip(".")), family


# ------------------------------------------------------------------------------------------------
# From config.json to ModelArgs


def from_config(config: dict) -> ModelArgs:
    """Read a published `config.json`; `UserError` if a key is wrong or not supported."""
    keys, family = find_family(config)
    act = "hidden_activation" if keys.has("hidden_activation") else "hidden_act"
    context = context_length(keys, family.local_rope)
    return ModelArgs(
        dim=keys.count("hidden_size"),
        n_layer=keys.count("num_hidden_layers", MAX_LAYERS),
        vocab_size=keys.count("vocab_size"),
        block_size=context,
        intermediate_size=keys.count("intermediate_size"),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        norms=family.norms,
        act=ACTIVATIONS[keys.choice(act, (*ACTIVATIONS,), "silu")],
        tied=keys.flag("tie_word_embeddings"),
        biases=sum((of for flag, of in family.biases.items() if keys.flag(flag)), ()),
        mixture=family.mixture and Mixture(**family.mixture(keys)),
        **layer_kinds(keys, family, context),
        **{"qk_norm": family.qk_norm} | family.model(keys),
    )


def read_config(folder: Path) -> ModelArgs:
    """Read `folder`/config.json or, without one, the preset its name contains."""
    if os.path.lexists(folder / "config.json"):
        return from_config(read_json(folder / "config.json"))
    name, presets = folder.resolve().name.lower(), read_json(PRESETS)
    fitting = [preset for preset in presets if preset in name]
    if not fitting:
        raise UserError(
            f"{folder} has no config.json and its name fits no preset; "
            f"add the config.json, or name the folder after one of: {', '.join(presets)}"
        )
    return preset(max(fitting, key=len))


def preset_names() -> list[str]:
    return [*read_json(PRESETS)]


def preset(name: str) -> ModelArgs:
    """The shape of a well-known model."""
    return from_config(read_json(PRESETS)[name])

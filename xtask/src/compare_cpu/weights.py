"""Random weights under the official names, and files of them."""

import json

import numpy as np

DEPTH, PATCH, SIDE, CLASSES, R = 12, 16, 224, 1000, 13


def deit(width):
    rng = np.random.default_rng(width)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    w = {
        "cls_token": normal(1, 1, width),
        "pos_embed": 0.5 * normal(1, (SIDE // PATCH) ** 2 + 1, width),
        "patch_embed.proj.weight": normal(width, 3, PATCH, PATCH) / 16,
        "patch_embed.proj.bias": 0.1 * normal(width),
        "norm.weight": 1 + 0.1 * normal(width),
        "norm.bias": 0.1 * normal(width),
        "head.weight": normal(CLASSES, width) / width**0.5,
        "head.bias": 0.1 * normal(CLASSES),
    }
    for i in range(DEPTH):
        for name, outputs, inputs in [
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ]:
            w[f"blocks.{i}.{name}.weight"] = normal(outputs, inputs) / inputs**0.5
            w[f"blocks.{i}.{name}.bias"] = 0.1 * normal(outputs)
        for name in ["norm1", "norm2"]:
            w[f"blocks.{i}.{name}.weight"] = 1 + 0.1 * normal(width)
            w[f"blocks.{i}.{name}.bias"] = 0.1 * normal(width)
    return w


def lv_vit(width, depth, ratio=3, stem=64):
    """LV-ViT: a stem of convolutions, no biases of queries, keys and values, a second head for patches."""
    rng = np.random.default_rng(width)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    w = {
        "cls_token": normal(1, 1, width),
        "pos_embed": 0.5 * normal(1, 197, width),
        "patch_embed.proj.weight": normal(width, stem, 8, 8) / (64 * stem) ** 0.5,
        "patch_embed.proj.bias": 0.1 * normal(width),
    }
    for i, (inputs, side) in enumerate([(3, 7), (stem, 3), (stem, 3)], 1):
        w[f"patch_embed.conv{i}.weight"] = normal(stem, inputs, side, side) / (side * side * inputs) ** 0.5
        w |= batch_norm(rng, f"patch_embed.bn{i}", stem)
    for i in range(depth):
        for name, outputs, inputs in [
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", ratio * width, width),
            ("mlp.fc2", width, ratio * width),
        ]:
            w[f"blocks.{i}.{name}.weight"] = normal(outputs, inputs) / inputs**0.5
            if name != "attn.qkv":
                w[f"blocks.{i}.{name}.bias"] = 0.1 * normal(outputs)
        for name in ["norm1", "norm2"]:
            w[f"blocks.{i}.{name}.weight"] = 1 + 0.1 * normal(width)
            w[f"blocks.{i}.{name}.bias"] = 0.1 * normal(width)
    w["norm.weight"], w["norm.bias"] = 1 + 0.1 * normal(width), 0.1 * normal(width)
    for head in ["head", "aux_head"]:
        w[f"{head}.weight"], w[f"{head}.bias"] = normal(CLASSES, width) / width**0.5, 0.1 * normal(CLASSES)
    return w


def batch_norm(rng, name, width):
    normal = lambda: 0.1 * rng.standard_normal(width, np.float32)
    return {
        f"{name}.weight": 1 + normal(),
        f"{name}.bias": normal(),
        f"{name}.running_mean": normal(),
        f"{name}.running_var": 1 + np.abs(normal()),
    }


# AFFNet-ET: stage widths, blocks, and how much wider the bottlenecks are inside.
AFF_STAGES = {3: (64, 2), 4: (104, 4), 5: (144, 3)}
AFF_EXPAND = 2


def aff_layers():
    """The inverted residuals of AFFNet-ET: name, inputs, outputs, stride."""
    yield "layer_1.0", 16, 32, 1
    yield "layer_2.0", 32, 48, 2
    yield "layer_2.1", 48, 48, 1
    yield "layer_2.2", 48, 48, 1
    before = 48
    for stage, (width, blocks) in AFF_STAGES.items():
        yield f"layer_{stage}.0", before, width, 2
        for i in range(blocks):
            yield f"layer_{stage}.1.global_rep.{i}.mlp", width, width, 1
        before = width


def affnet():
    """AFFNet-ET."""
    rng = np.random.default_rng(7)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    w = {}

    def conv(name, outputs, inputs, side):
        w[f"{name}.block.conv.weight"] = normal(outputs, inputs, side, side) / (side * side * inputs) ** 0.5
        w.update(batch_norm(rng, f"{name}.block.norm", outputs))

    def norm(name, width):
        w[f"{name}.weight"], w[f"{name}.bias"] = 1 + 0.1 * normal(width), 0.1 * normal(width)

    conv("conv_1", 16, 3, 3)
    for name, inputs, outputs, _ in aff_layers():
        hidden = AFF_EXPAND * inputs
        conv(f"{name}.block.exp_1x1", hidden, inputs, 1)
        conv(f"{name}.block.conv_3x3", hidden, 1, 3)
        conv(f"{name}.block.red_1x1", outputs, hidden, 1)
    for stage, (width, blocks) in AFF_STAGES.items():
        body, s = f"layer_{stage}.1", width // 8
        for i in range(blocks):
            block = f"{body}.global_rep.{i}"
            norm(f"{block}.norm1", width)
            norm(f"{block}.norm2", width)
            for k in (1, 2):
                w[f"{block}.filter.w{k}"] = normal(2, 8, s, s) / s**0.5
                w[f"{block}.filter.b{k}"] = 0.1 * normal(2, 8, s)
        norm(f"{body}.global_rep.{blocks}", width)
        conv(f"{body}.conv_proj", width, width, 1)
        conv(f"{body}.fusion", width, 2 * width, 1)
    conv("conv_1x1_exp", 576, 144, 1)
    w["classifier.fc.weight"], w["classifier.fc.bias"] = normal(CLASSES, 576) / 24, 0.1 * normal(CLASSES)
    return w


def write_safetensors(path, w):
    header, at = {}, 0
    for name, value in w.items():
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in w.values():
            file.write(value.tobytes())

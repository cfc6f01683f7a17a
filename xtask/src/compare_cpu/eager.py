"""Forward passes in PyTorch's eager mode, as timm and the official code run them: attention fused, batch norms where they are."""

import torch
import torch.nn.functional as F

from weights import AFF_STAGES, PATCH, aff_layers


def runner(forward, w, threads):
    """`forward(weights, images)` on arrays of NumPy."""
    torch.set_num_threads(threads)
    w = {name: torch.from_numpy(value) for name, value in w.items()}

    @torch.inference_mode()
    def run(images):
        torch.set_num_threads(threads)
        return forward(w, torch.from_numpy(images)).numpy()

    return run


def blocks(w, x, depth, heads, eps, skip=1.0):
    b, n, width = x.shape
    for i in range(depth):
        p = lambda name: (w[f"blocks.{i}.{name}.weight"], w.get(f"blocks.{i}.{name}.bias"))
        y = F.linear(F.layer_norm(x, (width,), *p("norm1"), eps), *p("attn.qkv"))
        q, k, v = y.reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
        y = F.linear(y, *p("attn.proj"))
        x = x + (y if skip == 1.0 else y / skip)
        y = F.gelu(F.linear(F.layer_norm(x, (width,), *p("norm2"), eps), *p("mlp.fc1")))
        y = F.linear(y, *p("mlp.fc2"))
        x = x + (y if skip == 1.0 else y / skip)
    return F.layer_norm(x, (width,), w["norm.weight"], w["norm.bias"], eps)


def tokens(w, x):
    x = x.flatten(2).transpose(1, 2)
    return torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]


def deit(depth, heads):
    def forward(w, images):
        x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
        x = blocks(w, tokens(w, x), depth, heads, 1e-6)
        return F.linear(x[:, 0], w["head.weight"], w["head.bias"])

    return forward


def batch_norm(w, name, x):
    mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"], False, 0.0, 1e-5)


def lv_vit(depth, heads, skip):
    def forward(w, x):
        for i, (stride, pad) in enumerate([(2, 3), (1, 1), (1, 1)], 1):
            x = F.conv2d(x, w[f"patch_embed.conv{i}.weight"], stride=stride, padding=pad)
            x = F.relu(batch_norm(w, f"patch_embed.bn{i}", x))
        x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
        x = blocks(w, tokens(w, x), depth, heads, 1e-5, skip)
        aux = F.linear(x[:, 1:], w["aux_head.weight"], w["aux_head.bias"])
        return F.linear(x[:, 0], w["head.weight"], w["head.bias"]) + 0.5 * aux.max(1)[0]

    return forward


def affnet(w, x):
    """AFFNet-ET with SiLU and norms over whole images."""

    def conv(name, x, stride=1, groups=1, act=True):
        weight = w[f"{name}.block.conv.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        x = batch_norm(w, f"{name}.block.norm", x)
        return F.silu(x) if act else x

    def bottleneck(name, x, stride):
        y = conv(f"{name}.block.exp_1x1", x)
        y = conv(f"{name}.block.conv_3x3", y, stride, y.shape[1])
        y = conv(f"{name}.block.red_1x1", y, act=False)
        return x + y if stride == 1 and x.shape[1] == y.shape[1] else y

    norm = lambda name, x: F.group_norm(x, 1, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)
    strides = {name: stride for name, _, _, stride in aff_layers()}
    x = conv("conv_1", x, 2)
    for name in ["layer_1.0", "layer_2.0", "layer_2.1", "layer_2.2"]:
        x = bottleneck(name, x, strides[name])
    for stage, (_, count) in AFF_STAGES.items():
        x = bottleneck(f"layer_{stage}.0", x, 2)
        body = f"layer_{stage}.1"
        y = x
        for i in range(count):
            block = f"{body}.global_rep.{i}"
            z = bottleneck(f"{block}.mlp", norm(f"{block}.norm1", y), 1)
            y = y + mixer(w, f"{block}.filter", norm(f"{block}.norm2", z))
        y = conv(f"{body}.conv_proj", norm(f"{body}.global_rep.{count}", y), act=False)
        x = conv(f"{body}.fusion", torch.cat([x, y], 1))
    x = conv("conv_1x1_exp", x).mean((2, 3))
    return F.linear(x, w["classifier.fc.weight"], w["classifier.fc.bias"])


def mixer(w, name, x):
    """The adaptive frequency filter: a grouped complex network makes the mask of the spectrum."""
    b, c, height, width = x.shape
    groups = lambda t: t.reshape(b, 8, c // 8, height, -1)
    spectrum = torch.fft.rfft2(x, norm="ortho")
    re, im = groups(spectrum.real), groups(spectrum.imag)

    def layer(k, re, im):
        weight, bias = w[f"{name}.w{k}"], w[f"{name}.b{k}"][:, None, :, :, None, None]
        product = lambda t, part: torch.einsum("bgihw,gio->bgohw", t, weight[part])
        return product(re, 0) - product(im, 1) + bias[0], product(im, 0) + product(re, 1) + bias[1]

    re, im = layer(1, re, im)
    re, im = layer(2, F.silu(re), F.silu(im))
    mask = torch.complex(F.softshrink(re, 0.01), F.softshrink(im, 0.01)).reshape(spectrum.shape)
    return torch.fft.irfft2(mask * spectrum, s=(height, width), norm="ortho") + x

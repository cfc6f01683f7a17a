#!/usr/bin/env python3
"""Small vision transformers of every shape timm's VisionTransformer can take, with its outputs: the files beside this one.

Usage: make.py FOLDER. Needs torch, timm and safetensors; random weights at 1/sqrt(fan-in), f16 values computed in f32."""
import functools, json, sys
import torch, torch.nn as nn
import timm
from safetensors.torch import save_file
from timm.layers import QuickGELU, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer

eps6 = functools.partial(nn.LayerNorm, eps=1e-6)
CASES = {
    'attention_pool': dict(class_token=False, global_pool='map', act_layer=functools.partial(nn.GELU, approximate='tanh')),
    'registers_swiglu': dict(reg_tokens=4, no_embed_class=True, init_values=1e-5, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=2 * 4 / 3),
    'clip_quickgelu': dict(pre_norm=True, act_layer=QuickGELU, norm_layer=nn.LayerNorm),
    'qk_norm_mean': dict(qk_norm=True, global_pool='avg', scale_attn_norm=True, scale_mlp_norm=True),
    'no_class_token': dict(class_token=False, global_pool='avg', fc_norm=False, qkv_bias=False),
}
SET = {
    'attention_pool': ['activation=gelu_tanh'],
    'clip_quickgelu': ['activation=quick_gelu'],
    'qk_norm_mean': [],
    'no_class_token': [],
    'registers_swiglu': [],
}
for name, extra in CASES.items():
    torch.manual_seed(len(name))
    model = VisionTransformer(**{**dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7, norm_layer=eps6), **extra}).eval()
    for key, p in model.named_parameters():
        scale = p[0].numel() ** -.5 if p.dim() > 1 and 'token' not in key and 'pos' not in key else 0.3
        p.data = (torch.randn_like(p) * scale + (1.0 if 'norm' in key and key.endswith('weight') else 0.0)).half().float()
    x = torch.randn(2, 3, 32, 32).half().float()
    with torch.inference_mode():
        logits = model(x)
        features = model.forward_head(model.forward_features(x), pre_logits=True).contiguous()
    tensors = {'w/' + k: v.half().contiguous() for k, v in model.state_dict().items()}
    tensors.update({'x': x.half(), 'logits': logits, 'features': features})
    save_file(tensors, f'{sys.argv[1]}/{name}.safetensors', metadata={'set': json.dumps(['heads=3'] + SET[name]), 'source': f'timm {timm.__version__}'})
    print(name, sorted(k for k in tensors if '.1.' not in k and '.0.' not in k), logits.abs().max().item())

#!/usr/bin/env python3
"""A small convolutional network on the same data: the teacher whose soft answers `train_vit.py --teacher` learns from."""
import argparse, time
import torch, torch.nn as nn, torch.nn.functional as F
from safetensors.torch import load_file, save_file


class Teacher(nn.Module):
    """Six 3x3 convolutions in three resolutions (28, 14, 7) with batch norm; input (B, 1, 28, 28) in [0, 1]."""
    def __init__(self, channels=(32, 64, 128, 128, 192, 192), classes=10):
        super().__init__()
        layers, prev = [], 1
        for i, c in enumerate(channels):
            layers += [nn.Conv2d(prev, c, 3, stride=2 if i in (0, 2, 4) else 1, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
            prev = c
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(prev, classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def augment(x, shift=2):
    """Random flip and shift of whole pixels, one shift for the batch."""
    flip = torch.rand(len(x), 1, 1, 1) < .5
    x = torch.where(flip, x.flip(3), x)
    dy, dx = torch.randint(0, 2 * shift + 1, (2,)).tolist()
    return F.pad(x, (shift,) * 4)[:, :, dy:dy + x.shape[2], dx:dx + x.shape[3]]


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--data', required=True); p.add_argument('--out', required=True)
    p.add_argument('--epochs', type=float, default=8); p.add_argument('--batch', type=int, default=256)
    p.add_argument('--lr', type=float, default=3e-3); p.add_argument('--threads', type=int, default=2)
    a = p.parse_args()
    torch.manual_seed(0); torch.set_num_threads(a.threads)
    d = load_file(a.data)
    x, y = d['train_images'].unsqueeze(1), d['train_labels'].long()
    xt, yt = d['test_images'].unsqueeze(1), d['test_labels'].long()
    net = Teacher().to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(net.parameters(), lr=a.lr, weight_decay=.05)
    steps = int(a.epochs * len(x) / a.batch); perm, pos, t0 = torch.randperm(len(x)), 0, time.time()
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, a.lr, total_steps=steps + 1, pct_start=.2)
    for step in range(steps):
        if pos + a.batch > len(x): perm, pos = torch.randperm(len(x)), 0
        ix = perm[pos:pos + a.batch]; pos += a.batch
        net.train(); loss = F.cross_entropy(net(augment(x[ix].float() / 255).contiguous(memory_format=torch.channels_last)), y[ix], label_smoothing=.05)
        opt.zero_grad(); loss.backward(); opt.step(); sched.step()
        if step % 100 == 99: print(f'step {step + 1}/{steps} loss {loss.item():.3f} {time.time() - t0:.0f} s', flush=True)
    net.eval()
    with torch.inference_mode():
        ok = sum((net(xt[i:i + 500].float() / 255).argmax(1) == yt[i:i + 500]).sum().item() for i in range(0, len(xt), 500))
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, a.out, metadata={'test_top1': f'{ok / len(xt):.4f}'})
    print(f'top-1 {ok / len(xt):.4f}')


if __name__ == '__main__': main()

#!/usr/bin/env python3
"""DeiT-style training of a small plain ViT (class token, learned positions) on u8 images, CPU bf16 or CUDA.

Data: one safetensors file with train_images/test_images (N,H,W) or (N,H,W,C) u8 and train_labels/test_labels u8.
Schedule is driven by wall clock (--minutes) or by --epochs, so a busy machine shortens the run instead of
leaving the learning rate high. Checkpoints: OUT/last.pt (resume), OUT/model.safetensors (EMA weights, f32, timm names),
OUT/model_f16.safetensors, OUT/log.jsonl. `--bench N` times N steps and exits.
"""
import argparse, json, math, os, time, copy, signal
os.environ.setdefault('TIMM_FUSED_ATTN', '0')   # on CPU the backward of the fused attention is several times slower than plain matmuls
import torch, torch.nn as nn, torch.nn.functional as F
from safetensors.torch import load_file, save_file
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

P = argparse.ArgumentParser()
P.add_argument('--data', required=True, help='file made by prepare_fashion_mnist.py')
P.add_argument('--out', required=True)
P.add_argument('--img', type=int, default=28); P.add_argument('--patch', type=int, default=4)
P.add_argument('--dim', type=int, default=128); P.add_argument('--depth', type=int, default=12)
P.add_argument('--heads', type=int, default=2); P.add_argument('--mlp', type=float, default=4.0)
P.add_argument('--drop-path', type=float, default=0.05)
P.add_argument('--batch', type=int, default=256); P.add_argument('--lr', type=float, default=1e-3)
P.add_argument('--wd', type=float, default=0.05); P.add_argument('--warmup', type=float, default=0.05)
P.add_argument('--smooth', type=float, default=0.1); P.add_argument('--mix', type=float, default=0.5, help='share of batches with mixup/cutmix')
P.add_argument('--erase', type=float, default=0.25); P.add_argument('--clean-tail', type=float, default=0.15, help='last share of the run without mixing/erasing')
P.add_argument('--ema', type=float, default=0.999)
P.add_argument('--minutes', type=float, default=0); P.add_argument('--epochs', type=float, default=0)
P.add_argument('--threads', type=int, default=1); P.add_argument('--ckpt-min', type=float, default=4)
P.add_argument('--init', default='', help='safetensors to start from (patch kernel and positions are resized)')
P.add_argument('--no-pure', dest='pure', action='store_false')
P.add_argument('--f32', action='store_true', help='plain float32 throughout: faster than bf16 on processors without bf16 matrix instructions')
P.add_argument('--patch-drop', type=float, default=0.0, help='share of patch tokens left out at random in training (halving them doubles the images per second)')
P.add_argument('--geo', type=float, default=1.0, help='strength of the shift, scale and turn; 1 is strong for 28x28 images')
P.add_argument('--teacher', default='', help='file of train_teacher.py: learn from its soft answers on the same augmented images')
P.add_argument('--soft', type=float, default=0.7, help='weight of the teacher in the loss'); P.add_argument('--temperature', type=float, default=2.0)
P.add_argument('--muon', action='store_true', help='Muon for the matrices of the blocks, AdamW for the rest')
P.add_argument('--compile', action='store_true'); P.add_argument('--bench', type=int, default=0)
P.add_argument('--seed', type=int, default=0); P.add_argument('--eval-n', type=int, default=2000, help='test images at the periodic checks'); P.add_argument('--final-n', type=int, default=10**9, help='test images at the end: all, unless another run follows')
a = P.parse_args()
if a.f32: a.pure = False
torch.set_num_threads(a.threads); torch.manual_seed(a.seed)
dev = 'cuda' if torch.cuda.is_available() else 'cpu'
os.makedirs(a.out, exist_ok=True)

D = load_file(a.data)
def prep(x):
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2)
    if x.shape[-1] != a.img: x = torch.cat([F.interpolate(c.float(), size=(a.img, a.img), mode='bilinear', antialias=True).round().clamp(0, 255).byte() for c in x.split(4096)])
    return x.contiguous().to(dev)
Xtr, Ytr = prep(D['train_images']), D['train_labels'].long().to(dev)
Xte, Yte = prep(D['test_images']), D['test_labels'].long().to(dev)
C = Xtr.shape[1]; NC = int(Ytr.max()) + 1; N = len(Xtr)
s = Xtr[::max(1, N // 6000)].float() / 255
MEAN = s.mean((0, 2, 3)).view(1, C, 1, 1); STD = s.std((0, 2, 3)).view(1, C, 1, 1)
with safe_open(a.data, 'pt') as f: META = f.metadata() or {}

def make(): return VisionTransformer(img_size=a.img, patch_size=a.patch, in_chans=C, num_classes=NC, embed_dim=a.dim, depth=a.depth,
                                     num_heads=a.heads, mlp_ratio=a.mlp, qkv_bias=True, class_token=True, drop_path_rate=a.drop_path, patch_drop_rate=a.patch_drop)
model = make().to(dev)
if a.init:
    sd = {k: v.float() for k, v in load_file(a.init).items()}
    w = sd['patch_embed.proj.weight']
    if w.shape[-1] != a.patch:                       # scale keeps the response to a flat patch
        k = w.shape[-1]; sd['patch_embed.proj.weight'] = F.interpolate(w, size=(a.patch, a.patch), mode='bilinear', antialias=True, align_corners=False) * (k / a.patch) ** 2
    pe = sd['pos_embed']; g = int((pe.shape[1] - 1) ** .5); G = a.img // a.patch
    if g != G:
        q = F.interpolate(pe[:, 1:].reshape(1, g, g, -1).permute(0, 3, 1, 2), size=(G, G), mode='bicubic', align_corners=False)
        sd['pos_embed'] = torch.cat([pe[:, :1], q.permute(0, 2, 3, 1).reshape(1, G * G, -1)], 1)
    model.load_state_dict(sd)
# forward/backward in a bf16 copy, optimiser on f32 masters (no autocast casts); --no-pure keeps f32 weights under autocast
work = copy.deepcopy(model).bfloat16() if a.pure else model
ema = copy.deepcopy(model).eval(); [p.requires_grad_(False) for p in ema.parameters()]
nparam = sum(p.numel() for p in model.parameters())
decay = [p for n, p in model.named_parameters() if p.dim() > 1 and n not in ('pos_embed', 'cls_token')]
ids = {id(p) for p in decay}
class Both:
    """Two optimisers behind one: orthogonalised momentum for the blocks' matrices, AdamW for everything else."""
    def __init__(self, matrices, rest, plain):
        self.parts = [torch.optim.Muon(matrices, lr=a.lr, weight_decay=a.wd, momentum=0.95, adjust_lr_fn='match_rms_adamw')] if matrices else []
        self.parts.append(torch.optim.AdamW([{'params': rest, 'weight_decay': a.wd}, {'params': plain, 'weight_decay': 0.}], lr=a.lr, betas=(0.9, 0.999), foreach=True))
        self.param_groups = [g for p in self.parts for g in p.param_groups]
    def step(self): [p.step() for p in self.parts]
    def state_dict(self): return [p.state_dict() for p in self.parts]
    def load_state_dict(self, states): [p.load_state_dict(s) for p, s in zip(self.parts, states)]
blocks = {id(p) for n, p in model.named_parameters() if p.dim() == 2 and n.startswith('blocks.')} if a.muon else set()
opt = Both([p for p in decay if id(p) in blocks], [p for p in decay if id(p) not in blocks], [p for p in model.parameters() if id(p) not in ids])
teacher = None
if a.teacher:
    from train_teacher import Teacher
    teacher = Teacher(classes=NC).eval().to(dev); teacher.load_state_dict(load_file(a.teacher)); teacher.to(memory_format=torch.channels_last)
net = torch.compile(work) if a.compile else work
amp = lambda: torch.autocast(dev, dtype=torch.bfloat16, enabled=not a.f32)

def augment(x, y, strong):
    """x u8 -> normalised float; random affine (shift, scale, small turn, flip), then mixing/erasing; soft targets"""
    B = len(x); x = (x.float() / 255)
    ang = (torch.rand(B, device=dev) - .5) * 0.25 * a.geo; sc = 1 + (torch.rand(B, device=dev) - .5) * 0.3 * a.geo
    fl = (torch.rand(B, device=dev) < .5).float() * 2 - 1; ar = 1 + (torch.rand(B, device=dev) - .5) * 0.2 * a.geo
    th = torch.zeros(B, 2, 3, device=dev)
    th[:, 0, 0] = ang.cos() * sc * ar * fl; th[:, 0, 1] = -ang.sin() * sc; th[:, 1, 0] = ang.sin() * sc * fl; th[:, 1, 1] = ang.cos() * sc / ar
    th[:, :, 2] = (torch.rand(B, 2, device=dev) - .5) * 0.3 * a.geo
    x = F.grid_sample(x, F.affine_grid(th, x.shape, align_corners=False), mode='bilinear', padding_mode='zeros', align_corners=False)
    x = (x - MEAN) / STD
    t = F.one_hot(y, NC).float() * (1 - a.smooth) + a.smooth / NC
    if strong and torch.rand(()) < a.mix:
        p = torch.randperm(B, device=dev)
        if torch.rand(()) < .5:
            lam = float(torch.distributions.Beta(.8, .8).sample()); x = lam * x + (1 - lam) * x[p]
        else:
            lam = float(torch.rand(())); w = int(a.img * math.sqrt(1 - lam)); cx, cy = [int(torch.randint(a.img - w + 1, ())) for _ in range(2)]
            x[:, :, cy:cy + w, cx:cx + w] = x[p, :, cy:cy + w, cx:cx + w]; lam = 1 - w * w / a.img ** 2
        t = lam * t + (1 - lam) * t[p]
    elif strong and a.erase:
        for i in (torch.rand(B) < a.erase).nonzero().flatten().tolist():
            h, w = [int(torch.randint(a.img // 8, a.img // 2 + 1, ())) for _ in range(2)]; u, v = int(torch.randint(a.img - h + 1, ())), int(torch.randint(a.img - w + 1, ()))
            x[i, :, u:u + h, v:v + w] = torch.randn(C, h, w, device=dev)
    return x, t

@torch.inference_mode()
def evaluate(m, n):
    m.eval(); ok = 0
    for i in range(0, n, 500):
        with amp(): ok += (m(((Xte[i:i + 500].float() / 255) - MEAN) / STD).argmax(1) == Yte[i:i + 500]).sum().item()
    return ok / n

def export(tag, acc):
    sd = {k: v.detach().float().cpu().contiguous() for k, v in ema.state_dict().items()}
    meta = {'arch': json.dumps(dict(img=a.img, patch=a.patch, in_chans=C, dim=a.dim, depth=a.depth, heads=a.heads, mlp=a.mlp, classes=NC, norm_eps=1e-6)),
            'mean': json.dumps(MEAN.flatten().tolist()), 'std': json.dumps(STD.flatten().tolist()), 'test_top1': f'{acc:.4f}',
            **{k: META[k] for k in ('labels', 'licence', 'source') if k in META}}
    for nm, d in (('model', sd), ('model_f16', {k: v.half() for k, v in sd.items()})):
        save_file(d, f'{a.out}/{nm}.tmp', metadata=meta); os.replace(f'{a.out}/{nm}.tmp', f'{a.out}/{nm}.safetensors')

step, spent, seen = 0, 0.0, 0
if os.path.exists(f'{a.out}/last.pt') and not a.bench:
    ck = torch.load(f'{a.out}/last.pt', map_location=dev); model.load_state_dict(ck['model']); ema.load_state_dict(ck['ema']); opt.load_state_dict(ck['opt'])
    step, spent, seen = ck['step'], ck['spent'], ck['seen']
    if a.pure: torch._foreach_copy_([q.data for q in work.parameters()], [p.data for p in model.parameters()])
def save():
    torch.save(dict(model=model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), step=step, spent=spent + time.time() - t0, seen=seen), f'{a.out}/last.tmp')
    os.replace(f'{a.out}/last.tmp', f'{a.out}/last.pt')
stop = False
def on(*_):
    global stop; stop = True
signal.signal(signal.SIGTERM, on); signal.signal(signal.SIGINT, on)
print(json.dumps(dict(params=nparam, tokens=(a.img // a.patch) ** 2 + 1, train=N, test=len(Xte), device=dev, args=vars(a))), flush=True)
t0 = last = time.time(); cpu0 = time.process_time(); run = 0.0; log = open(f'{a.out}/log.jsonl', 'a')
perm = torch.randperm(N); pos = 0
while True:
    prog = (spent + time.time() - t0) / (a.minutes * 60) if a.minutes else (seen / N / a.epochs if a.epochs else 0)
    if prog >= 1 or stop: break
    lr = a.lr * (min(1, prog / a.warmup) if a.warmup else 1) * (.5 * (1 + math.cos(math.pi * max(0, prog - a.warmup) / (1 - a.warmup))) if not a.bench else 1) + 1e-6
    for gr in opt.param_groups: gr['lr'] = lr
    if pos + a.batch > N: perm = torch.randperm(N); pos = 0
    ix = perm[pos:pos + a.batch]; pos += a.batch
    x, t = augment(Xtr[ix], Ytr[ix], prog < 1 - a.clean_tail); work.train()
    if a.pure: o = net(x.bfloat16())
    else:
        with amp(): o = net(x)
    loss = -(t * F.log_softmax(o.float(), 1)).sum(1).mean()
    if teacher is not None:                          # the teacher sees what the student sees
        with torch.no_grad(): q = F.softmax(teacher((x.float() * STD + MEAN).contiguous(memory_format=torch.channels_last)) / a.temperature, 1)
        loss = (1 - a.soft) * loss + a.soft * a.temperature ** 2 * F.kl_div(F.log_softmax(o.float() / a.temperature, 1), q, reduction='batchmean')
    work.zero_grad(set_to_none=True); loss.backward()
    if a.pure:
        for p, q in zip(model.parameters(), work.parameters()): p.grad = q.grad.float()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0); opt.step()
    if a.pure: torch._foreach_copy_([q.data for q in work.parameters()], [p.data for p in model.parameters()])
    d = min(a.ema, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - d)
    step += 1; seen += a.batch; run = loss.item() if run == 0 else .98 * run + .02 * loss.item()
    if a.bench:
        if step == 5: tb, cb = time.time(), time.process_time()
        if step == a.bench + 5:
            n = a.batch * a.bench; w, c = time.time() - tb, time.process_time() - cb
            print(json.dumps(dict(bench=True, img_per_s=round(n / w, 1), img_per_core_s=round(n / c, 1), cpu_over_wall=round(c / w, 2), params=nparam, tokens=(a.img // a.patch) ** 2 + 1))); break
        continue
    if step % 50 == 0:
        r = dict(step=step, epoch=round(seen / N, 3), loss=round(run, 4), lr=round(lr, 6), prog=round(prog, 4), img_s=round((step * a.batch) / (spent + time.time() - t0), 1), min=round((spent + time.time() - t0) / 60, 1))
        print(json.dumps(r), flush=True); log.write(json.dumps(r) + '\n'); log.flush()
    if time.time() - last > a.ckpt_min * 60:
        acc = evaluate(ema, min(a.eval_n, len(Xte))); save(); export('ckpt', acc); last = time.time()
        r = dict(step=step, epoch=round(seen / N, 3), test_top1_first_n=acc, n=min(a.eval_n, len(Xte))); print(json.dumps(r), flush=True); log.write(json.dumps(r) + '\n'); log.flush()
if not a.bench:
    n = min(a.final_n, len(Xte)); acc = evaluate(ema, n); save(); export('final', acc)
    r = dict(final=True, step=step, epoch=round(seen / N, 3), test_top1=acc, n=n, minutes=round((spent + time.time() - t0) / 60, 1)); print(json.dumps(r), flush=True); log.write(json.dumps(r) + '\n')

"""Forward passes on the processor, in turn: foveate, OpenVINO, ONNX Runtime, and PyTorch where it is there.

    compare.py CPU_ROUNDS FOLDER ROUNDS

The same random weights go to all: DeiT-T and DeiT-S dense and with ToMe (r = 13, proportional attention), written as a
safetensors file and as ONNX graphs by hand. Prints a Markdown table of ratios: the other's time over foveate's, medians over
rounds in which everybody runs once. Outputs are compared first.
"""

import json
import statistics
import subprocess
import sys
import time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MODELS = {"deit_tiny": (192, 3), "deit_small": (384, 6)}
DEPTH, PATCH, SIDE, CLASSES, R = 12, 16, 224, 1000, 13


def weights(width):
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


class Graph:
    """An ONNX graph in the making: each operation returns the name of its result."""

    def __init__(self):
        self.nodes, self.constants, self.count = [], [], 0

    def constant(self, value):
        self.count += 1
        name = f"c{self.count}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind, *inputs, outputs=1, **attributes):
        self.count += 1
        names = [f"v{self.count}_{i}" for i in range(outputs)]
        inputs = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def ints(self, *values):
        return np.array(values, np.int64)


def export(path, w, width, heads, batch, tome):
    """A DeiT with timm's semantics; with ToMe the official code's: matching on keys, sizes, proportional attention."""
    g, d, n = Graph(), width // heads, (SIDE // PATCH) ** 2 + 1
    f32 = lambda x: np.float32(x)

    def linear(x, name):
        y = g.op("MatMul", x, np.ascontiguousarray(w[f"{name}.weight"].T))
        return g.op("Add", y, w[f"{name}.bias"])

    def norm(x, name):
        return g.op("LayerNormalization", x, w[f"{name}.weight"], w[f"{name}.bias"], axis=-1, epsilon=1e-6)

    x = g.op("Conv", "images", w["patch_embed.proj.weight"], w["patch_embed.proj.bias"],
             kernel_shape=[PATCH, PATCH], strides=[PATCH, PATCH])
    x = g.op("Transpose", g.op("Reshape", x, g.ints(batch, width, n - 1)), perm=[0, 2, 1])
    x = g.op("Concat", np.broadcast_to(w["cls_token"], (batch, 1, width)).copy(), x, axis=1)
    x = g.op("Add", x, w["pos_embed"])
    size = None
    for i in range(DEPTH):
        block = f"blocks.{i}"
        qkv = g.op("Reshape", linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv"), g.ints(batch, n, 3, heads, d))
        qkv = g.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
        q, k, v = [g.op("Gather", qkv, np.array(part, np.int64), axis=0) for part in range(3)]
        scores = g.op("MatMul", g.op("Mul", q, f32(d**-0.5)), g.op("Transpose", k, perm=[0, 1, 3, 2]))
        if size is not None:
            scores = g.op("Add", scores, g.op("Reshape", g.op("Log", size), g.ints(batch, 1, 1, n)))
        context = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)
        context = g.op("Reshape", g.op("Transpose", context, perm=[0, 2, 1, 3]), g.ints(batch, n, width))
        x = g.op("Add", x, linear(context, f"{block}.attn.proj"))
        if tome:
            x, size, n = merge(g, x, size, k, n, min(R, (n - 1) // 2), batch, width, d)
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        # Exact GELU; both engines fuse this pattern.
        erf = g.op("Erf", g.op("Div", hidden, f32(2**0.5)))
        hidden = g.op("Mul", g.op("Mul", hidden, g.op("Add", erf, f32(1))), f32(0.5))
        x = g.op("Add", x, linear(hidden, f"{block}.mlp.fc2"))
    x = g.op("Gather", norm(x, "norm"), np.array(0, np.int64), axis=1)
    logits = linear(x, "head")
    graph = helper.make_graph(
        g.nodes, "vit",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(logits, TensorProto.FLOAT, [batch, CLASSES])], g.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)


def merge(g, x, size, k, n, r, batch, width, d):
    """One step of ToMe: r tokens of A (even positions) go to their best tokens of B (odd positions)."""
    na, nb = (n + 1) // 2, n // 2
    metric = g.op("ReduceMean", k, g.ints(1), keepdims=0)
    metric = g.op("Div", metric, g.op("ReduceL2", metric, g.ints(-1), keepdims=1))
    sides = lambda t: [g.op("Slice", t, g.ints(first), g.ints(n), g.ints(1), g.ints(2)) for first in (0, 1)]
    a, b = sides(metric)
    scores = g.op("MatMul", a, g.op("Transpose", b, perm=[0, 2, 1]))
    never = np.zeros((1, na, 1), np.float32)
    never[0, 0] = -np.inf
    scores = g.op("Add", scores, never)
    best = g.op("ReduceMax", scores, g.ints(-1), keepdims=0)
    partner = g.op("ArgMax", scores, axis=-1, keepdims=0)
    _, order = g.op("TopK", best, g.ints(na), outputs=2, axis=-1, largest=1, sorted=1)
    merged = g.op("Slice", order, g.ints(0), g.ints(r), g.ints(1))
    kept = g.op("Slice", order, g.ints(r), g.ints(na), g.ints(1))
    kept, _ = g.op("TopK", kept, g.ints(na - r), outputs=2, axis=-1, largest=0, sorted=1)
    target = g.op("GatherElements", partner, merged, axis=1)
    size = size if size is not None else np.ones((batch, n, 1), np.float32)

    def apply(t, columns):
        a, b = sides(t)
        rows = lambda index, count: g.op(
            "Expand", g.op("Unsqueeze", index, g.ints(-1)), g.ints(batch, count, columns))
        moved = g.op("GatherElements", a, rows(merged, r), axis=1)
        stays = g.op("GatherElements", a, rows(kept, na - r), axis=1)
        b = g.op("ScatterElements", b, rows(target, r), moved, axis=1, reduction="add")
        return g.op("Concat", stays, b, axis=1)

    total = apply(size, 1)
    return g.op("Div", apply(g.op("Mul", x, size), width), total), total, n - r


class Foveate:
    def __init__(self, program, path, threads):
        self.process = subprocess.Popen([program, path, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().split()

    def run(self, spec, batch):
        seconds, *logits = self.ask(f"{spec} {batch}")
        return float(seconds), np.array(logits, np.float32)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def openvino_runner(threads):
    import openvino

    core = openvino.Core()

    def load(path):
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_PRECISION_HINT": "f32"}
        request = core.compile_model(path, "CPU", settings).create_infer_request()
        return lambda images: request.infer([images], share_inputs=True)[0]

    return load


def onnxruntime_runner(threads):
    import onnxruntime

    def load(path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})[0]

    return load


def torch_runner(threads, w, width, heads):
    """timm's forward pass in eager mode: fused attention, dense only."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    w = {name: torch.from_numpy(value) for name, value in w.items()}

    @torch.inference_mode()
    def forward(images):
        x = F.conv2d(torch.from_numpy(images), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
        b, n, _ = x.shape
        for i in range(DEPTH):
            p = lambda name: (w[f"blocks.{i}.{name}.weight"], w[f"blocks.{i}.{name}.bias"])
            y = F.linear(F.layer_norm(x, (width,), *p("norm1"), 1e-6), *p("attn.qkv"))
            q, k, v = y.reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
            x = x + F.linear(y, *p("attn.proj"))
            y = F.gelu(F.linear(F.layer_norm(x, (width,), *p("norm2"), 1e-6), *p("mlp.fc1")))
            x = x + F.linear(y, *p("mlp.fc2"))
        x = F.layer_norm(x, (width,), w["norm.weight"], w["norm.bias"], 1e-6)
        return F.linear(x[:, 0], w["head.weight"], w["head.bias"]).numpy()

    return forward


def timed(run, images):
    begun = time.perf_counter()
    run(images)
    return time.perf_counter() - begun


def main(program, folder, rounds):
    have = {}
    for name, make in [("OpenVINO", openvino_runner), ("ONNX Runtime", onnxruntime_runner)]:
        try:
            make(1)
            have[name] = make
        except ImportError:
            print(f"{name} is not there", file=sys.stderr)
    try:
        import torch  # noqa: F401
        have["PyTorch"] = None
    except (ImportError, OSError):
        print("PyTorch is not there", file=sys.stderr)
    rows, speedups = [], []
    for model, (width, heads) in MODELS.items():
        w = weights(width)
        checkpoint = f"{folder}/{model}.safetensors"
        write_safetensors(checkpoint, w)
        for batch in (1, 8):
            values = np.arange(batch * 3 * SIDE * SIDE, dtype=np.int64) * 31 % 251
            images = (values.astype(np.float32) / 125 - 1).reshape(batch, 3, SIDE, SIDE)
            for threads in (1, 2):
                fast = Foveate(program, checkpoint, threads)
                runs, times = {}, {}
                for spec, tome in (("none", False), (f"tome:r={R}", True)):
                    path = f"{folder}/{model}_{batch}_{int(tome)}.onnx"
                    export(path, w, width, heads, batch, tome)
                    _, want = fast.run(spec, batch)
                    for name, make in have.items():
                        if make is None and tome:
                            continue
                        run = torch_runner(threads, w, width, heads) if make is None else make(threads)(path)
                        got = np.asarray(run(images)).reshape(-1)[: len(want)]
                        error = np.abs(got - want).max() / np.abs(want).max()
                        print(f"{model} {spec} batch {batch}: {name} differs by {error:.1e}", file=sys.stderr)
                        if error > 1e-3:
                            raise SystemExit(f"{name} computes something else: {got} instead of {want}")
                        runs[spec, name] = run
                for _ in range(rounds):
                    for spec in ("none", f"tome:r={R}"):
                        # As far apart as the others' rounds are, so that nobody finds a warmer cache.
                        times.setdefault((spec, "foveate"), []).append(fast.run(spec, batch)[0])
                        for (other, name), run in runs.items():
                            if other == spec:
                                times.setdefault((spec, name), []).append(timed(run, images))
                fast.close()
                ratio = lambda a, b: statistics.median(x / y for x, y in zip(times[a], times[b]))
                for spec in ("none", f"tome:r={R}"):
                    cells = [f"{ratio((spec, name), (spec, 'foveate')):.2f}" if (spec, name) in times else ""
                             for name in have]
                    rows.append([model, spec, str(batch), str(threads), *cells])
                tome = f"tome:r={R}"
                own = [f"{ratio(('none', name), (tome, name)):.2f}" if (tome, name) in times else ""
                       for name in ["foveate", *have]]
                speedups.append([model, str(batch), str(threads), *own])
    table(["model", "reduction", "batch", "threads", *have], rows)
    print()
    print("Speed-up of ToMe over the same engine's dense model:")
    print()
    table(["model", "batch", "threads", "foveate", *have], speedups)


def table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

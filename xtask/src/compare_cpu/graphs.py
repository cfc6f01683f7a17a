"""A DeiT as an ONNX graph, written by hand: what OpenVINO and ONNX Runtime are given."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from weights import CLASSES, DEPTH, PATCH, R, SIDE


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

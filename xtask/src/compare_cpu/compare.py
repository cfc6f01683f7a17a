"""Forward passes on the processor, in turn: foveate, OpenVINO, ONNX Runtime, and PyTorch where it is there.

    compare.py PROGRAM FOLDER REPORT HEAD --rounds N --models A,B --threads 1,2 --precisions f32,bf16

The same random weights go to all, as a safetensors file and as ONNX graphs written by hand: DeiT-T and DeiT-S, dense and with ToMe
(r = 13, proportional attention); to PyTorch also LV-ViT-S and AFFNet-ET. In bf16 weights and images stay f32 and each engine
multiplies as it sees fit. Writes Markdown tables of ratios to REPORT behind the text of the file HEAD, medians over rounds in which
everybody has a turn. A turn is a few passes, of which the fastest counts: the first finds the caches full of the others' weights,
and a machine that is shared stops now one, now another. Outputs are compared first.

REPORT is written anew after every row, and rows of earlier runs are kept in FOLDER until they are measured again: a run that is cut off
loses nothing, and a part can be measured alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

import weights
from weights import R, SIDE

MODELS = {"deit_tiny": (192, 3), "deit_small": (384, 6)}
TOME = f"tome:r={R}"
REDUCTIONS = [TOME, "mctf:r=16", "evit:keep=0.5", "bat:keep=0.7", "mstm:keep=0.7"]
# Seconds before a turn: others' threads look for work for a moment before they sleep.
PAUSE = 0.03
# Passes of a turn, by batch.
PASSES = {1: 5, 8: 2}


# How far outputs may lie from foveate's f32 ones.
TOLERANCES = {"f32": 1e-3, "bf16": 5e-2}
ENGINES = ["OpenVINO", "ONNX Runtime", "PyTorch"]


class Foveate:
    def __init__(self, program, path, threads, precision):
        command = [program, path, str(threads), precision]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().split()

    def logits(self, spec, batch):
        return np.array(self.ask(f"{spec} {batch}")[1:], np.float32)

    def turn(self, spec, batch):
        time.sleep(PAUSE)
        return min(float(self.ask(f"{spec} {batch}")[0]) for _ in range(PASSES[batch]))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def openvino_runner(threads, precision):
    import openvino

    core = openvino.Core()

    def load(path):
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_PRECISION_HINT": precision}
        request = core.compile_model(path, "CPU", settings).create_infer_request()
        return lambda images: request.infer([images], share_inputs=True)[0]

    return load


def onnxruntime_runner(threads, precision):
    import onnxruntime

    if precision != "f32":
        return None

    def load(path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})[0]

    return load


def turn(run, images):
    def once():
        begun = time.perf_counter()
        run(images)
        return time.perf_counter() - begun

    time.sleep(PAUSE)
    return min(once() for _ in range(PASSES[len(images)]))


def pixels(batch, side):
    values = np.arange(batch * 3 * side * side, dtype=np.int64) * 31 % 251
    return (values.astype(np.float32) / 125 - 1).reshape(batch, 3, side, side)


def check(what, want, got, tolerance):
    got = np.asarray(got).reshape(-1)[: len(want)]
    error = np.abs(got - want).max() / np.abs(want).max()
    print(f"{what} differs by {error:.1e}", file=sys.stderr)
    if not error < tolerance:
        raise SystemExit(f"{what} computes something else: {got} instead of {want}")


def available():
    have = {}
    for name, make in [("OpenVINO", openvino_runner), ("ONNX Runtime", onnxruntime_runner)]:
        try:
            make(1, "f32")
            have[name] = make
        except ImportError:
            print(f"{name} is not there", file=sys.stderr)
    try:
        import eager

        return have, eager
    except (ImportError, OSError):
        print("PyTorch is not there", file=sys.stderr)
        return have, None


def ratio(times, a, b):
    return statistics.median(x / y for x, y in zip(times[a], times[b]))


class Report:
    """Tables whose rows are known by what they are of. All that is known is written after every row: the whole takes minutes."""

    TABLES = {
        "engines": ("", ["model", "precision", "reduction", "batch", "threads", *ENGINES, "rounds"]),
        "eager": ("The same for PyTorch alone, dense:", ["model", "precision", "batch", "threads", "PyTorch", "rounds"]),
        "tome": ("Speed-up of ToMe over the same engine's dense model:",
                 ["model", "precision", "batch", "threads", "foveate", *ENGINES[:2], "rounds"]),
        "own": ("Speed-up of each reduction over foveate's own dense model, beside the ratio of multiply-adds:",
                ["model", "precision", "reduction", "batch", "threads", "speed-up", "multiply-adds", "quotient", "rounds"]),
        "precision": ("Speed-up of bf16 products over f32:", ["model", "reduction", "batch", "speed-up", "rounds"]),
        "threads": ("Speed-up of two threads over one, batch 8:", ["model", "precision", "reduction", "speed-up", "rounds"]),
    }
    # Columns that say what a row is of.
    NAMES = {"model", "precision", "reduction", "batch", "threads"}

    def __init__(self, path, head, state, rounds):
        self.path, self.head, self.state, self.rounds = path, head, state, rounds
        self.rows = {name: [] for name in self.TABLES}
        if os.path.exists(state):
            with open(state) as file:
                self.rows.update(json.load(file))

    def add(self, table, *row):
        columns = self.TABLES[table][1]
        names = sum(column in self.NAMES for column in columns)
        row = [str(cell) for cell in (*row, self.rounds)]
        assert len(row) == len(columns), (table, row)
        print(table, *row, file=sys.stderr, flush=True)
        rows = self.rows[table]
        rows[:] = [other for other in rows if other[:names] != row[:names]] + [row]
        rows.sort(key=lambda row: row[:names])
        self.write()

    def write(self):
        for path, text in [(self.state, json.dumps(self.rows)), (self.path, self.text())]:
            with open(f"{path}.new", "w") as file:
                file.write(text)
            os.replace(f"{path}.new", path)

    def text(self):
        lines = [self.head.rstrip("\n")]
        for name, (title, columns) in self.TABLES.items():
            if self.rows[name]:
                lines += ["", *([title, ""] if title else []), "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
                lines += ["| " + " | ".join(row) + " |" for row in self.rows[name]]
        return "\n".join(lines) + "\n"


def transformers(report, options, have, eager, model, precision):
    """A DeiT beside the others: times, speed-ups by ToMe, and our own speed-ups."""
    import graphs

    width, heads = MODELS[model]
    w = weights.deit(width)
    checkpoint = f"{options.folder}/{model}.safetensors"
    weights.write_safetensors(checkpoint, w)
    for batch in (1, 8):
        images = pixels(batch, SIDE)
        for threads in options.threads:
            fast = Foveate(options.program, checkpoint, threads, precision)
            exact = fast if precision == "f32" else Foveate(options.program, checkpoint, threads, "f32")
            runs, times = {}, {}
            for spec in ("none", TOME):
                path = f"{options.folder}/{model}_{batch}_{spec != 'none'}.onnx"
                graphs.export(path, w, width, heads, batch, spec != "none")
                loaders = {name: make(threads, precision) for name, make in have.items()}
                made = {name: load(path) for name, load in loaders.items() if load}
                if eager and spec == "none" and precision == "f32":
                    made["PyTorch"] = eager.runner(eager.deit(weights.DEPTH, heads), w, threads)
                want = exact.logits(spec, batch)
                for name, run in made.items():
                    # With the similarities of rounded keys another engine merges other tokens.
                    if spec == "none" or precision == "f32":
                        check(f"{model} {spec} batch {batch}: {name}", want, run(images), TOLERANCES[precision])
                    runs[spec, name] = run
                if precision != "f32":
                    check(f"{model} {spec} batch {batch}: foveate", want, fast.logits(spec, batch), TOLERANCES[precision])
            for _ in range(options.rounds):
                for spec in ("none", TOME):
                    times.setdefault((spec, "foveate"), []).append(fast.turn(spec, batch))
                    for (other, name), run in runs.items():
                        if other == spec:
                            times.setdefault((spec, name), []).append(turn(run, images))
                for spec in REDUCTIONS[1:]:
                    times.setdefault((spec, "foveate"), []).append(fast.turn(spec, batch))
                if fast is not exact and threads == 1:
                    for spec in ("none", *REDUCTIONS):
                        times.setdefault((spec, "exact"), []).append(exact.turn(spec, batch))
            cell = lambda a, b: f"{ratio(times, a, b):.2f}" if a in times and b in times else ""
            for spec in ("none", TOME):
                cells = [cell((spec, name), (spec, "foveate")) for name in ENGINES]
                report.add("engines", model, precision, spec, batch, threads, *cells)
            cells = [cell(("none", name), (TOME, name)) for name in ["foveate", *ENGINES[:2]]]
            report.add("tome", model, precision, batch, threads, *cells)
            dense = float(fast.ask("macs none 1")[0])
            for spec in REDUCTIONS:
                saved = dense / float(fast.ask(f"macs {spec} 1")[0])
                gained = ratio(times, ("none", "foveate"), (spec, "foveate"))
                report.add("own", model, precision, spec, batch, threads, f"{gained:.2f}", f"{saved:.2f}", f"{gained / saved:.2f}")
            for spec in ("none", *REDUCTIONS):
                if (spec, "exact") in times:
                    report.add("precision", model, spec, batch, cell((spec, "exact"), (spec, "foveate")))
            for running in {fast, exact}:
                running.close()
    if {1, 2} <= set(options.threads):
        both = [Foveate(options.program, checkpoint, count, precision) for count in (1, 2)]
        for spec in ("none", *REDUCTIONS):
            for fast in both:
                fast.turn(spec, 8)
            pairs = [[fast.turn(spec, 8) for fast in both] for _ in range(options.rounds)]
            report.add("threads", model, precision, spec, f"{statistics.median(one / two for one, two in pairs):.2f}")
        for fast in both:
            fast.close()


def others(report, options, eager, model):
    """PyTorch's time over ours where there is no graph for the others."""
    w, forward, side = {
        "lvvit_s": lambda: (weights.lv_vit(384, 16), eager.lv_vit(16, 6, 2.0), 224),
        "affnet_et": lambda: (weights.affnet(), eager.affnet, 256),
    }[model]()
    checkpoint = f"{options.folder}/{model}.safetensors"
    weights.write_safetensors(checkpoint, w)
    for count in options.threads:
        fast, run = Foveate(options.program, checkpoint, count, "f32"), eager.runner(forward, w, count)
        for batch in (1, 8):
            images = pixels(batch, side)
            check(f"{model} batch {batch}: PyTorch", fast.logits("none", batch), run(images), TOLERANCES["f32"])
            pairs = [(turn(run, images), fast.turn("none", batch)) for _ in range(options.rounds)]
            report.add("eager", model, "f32", batch, count, f"{statistics.median(a / b for a, b in pairs):.2f}")
        fast.close()


def main():
    parser = argparse.ArgumentParser()
    for name in ("program", "folder", "report", "head"):
        parser.add_argument(name)
    words = lambda text: text.split(",")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--models", type=words, required=True)
    parser.add_argument("--threads", type=lambda text: [int(word) for word in words(text)], required=True)
    parser.add_argument("--precisions", type=words, required=True)
    options = parser.parse_args()
    with open(options.head) as head:
        report = Report(options.report, head.read(), f"{options.folder}/rows.json", options.rounds)
    have, eager = available()
    for model in options.models:
        if model in MODELS:
            for precision in options.precisions:
                transformers(report, options, have, eager, model, precision)
        elif eager and "f32" in options.precisions:
            others(report, options, eager, model)
    report.write()


if __name__ == "__main__":
    main()

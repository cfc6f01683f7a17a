"""Forward passes on the processor, in turn: foveate, OpenVINO, ONNX Runtime, and PyTorch where it is there.

    compare.py CPU_ROUNDS FOLDER ROUNDS

The same random weights go to all, as a safetensors file and as ONNX graphs written by hand: DeiT-T and DeiT-S, dense and with ToMe
(r = 13, proportional attention); to PyTorch also LV-ViT-S and AFFNet-ET. Prints Markdown tables of ratios, medians over rounds in which
everybody has a turn. A turn is a few passes, of which the fastest counts: the first finds the caches full of the others' weights,
and a machine that is shared stops now one, now another. Outputs are compared first.
"""

import statistics
import subprocess
import sys
import time

import numpy as np

import weights
from weights import R, SIDE

MODELS = {"deit_tiny": (192, 3), "deit_small": (384, 6)}
TOME = f"tome:r={R}"
REDUCTIONS = [TOME, "mctf:r=16", "evit:keep=0.5"]
# Seconds before a turn: others' threads look for work for a moment before they sleep.
PAUSE = 0.03
# Passes of a turn, by batch.
PASSES = {1: 5, 8: 2}


class Foveate:
    def __init__(self, program, path, threads):
        command = [program, path, str(threads)]
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


def check(what, want, got):
    got = np.asarray(got).reshape(-1)[: len(want)]
    error = np.abs(got - want).max() / np.abs(want).max()
    print(f"{what} differs by {error:.1e}", file=sys.stderr)
    if not error < 1e-3:
        raise SystemExit(f"{what} computes something else: {got} instead of {want}")


def available():
    have = {}
    for name, make in [("OpenVINO", openvino_runner), ("ONNX Runtime", onnxruntime_runner)]:
        try:
            make(1)
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


def transformers(program, folder, rounds, have, eager):
    """DeiT: rows of others' times over ours, of speed-ups by ToMe, and of our own speed-ups."""
    import graphs

    rows, speedups, own = [], [], []
    for model, (width, heads) in MODELS.items():
        w = weights.deit(width)
        checkpoint = f"{folder}/{model}.safetensors"
        weights.write_safetensors(checkpoint, w)
        for batch in (1, 8):
            images = pixels(batch, SIDE)
            for threads in (1, 2):
                fast = Foveate(program, checkpoint, threads)
                runs, times = {}, {}
                for spec in ("none", TOME):
                    path = f"{folder}/{model}_{batch}_{spec != 'none'}.onnx"
                    graphs.export(path, w, width, heads, batch, spec != "none")
                    made = {name: make(threads)(path) for name, make in have.items()}
                    if eager and spec == "none":
                        made["PyTorch"] = eager.runner(eager.deit(weights.DEPTH, heads), w, threads)
                    want = fast.logits(spec, batch)
                    for name, run in made.items():
                        check(f"{model} {spec} batch {batch}: {name}", want, run(images))
                        runs[spec, name] = run
                for _ in range(rounds):
                    for spec in ("none", TOME):
                        times.setdefault((spec, "foveate"), []).append(fast.turn(spec, batch))
                        for (other, name), run in runs.items():
                            if other == spec:
                                times.setdefault((spec, name), []).append(turn(run, images))
                    for spec in REDUCTIONS[1:]:
                        times.setdefault((spec, "foveate"), []).append(fast.turn(spec, batch))
                names = [*have, "PyTorch"]
                cell = lambda a, b: f"{ratio(times, a, b):.2f}" if a in times and b in times else ""
                for spec in ("none", TOME):
                    cells = [cell((spec, name), (spec, "foveate")) for name in names]
                    note(rows, [model, spec, batch, threads, *cells])
                cells = [cell(("none", name), (TOME, name)) for name in ["foveate", *have]]
                note(speedups, [model, batch, threads, *cells])
                dense = float(fast.ask("macs none 1")[0])
                for spec in REDUCTIONS:
                    saved = dense / float(fast.ask(f"macs {spec} 1")[0])
                    gained = ratio(times, ("none", "foveate"), (spec, "foveate"))
                    note(own, [model, spec, batch, threads, f"{gained:.2f}", f"{saved:.2f}", f"{gained / saved:.2f}"])
                fast.close()
    return rows, speedups, own


def threads(program, folder, rounds):
    """Batch 8 on one thread and on two, in turn."""
    rows = []
    for model in MODELS:
        both = [Foveate(program, f"{folder}/{model}.safetensors", count) for count in (1, 2)]
        cells = []
        for spec in ("none", *REDUCTIONS):
            for fast in both:
                fast.turn(spec, 8)
            pairs = [[fast.turn(spec, 8) for fast in both] for _ in range(rounds)]
            cells.append(f"{statistics.median(one / two for one, two in pairs):.2f}")
        for fast in both:
            fast.close()
        note(rows, [model, *cells])
    return rows


def others(program, folder, rounds, eager):
    """PyTorch's time over ours where there is no graph for the others."""
    rows = []
    made = {
        "lvvit_s": (weights.lv_vit(384, 16), eager.lv_vit(16, 6, 2.0), 224),
        "affnet_et": (weights.affnet(), eager.affnet, 256),
    }
    for model, (w, forward, side) in made.items():
        checkpoint = f"{folder}/{model}.safetensors"
        weights.write_safetensors(checkpoint, w)
        for count in (1, 2):
            fast, run = Foveate(program, checkpoint, count), eager.runner(forward, w, count)
            for batch in (1, 8):
                images = pixels(batch, side)
                check(f"{model} batch {batch}: PyTorch", fast.logits("none", batch), run(images))
                pairs = [(turn(run, images), fast.turn("none", batch)) for _ in range(rounds)]
                note(rows, [model, batch, count, f"{statistics.median(a / b for a, b in pairs):.2f}"])
            fast.close()
    return rows


def note(rows, row):
    """Another row of a table, shown at once: the whole takes minutes."""
    print(*row, file=sys.stderr)
    rows.append(row)


def table(title, head, rows):
    print(f"\n{title}\n" if title else "", end="\n" if title else "")
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def main(program, folder, rounds):
    have, eager = available()
    rows, speedups, own = transformers(program, folder, rounds, have, eager)
    table("", ["model", "reduction", "batch", "threads", *have, "PyTorch"], rows)
    if eager:
        table("The same for PyTorch alone, dense:", ["model", "batch", "threads", "PyTorch"], others(program, folder, rounds, eager))
    table("Speed-up of ToMe over the same engine's dense model:", ["model", "batch", "threads", "foveate", *have], speedups)
    table("Speed-up of each reduction over foveate's own dense model, beside the ratio of multiply-adds:",
          ["model", "reduction", "batch", "threads", "speed-up", "multiply-adds", "quotient"], own)
    table("Speed-up of two threads over one, batch 8:", ["model", "none", *REDUCTIONS], threads(program, folder, rounds))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

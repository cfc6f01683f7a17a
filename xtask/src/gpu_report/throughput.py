"""Images per second of DeiT in PyTorch, f16, random weights: timm's models as they are, and with ToMe where it is installed.

Prints a Markdown table. Exit code 3 and one line where there is nothing to time.
"""
import statistics
import sys


def nothing(why):
    print(why)
    sys.exit(3)


try:
    import torch
except ImportError as error:
    nothing(f"this Python has no torch ({error})")
if not torch.cuda.is_available():
    nothing("this Python's torch finds no card")
try:
    import timm
except ImportError as error:
    nothing(f"this Python has no timm ({error})")
try:
    import tome
except ImportError:
    tome = None

BATCH, WARM_UP, SAMPLES, PASSES = 64, 10, 15, 10


def milliseconds(model, images):
    """The median over samples of the time of one pass."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    with torch.inference_mode():
        for _ in range(WARM_UP):
            model(images)
        for _ in range(SAMPLES):
            begin.record()
            for _ in range(PASSES):
                model(images)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / PASSES)
    return statistics.median(times)


def graphed(model, images):
    """The model's launches as one CUDA graph; None where a graph cannot hold them."""
    try:
        with torch.inference_mode():
            return torch.cuda.make_graphed_callables(model, (images,))
    except Exception:  # whatever a model does that cannot be captured
        torch.cuda.synchronize()
        return None


def rows(name):
    images = torch.rand(BATCH, 3, 224, 224, device="cuda", dtype=torch.float16)
    make = lambda: timm.create_model(name, num_classes=1000).eval().cuda().half()
    variants = [("none", make())]
    if tome is not None:
        for r in (8, 13, 16):
            model = make()
            tome.patch.timm(model)
            model.r = r
            variants.append((f"tome:r={r}", model))
    dense = None
    for method, model in variants:
        time = milliseconds(model, images)
        dense = dense or time
        yield method, "eager", time, dense
    graph = graphed(variants[0][1], images)
    if graph is not None:
        yield "none", "CUDA graph", milliseconds(graph, images), dense


print(f"| model, batch {BATCH}, f16 | method | how | ms | images/s | of eager dense |")
print("| --- | --- | --- | --- | --- | --- |")
for name in ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"):
    for method, how, time, dense in rows(name):
        print(f"| {name} | {method} | {how} | {time:.3f} | {1e3 * BATCH / time:.0f} | {time / dense:.3f} |", flush=True)
print()
versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, timm {timm.__version__}"
print(versions + (", tome from its own package" if tome else ", no package tome: ToMe in PyTorch was not timed"))

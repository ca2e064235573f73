"""Measures time and memory of training at full size on a GPU, and compares them with the planner's forecasts.

scripts/check_gpu.py measures the rows that tell most, in a few minutes.

    python scripts/bench/gpu.py --json out.json         SD 1.5 at 512² and SDXL at 1024²; an hour or more
    python scripts/bench/gpu.py --models sd15 --policies fast,balanced --chunks 4 --active 50
    python scripts/bench/gpu.py --limit_gib 4           SD 1.5, all 50 sampler steps active, held to 4 GiB; if several
                                                        cases are given, the fastest policy that should fit
    python scripts/bench/gpu.py --table out.json        the table of an earlier run, finished or not; needs no GPU
    python scripts/bench/gpu.py --models tiny --device cpu      tries the script itself, on the bundled model's sizes

Each row measures AlignPropTrainer's own optimizer step on random weights in bfloat16, with a LoRA of rank 4, AdamW and
a random CLIP ViT-L aesthetic score. A step has one micro-batch of `chunk` samples, all of them in one network call and
in one decode, with gradient through the last K of 50 sampler steps. Prompts count as encoded already. The seconds of a
sample are the median of some steps after a first one. For "small" and "smallest" they include moving modules once in
every step, so a larger micro-batch in chunks does better.

The peak is the most that PyTorch's allocator gave out. Compare it with the forecast (in brackets, by how much the
measured peak exceeds it). `reserved` is what the allocator took from the device for that. `outside` is what the process
took in addition: the CUDA context, kernels, and workspaces of libraries. TFLOP/s are the forecast's operations divided
by the measured seconds (in brackets, as a share of a large matrix product in bfloat16, measured in the same run).
"""

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that the file runs as a script, from any folder

from scripts.bench.full_size import MODELS, VARIANTS, Case, build_trainer, expected  # noqa: E402, I001
import torch  # noqa: E402 (it comes after the line above, which sets environment variables)
from tqdm import tqdm  # noqa: E402

from alignprop.memory.forecast import GIB, Forecast  # noqa: E402
from alignprop.models.formats import FORMATS  # noqa: E402
from alignprop.settings.memory_policies import POLICIES  # noqa: E402
from scripts.bench.tables import markdown  # noqa: E402


def cases(models, policies, chunks, active, steps: int, variants) -> list[Case]:
    """Returns all combinations. Variants are combined only with the policy "fast" and the last of `chunks`."""
    combined = [(m, p, n, k) for m in models for p in policies for n in chunks for k in active if k <= steps]
    varied = [Case(*c, steps, v) for v in variants for c in combined if c[1:3] == ("fast", chunks[-1])]
    return [Case(*c, steps) for c in combined] + varied


# ---- measuring


def measure(case: Case, device: str, repeats: int, made_on: str) -> dict:
    """Returns the case as a dict with the seconds of `repeats` steps, and bytes for device "cuda"; or an "error"."""
    row = asdict(case)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = build_trainer(case, made_on, folder)
            trainer.step()  # kernels are chosen and compiled, the optimizer gets its moments
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            row["seconds"] = [seconds(trainer.step, device) for _ in range(repeats)]
        except torch.OutOfMemoryError:
            return {**row, "error": "out of memory"}
    if device == "cuda":
        row["peak"], row["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        row["outside"] = outside()
    return row


def seconds(function, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


def outside() -> int:
    """Returns the bytes of the GPU that are in use, but not by PyTorch's allocator."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def free(device: str) -> None:
    """Frees whatever the case before has left."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def facts(device: str) -> dict:
    """Returns the device, its memory in use before anything is loaded, and the FLOP/s of a large matrix product."""
    found = {"torch": torch.__version__, "device": "CPU", "context": None}
    if device == "cuda":
        torch.zeros(1, device=device)
        found |= {"device": torch.cuda.get_device_name(), "context": outside()}
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    durations = [seconds(lambda: a @ b, device) for _ in range(20)]
    return {**found, "flops_per_second": 2 * size**3 / statistics.median(durations)}


def hold_to(gib: float) -> None:
    """Makes PyTorch run out of memory if the process takes more of the GPU than that."""
    torch.cuda.set_per_process_memory_fraction((gib * GIB - outside()) / torch.cuda.mem_get_info()[1])


def fastest(gib: float, model: str, steps: int) -> Case:
    """Returns the first policy that should fit with every sampler step active, with as many samples at once as it can.

    Raises:
        SystemExit: No policy fits.
    """
    done, least = {}, math.inf
    for policy in POLICIES:
        for chunk in (4, 2, 1):
            case = Case(model, policy, chunk, steps, steps)
            forecast = expected(case, done)
            if forecast.fits(gib * GIB):
                return case
            least = min(least, forecast.peak / GIB)
    sys.exit(
        f"error: --limit_gib = {gib:g} fits no policy: the smallest takes {least:.2f} GiB, plus what a forecast "
        "leaves out"
    )


# ---- results


def table(rows: list[dict], forecasts: list[Forecast], flops_per_second: float) -> str:
    """Returns a Markdown table of what was measured."""
    header = [
        "model",
        "policy",
        "chunk",
        "K",
        "variant",
        "format",
        "s/sample",
        "peak GiB",
        "forecast",
        "reserved",
        "outside",
    ]
    lines = [cells(row, f, flops_per_second) for row, f in zip(rows, forecasts, strict=True)]
    return markdown([*header, "TFLOP/s"], lines)


def cells(row: dict, forecast: Forecast, flops_per_second: float) -> list[str]:
    case = [str(row.get(name, "")) for name in ("model", "policy", "chunk", "active", "variant", "quantize")]
    case[-1] += " products" if row.get("products") else ""
    planned = f"{forecast.peak / GIB:.2f}"
    if "error" in row:
        return [*case, row["error"], "", planned, "", "", ""]
    memory = ["", planned, "", ""]
    if "peak" in row:
        peak, reserved, others = (row[name] / GIB for name in ("peak", "reserved", "outside"))
        planned = f"{planned} ({row['peak'] / forecast.peak - 1:+.1%})"
        memory = [f"{peak:.2f}", planned, f"{reserved:.2f}", f"{others:.2f}"]
    duration = statistics.median(row["seconds"]) / row["chunk"]
    pace = forecast.flops / duration
    return [*case, f"{duration:.4g}", *memory, f"{pace / 1e12:.4g} ({pace / flops_per_second:.0%})"]


def report(measured: dict) -> str:
    """Returns the table of what was measured, next to forecasts that are made now."""
    done, names = {model: {} for model in MODELS}, [field.name for field in fields(Case)]
    rows = tqdm(measured["rows"], "forecasts", leave=False, disable=None)
    forecasts = [
        expected(Case(**{name: row[name] for name in names if name in row}), done[row["model"]]) for row in rows
    ]
    found = measured["facts"]
    context = "" if found["context"] is None else f", its context {found['context'] / GIB:.2f} GiB"
    pace = f"a large matrix product {found['flops_per_second'] / 1e12:.4g} TFLOP/s"
    lines = table(measured["rows"], forecasts, found["flops_per_second"])
    return f"{found['device']}, torch {found['torch']}{context}; {pace}\n\n{lines}"


def main() -> None:
    options = parse()
    if options.table:
        print(report(json.loads(options.table.read_text())))
        return
    chosen = cases(options.models, options.policies, options.chunks, options.active, options.steps, options.variants)
    chosen = [replace(case, quantize=options.quantize, products=options.products) for case in chosen]
    if options.forecast:
        done: dict = {}
        forecasts = [expected(case, done) for case in chosen]
        options.forecast.write_text(json.dumps([{"peak": f.peak, "flops": f.flops} for f in forecasts]) + "\n")
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here; without one, only --models tiny --device cpu runs")
    os.environ["ACCELERATE_USE_CPU"] = "false" if options.device == "cuda" else "true"
    measured, made_on = {"facts": facts(options.device), "rows": []}, options.device
    free(options.device)
    if options.limit_gib:
        made_on = "cpu"
        if len(chosen) > 1:
            chosen = [fastest(options.limit_gib, "sd15", options.steps)]
        hold_to(options.limit_gib)
    for case in tqdm(chosen, "cases", disable=None):
        measured["rows"].append(measure(case, options.device, options.repeats, made_on))
        free(options.device)
        if options.json:  # written after each case, so that a run that is cut short leaves what it has
            options.json.write_text(json.dumps(measured, indent=2) + "\n")
    if not options.no_table:
        print(report(measured))
    if options.limit_gib and "error" in measured["rows"][0]:
        sys.exit(f"error: it did not fit --limit_gib = {options.limit_gib:g}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(name, default, kind=str, allowed=None):
        def values(text):
            found = [kind(word) for word in text.split(",") if word]
            wrong = [value for value in found if allowed and value not in allowed]
            if wrong:
                raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(allowed)}")
            return found

        shown = f"default {default}" + (f"; of {', '.join(allowed)}" if allowed else "")
        parser.add_argument(name, type=values, default=default, help=f"comma-separated; {shown}")

    several("--models", "sd15,sdxl", allowed=MODELS)
    several("--policies", ",".join(POLICIES), allowed=POLICIES)
    several("--chunks", "1,2,4,8", int)
    several("--active", "1,50", int)
    several("--variants", ",".join(VARIANTS), allowed=VARIANTS)
    parser.add_argument("--steps", type=int, default=50, help="sampler steps; default 50")
    parser.add_argument("--quantize", default="", choices=("", *FORMATS), help="format of the denoiser's weights")
    parser.add_argument("--products", action="store_true", help="layers in int8 or fp8 also multiply so")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each case; default 3")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    parser.add_argument("--limit_gib", type=float, help="hold PyTorch to that much; measures one case, see above")
    parser.add_argument("--forecast", type=Path, help="only write the forecast of each case to that file; needs no GPU")
    parser.add_argument("--json", type=Path, help="file for every measurement")
    parser.add_argument("--no_table", action="store_true", help="only write --json, because a table needs forecasts")
    parser.add_argument("--table", type=Path, help="print the table of this JSON file")
    options = parser.parse_args()
    needs_no_gpu = options.table or options.forecast
    if options.device == "cpu" and (options.models != ["tiny"] or options.limit_gib) and not needs_no_gpu:
        parser.error("--device cpu is for --models tiny: full size, and a limit, need a GPU")
    if options.no_table and not options.json:
        parser.error("--no_table leaves nothing without --json")
    return options


if __name__ == "__main__":
    main()

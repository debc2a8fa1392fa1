"""``make gpu-check``: everything that needs a GPU, in one go, with the results in docs/benchmarks/gpu.md.

Runs the tests marked ``gpu``, then ``bench step`` and ``bench train`` on CUDA with networks of the size of
Stable Diffusion 1.5 and XL. On a machine without a GPU it says so and succeeds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPORT = Path("docs/benchmarks/gpu.md")
# SDXL trained in full needs weights, gradients, two moments and a reference: about 50 GB.
FULL_SDXL_BYTES = 70 << 30
NO_TESTS = 5  # pytest's exit code if none was collected


def main(root: Path = ROOT) -> int:
    """Run the checks and write the report under ``root``; returns the exit code."""
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device on this machine, so there is nothing to check.")
        return 0
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=root, capture_output=True, text=True
    )
    print(tests.stdout)
    passed = tests.returncode in (0, NO_TESTS)
    summary = tests.stdout.strip().splitlines()[-1] if tests.stdout.strip() else tests.stderr[-300:]
    sections = ["# On a GPU", "Written by `make gpu-check`.", f"Tests marked gpu: {summary}"]
    with tempfile.TemporaryDirectory() as folder:
        sections += benchmarks(Path(folder), torch.cuda.get_device_properties(0).total_memory)
    path = root / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(f"gpu-check: {path}")
    return 0 if passed else 3


def benchmarks(out: Path, memory: int) -> list[str]:
    """Run ``bench step`` and ``bench train`` on CUDA; returns the sections of the report.

    Args:
        out: folder for their files.
        memory: bytes of the device; what does not fit is left out and named.
    """
    from diffalign.bench import step, train

    sections = [
        "## A step of the scheduler",
        "Ratio: diffusers' time over ours. Syncs: host waits in one loop of 20 steps, as the driver reports. "
        "Limit: each tensor of a step read and written once. Graph: a whole loop runs as one CUDA graph.",
    ]
    for dtype in ("float32", "float16"):
        step.run(step.StepConfig(output_dir=str(out / dtype), device="cuda", dtype=dtype))
        sections += [f"### {dtype}", (out / dtype / "step.md").read_text().strip()]
    sections += [
        "## A step of training",
        "Ratios to plain fine-tuning of the same images, bfloat16, one pair.",
    ]
    jobs = {"sd15": ["lora", "full"], "sdxl": ["lora", "full"] if memory > FULL_SDXL_BYTES else ["lora"]}
    for size, kinds in jobs.items():
        folder = out / size
        config = train.BenchTrainConfig(
            output_dir=str(folder), networks=[size], counted=[], train=kinds, device="cuda", dtype="bfloat16"
        )
        train.run(config)
        sections += [f"### {size}", (folder / "train.md").read_text().strip()]
        if "full" not in kinds:
            sections.append("Full training is left out: the device has too little memory for it.")
    return sections


if __name__ == "__main__":
    sys.exit(main())

"""The CPU's fused attention kernel against plain matrix products: forward and backward, by number of tokens.

What `use_cpu` in learning/optimization.py rests on. Both run in turns on the same inputs; 3 heads of 64, as
in ViT-Tiny.

    python -m benchmarks.attention
"""

import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from modeling_fer.learning.optimization import cpu_cores

RESULTS = Path(__file__).parent / "results"
BATCH, HEADS, WIDTH, TURNS = 128, 3, 64, 7


def seconds(backend: SDPBackend, inputs: list[torch.Tensor]) -> float:
    """Time of one forward and backward pass."""
    query, key, value = inputs
    start = time.perf_counter()
    with sdpa_kernel(backend):
        scaled_dot_product_attention(query, key, value).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and keep the result."""
    torch.set_num_threads(cpu_cores())
    rows = []
    for dtype in tqdm((torch.float32, torch.bfloat16)):
        for tokens in (10, 37, 50, 101, 197):
            inputs = [
                torch.randn(BATCH, HEADS, tokens, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3)
            ]
            times: dict[str, list[float]] = {"fused": [], "plain": []}
            for turn in range(TURNS + 1):  # the first warms up
                for name, backend in (("fused", SDPBackend.FLASH_ATTENTION), ("plain", SDPBackend.MATH)):
                    spent = seconds(backend, inputs)
                    if turn:
                        times[name].append(spent)
            fused, plain = (statistics.median(times[name]) * 1e3 for name in ("fused", "plain"))
            row = {"dtype": str(dtype), "tokens": tokens, "fused_ms": fused, "plain_ms": plain}
            rows.append({**row, "fused_over_plain": fused / plain})
    result = {"batch": BATCH, "threads": cpu_cores(), "torch": torch.__version__, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "attention_cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()

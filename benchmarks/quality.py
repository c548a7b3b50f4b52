"""The proof of quality: the study's variants on SmolLM2 through the real cache, beside the study's own figures.

`python -m benchmarks.quality` from the repository root; about half an hour on two CPU cores.
"""

import argparse
import sys
from pathlib import Path

import torch

from ottfx.eval_command import run_evaluation
from ottfx.results import markdown_table, write_results
from ottfx.study import STUDY, study_table, study_variants


def main() -> int:
    """Measure, print measured against expected, write the results."""
    labels = [row.variant.label for row in STUDY]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=labels, help="a variant; repeat for more; default: all")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--start", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality-smollm2")
    options = parser.parse_args()
    variants = study_variants(options.only)
    results = run_evaluation(
        variants, "smollm2", options.device, options.dtype, "", options.tokens, options.start, str(options.out)
    )
    print(markdown_table(results))
    if (options.tokens, options.start) == (2048, 256):
        print(study_table(results))
    else:
        print("Not the study's positions: no comparison. Use --tokens 2048 --start 256 for it.")
    for file in write_results(results, options.out):
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

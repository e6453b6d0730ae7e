"""What `import undiffuse` adds to `import torch`, in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys

from common import table, write

CODE = "from time import perf_counter as t; a = t(); import torch; b = t(); import undiffuse; print(b - a, t() - b)"


def main() -> None:
    runs = [subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True) for _ in range(7)]
    pairs = [[float(word) for word in run.stdout.split()] for run in runs]
    torch_s, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    rows = [[f"{torch_s:.2f} s", f"{ours:.2f} s"]]
    write("Import time", "python benchmarks/import_time.py", table(["import torch", "import undiffuse adds"], rows))


if __name__ == "__main__":
    main()

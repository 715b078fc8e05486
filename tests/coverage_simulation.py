"""How often the 95 % intervals contain the truth: simulated patients of known AUROC and sensitivity; run by hand.

python tests/coverage_simulation.py             # about 40 minutes on one core
python tests/coverage_simulation.py --sets 50   # a rougher table
"""

import argparse
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from scipy.special import ndtri

import evaluate


def simulate(rng: np.random.Generator, images: int, separation: float) -> evaluate.Answers:
    """Gaussian scores of variance 1, half of it between patients; sensitivity 0.99 at the threshold.

    Patients have 1 to 4 images, 1.46 on average, as in the public test split (624 from 428); 62 % of them are positive.
    """
    sizes = rng.choice([1, 2, 3, 4], size=images, p=[0.7, 0.18, 0.08, 0.04])
    patients = np.repeat(np.arange(images), sizes)[:images]
    is_positive = (rng.random(images) < 0.62)[patients]
    shared = rng.normal(0, math.sqrt(0.5), images)[patients]
    score = shared + rng.normal(0, math.sqrt(0.5), images) + is_positive * separation
    called = score >= separation - ndtri(0.99)
    return evaluate.Answers(is_positive, score, called, patients, stratum=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=500, help="simulated data sets per row")
    args = parser.parse_args()
    print("| images | AUROC | coverage of AUROC | coverage of sensitivity 0.99 |")
    print("| --- | --- | --- | --- |")
    for images in (100, 624, 5000):
        for auroc in (0.9, 0.99, 0.999):
            separation = math.sqrt(2) * ndtri(auroc)
            truth = {"auroc": auroc, "sensitivity": 0.99}
            covered = dict.fromkeys(truth, 0)
            for seed in range(args.sets):
                rng = np.random.default_rng([images, round(auroc * 1000), seed])
                answers = simulate(rng, images, separation)
                found = evaluate.estimates(answers, evaluate.Bootstrap(500, seed), truth)
                for metric, value in truth.items():
                    low, high = found[metric]["ci95"]
                    covered[metric] += low <= value <= high
            shares = [f"{n / args.sets:.3f}" for n in covered.values()]
            print(f"| {images} | {auroc} | {shares[0]} | {shares[1]} |", flush=True)


if __name__ == "__main__":
    main()

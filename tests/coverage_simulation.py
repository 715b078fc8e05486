"""How often the 95 % intervals contain the truth: simulated patients of known AUROC and sensitivity; run by hand.

python tests/coverage_simulation.py             # the README's table, about 40 minutes on one core
python tests/coverage_simulation.py --sets 50   # a rougher one
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

SENSITIVITIES = (0.9, 0.99)


def simulate(rng: np.random.Generator, images: int, auroc: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (bool), scores and patients, each [images].

    Patients have 1 to 4 images, 1.46 on average, as in the public test split (624 of 428); 62 % of them are positive;
    half of the variance of a score is the patient's.
    """
    sizes = rng.choice([1, 2, 3, 4], size=images, p=[0.7, 0.18, 0.08, 0.04])
    patients = np.repeat(np.arange(images), sizes)[:images]
    is_positive = (rng.random(images) < 0.62)[patients]
    shared = rng.normal(0, math.sqrt(0.5), images)[patients]
    score = shared + rng.normal(0, math.sqrt(0.5), images) + is_positive * separation(auroc)
    return is_positive, score, patients


def separation(auroc: float) -> float:
    """Distance between the means of two normal scores of variance 1."""
    return math.sqrt(2) * ndtri(auroc)


def covered(images: int, auroc: float, sets: int, draws: int) -> list[float]:
    """Share of the data sets whose interval contains the AUROC, and each of SENSITIVITIES."""
    hits = []
    for seed in range(sets):
        rng = np.random.default_rng([images, round(auroc * 1000), seed])
        is_positive, score, patients = simulate(rng, images, auroc)
        bootstrap = evaluate.Bootstrap(draws, seed)
        row = []
        for metric, truth in (("auroc", auroc), *(("sensitivity", truth) for truth in SENSITIVITIES)):
            predicted = score >= separation(auroc) - ndtri(truth)
            answers = evaluate.Answers(is_positive, score, predicted, patients, stratum=None)
            low, high = evaluate.estimates(answers, bootstrap, [metric])[metric]["ci95"]
            row.append(low <= truth <= high)
        hits.append(row)
    return np.mean(hits, axis=0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=500, help="data sets in each row")
    parser.add_argument("--draws", type=int, default=500, help="of the bootstrap")
    args = parser.parse_args()
    print("| images | AUROC | covered | sensitivity 0.9 covered | 0.99 covered |\n| --- | --- | --- | --- | --- |")
    for images in (100, 624, 5000):
        for auroc in (0.9, 0.99, 0.999):
            shares = covered(images, auroc, args.sets, args.draws)
            print(f"| {images} | {auroc} | {' | '.join(f'{share:.3f}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()

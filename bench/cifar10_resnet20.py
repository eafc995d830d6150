"""Replace ``layer3`` of the published ResNet-20, three quarters of its parameters.

Run ``CVXDISTILL_DATA=... python bench/cifar10_resnet20.py``; writes
``bench/results/cifar10_resnet20.csv`` and ``.png``.
"""

from __future__ import annotations

from cifar10_blocks import parse_arguments, run

CONFIGURATIONS = {
    "3 x 3": {"kernel_size": 3, "max_rows": 100_000, "time_limit": 90},
    "5 x 5": {"kernel_size": 5, "max_rows": 100_000, "time_limit": 90, "n_gates": 16},
}

if __name__ == "__main__":
    arguments = parse_arguments(__doc__.splitlines()[0])
    run(
        "resnet20",
        "layer3",
        configurations=CONFIGURATIONS,
        images=arguments.images,
        test_images=arguments.test_images,
        name="cifar10_resnet20",
    )

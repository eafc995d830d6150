"""Replace ``layer4`` of a ResNet-18, 8.4 of its 11.2 million parameters.

Run ``CVXDISTILL_DATA=... python bench/cifar10_resnet18.py``; writes
``bench/results/cifar10_resnet18.csv`` and ``.png``.
"""

from __future__ import annotations

from cifar10_blocks import parse_arguments, run

CONFIGURATIONS = {
    "teacher gates": {"n_gates": 32},
    "Gaussian gates": {"n_gates": 32, "gates": "gaussian"},
}

if __name__ == "__main__":
    arguments = parse_arguments(__doc__.splitlines()[0])
    run(
        "resnet18",
        "layer4",
        configurations=CONFIGURATIONS,
        images=arguments.images,
        test_images=arguments.test_images,
        name="cifar10_resnet18",
    )

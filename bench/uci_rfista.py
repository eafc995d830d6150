"""R-FISTA here and in pyscnn on 14 UCI tables: seconds to the same relative suboptimality.

    python bench/uci_rfista.py            all tables, three alphas
    python bench/uci_rfista.py --quick    three small tables

The problem is C-GReLU with squared loss, penalty "neuron", 100 standard normal gates and no
intercept; the target is the largest class against the rest (+1, -1), or the standardised number.
The accuracy asked for is a relative 1e-4 at 0.1 and 0.01 alpha_max and 1e-3 at 0.001 alpha_max.
Each solver stops by its own rule:

* here, on the *certified* relative duality gap, which bounds the suboptimality from above;
* pyscnn, on the loosest of its tolerances (powers of ten) whose result has
  objective <= (1 + accuracy) * optimum, as if somebody had told its user which one that is.

Beside that stands the time to the first iterate with such an objective, as if an oracle had
stopped each. The optimum is that of a solve to a hundredth of the accuracy, in float64.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click
import matplotlib
import numpy as np
import pandas as pd
from datasets import UCI_TABLES, load_uci
from machine import describe_machine
from peers.environment import peers_python
from peers.serving import Worker

from cvxdistill.solvers import RFISTA, GatedReLUProblem, activation_patterns, sample_gates

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache" / "uci_rfista"
ACCURACY = {0.1: 1e-4, 0.01: 1e-4, 0.001: 1e-3}  # by alpha / alpha_max
N_GATES = 100
THREADS = 2
LADDER = [10.0**-k for k in range(17)]
QUICK_TABLES = ("glass", "wine", "banknote")
# Our float64 first: it is what the others are compared with.
SOLVERS = (
    ("cvxdistill", "float64"),
    ("cvxdistill", "float32"),
    ("pyscnn", "float64"),
    ("pyscnn", "float32"),
)

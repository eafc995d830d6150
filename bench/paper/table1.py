"""Table 1 of Varshney and Pilanci (2024): what the students of a ResNet-18's four blocks save.

    python bench/paper/table1.py    a second or two, no data

All is counted and measured: the network is ``teachers.resnet18`` with 1,000 classes, run on images
of 32 x 32, and the paper's student of equation 8 is built in torch, with 60, 128, 256 and 256
filters and batch norm behind each convolution, and run on what the block sees. Sparsity is the
student's share of the block's parameters, and the share of the whole network that is left when only
this block is replaced. The paper's printed sparsities stand beside: it cuts digits off in some
places and rounds in others. The last columns are our own student with as many filters, which has
biases instead of batch norms.
"""

from __future__ import annotations

import click
import cpu_clock
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from machine import describe_machine
from teachers import resnet18
from torch import Tensor, nn

from cvxdistill.adapters import build_student, capture

IMAGE = (3, 32, 32)
CLASSES = 1000
FILTERS = {"layer1": 60, "layer2": 128, "layer3": 256, "layer4": 256}
# As printed, (of the block, overall).
PRINTED = {
    "layer1": ("0.495", "0.994"),
    "layer2": ("0.313", "0.969"),
    "layer3": ("0.313", "0.8765"),
    "layer4": ("0.156", "0.394"),
}


class PaperStudent(nn.Module):
    """CNN3_1x1(CNN2(z) * (CNN1(z) > 0)), equation 8, each convolution with batch norm."""

    def __init__(self, C_in: int, C_out: int, filters: int, stride: int) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, k: int, stride: int) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, k, stride, padding=k // 2, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs))

        self.gate = stage(C_in, filters, 3, stride)
        self.first = stage(C_in, filters, 3, stride)
        self.second = stage(filters, C_out, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.second(self.first(z) * (self.gate(z) > 0))


def parameters(module: nn.Module) -> int:
    """Numbers that the module learns; running means of batch norms are not among them."""
    return sum(p.numel() for p in module.parameters())


def measure(filters: dict[str, int] = FILTERS) -> pd.DataFrame:
    """One row for each block."""
    model = resnet18(CLASSES).eval()
    total = parameters(model)
    images = torch.zeros(2, *IMAGE)
    rows = []
    for block, m in filters.items():
        with capture(model, block, [images], verbose=0) as captured:
            inputs = torch.from_numpy(np.array(captured.inputs))
            output_shape = tuple(captured.outputs.shape[1:])
            layout = captured.layout(kernel_size=3)
        C_in, height, _ = inputs.shape[1:]
        paper = PaperStudent(C_in, output_shape[0], m, height // output_shape[1]).eval()
        # Gates by their own, so that all are stored; what the weights are does not matter.
        rng = np.random.default_rng(0)
        W = rng.standard_normal((layout.n_features, m)).astype(np.float32)
        W2 = np.ones((m, layout.n_outputs), np.float32)
        ours = build_student(layout, W, W2, np.arange(m), W, np.zeros(layout.n_outputs)).eval()
        with torch.inference_mode():
            for student in (paper, ours):
                shape = tuple(student(inputs).shape[1:])
                if shape != output_shape:
                    raise ValueError(f"a student of {block} returns {shape}, not {output_shape}")
        teacher = parameters(model.get_submodule(block))
        student = parameters(paper)
        rows.append(
            {
                "block": block,
                "input": " x ".join(map(str, inputs.shape[1:])),
                "output": " x ".join(map(str, output_shape)),
                "teacher": teacher,
                "filters": m,
                "student": student,
                "sparsity_block": student / teacher,
                "sparsity_overall": (total - teacher + student) / total,
                "printed_block": PRINTED[block][0],
                "printed_overall": PRINTED[block][1],
                "our_student": ours.parameters_stored,
                "our_trainable": ours.trainable,
                "network": total,
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, file: str) -> None:
    """Parameters of each block before and after."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    names = {"teacher": "block", "student": "the paper's student", "our_student": "ours"}
    for number, (column, label) in enumerate(names.items()):
        place = np.arange(len(table)) + 0.27 * (number - 1)
        bars = axis.bar(place, table[column], 0.25, label=label)
        axis.bar_label(bars, [f"{count:,}" for count in table[column]], fontsize=7)
    axis.set_xticks(range(len(table)), table["block"])
    axis.set(yscale="log", ylabel="parameters, gates included", ylim=(2e4, 3e7))
    axis.set_title("blocks of a ResNet-18 and students of as many filters")
    axis.legend(loc="upper left")
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
def main() -> None:
    """Count, print the table and write it with its picture."""
    print(describe_machine("torch", "cvxdistill"))
    table = measure()
    cpu_clock.RESULTS.mkdir(parents=True, exist_ok=True)
    output = cpu_clock.RESULTS / "table1"
    table.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    draw(table, str(output.with_suffix(".png")))
    with pd.option_context("display.width", 200):
        shown = table.drop(columns="network")
        print(shown.to_string(index=False, float_format="%.4f"))
    print(f"The network of {CLASSES:,} classes has {table['network'].iloc[0]:,} parameters.")
    print(f"wrote {output}.csv and .png")


if __name__ == "__main__":
    main()

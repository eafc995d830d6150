"""Between torch and the solvers: record a block, lay it out as rows, deploy a student, swap it in.

Imports as ``cvxdistill.adapters``. Needs torch and safetensors, which
``pip install "cvxdistill[torch]"`` brings.
"""

from cvxdistill.adapters.block_table import BlockInfo, block_table, measure_blocks
from cvxdistill.adapters.capture import Capture, capture
from cvxdistill.adapters.layout import ConvLayout, DenseLayout, infer_layout
from cvxdistill.adapters.module_tree import check_swappable, evaluating, get_block, swap_block
from cvxdistill.adapters.storage import load_student, save_student
from cvxdistill.adapters.student import GatedStudent, build_student, table1_parameters
from cvxdistill.adapters.student_neurons import (
    StudentNeurons,
    stored_size,
    student_neurons,
)
from cvxdistill.adapters.teacher_gates import teacher_gates

__all__ = [
    "BlockInfo",
    "Capture",
    "ConvLayout",
    "DenseLayout",
    "GatedStudent",
    "StudentNeurons",
    "block_table",
    "build_student",
    "capture",
    "check_swappable",
    "evaluating",
    "get_block",
    "infer_layout",
    "load_student",
    "measure_blocks",
    "save_student",
    "stored_size",
    "student_neurons",
    "swap_block",
    "table1_parameters",
    "teacher_gates",
]

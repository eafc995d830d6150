"""Between torch and the solvers: record a block, lay it out as rows, deploy a student, swap it in.

Imports as ``cvxdistill.adapters``. Needs torch and safetensors, which
``pip install "cvxdistill[torch]"`` brings.
"""

from cvxdistill.adapters.block_table import BlockInfo, block_table, measure_blocks
from cvxdistill.adapters.capture import Capture, capture
from cvxdistill.adapters.compressed_storage import load_compressed, save_compressed
from cvxdistill.adapters.following import FollowingMap, find_following
from cvxdistill.adapters.latency import Latency, measure_latency, measure_onnx_latency
from cvxdistill.adapters.layout import ConvLayout, DenseLayout, infer_layout
from cvxdistill.adapters.linear_student import (
    LinearStudent,
    build_linear_student,
    input_channels,
    linear_student_size,
    stored_orders,
)
from cvxdistill.adapters.module_tree import (
    check_model,
    check_swappable,
    evaluating,
    get_block,
    swap_block,
)
from cvxdistill.adapters.onnx_export import export_onnx
from cvxdistill.adapters.quantization import Int8Layer, quantize_student, stored_dtype
from cvxdistill.adapters.sensitivity import change_when_rewritten, output_metrics
from cvxdistill.adapters.sites import Site, Sites, find_sites
from cvxdistill.adapters.span_search import find_span
from cvxdistill.adapters.spans import Span
from cvxdistill.adapters.storage import (
    OnlineState,
    load_online_state,
    load_student,
    save_online_state,
    save_student,
)
from cvxdistill.adapters.streaming import BlockTaps, Examples, model_output, token_rows
from cvxdistill.adapters.student import GatedStudent, build_student, table1_parameters
from cvxdistill.adapters.student_neurons import (
    StudentNeurons,
    stored_size,
    student_neurons,
)
from cvxdistill.adapters.teacher_gates import teacher_gates

__all__ = [
    "BlockInfo",
    "BlockTaps",
    "Capture",
    "ConvLayout",
    "DenseLayout",
    "Examples",
    "FollowingMap",
    "GatedStudent",
    "Int8Layer",
    "Latency",
    "LinearStudent",
    "OnlineState",
    "Site",
    "Sites",
    "Span",
    "StudentNeurons",
    "block_table",
    "build_linear_student",
    "build_student",
    "capture",
    "change_when_rewritten",
    "check_model",
    "check_swappable",
    "evaluating",
    "export_onnx",
    "find_following",
    "find_sites",
    "find_span",
    "get_block",
    "infer_layout",
    "input_channels",
    "linear_student_size",
    "load_compressed",
    "load_online_state",
    "load_student",
    "measure_blocks",
    "measure_latency",
    "measure_onnx_latency",
    "model_output",
    "output_metrics",
    "quantize_student",
    "save_compressed",
    "save_online_state",
    "save_student",
    "stored_dtype",
    "stored_orders",
    "stored_size",
    "student_neurons",
    "swap_block",
    "table1_parameters",
    "teacher_gates",
    "token_rows",
]

"""Packed networks run from their integers: four engines, one answer.

A quantized layer multiplies x_hat = step * x_int (+ offset) with w_hat = step_o * (a level), so

    y_o = step_o * step * sum_k level[w_ok] * x_int_k  + bias_o

and only the sum is work. Its engines differ in how they do it:

    integer     products of 8-bit integers, summed in 32 bits (`gemm`): fast, vectorised
    table       T[code of w, code of x] looked up in a table of 2^(W + A) products (`table`)
    reference   integers, shifts or the table, one product after the other, exact (`reference`)
    triton      as `integer`, on a GPU, weights packed in memory (`packed_gemm`)

ASQ's factor of a sample is in `step`, N2UQ's thresholds and AQuant's borders in x_int, which is
decided as in training, ties included (`source`). A layer with a float operand stays float.
"""

from qexp.engine.network import ENGINES, ON_CPU, engine_device, integer_network

__all__ = ["ENGINES", "ON_CPU", "engine_device", "integer_network"]

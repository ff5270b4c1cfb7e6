"""Quantization: fake-quant in training, integers in execution."""

from kd_jax.quantize.activations import init_quant_stats as init_quant_stats
from kd_jax.quantize.activations import (
  quantize_activations as quantize_activations,
)
from kd_jax.quantize.conversion import convert as convert
from kd_jax.quantize.execution import dequantize_params as dequantize_params
from kd_jax.quantize.execution import execute_integers as execute_integers
from kd_jax.quantize.fake_quant import INT8_ACTIVATIONS as INT8_ACTIVATIONS
from kd_jax.quantize.fake_quant import INT8_WEIGHTS as INT8_WEIGHTS
from kd_jax.quantize.fake_quant import QuantSpec as QuantSpec
from kd_jax.quantize.fake_quant import dequantize as dequantize
from kd_jax.quantize.fake_quant import fake_quant as fake_quant
from kd_jax.quantize.fake_quant import fake_quant_params as fake_quant_params
from kd_jax.quantize.fake_quant import quantize as quantize
from kd_jax.quantize.fake_quant import (
  scale_and_zero_point as scale_and_zero_point,
)
from kd_jax.quantize.fold import fold_batch_norm as fold_batch_norm
from kd_jax.quantize.fold import foldable_batch_norms as foldable_batch_norms
from kd_jax.quantize.fold import (
  skip_folded_batch_norms as skip_folded_batch_norms,
)
from kd_jax.quantize.observers import Observer as Observer
from kd_jax.quantize.observers import ema_min_max as ema_min_max
from kd_jax.quantize.packing import pack_int4 as pack_int4
from kd_jax.quantize.packing import unpack_int4 as unpack_int4

"""Quantization: fake-quant in training, integers in execution."""

from kd_jax.quantize.activations import init_quant_stats as init_quant_stats
from kd_jax.quantize.activations import (
  quantize_activations as quantize_activations,
)
from kd_jax.quantize.allocation import Allocation as Allocation
from kd_jax.quantize.allocation import allocate as allocate
from kd_jax.quantize.allocation import size_costs as size_costs
from kd_jax.quantize.allocation import weight_bytes as weight_bytes
from kd_jax.quantize.calibration import calibrate as calibrate
from kd_jax.quantize.calibration import correct_biases as correct_biases
from kd_jax.quantize.channels import FreeScale as FreeScale
from kd_jax.quantize.channels import free_scales as free_scales
from kd_jax.quantize.equalization import equalize as equalize
from kd_jax.quantize.equalization import smooth as smooth
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
from kd_jax.quantize.int8 import convert as convert
from kd_jax.quantize.int8 import execute_integers as execute_integers
from kd_jax.quantize.observers import Observer as Observer
from kd_jax.quantize.observers import ema_min_max as ema_min_max
from kd_jax.quantize.rounding import adaround as adaround
from kd_jax.quantize.sensitivities import Sensitivity as Sensitivity
from kd_jax.quantize.sensitivities import sensitivity as sensitivity
from kd_jax.quantize.sensitivities import weight_options as weight_options

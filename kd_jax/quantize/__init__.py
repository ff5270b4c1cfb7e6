"""Quantization: fake-quant in training, integers in execution.

Owns formats (`specs`), ranges (`observers`, `learned`), rounding in training
(`fake_quant`, `activations`, `delays`) and after it (`calibration`,
`rounding`, `equalization`), the bits of each layer (`allocation`), and the way
to integers (`fold`, `conversion`, `execution`). What comes after training in
one call is `deploy`'s, files are `export`'s.
"""

from kd_jax.quantize.activations import activation as activation
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
from kd_jax.quantize.conversion import convert as convert
from kd_jax.quantize.delays import delayed as delayed
from kd_jax.quantize.delays import freeze_batch_norm as freeze_batch_norm
from kd_jax.quantize.delays import freeze_observer as freeze_observer
from kd_jax.quantize.delays import (
  init_batch_norm_steps as init_batch_norm_steps,
)
from kd_jax.quantize.equalization import equalize as equalize
from kd_jax.quantize.equalization import smooth as smooth
from kd_jax.quantize.execution import execute_integers as execute_integers
from kd_jax.quantize.fake_quant import dequantize as dequantize
from kd_jax.quantize.fake_quant import fake_quant as fake_quant
from kd_jax.quantize.fake_quant import fake_quant_params as fake_quant_params
from kd_jax.quantize.fake_quant import quantize as quantize
from kd_jax.quantize.fake_quant import weight_scale as weight_scale
from kd_jax.quantize.fold import fold_batch_norm as fold_batch_norm
from kd_jax.quantize.fold import foldable_batch_norms as foldable_batch_norms
from kd_jax.quantize.fold import simulate_folding as simulate_folding
from kd_jax.quantize.fold import (
  skip_folded_batch_norms as skip_folded_batch_norms,
)
from kd_jax.quantize.learned import init_lsq_params as init_lsq_params
from kd_jax.quantize.learned import lsq as lsq
from kd_jax.quantize.learned import lsq_gradient_factor as lsq_gradient_factor
from kd_jax.quantize.learned import lsq_params as lsq_params
from kd_jax.quantize.learned import pact as pact
from kd_jax.quantize.learned_inputs import (
  init_learned_activations as init_learned_activations,
)
from kd_jax.quantize.learned_inputs import (
  learned_activations as learned_activations,
)
from kd_jax.quantize.learned_inputs import learned_ranges as learned_ranges
from kd_jax.quantize.observers import Observer as Observer
from kd_jax.quantize.observers import ema_min_max as ema_min_max
from kd_jax.quantize.observers import entropy as entropy
from kd_jax.quantize.observers import merge_stats as merge_stats
from kd_jax.quantize.observers import min_max as min_max
from kd_jax.quantize.observers import mse as mse
from kd_jax.quantize.observers import octav as octav
from kd_jax.quantize.observers import percentile as percentile
from kd_jax.quantize.packing import pack_int4 as pack_int4
from kd_jax.quantize.packing import unpack_int4 as unpack_int4
from kd_jax.quantize.rounding import adaround as adaround
from kd_jax.quantize.sensitivities import Sensitivity as Sensitivity
from kd_jax.quantize.sensitivities import sensitivity as sensitivity
from kd_jax.quantize.sensitivities import weight_options as weight_options
from kd_jax.quantize.specs import INT8_ACTIVATIONS as INT8_ACTIVATIONS
from kd_jax.quantize.specs import INT8_WEIGHTS as INT8_WEIGHTS
from kd_jax.quantize.specs import QuantSpec as QuantSpec
from kd_jax.quantize.specs import per_group as per_group
from kd_jax.quantize.specs import (
  scale_and_zero_point as scale_and_zero_point,
)
from kd_jax.quantize.stored import dequantize_params as dequantize_params

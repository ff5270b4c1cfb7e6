"""Parity: how closely one form of a model computes what another does.

A model changes form when it is folded, converted to integers or exported; each
form is compared with the one it came from on the same batches. `compare` sees
functions of a batch, whatever they are; `check_parity` sees the layers of a
linen model. Owns no data and no models.
"""

from kd_jax.parity.layers import LayerParity as LayerParity
from kd_jax.parity.layers import ParityReport as ParityReport
from kd_jax.parity.layers import check_parity as check_parity
from kd_jax.parity.outputs import Agree as Agree
from kd_jax.parity.outputs import Parity as Parity
from kd_jax.parity.outputs import compare as compare
from kd_jax.parity.outputs import most_likely as most_likely
from kd_jax.parity.outputs import require as require
from kd_jax.parity.outputs import within as within
from kd_jax.parity.table import print_parity as print_parity

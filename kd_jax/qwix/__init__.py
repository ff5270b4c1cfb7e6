"""Our quantization rules as those of Qwix, and back.

Owns the translation, for what Qwix has and we do not: 8-bit floats, rounded
gradients, TPU kernels. Quantization itself is in `quantize`. Qwix is the extra
`[qwix]`; it is imported when a function here is called. `translation` takes
lists of rules, by `patterns` of modules and `fields` of one rule; `models` has
models made with them.

A weight rule for `<module>/kernel` and an activation rule for `<module>` become
one rule for the module. What Qwix computes with it, of version 0.1.8:

- Its symmetric step is max|x| / 127.5, 7.5 at 4 bits, and it uses the code
  -128. `narrow` specs ask it for max|x| / 127, 'absmax,1.0039...', and then the
  codes are ours; those with `narrow=False` get Qwix's own step, 0.4 % smaller
  than ours, 6.7 % at 4 bits.
- Affine ranges have our scale and zero point, but x / scale + zero_point is
  rounded as a sum: a tie may go to the other code.
- Scales have the tensor's dtype; ours are float32.
- Channels of a weight are all axes that the product does not sum over. Of
  activations with dynamic ranges they are too: tokens have one each, where
  `axis=0` gives examples one each. In convolutions they are the same.
- A static range is the mean over all batches so far, in convolutions also over
  the examples of a batch; ours is a moving average of the batch's extremes. A
  dense layer has the same range in its first batch.
- Gradients pass to values outside of a static range too. Without `bwd_qtype`
  the backward product of a dense layer takes the values before rounding, ours
  those after it.
- Convolutions know no groups along the reduction; weights, inputs and, with
  `bwd_qtype`, gradients have to be of one type there, which CPUs and GPUs have
  no int4 products for. Weights alone may be int4.
- In a module with a rule both operands of other products are rounded too, such
  as attention's, the second one with a scale per channel. Additions, pooling
  and embeddings stay in float.
"""

from kd_jax.qwix.models import PROVIDERS as PROVIDERS
from kd_jax.qwix.models import quantize_model as quantize_model
from kd_jax.qwix.translation import from_qwix as from_qwix
from kd_jax.qwix.translation import to_qwix as to_qwix

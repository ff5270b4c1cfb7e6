"""What a run needs on chips that need not be there, from their compiler.

`chips` has their figures, `rehearsal` makes a run of shapes alone and `steps` a
train step of it, which `program` compiles and reads, by `memory` and `hlo`.
`estimate` puts the numbers together, with `alternatives` and `timing`. Owns no
step of its own and trains nothing.
"""

from kd_jax.plan.alternatives import ALTERNATIVES as ALTERNATIVES
from kd_jax.plan.estimate import Plan as Plan
from kd_jax.plan.estimate import plan as plan
from kd_jax.plan.steps import check as check
from kd_jax.plan.timing import measure_step as measure_step

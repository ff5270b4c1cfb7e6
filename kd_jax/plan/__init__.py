"""What a run needs on chips that need not be there, from their compiler.

`chips` has their figures, `rehearsal` makes a run of shapes alone, `program`
and `hlo` read one compiled step, and `estimate` puts the numbers together.
"""

from kd_jax.plan.estimate import ALTERNATIVES as ALTERNATIVES
from kd_jax.plan.estimate import Plan as Plan
from kd_jax.plan.estimate import measure_step as measure_step
from kd_jax.plan.estimate import plan as plan

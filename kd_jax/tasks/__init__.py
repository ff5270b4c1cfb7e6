"""The kinds of problems that runs are about, by name.

`config.data.task` is one of `TASKS`; your own is one more entry, see the
README's section "Extend it".
"""

from kd_jax.tasks import images
from kd_jax.tasks.base import Task as Task

TASKS: dict[str, Task] = {'image_classification': images.CLASSIFICATION}

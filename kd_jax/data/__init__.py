"""Images in memory or streamed, resumable batches, and keyed augmentation.

Owns the way from files to batches. `sources` and `builders` find and read data
sets, `pipeline` says which examples a step sees, of arrays (`examples`,
`resident`) or of files (`streamed`, `workers`); `augment` and `crops` change
them by keys; `cache_writer` and `teacher_cache` keep what a teacher says of
them. Which data a configuration means is `tasks`'.
"""

from kd_jax.data.augment import make_preprocess as make_preprocess
from kd_jax.data.augment import renormalize as renormalize
from kd_jax.data.augment import resize as resize
from kd_jax.data.builders import describe as describe
from kd_jax.data.builders import identity as identity
from kd_jax.data.cache_form import Form as Form
from kd_jax.data.cache_writer import write_cache as write_cache
from kd_jax.data.examples import ArrayData as ArrayData
from kd_jax.data.examples import Examples as Examples
from kd_jax.data.examples import ImageData as ImageData
from kd_jax.data.examples import InMemory as InMemory
from kd_jax.data.examples import Split as Split
from kd_jax.data.fingerprint import digest as digest
from kd_jax.data.fingerprint import make_fingerprint as make_fingerprint
from kd_jax.data.pipeline import batches_per_epoch as batches_per_epoch
from kd_jax.data.pipeline import eval_batches as eval_batches
from kd_jax.data.pipeline import train_batches as train_batches
from kd_jax.data.resident import Input as Input
from kd_jax.data.resident import make_input as make_input
from kd_jax.data.sources import Images as Images
from kd_jax.data.sources import load_images as load_images
from kd_jax.data.streamed import StreamedImages as StreamedImages
from kd_jax.data.teacher_cache import TeacherCache as TeacherCache

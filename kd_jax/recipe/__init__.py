"""The main job and its variants: from a configuration to a report.

`run` makes objects of a configuration, `fit` trains one network, `stages` is
the main job in order: teacher, alone, distill, compress, convert, export,
report. `distillation` says who learns from whom, `compression` (`pruning`,
`quantization`, `words`) what becomes smaller and when, `assess` what is
measured. `compare`, `candidates` and `search` run variants of it, and
`load_artefact` reads what `kd-jax compress` and `kd-jax shrink` wrote. Owns
what the words of a configuration become, and none of the mathematics.
"""

from kd_jax.recipe.artefact import load_artefact as load_artefact

"""Export: trained models as files that run without this library, and back.

Owns the formats; how alike a file and its model are is `parity`'s to say.
Loads no ONNX package: that format is in `kd_jax.export.onnx`.
"""

from kd_jax.export.artefact import Artefact as Artefact
from kd_jax.export.artefact import load_stablehlo as load_stablehlo
from kd_jax.export.manifest import ArtefactError as ArtefactError
from kd_jax.export.manifest import artefact_bytes as artefact_bytes
from kd_jax.export.stablehlo import export_stablehlo as export_stablehlo

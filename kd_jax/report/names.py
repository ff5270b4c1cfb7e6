"""What a report calls the networks of a run, for all who look one up by name.

Owns the names alone. The networks are `recipe`'s, and what an export is called
is said in `export.exporters`.
"""

TEACHER = 'teacher'
ALONE = 'student alone'
DISTILLED = 'distilled'
# Pruned and fake-quantized, as far as the configuration says so.
COMPRESSED = 'compressed'
INTEGER = 'integer (JAX)'

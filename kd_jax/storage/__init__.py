"""Files of a run: whole or not at all, checked when read, also in a bucket.

`files`, `mirror` and `lock` know no arrays; `checkpoint` and its format save
states of training, `weights` single networks; `workdir` names where everything
of a run lies, and `progress` shows how far it is. Owns no format of models.
"""

"""Commands of kd-jax in one process: `commands_worker.py FILE FLAG...`.

FILE is JSON, a list of their words; each gets the flags too. Prints the exit
code of each. The processes of a pair call it with the flags of a process.
"""

import json
import pathlib
import sys

from kd_jax import cli

if __name__ == '__main__':
  for words in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    code = cli.main([*words, *sys.argv[2:]])
    print(f'{words[0]} ended with {code}', flush=True)

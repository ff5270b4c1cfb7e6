"""Runs a configuration with several seeds and prints mean and deviation.

  python benchmarks/seeds.py --config configs/digits.py --seeds 5 \\
      --workdir runs/digits_seeds --out benchmarks/results/digits.md

Each seed is a `kd-jax run` of its own in WORKDIR/seed<N>; run it again and it
continues. Further words are passed on, such as `--config.data.data_dir=DIR`.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence

import page


def run_seeds(args: argparse.Namespace, rest: list[str]) -> list[dict]:
  """The reports of all seeds."""
  reports = []
  for seed in range(args.seeds):
    workdir = pathlib.Path(args.workdir) / f'seed{seed}'
    command = [
      sys.executable,
      '-m',
      'kd_jax',
      'run',
      f'--config={args.config}',
      f'--workdir={workdir}',
      f'--config.seed={seed}',
      *rest,
    ]
    subprocess.run(command, check=True)
    path = workdir / 'report' / 'report.json'
    reports.append(json.loads(path.read_text()))
  return reports


def table(reports: list[dict]) -> str:
  """A Markdown table: mean and standard deviation over the seeds."""
  lines = [
    '| model | accuracy % | agreement % | ECE % | parameters | nonzero | '
    'bytes | ms, batch 1 | ms, batch 32 | train s |',
    '| --- ' * 10 + '|',
  ]
  for i, first in enumerate(reports[0]['models']):
    rows = [report['models'][i] for report in reports]
    cells = [
      first['name'],
      *(
        _spread([100 * r[k] for r in rows], 2)
        for k in ('accuracy', 'agreement', 'calibration_error')
      ),
      *(
        f'{statistics.mean(r[k] for r in rows):,.0f}'
        for k in ('parameters', 'nonzero_parameters', 'bytes')
      ),
      *(
        _spread([r['latency'][b]['median_ms'] for r in rows], 3)
        for b in ('1', '32')
      ),
      '-'
      if first['train_seconds'] is None
      else _spread([r['train_seconds'] for r in rows], 0),
    ]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def _spread(values: list[float], digits: int) -> str:
  deviation = statistics.stdev(values) if len(values) > 1 else 0.0
  return f'{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}'


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the seeds and writes the table."""
  parser = page.make_parser(__doc__)
  parser.add_argument('--config', required=True)
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--workdir', required=True)
  args, rest = parser.parse_known_args(argv)
  reports = run_seeds(args, rest)
  first = reports[0]
  made = first.get('compression')
  versions = ', '.join(f'{k} {v}' for k, v in first['versions'].items())
  page.publish(
    args.out,
    [table(reports)],
    [
      *(
        f'{aim["text"]}: met by {sum(r["aims"][i]["met"] for r in reports)} of '
        f'{len(reports)} seeds (seed 0: {aim["value"]})'
        for i, aim in enumerate(first['aims'])
      ),
      *([f'compressed: {made}.'] if made else []),
      f'{len(reports)} seeds, mean ± standard deviation, test split of '
      f'{first["dataset"]["test_examples"]} images, last step.',
    ],
    # Of the runs, which may be older than this process.
    machine=f'{first["hardware"]}; {versions}; {first["created"][:10]}.',
    command=page.command(__file__, argv),
  )


if __name__ == '__main__':
  main()

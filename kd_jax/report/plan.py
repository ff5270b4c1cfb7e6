"""A plan as a page for the terminal.

Owns how `plan.Plan` is shown; knows its dict of numbers and computes nothing
but sums.
"""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd_jax.report.units import (
  DASH,
  count,
  percent,
  seconds,
  size,
)

WIDTH = 100
_MEMORY = {
  'student': 'student: parameters and statistics',
  'teacher': 'teacher',
  'optimizer': 'optimizer',
  'masks': 'pruning masks',
  'objective': 'objective: its parameters and memory banks',
  'batch': 'batch',
  'padding': "padding of these to the chip's tiles",
  'temporaries': 'temporaries: activations, gradients',
  'program': 'program',
}
_BOUNDS = {
  'compute': 'FLOPs / peak',
  'memory': 'bytes of memory / bandwidth',
  'network': 'bytes sent / bandwidth of all links',
}


def print_plan(plan: Mapping[str, Any], console: Console | None = None) -> None:
  """Prints a plan in at most 100 columns.

  Args:
    plan: from `plan.Plan.as_dict`.
    console: where to print; standard output when None.
  """
  if console is None:
    console = Console()
    if not console.is_terminal and not console.is_jupyter:
      console = Console(width=WIDTH)

  def show(title, header, rows, note=''):
    table = Table(
      box=box.SIMPLE_HEAD, title=Text(title), title_justify='left', min_width=60
    )
    for i, name in enumerate(header):
      table.add_column(
        Text(name), justify='right' if i else 'left', overflow='fold'
      )
    for row in rows:
      table.add_row(*(Text(cell) for cell in row))
    console.print(table, width=WIDTH)
    if note:
      console.print(Text(f'  {note}', style='dim'), width=WIDTH)

  console.print(Text(headline(plan), style='bold'), width=WIDTH)
  console.print(Text(verdict(plan)), width=WIDTH)
  program = plan['program']
  if program['memory']:
    show('Memory of a chip', ('held by', 'bytes'), memory_rows(plan))
  if program['flops'] is not None:
    show('Work of a step', ('on a chip', ''), work_rows(plan))
    show(
      'Collectives of a step',
      ('kind', 'of', 'operations', 'bytes'),
      [
        [r['kind'], r['owner'], str(r['count']), size(r['bytes'])]
        for r in program['collectives']
      ]
      or [['none', '', '', '']],
      'Compiled. One operation may carry arrays of several owners.',
    )
  if program['bounds'] or plan['measured']:
    show('Time of a step', ('', 'ms', ''), time_rows(plan))
  if plan['alternatives']:
    show(
      'What would change',
      ('', 'fits', 'bytes', 'FLOPs', 'ms', 'examples/s', 'hours', ''),
      what_if_rows(plan),
      'ms, examples/s and hours are the roofline estimate, all devices '
      'together for the latter two.',
    )
    for name, other in plan['alternatives'].items():
      if other['why']:
        line = f'  {_title(name)} ({other["how"]}): {other["why"]}'
        console.print(Text(line, style='dim'), width=WIDTH)
  for note in plan['notes']:
    console.print(Text(f'* {note}', style='dim'), width=WIDTH)


def headline(plan: Mapping[str, Any]) -> str:
  """What is planned, on one line."""
  mesh = ' x '.join(f'{axis} {n}' for axis, n in plan['mesh'].items() if n > 1)
  program = plan['program']
  each = program['batch_size'] / plan['devices']
  return (
    f'{plan["stage"]} on {plan["topology"]}: {plan["devices"]} devices'
    f'{f" ({mesh})" if mesh else ""}, batch {program["batch_size"]} '
    f'({each:g} on each), {program["total_steps"]} steps'
  )


def verdict(plan: Mapping[str, Any]) -> str:
  """Whether it fits, and how long it takes, in a sentence or two."""
  program, chip = plan['program'], plan['chip']
  has = None if chip is None else _memory_of(plan)
  needs = size(program['bytes'])
  if program['fits'] is None:
    said = [f'Needs {needs} a chip.']
  elif program['fits']:
    share = percent(program['bytes'] / has)
    said = [f'Fits: {needs} of the {size(has)} of a chip ({share}).']
  else:
    said = [f'Does not fit: {needs} of the {size(has)} of a chip.']
  if program['seconds']:
    said.append(
      f'At the roofline {count(program["examples_per_second"])} examples/s and '
      f'{program["hours"]:.3g} h, bound by {program["bound"]}.'
    )
  return ' '.join(said)


def _memory_of(plan: Mapping[str, Any]) -> int:
  return plan['chip']['hbm_bytes'] // plan['devices_per_chip']


def memory_rows(plan: Mapping[str, Any]) -> list[list[str]]:
  """Who holds how much."""
  memory = plan['program']['memory']
  rows = [[title, size(memory.get(key, 0))] for key, title in _MEMORY.items()]
  return [*rows, ['together (compiled)', size(plan['program']['bytes'])]]


def work_rows(plan: Mapping[str, Any]) -> list[list[str]]:
  """FLOPs, whose they are, and traffic."""
  program = plan['program']
  ratio = program['flops'] / plan['own_flops'] if plan['own_flops'] else None
  return [
    ['FLOPs (compiled)', count(program['flops'])],
    ['  share of the teacher', percent(plan['teacher_share'])],
    [
      "models' own count, 2 x (3 student + teacher)",
      count(plan['own_flops']),
    ],
    ['  compiled / own', DASH if ratio is None else f'{ratio:.2f}'],
    ['bytes read and written (compiled)', size(program['hbm_bytes'])],
    ['bytes sent to other chips (ring)', size(program['ici_bytes'])],
  ]


def time_rows(plan: Mapping[str, Any]) -> list[list[str]]:
  """Predicted bounds, and the measured step beside them."""
  program, measured = plan['program'], plan['measured']
  rows = []
  for key, value in program['bounds'].items():
    holds = 'holds' if key == program['bound'] else ''
    rows.append([_BOUNDS[key], _ms(value), holds])
  if program['seconds']:
    rows.append(['estimate: the largest', _ms(program['seconds']), 'estimated'])
  if measured:
    spread = (
      f'{_ms(measured["low"])}-{_ms(measured["high"])}, {measured["runs"]} runs'
    )
    rows.append(['measured', _ms(measured['seconds']), spread])
    rows.append(
      [
        '  examples/s, FLOP/s of a device',
        count(measured['examples_per_second']),
        count(measured['flops_per_second']),
      ]
    )
    if 'utilization' in measured:
      share = percent(measured['utilization'])
      rows.append(['  share of the published peak', share, ''])
    if 'peak_bytes' in measured:
      rows.append(['  peak of memory', size(measured['peak_bytes']), ''])
  return rows


def what_if_rows(plan: Mapping[str, Any]) -> list[list[str]]:
  """The step as it is, and every alternative."""
  rows = [_what_if('as configured', plan['program'])]
  for name, program in plan['alternatives'].items():
    rows.append(_what_if(_title(name), program))
  return rows


def _what_if(title: str, program: Mapping[str, Any]) -> list[str]:
  fits = {True: 'yes', False: 'no', None: DASH}[program['fits']]
  hours = program['hours']
  return [
    title,
    fits,
    size(program['bytes']),
    count(program['flops']),
    _ms(program['seconds']),
    count(program['examples_per_second']),
    DASH if hours is None else seconds(3600 * hours),
    program['how'],
  ]


def _title(name: str) -> str:
  return name.replace('_', ' ')


def _ms(value: Any) -> str:
  return DASH if value is None else f'{1e3 * value:.3g}'

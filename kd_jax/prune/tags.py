"""Tags: which positions of which axes can only leave together.

Owns the bookkeeping of the dependency analysis and knows nothing of JAX. Every
position of an axis carries a tag. A tag is an atom, which is kept or removed,
or a product of atoms, which is kept where all of them are: channel `(h, j)` of
a projection by heads is kept if head `h` and place `j` are. Tied tags are kept
or removed together, and a fixed atom stays. Where two products have to be
equal and do not fit each other, more is tied or fixed than mathematics asks
for: the analysis may keep too much and never removes too much.
"""

from collections.abc import Iterable, Sequence

import numpy as np

# The tag of a position that is always kept.
ALWAYS = -1


class Tags:
  """Union-find over tags.

  Attributes:
    fixed: atom -> why it stays.
    inexact: atom -> why a model without it computes other numbers than one in
      which it is zero.
    kind: atom -> what it is of a product, such as 'heads' or 'within'.

  Example:
    >>> tags = Tags()
    >>> conv, norm = tags.fresh(3), tags.fresh(3)
    >>> tags.tie(conv, norm, 'added')
    >>> tags.fix(norm[:1], 'returned')
    >>> [len(tags.free_atoms(tag)) for tag in conv]
    [0, 1, 1]
  """

  def __init__(self):
    self.fixed: dict[int, str] = {}
    self.inexact: dict[int, str] = {}
    self.kind: dict[int, str] = {}
    self._parent: list[int] = []
    self._parts: dict[int, tuple[int, int]] = {}
    self._products: dict[tuple[int, int], int] = {}

  def fresh(self, count: int, kind: str = '') -> np.ndarray:
    """`[count]` new atoms."""
    first = len(self._parent)
    self._parent.extend(range(first, first + count))
    if kind:
      self.kind.update((i, kind) for i in range(first, first + count))
    return np.arange(first, first + count)

  def find(self, tag: int) -> int:
    """The tag that stands for all that are tied to this one."""
    parent = self._parent
    while parent[tag] != tag:
      parent[tag] = parent[parent[tag]]
      tag = parent[tag]
    return tag

  def atoms(self, tag: int) -> tuple[int, ...]:
    """The atoms of a tag, none of `ALWAYS`; in the order of the product."""
    if tag == ALWAYS:
      return ()
    tag = self.find(tag)
    if tag not in self._parts:
      return (tag,)
    major, minor = self._parts[tag]
    return tuple(dict.fromkeys(self.atoms(major) + self.atoms(minor)))

  def free_atoms(self, tag: int) -> tuple[int, ...]:
    """The atoms of a tag that are not fixed; with none it can never leave."""
    return tuple(a for a in self.atoms(tag) if a not in self.fixed)

  def product(self, major: int, minor: int) -> int:
    """The tag that is kept where both are."""
    if ALWAYS in (major, minor):
      return minor if major == ALWAYS else major
    key = self.find(major), self.find(minor)
    if key not in self._products:
      made = int(self.fresh(1)[0])
      self._parts[made] = key
      self._products[key] = made
    return self._products[key]

  def tie(self, xs: np.ndarray, ys: np.ndarray, reason: str) -> None:
    """Ties two axes of equal size position by position.

    Args:
      xs: `[n]` tags.
      ys: `[n]` tags.
      reason: why, for what gets fixed by it.
    """
    for i in np.flatnonzero(xs != ys):
      self._join(int(xs[i]), int(ys[i]), reason)

  def fix(self, tags: Iterable[int], reason: str) -> None:
    """Keeps positions for good; the first reason given is remembered."""
    self._mark(self.fixed, tags, reason)

  def blur(self, tags: Iterable[int], reason: str) -> None:
    """Remembers that removing these positions changes numbers."""
    self._mark(self.inexact, tags, reason)

  def _mark(
    self, marks: dict[int, str], tags: Iterable[int], reason: str
  ) -> None:
    for tag in tags:
      for atom in self.atoms(int(tag)):
        marks.setdefault(atom, reason)

  def _join(self, x: int, y: int, reason: str) -> None:
    if ALWAYS in (x, y):
      self.fix((x, y), reason)
      return
    x, y = self.find(x), self.find(y)
    if x == y:
      return
    a, b = self.atoms(x), self.atoms(y)
    if x not in self._parts and x not in b:
      self._link(x, y)
    elif y not in self._parts and y not in a:
      self._link(y, x)
    else:
      self._join_products(a, b, reason)

  def _join_products(
    self, a: Sequence[int], b: Sequence[int], reason: str
  ) -> None:
    left = [t for t in a if t not in b]
    right = [t for t in b if t not in a]
    if not left or not right:
      # h * e has to equal h: that holds where e is always kept.
      self.fix(left + right, reason)
    elif len(left) == len(right):
      for s, t in zip(left, right, strict=True):
        self._join(s, t, reason)
    else:
      first, *others = left + right
      for other in others:
        self._join(first, other, reason)

  def _link(self, atom: int, to: int) -> None:
    self._parent[atom] = to
    if atom in self.fixed:
      self.fix((to,), self.fixed.pop(atom))
    if atom in self.inexact:
      self.blur((to,), self.inexact.pop(atom))
    kind = self.kind.pop(atom, '')
    if kind and to not in self._parts:
      self.kind.setdefault(to, kind)

  def factor(
    self, tags: np.ndarray, major: int, kind: str | None, reason: str
  ) -> tuple[np.ndarray | str, np.ndarray | str]:
    """Splits an axis `[major * n]` into `[major, n]`, so that it stays a grid.

    Args:
      tags: `[major * n]`, with major and n above 1.
      major: size of the first new axis.
      kind: what the places of the first new axis are, if whole ones may leave
        (their number is not written in the code, or can be changed); None
        where only equally many places within each may leave.
      reason: why the first axis is fixed otherwise.

    Returns:
      The tags of both axes; a reason in place of those of a fixed axis.
    """
    grid = tags.reshape(major, -1)
    sets = [[frozenset(self.free_atoms(t)) for t in row] for row in grid]
    rows = [frozenset.intersection(*row) for row in sets]
    columns = [frozenset.intersection(*c) for c in zip(*sets, strict=True)]
    if all(
      s == r | c
      for row, r in zip(sets, rows, strict=True)
      for s, c in zip(row, columns, strict=True)
    ):
      return self._all_of(rows, reason), self._all_of(columns, reason)
    single = {s for row in sets for s in row if len(s) == 1}
    if kind is not None and len(single) == tags.size:
      whole = self.fresh(major, kind)
      within = self.fresh(grid.shape[1], 'within')
      for h, row in zip(whole, grid, strict=True):
        for e, tag in zip(within, row, strict=True):
          self._join(int(tag), self.product(int(h), int(e)), reason)
      return whole, within
    for row in grid[1:]:
      self.tie(grid[0], row, reason)
    return reason, grid[0]

  def _all_of(
    self, sets: Sequence[Iterable[int]], reason: str
  ) -> np.ndarray | str:
    """One tag for each set of atoms; a reason if all sets are empty."""
    if not any(sets):
      return reason
    made = []
    for atoms in sets:
      tag = ALWAYS
      for atom in sorted(atoms):
        tag = self.product(tag, atom)
      made.append(tag)
    return np.array(made)

  def merge(
    self, axes: list[np.ndarray | None], sizes: list[int]
  ) -> np.ndarray:
    """The tags of several axes made one, `[prod(sizes)]`, first axis major.

    Args:
      axes: tags of each axis; None for one that is fixed.
      sizes: of the axes.
    """
    merged = np.full(1, ALWAYS)
    for axis, size in zip(axes, sizes, strict=True):
      minor = np.full(size, ALWAYS) if axis is None else axis
      if (merged == ALWAYS).all():
        merged = np.tile(minor, merged.size)
      elif axis is None:
        merged = np.repeat(merged, size)
      else:
        merged = np.array(
          [self.product(int(m), int(n)) for m in merged for n in minor]
        )
    return merged

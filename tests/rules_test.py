"""Rules by path: whole matches, the first one wins, no rule goes unused."""

import jax.numpy as jnp
import pytest

from kd_jax import rules

NAMES = ['conv/kernel', 'conv/bias', 'head/kernel', 'head/bias']


def test_paths_name_dicts_sequences_and_bare_leaves():
  tree = {'block': [{'kernel': jnp.ones(1)}, (jnp.ones(1),)]}
  assert rules.leaf_names(tree) == ['block/0/kernel', 'block/1/0']
  assert rules.leaf_names(jnp.ones(1)) == ['']


def test_the_first_rule_that_matches_wins():
  found = rules.match([('head/.*', 1), ('.*/kernel', 2), ('.*', 3)], NAMES)
  assert found == {
    'conv/kernel': 2,
    'conv/bias': 3,
    'head/kernel': 1,
    'head/bias': 1,
  }
  assert rules.first([('head/.*', 1), ('.*', 3)], 'head/bias') == 1


def test_none_leaves_a_path_out_even_if_a_later_rule_matches():
  found = rules.match([('head/.*', None), ('.*/kernel', 8)], NAMES)
  assert found == {'conv/kernel': 8}
  assert rules.first([('head/.*', None), ('.*', 8)], 'head/kernel') is None


def test_a_pattern_must_match_the_whole_path():
  assert rules.first([('kernel', 1)], 'conv/kernel') is None
  with pytest.raises(ValueError, match="weight rule 'conv' matches nothing"):
    rules.match([('conv', 1)], NAMES, kind='weight rule')


def test_a_rule_that_matches_nothing_names_near_misses():
  with pytest.raises(ValueError, match='did you mean head/kernel'):
    rules.match([('heads/kernel', 1), ('.*', 2)], NAMES)
  # That the value is None makes a misspelling no better.
  with pytest.raises(ValueError, match='matches nothing'):
    rules.match([('heads/kernel', None), ('.*', 2)], NAMES)


def test_a_rule_hidden_by_earlier_ones_is_no_error():
  assert rules.match([('.*', 1), ('head/bias', 2)], ['head/bias']) == {
    'head/bias': 1
  }


def test_a_broken_pattern_is_named():
  with pytest.raises(ValueError, match='is no regular expression'):
    rules.match([('*kernel', 1)], NAMES)
  with pytest.raises(ValueError, match='is no regular expression'):
    rules.first([('*kernel', 1)], 'conv/kernel')


def test_no_rules_choose_nothing():
  assert rules.match([], NAMES) == {}


def test_unknown_choices_name_the_valid_ones():
  with pytest.raises(ValueError, match=r"Unknown thing 'adan': .*mean adam\?"):
    rules.choose('thing', 'adan', {'adam': 1, 'sgd': 2})
  with pytest.raises(ValueError, match='valid: adam, sgd'):
    rules.choose('thing', 'zzz', {'adam': 1, 'sgd': 2})
  with pytest.raises(ValueError, match='there are none'):
    rules.choose('thing', 'zzz', {})


def test_a_dozen_choices_are_all_named_in_their_order():
  stages = ('teacher', 'alone', 'distill', 'compress', 'convert', 'export')
  assert rules.near_misses('zzz', stages) == f'valid: {", ".join(stages)}'
  many = [f'layer{i}' for i in range(12, 0, -1)]
  assert rules.near_misses('zzz', many) == f'valid: {", ".join(many)}'
  assert rules.near_misses('zzz', ['layer13', *many]) == (
    f'valid: layer13, {", ".join(many[:-1])}, ...'
  )

"""Settings: strict, single-sourced, each with its meaning and range."""

import dataclasses

import pytest
import yaml

from feedforward_recon.config.schema import (
    MapperConfig,
    as_yaml,
    from_dict,
    to_dict,
)
from feedforward_recon.errors import ConfigError


def leaves(config, where=''):
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f'{where}{spec.name}.')
        else:
            yield f'{where}{spec.name}', spec, value


def nested(name, value):
    for key in reversed(name.split('.')):
        value = {key: value}
    return value


def test_dictionary_round_trip():
    assert from_dict(MapperConfig, to_dict(MapperConfig())) == MapperConfig()
    assert from_dict(MapperConfig, {}) == MapperConfig()


def test_yaml_round_trip_of_every_setting():
    assert from_dict(MapperConfig, yaml.safe_load(as_yaml(MapperConfig()))) == MapperConfig()


def test_every_setting_is_documented_and_its_default_is_allowed():
    for name, spec, _ in leaves(MapperConfig()):
        assert spec.metadata.get('doc'), f'{name} says nothing'
    from_dict(MapperConfig, to_dict(MapperConfig()))


@pytest.mark.parametrize(('name', 'spec', 'value'), list(leaves(MapperConfig())),
                         ids=[name for name, *_ in leaves(MapperConfig())])
def test_values_outside_their_range_are_refused(name, spec, value):
    for limit, step in ((spec.metadata['low'], -1), (spec.metadata['high'], 1)):
        if limit is not None:
            edge = type(value)(limit)
            assert from_dict(MapperConfig, nested(name, edge))
            with pytest.raises(ConfigError, match=f'expected {name} within'):
                from_dict(MapperConfig, nested(name, edge + step))


@pytest.mark.parametrize(('values', 'message'), [
    ({'memory': {'slot': 3}}, 'did you mean memory.slots'),
    ({'zzz': 1}, 'unknown setting zzz; known: '),
    ({'memory': {'slots': '3'}}, "expected int for memory.slots, found '3'"),
    ({'memory': {'slots': 3.5}}, 'expected int for memory.slots, found 3.5'),
    ({'memory': {'slots': True}}, 'expected int for memory.slots, found True'),
    ({'memory': 3}, 'expected a group of settings at memory, found 3'),
    ({'tracking': {'outlier_px': float('nan')}}, 'finite number for tracking.outlier_px'),
])
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(MapperConfig, values)


def test_whole_numbers_are_accepted_where_a_real_number_is_expected():
    outlier_px = from_dict(MapperConfig, {'tracking': {'outlier_px': 4}}).tracking.outlier_px
    assert isinstance(outlier_px, float)
    assert outlier_px == 4.0

"""Imports without the garbage collector, and that it is back afterwards."""

import gc
import subprocess
import sys

import pytest

from euphonium.generators.libraries import uncollected
from tests.checkout import environment


def test_the_collector_is_as_before_afterwards() -> None:
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_nothing_is_collected_while_networks_are_imported() -> None:
    code = (
        "import gc, sys; from euphonium.generators.libraries import import_networks; "
        "passes = []; gc.collect(); gc.callbacks.append(lambda phase, _: passes.append(phase)); "
        "import_networks(); "
        "print(len(passes), gc.isenabled(), 'diffusers.models.transformers.transformer_wan' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    told, enabled, imported = result.stdout.split()
    assert (enabled, imported) == ("True", "True")
    # Begin and end of a pass over all that is new, as soon as the collector is on again; it were hundreds otherwise.
    assert int(told) <= 2 * gc.get_threshold()[2]

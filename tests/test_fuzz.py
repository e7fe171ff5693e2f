"""Readers of foreign files, given damaged ones: read, or UserError in one line. benchmarks/fuzz.py tries thousands."""

import pytest
from fuzz import readers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowtilt.errors import UserError

READERS = readers()


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_are_read_or_refused_in_one_line(name, data, tmp_path_factory):
    payload = data.draw(READERS[name].inputs())
    folder = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    folder.mkdir(exist_ok=True)
    try:
        READERS[name].read(payload, folder)
    except UserError as error:
        assert "\n" not in str(error)

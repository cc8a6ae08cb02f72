"""Signals to ranks and launchers: a sample of `make test-faults`, a case of each kind."""

from pathlib import Path

import pytest

from tests.scripts.faults import SAMPLE, Case, inject


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_all_end_and_leave_the_terminal_as_it_was(
    roomy_folder: Path, tmp_path: Path, case: Case
) -> None:
    fork = case.phase != "import"  # what is forked has imported everything
    assert inject(case, roomy_folder, tmp_path, fork=fork) == []

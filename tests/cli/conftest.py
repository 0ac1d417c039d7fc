"""The command line as a process would call it, without one."""

from collections.abc import Callable

import pytest

from hf_kd_ranking.cli import main


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[[str], tuple[int, str, str]]:
    """call("verb --option value"): exit status, standard output, standard error."""

    def run(command: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["hf-kd-ranking", *command.split()])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run
